"""``mhc_boundary``: everything between two sublayers, with its kernels; one operation for each form of activations."""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ds4.kernels.cases import Inputs, Outputs
from ds4.kernels.entry import ArgPack, Entry, KernelCall, constant_set
from ds4.kernels.mhc import ref
from ds4.kernels.mhc.act import BLOCK, SUM_BLOCK, quantize_int8
from ds4.kernels.mhc.cases import boundary_cases
from ds4.kernels.numerics import Numerics
from ds4.kernels.proj.ref import Rows
from ds4.kernels.registry import Operation, register, run
from ds4.weights.formats.block_scale import quantize_e4m3

Act = Literal["none", "bf16", "fp8", "int8"]
N_STREAMS = 4
N_MIX = (2 + N_STREAMS) * N_STREAMS
N_GRAM = 10
FP8_BLOCK = 128
FN_TYPES = {torch.float32: "f32", torch.float16: "f16"}
CONSTANTS = ("HIDDEN", "N_TOK")
_FILE = "mhc/boundary.cu"
_RESOLVE = (("y", "f32*"), ("post", "f32*"), ("comb", "f32*"), ("streams", "f32*"))
_PARTIALS = {
    kind: Entry(
        f"mhc_partials_{kind}",
        _FILE,
        (*_RESOLVE, ("fn", f"{kind}*"), ("partials", "f32*"), ("count", "i32*")),
        CONSTANTS,
    )
    for kind in FN_TYPES.values()
}
_READ = tuple((name, "f32*") for name in ("streams", "partials", "scale", "base", "norm"))
_MADE = tuple((name, "f32*") for name in ("x", "post", "comb"))
_NUMBERS = (("iters", "i32"), ("hc_eps", "f32"), ("norm_eps", "f32"))
# What each form of activations adds to the results: name, pointer type, dtype, columns that share an element.
_ACTS: dict[Act, tuple[tuple[str, str, torch.dtype, int], ...]] = {
    "none": (),
    "bf16": (("rounded", "bf16*", torch.bfloat16, 1),),
    "fp8": (("codes", "u8*", torch.float8_e4m3fn, 1), ("exponents", "u8*", torch.uint8, FP8_BLOCK)),
    "int8": (
        ("codes", "i8*", torch.int8, 1),
        ("scales", "f32*", torch.float32, BLOCK),
        ("sums", "i32*", torch.int32, SUM_BLOCK),
    ),
}
_COUNT: dict[Act, tuple[tuple[str, str], ...]] = {"bf16": (("count", "i32*"),)}  # of a prompt's tokens
_FINALISE = {
    act: Entry(
        "mhc_finalise" if act == "none" else f"mhc_finalise_{act}",
        _FILE,
        (*_READ, *_MADE, *((name, kind) for name, kind, _, _ in added), *_COUNT.get(act, ()), *_NUMBERS),
        CONSTANTS,
    )
    for act, added in _ACTS.items()
}


class Boundary(NamedTuple):
    """Results of :func:`mhc_boundary`; ``act`` holds the quantised ``x``, empty without quantisation."""

    streams: Tensor
    x: Tensor
    post: Tensor
    comb: Tensor
    act: tuple[Tensor, ...]


