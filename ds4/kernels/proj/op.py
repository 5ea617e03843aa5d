"""``proj_in``, ``proj_q``, ``proj_oa``, ``proj_ob``: the attention's projections of up to 8 tokens; one kernel for all.

Their inputs are x and what :func:`segment_inputs` makes of the matrices, their outputs y0, y1, ... of the matrices, in
order. An input blocks, which may be left out, overrides the number of blocks, for tests and measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ds4.kernels.cases import Inputs, Outputs
from ds4.kernels.entry import ArgPack, Constants, Entry, KernelCall, constant_set
from ds4.kernels.numerics import Numerics
from ds4.kernels.packing import PACKINGS, Planes
from ds4.kernels.proj import ref
from ds4.kernels.proj.cases import RECIPES, Segments, cases
from ds4.kernels.proj.plan import THREADS, n_blocks, rows_plan
from ds4.kernels.registry import Operation, register, run

ProjWeights = Sequence[Planes]

FORMATS = ("f32", "f16", "bf16", "q8_0", "fp8_block")
MOST = 8  # matrices of a launch
_OF_MATRIX = (("w", "u8*"), ("s", "u8*"), ("y", "f32*"))
_ENTRY = Entry(
    "proj",
    "proj/proj.cu",
    (("x", "f32*"), *((f"{name}{i}", kind) for i in range(MOST) for name, kind in _OF_MATRIX)),
    ("FORMATS", "GROUPS", "K", "N_TOK", "ROWS"),
)


def segment_inputs(weights: ProjWeights) -> Inputs:
    """Matrices that share their input, as the operations take them.

    weights  1 to 8 of f32 | f16 | bf16 | q8_0 | fp8_block, with equally long rows
    returns  formats, a tuple of names; for matrix i its first plane as w<i>, its plane of scales or None as s<i>
    Error:   ValueError for another number of matrices, rows of unequal lengths, or a format without a kernel
    """
    if not 1 <= len(weights) <= MOST:
        raise ValueError(f"proj: {len(weights)} matrices; a launch takes 1 to {MOST}")
    if len({planes.n_cols for planes in weights}) > 1:
        raise ValueError(f"proj: the matrices have rows of {', '.join(str(planes.n_cols) for planes in weights)}")
    inputs: Inputs = {"formats": tuple(planes.packing.format for planes in weights)}
    _check_formats(inputs["formats"])
    for i, planes in enumerate(weights):
        tensors = [planes.tensors[plane.name] for plane in planes.packing.planes]
        inputs |= {f"w{i}": tensors[0], f"s{i}": tensors[1] if len(tensors) > 1 else None}
    return inputs


def project(operation: Operation, x: Tensor, weights: ProjWeights) -> list[Tensor]:
    """Activations times each of the matrices.

    y_i[t, r] = sum over k of W_i[r, k] x[t, k];  proj_oa: of W[r, k] x[t, r / (rows / groups), k]

    operation  PROJ_IN, PROJ_Q, PROJ_OA or PROJ_OB; they differ in their cases, and the third in its x
    x          f32 [n_tok, k]; PROJ_OA: f32 [n_tok, groups, k] and one matrix, whose rows are those of group 0, 1, ...
    weights    see :func:`segment_inputs`; on the device of x
    returns    y_i f32 [n_tok, rows of W_i]
    Order:     row t does not depend on n_tok nor on the other matrices, bit for bit.
    Error:     within k roundings of FP32; weights are decoded as ``Planes.decode`` does, activations not rounded. On a
               GPU the NaN codes of fp8_block, 0x7f and 0xff, count 480; mma_rows.cuh says what infinities give.
    Limits:    on a GPU n_tok 1 to 8, k a multiple of 32, planes without gaps between rows. Raises ValueError.
    Source:    spec model.md 2.3, 2.6.
    """
    results = run(operation, {"x": x, **segment_inputs(weights)})
    return [results[f"y{i}"] for i in range(len(weights))]


def _check_formats(formats: tuple[str, ...]) -> None:
    for name in formats:
        if name not in FORMATS:
            raise ValueError(f"proj: no kernel for {name}; there are: {', '.join(FORMATS)}")


def weights_of(inputs: Inputs) -> list[Planes]:
    """The matrices among the inputs. Raises ValueError for a format without a kernel or planes that do not fit x."""
    x, formats = inputs["x"], inputs["formats"]
    _check_formats(formats)
    k = x.shape[-1]
    weights = []
    for i, name in enumerate(formats):
        packing, n_rows = PACKINGS[name], inputs[f"w{i}"].shape[0]
        tensors = {plane.name: inputs[key] for plane, key in zip(packing.planes, (f"w{i}", f"s{i}"), strict=False)}
        for plane in packing.planes:
            want, given = (plane.n_rows(n_rows), plane.row_bytes(k) // plane.dtype.itemsize), tensors[plane.name]
            if given is None or given.shape != want or given.dtype != plane.dtype:
                what = "missing" if given is None else f"{given.dtype} {list(given.shape)}"
                raise ValueError(f"proj: matrix {i}, {name}: {plane.name} is {what}, not {plane.dtype} {list(want)}")
        weights.append(Planes(packing, n_rows, k, tensors))
    return weights


def _reference(inputs: Inputs, grouped: bool) -> Outputs:
    x, weights = inputs["x"], weights_of(inputs)
    rows = tuple(range(x.shape[0]))
    if grouped:
        return {"y0": ref.proj_grouped(x, weights[0].decode(), Numerics(), rows)}
    return {f"y{i}": ref.proj(x, planes.decode(), Numerics(), rows) for i, planes in enumerate(weights)}


def _outputs(inputs: Inputs) -> Outputs:
    x = inputs["x"]
    rows = [inputs[f"w{i}"].shape[0] for i in range(len(inputs["formats"]))]
    return {f"y{i}": torch.empty(x.shape[0], n, device=x.device) for i, n in enumerate(rows)}


def _calls(inputs: Inputs, outputs: Outputs, name: str, grouped: bool) -> list[KernelCall]:
    x = inputs["x"]
    if x.dim() != (3 if grouped else 2) or not 1 <= x.shape[0] <= 8 or x.shape[-1] % 32:
        form = "[n_tok, groups, k]" if grouped else "[n_tok, k]"
        raise ValueError(f"{name}: x {list(x.shape)}: {form} with n_tok 1 to 8 and k a multiple of 32 is needed")
    weights, groups = weights_of(inputs), x.shape[1] if grouped else 1
    rows = [planes.n_rows for planes in weights]
    if grouped and (len(rows) > 1 or rows[0] % groups):
        raise ValueError(f"{name}: {groups} groups of one matrix's rows are needed, the matrices have {rows}")
    values: dict[str, Tensor | int | float | None] = {"x": x}
    for i in range(MOST):
        planes = [inputs.get(f"{p}{i}") for p in "ws"]
        w, s = (None if plane is None else plane.view(torch.uint8) for plane in planes)
        values |= {f"w{i}": w, f"s{i}": s, f"y{i}": outputs.get(f"y{i}")}
    constants = _constants(x.shape[0], x.shape[-1], groups, tuple(zip(inputs["formats"], rows, strict=True)))
    plan = rows_plan(x.shape[-1], x.shape[0])
    n_units = sum(groups * -(-n // groups // plan.unit_rows) for n in rows)
    grid = (inputs.get("blocks") or n_blocks(plan, n_units, x.device), 1, 1)
    return [KernelCall(_ENTRY, constants, grid, (THREADS, 1, 1), plan.shared_bytes, ArgPack(_ENTRY, values), pdl=True)]


def _constants(n_tok: int, k: int, groups: int, segments: Segments) -> Constants:
    formats, rows = (",".join(str(segment[i]) for segment in segments) for i in (0, 1))
    return constant_set(FORMATS=formats, GROUPS=groups, K=k, N_TOK=n_tok, ROWS=rows)


def _variants(name: str) -> tuple[tuple[Entry, Constants], ...]:
    """As launched at the dimensions of DeepSeek-V4-Flash."""
    return tuple(
        (_ENTRY, _constants(n, recipe.k, recipe.groups, recipe.segments))
        for recipe in RECIPES[name]
        for n in recipe.n_tok
    )


def _operation(name: str, most: int) -> Operation:
    """``most``: matrices of a launch in the network, whose results the checks of single tokens look at."""
    grouped = name == "proj_oa"
    return register(
        Operation(
            name=name,
            reference=partial(_reference, grouped=grouped),
            outputs=_outputs,
            calls=partial(_calls, name=name, grouped=grouped),
            entries=(_ENTRY,),
            cases=partial(cases, name),
            variants=_variants(name),
            token_inputs={"x": 0},
            token_outputs={f"y{i}": 0 for i in range(most)},
        )
    )


PROJ_IN = _operation("proj_in", 7)
PROJ_Q = _operation("proj_q", 2)
PROJ_OA = _operation("proj_oa", 1)
PROJ_OB = _operation("proj_ob", 1)
