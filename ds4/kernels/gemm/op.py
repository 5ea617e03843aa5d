"""``gemm``: a prompt's activations times up to 8 matrices that share them, the prefill form of the operations of proj.

Its inputs are x, count, out and what :func:`ds4.kernels.proj.op.segment_inputs` makes of the matrices, its outputs y0,
y1, ... of the matrices, in order. An input pick, which may be left out or None, overrides the tile, for tests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds4.kernels.cases import Inputs, Outputs
from ds4.kernels.entry import ArgPack, Constants, Entry, KernelCall, constant_set
from ds4.kernels.gemm.cases import LAUNCHES, Launch, cases
from ds4.kernels.gemm.plan import gemm_pick, n_blocks, threads
from ds4.kernels.picks import Pick, shared_bytes
from ds4.kernels.proj.cases import Segments
from ds4.kernels.proj.op import MOST, ProjWeights, segment_inputs, weights_of
from ds4.kernels.registry import Operation, register, run

OUTS = {"f32": torch.float32, "bf16": torch.bfloat16}
_OF_MATRIX = (("w", "u8*"), ("s", "u8*"), ("y", "u8*"))
_ENTRY = Entry(
    "gemm",
    "gemm/gemm.cu",
    (
        *(("x", "bf16*"), ("count", "i32*")),
        *((f"{name}{i}", kind) for i in range(MOST) for name, kind in _OF_MATRIX),
        ("n_rows", "i32"),
    ),
    ("FORMATS", "GROUPS", "K", "OUT", "ROWS", "STAGES", "TOKENS"),
)


def gemm(x: Tensor, weights: ProjWeights, out: Sequence[str], count: Tensor | None = None) -> list[Tensor]:
    """Activations of many tokens times each of the matrices.

    y_i[t, r] = sum over k of W_i[r, k] x[t, k];  with groups: of W[r, k] x[t, r / (rows / groups), k]

    x        bf16 [n_rows, k], or [n_rows, groups, k] and one matrix, whose rows are those of group 0, 1, ...
    weights  see :func:`ds4.kernels.proj.op.segment_inputs`; on the device of x
    out      "f32" or "bf16" for each matrix; bf16 is the FP32 sum rounded to nearest, ties to even
    count    i32 [1]: rows from it on carry no token, and what they give is unspecified; None: all carry one
    returns  y_i [n_rows, rows of W_i] of the type in ``out``
    Order:   row t depends on x[t] and the weights only, bit for bit: not on n_rows, count, t, or the other matrices.
    Error:   within k roundings of FP32; weights are decoded as ``Planes.decode`` does. On a GPU the NaN codes of
             fp8_block, 0x7f and 0xff, count 480; gemm_tiles.cuh says what infinities give.
    Limits:  on a GPU k a multiple of 32, planes without gaps between rows. Raises ValueError.
    Source:  spec model.md 2.3, 2.6, 2.7; design.md ("Two forms").
    """
    results = run(GEMM, {"x": x, "count": count, "out": tuple(out), **segment_inputs(weights)})
    return [results[f"y{i}"] for i in range(len(weights))]


def _check(inputs: Inputs) -> int:
    """The groups of a call. Raises ValueError for what no kernel takes."""
    x, count, out, n_matrices = inputs["x"], inputs["count"], inputs["out"], len(inputs["formats"])
    if x.dtype != torch.bfloat16 or x.dim() not in (2, 3) or x.shape[0] < 1 or x.shape[-1] % 32:
        form = "bf16 [n_rows, k] or [n_rows, groups, k] with k a multiple of 32 is needed"
        raise ValueError(f"gemm: x is {x.dtype} {list(x.shape)}: {form}")
    if len(out) != n_matrices or set(out) - set(OUTS):
        raise ValueError(f"gemm: out is {out}: one of {', '.join(OUTS)} for each of {n_matrices} matrices is needed")
    if count is not None and (count.dtype != torch.int32 or count.shape != (1,)):
        raise ValueError(f"gemm: count is {count.dtype} {list(count.shape)}, not torch.int32 [1]")
    groups = x.shape[1] if x.dim() == 3 else 1
    if groups > 1 and (n_matrices > 1 or inputs["w0"].shape[0] % groups):
        raise ValueError(f"gemm: {groups} groups of one matrix's rows are needed")
    return groups


def _reference(inputs: Inputs) -> Outputs:
    x, results = inputs["x"].float(), {}
    groups = _check(inputs)
    for i, (planes, out) in enumerate(zip(weights_of(inputs), inputs["out"], strict=True)):
        w = planes.decode().unflatten(0, (groups, -1))
        y = torch.einsum("ngk,gmk->ngm", x.unflatten(-1, (-1, x.shape[-1])).view(x.shape[0], groups, -1), w).flatten(1)
        if inputs["count"] is not None:
            y[int(inputs["count"]) :] = torch.nan  # unspecified
        results[f"y{i}"] = y.to(OUTS[out])
    return results


def _outputs(inputs: Inputs) -> Outputs:
    x, shapes = inputs["x"], [inputs[f"w{i}"].shape[0] for i in range(len(inputs["formats"]))]
    return {
        f"y{i}": torch.empty(x.shape[0], n, dtype=OUTS[out], device=x.device)
        for i, (n, out) in enumerate(zip(shapes, inputs["out"], strict=False))  # lengths: _check
    }


def _calls(inputs: Inputs, outputs: Outputs) -> list[KernelCall]:
    groups, x = _check(inputs), inputs["x"]
    segments = tuple((planes.packing.format, planes.n_rows) for planes in weights_of(inputs))
    n_rows, k = x.shape[0], x.shape[-1]
    pick = inputs.get("pick") or gemm_pick(segments, groups, k, n_rows, x.device)
    values: dict[str, Tensor | int | float | None] = {"x": x, "count": inputs["count"], "n_rows": n_rows}
    for i in range(MOST):
        tensors = {"w": inputs.get(f"w{i}"), "s": inputs.get(f"s{i}"), "y": outputs.get(f"y{i}")}
        values |= {f"{name}{i}": None if t is None else t.view(torch.uint8) for name, t in tensors.items()}
    grid = (n_blocks(segments, groups, n_rows, pick.tokens), 1, 1)
    shared = shared_bytes(pick, inputs["formats"])
    constants = _constants(segments, inputs["out"], groups, k, pick)
    args = ArgPack(_ENTRY, values)
    return [KernelCall(_ENTRY, constants, grid, (threads(pick.tokens), 1, 1), shared, args, pdl=True)]


def _constants(segments: Segments, out: Sequence[str], groups: int, k: int, pick: Pick) -> Constants:
    """The kernel's constants for matrices (format, rows) with these results."""
    formats, rows = (",".join(str(segment[i]) for segment in segments) for i in (0, 1))
    sizes = {"GROUPS": groups, "K": k, "TOKENS": pick.tokens, "STAGES": pick.stages}
    return constant_set(FORMATS=formats, ROWS=rows, OUT=",".join(out), **sizes)


def _variant(one: Launch, n_rows: int) -> tuple[Entry, Constants]:
    """As launched for up to ``n_rows`` tokens where no file of picks says otherwise."""
    pick = gemm_pick(one.segments, one.groups, one.k, n_rows, torch.device("cpu"))
    return _ENTRY, _constants(one.segments, one.out, one.groups, one.k, pick)


GEMM = register(
    Operation(
        name="gemm",
        reference=_reference,
        outputs=_outputs,
        calls=_calls,
        entries=(_ENTRY,),
        cases=cases,
        variants=(
            *(_variant(one, 4096) for one in LAUNCHES),
            *(_variant(one, 8) for one in LAUNCHES if one.title in ("proj_in native CSA", "proj_in GGUF CSA")),
        ),
        token_inputs={"x": 0},
        token_outputs={f"y{i}": 0 for i in range(5)},  # as many as a case has
        decode=False,
    )
)