def mhc_boundary(
    y: Tensor | None,
    streams: Tensor,
    post: Tensor | None,
    comb: Tensor | None,
    *,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm: Tensor,
    sinkhorn_iters: int,
    hc_eps: float,
    norm_eps: float,
    act: Act = "none",
    numerics: Numerics | None = None,
    rows: Rows = None,
) -> Boundary:
    """Finish the previous sublayer, mix the streams, collapse and norm them for the next one.

    streams[k] = post[k] y + sum_j comb[j, k] streams[j];  mix = (streams fn^T) rsqrt(mean(streams^2) + norm_eps)
    pre, post, comb = sigmoid, 2 sigmoid, Sinkhorn of mix * scale + base;  x = rms_norm(sum_n pre[n] streams[n])

    y        f32 [n_tok, d] or None        output of the previous sublayer; None where nothing is pending
    streams  f32 [n_tok, 4, d]             UPDATED IN PLACE
    post     f32 [n_tok, 4] or None, comb f32 [n_tok, 4, 4] or None   of the previous sublayer, with y
    fn       f32 | f16 [24, 4 d], scale f32 [3], base f32 [24], norm f32 [d]
    count    i32 [1] or None, of the operations alone: tokens there are; rows from it on are unspecified
    act      "bf16": act = (rounded bf16 [n_tok, d],);
             "fp8": act = (codes float8_e4m3fn [n_tok, d], exponents u8 e8m0 [n_tok, d / 128]), official rounding;
             "int8": act = (codes i8 [n_tok, d], scales f32 [n_tok, d / 32], sums i32 [n_tok, d / 16]), see mhc/act.py
    numerics, rows  CPU only: rounding points of the official code, and the rows of a decode launch that carry tokens
    returns  streams (the input), x f32 [n_tok, d], the next sublayer's post and comb, act
    Order:   row t does not depend on n_tok, bit for bit.
    Error:   FP32 sums in another order than the reference's; see mhc/cases.py. act follows from x exactly.
    Limits:  on a GPU d is a multiple of 32, of 128 with fp8. Raises ValueError for shapes that do not go together.
    Source:  spec model.md 2.2, 2.1, 5.1.
    """
    inputs: Inputs = {"y": y, "prev_post": post, "prev_comb": comb, "streams": streams, "fn": fn, "scale": scale}
    inputs |= {"base": base, "norm": norm, "sinkhorn_iters": sinkhorn_iters, "hc_eps": hc_eps, "norm_eps": norm_eps}
    if streams.device.type == "cpu":
        results = _reference(inputs, act, numerics or Numerics(), rows)
        streams.copy_(results["streams"])
    elif numerics is not None and numerics.bf16:
        raise ValueError("mhc_boundary: the official code's bf16 rounding points exist on the CPU only")
    else:
        results = run(OPERATIONS[act], inputs)
    added = tuple(results[name] for name, *_ in _ACTS[act])
    return Boundary(streams, results["x"], results["post"], results["comb"], added)


def quantized(x: Tensor, act: Act) -> dict[str, Tensor]:
    """x f32 [n_tok, d] in a form of activations, the tensors by name: the definition of what the kernels add."""
    made: tuple[Tensor, ...] = ()
    if act == "bf16":
        made = (x.to(torch.bfloat16),)
    elif act != "none":
        made = quantize_e4m3(x, FP8_BLOCK) if act == "fp8" else quantize_int8(x)
    return {name: value for (name, *_), value in zip(_ACTS[act], made, strict=True)}


def _reference(inputs: Inputs, act: Act, numerics: Numerics, rows: Rows = None) -> Outputs:
    streams, x, post, comb = ref.mhc_boundary(
        inputs["y"],
        inputs["streams"],
        inputs["prev_post"],
        inputs["prev_comb"],
        fn=inputs["fn"].float(),
        numerics=numerics,
        rows=rows,
        **{name: inputs[name] for name in ("scale", "base", "norm", "sinkhorn_iters", "hc_eps", "norm_eps")},
    )
    results = {"streams": streams, "x": x, "post": post, "comb": comb, **quantized(x, act)}
    if inputs.get("count") is not None:
        for result in results.values():
            result[int(inputs["count"]) :] = torch.nan  # unspecified
    return results


def partials_workspace(streams: Tensor, n_rows: int) -> Tensor:
    """f32 [n_tok, n_rows + 10, stride], new: what the first kernel hands to the second, with ``n_rows`` rows of fn."""
    n_tok, _, d = streams.shape
    return torch.empty(n_tok, n_rows + N_GRAM, -(-d // (4 * 32)) * 4, device=streams.device)


def _outputs(inputs: Inputs, act: Act) -> Outputs:
    streams = inputs["streams"]
    (n_tok, m, d), device = streams.shape, streams.device
    return {
        "x": torch.empty(n_tok, d, device=device),
        "post": torch.empty(n_tok, m, device=device),
        "comb": torch.empty(n_tok, m, m, device=device),
        **{name: torch.empty(n_tok, d // block, dtype=dtype, device=device) for name, _, dtype, block in _ACTS[act]},
        "partials": partials_workspace(streams, N_MIX),
    }


def check_shapes(name: str, inputs: Inputs, n_rows: int, n_scales: int) -> tuple[int, int]:
    """(n_tok, d) of a call whose fn has ``n_rows`` rows. Raises ValueError naming the tensor that does not fit."""
    n_tok, m, d = inputs["streams"].shape
    want = {
        "streams": (n_tok, N_STREAMS, d),
        "fn": (n_rows, N_STREAMS * d),
        "scale": (n_scales,),
        "base": (n_rows,),
        "norm": (d,),
    }
    pending = {"y": (n_tok, d), "prev_post": (n_tok, m), "prev_comb": (n_tok, m, m)}
    given = [key for key in pending if inputs[key] is not None]
    if given and len(given) < len(pending):
        raise ValueError(f"{name}: of y, prev_post and prev_comb only {', '.join(given)} given")
    for key, shape in (want | (pending if given else {})).items():
        if inputs[key].shape != shape:
            raise ValueError(f"{name}: {key} has shape {list(inputs[key].shape)} instead of {list(shape)}")
    if d % 32 or inputs["fn"].dtype not in FN_TYPES:
        raise ValueError(f"{name}: d = {d} is no multiple of 32, or fn of type {inputs['fn'].dtype} not F32 or F16")
    return n_tok, d


def pending_of(inputs: Inputs) -> dict[str, Tensor | None]:
    """What is pending, under the kernels' names."""
    return {"y": inputs["y"], "post": inputs["prev_post"], "comb": inputs["prev_comb"], "streams": inputs["streams"]}


def partials_grid(n_tok: int, d: int) -> tuple[int, int, int]:
    """Grid of the kernels built on streams.cuh."""
    return (d // 32, -(-n_tok // 8), 1)


def _calls(inputs: Inputs, outputs: Outputs, act: Act) -> list[KernelCall]:
    n_tok, d = check_shapes("mhc_boundary", inputs, N_MIX, 3)
    if act == "fp8" and d % FP8_BLOCK:
        raise ValueError(f"mhc_boundary: d = {d} is no multiple of 128, the block of fp8 activations")
    constants = constant_set(HIDDEN=d, N_TOK=n_tok if n_tok % 8 else 8)
    first, second = _PARTIALS[FN_TYPES[inputs["fn"].dtype]], _FINALISE[act]
    count = {"count": inputs.get("count")}
    mix = ArgPack(first, pending_of(inputs) | {"fn": inputs["fn"], "partials": outputs["partials"], **count})
    values = {name: inputs[name] for name in ("streams", "scale", "base", "norm", "hc_eps", "norm_eps")}
    values |= count if act in _COUNT else {}
    finish = ArgPack(second, values | outputs | {"iters": inputs["sinkhorn_iters"]})
    return [
        KernelCall(first, constants, partials_grid(n_tok, d), (256, 1, 1), 0, mix, pdl=True),
        KernelCall(second, constants, (1 + -(-d // 512), n_tok, 1), (128, 1, 1), 0, finish, pdl=True),
    ]


def _operation(act: Act) -> Operation:
    name = "mhc_boundary" if act == "none" else f"mhc_boundary_{act}"
    results = ("streams", "x", "post", "comb", *(name for name, *_ in _ACTS[act]))
    entries = (*_PARTIALS.values(), _FINALISE[act])
    return Operation(
        name=name,
        reference=partial(_reference, act=act, numerics=Numerics()),
        outputs=partial(_outputs, act=act),
        calls=partial(_calls, act=act),
        entries=entries,
        cases=partial(boundary_cases, act),
        variants=tuple((entry, constant_set(HIDDEN=4096, N_TOK=n_tok)) for entry in entries for n_tok in (1, 2, 8)),
        mutates=("streams",),
        workspaces=("partials",),
        token_inputs=dict.fromkeys(("y", "prev_post", "prev_comb", "streams"), 0),
        token_outputs=dict.fromkeys(results, 0),
    )


OPERATIONS: dict[Act, Operation] = {act: register(_operation(act)) for act in _ACTS}
