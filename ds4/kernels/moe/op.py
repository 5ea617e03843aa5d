"""``moe_up`` and ``moe_down``: the experts of a decode step, routed and shared; public functions and kernels.
The prefill form's operations are registered from here."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from ds4.kernels.cases import Inputs, Outputs
from ds4.kernels.entry import ArgPack, Constants, Entry, KernelCall, constant_set
from ds4.kernels.moe.cases import down_cases, up_cases
from ds4.kernels.moe.matrices import (
    FORMATS,
    N_PLANES,
    constant_of,
    decoded,
    format_constants,
    formats_of,
    matrix_inputs,
    n_rows_of,
    pattern_argument,
    plane_arguments,
)
from ds4.kernels.moe.prefill_op import MOE_COMBINE, MOE_DOWN_GEMM, MOE_GROUP, MOE_UP_GEMM
from ds4.kernels.moe.ref import swiglu
from ds4.kernels.moe.tiles import block_rows, shared_bytes, threads
from ds4.kernels.packing import Planes
from ds4.kernels.registry import Operation, register, run

__all__ = [
    "FORMATS",
    "MOE_COMBINE",
    "MOE_DOWN",
    "MOE_DOWN_GEMM",
    "MOE_GROUP",
    "MOE_UP",
    "MOE_UP_GEMM",
    "moe_down",
    "moe_up",
]

_UP, _DOWN = ("w1", "w3", "sw1", "sw3"), ("w2", "sw2")
_SIZES = ("HIDDEN", "INTER", "TOP_K", "N_TOK", "SHARED_BYTES")


def _plane_params(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple((f"{name}_{i}", "u8*") for name in names for i in range(N_PLANES))


_UP_ENTRY = Entry(
    "moe_up",
    "moe/moe_up.cu",
    (
        *(("x", "f32*"), ("ids", "i32*"), ("weights", "f32*")),
        *_plane_params(_UP),
        *(("w1_scale", "f32*"), ("w3_scale", "f32*"), ("patterns", "u64*"), ("mid", "f32*")),
        *(("sw1_scale", "f32"), ("sw3_scale", "f32"), ("limit", "f32")),
    ),
    (*_SIZES, *map(constant_of, _UP)),
)
_DOWN_ENTRY = Entry(
    "moe_down",
    "moe/moe_down.cu",
    (
        *(("mid", "f32*"), ("ids", "i32*")),
        *_plane_params(_DOWN),
        *(("w2_scale", "f32*"), ("patterns", "u64*"), ("y", "f32*"), ("parts", "f32*"), ("counter", "u32*")),
        ("sw2_scale", "f32"),
    ),
    (*_SIZES, *map(constant_of, _DOWN)),
)


def moe_up(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    *,
    w1: Planes,
    w3: Planes,
    sw1: Planes,
    sw3: Planes,
    limit: float,
    w1_scale: Tensor | None = None,
    w3_scale: Tensor | None = None,
    sw1_scale: float = 1.0,
    sw3_scale: float = 1.0,
) -> Tensor:
    """The inputs of w2: gate and up projections, SwiGLU and routing weight of every (token, slot).

    mid[t, s] = silu(min(gate, limit)) * clamp(up, -limit, limit) * weight
    gate = w1_scale[e] w1[e] x[t], up = w3_scale[e] w3[e] x[t], e = ids[t, s]; the last slot: shared expert, weight 1

    x        f32 [n_tok, d];  ids i32 [n_tok, top_k], weights f32 [n_tok, top_k] as ``route`` gives them
    w1, w3   [n_experts * inter, d]: the experts' gate and up matrices one below the other; sw1, sw3 [inter, d], shared.
             Each of one of FORMATS
    w1_scale, w3_scale   f32 [n_experts] or None, multipliers of decoded values; applied to the sum, which is one
             rounding more than none. sw1_scale, sw3_scale likewise
    returns  f32 [n_tok, top_k + 1, inter]
    Order:   row t does not depend on n_tok or on who shares its experts, bit for bit; it is that of mma_rows.cuh.
    Error:   relative RMS below 1e-5 of the reference; a NaN stays one.
    Limits:  on a GPU n_tok 1 to 8, ids within the experts; d a multiple of 32, inter of 16, of 128 where w1
             or w3 is fp8_block.
    Source:  spec model.md 2.7.
    """
    inputs: Inputs = {"x": x, "ids": ids, "weights": weights, "limit": limit}
    for name, planes in (("w1", w1), ("w3", w3), ("sw1", sw1), ("sw3", sw3)):
        inputs |= matrix_inputs(name, planes)
    inputs |= {"w1_scale": w1_scale, "w3_scale": w3_scale, "sw1_scale": sw1_scale, "sw3_scale": sw3_scale}
    return run(MOE_UP, inputs)["mid"]


def moe_down(
    mid: Tensor,
    ids: Tensor,
    *,
    w2: Planes,
    sw2: Planes,
    w2_scale: Tensor | None = None,
    sw2_scale: float = 1.0,
) -> Tensor:
    """The sum of the experts' outputs: y[t] = sum over slots s of w2_scale[e] w2[e] mid[t, s], e = ids[t, s].

    mid      f32 [n_tok, top_k + 1, inter] of :func:`moe_up`;  ids i32 [n_tok, top_k]
    w2       [n_experts * d, inter], sw2 [d, inter]: as the matrices of :func:`moe_up`
    returns  f32 [n_tok, d]
    Order:   slots by rank, the shared expert last; row t does not depend on n_tok or on who shares its experts.
    Error:   relative RMS below 1e-5 of the reference.
    Limits:  on a GPU n_tok 1 to 8, ids within the experts; inter a multiple of 32, d of 16, of 128 where w2
             is fp8_block.
    Source:  spec model.md 2.7.
    """
    inputs: Inputs = {"mid": mid, "ids": ids, "w2_scale": w2_scale, "sw2_scale": sw2_scale}
    return run(MOE_DOWN, inputs | matrix_inputs("w2", w2) | matrix_inputs("sw2", sw2))["y"]


def _reference_up(inputs: Inputs) -> Outputs:
    x, ids, weights = inputs["x"], inputs["ids"].tolist(), inputs["weights"]
    (n_tok, d), inter = x.shape, n_rows_of(inputs, "sw1")
    mid = torch.empty(n_tok, len(ids[0]) + 1, inter)
    slots = _slots(ids)
    for expert, pairs in slots.items():
        names, index = (("sw1", "sw3"), 0) if expert is None else (("w1", "w3"), expert)
        w1, w3 = (decoded(inputs, name, index, inter, d) for name in names)
        for t, s in pairs:
            act = swiglu(w1 @ x[t], w3 @ x[t], inputs["limit"])
            mid[t, s] = act if expert is None else act * weights[t, s]
    return {"mid": mid}


def _reference_down(inputs: Inputs) -> Outputs:
    mid, ids = inputs["mid"], inputs["ids"].tolist()
    (n_tok, n_slots, inter), d = mid.shape, n_rows_of(inputs, "sw2")
    parts = torch.empty(n_tok, n_slots, d)
    for expert, pairs in _slots(ids).items():
        name, index = ("sw2", 0) if expert is None else ("w2", expert)
        w2 = decoded(inputs, name, index, d, inter)
        for t, s in pairs:
            parts[t, s] = w2 @ mid[t, s]
    y = parts[:, 0].clone()
    for s in range(1, n_slots):
        y += parts[:, s]
    return {"y": y}


def _slots(ids: list[list[int]]) -> dict[int | None, list[tuple[int, int]]]:
    """(token, slot) pairs of each expert in use; None is the shared one."""
    found: dict[int | None, list[tuple[int, int]]] = {None: [(t, len(row)) for t, row in enumerate(ids)]}
    for t, s in product(range(len(ids)), range(len(ids[0]))):
        found.setdefault(ids[t][s], []).append((t, s))
    return found


def _outputs_up(inputs: Inputs) -> Outputs:
    n_tok, top_k = inputs["ids"].shape
    return {"mid": torch.empty(n_tok, top_k + 1, n_rows_of(inputs, "sw1"), device=inputs["x"].device)}


def _outputs_down(inputs: Inputs) -> Outputs:
    (n_tok, n_slots, inter), d, device = inputs["mid"].shape, n_rows_of(inputs, "sw2"), inputs["mid"].device
    return {
        "y": torch.empty(n_tok, d, device=device),
        "parts": torch.empty(n_tok, n_slots, d, device=device),
        "counter": torch.zeros(_n_row_blocks(d, block_rows(inter, n_tok)), dtype=torch.int32, device=device),
    }


def _check_tokens(name: str, n_tok: int, ids: Tensor, want: tuple[int, ...]) -> None:
    if not 1 <= n_tok <= 8 or tuple(ids.shape) != want:
        raise ValueError(f"{name}: {n_tok} tokens (1 to 8), ids {list(ids.shape)} instead of {list(want)}")


def _calls_up(inputs: Inputs, outputs: Outputs) -> list[KernelCall]:
    x, ids = inputs["x"], inputs["ids"]
    (n_tok, d), top_k, inter = x.shape, ids.shape[1], n_rows_of(inputs, "sw1")
    _check_tokens("moe_up", n_tok, ids, (n_tok, top_k))
    values: Inputs = {k: inputs[k] for k in ("x", "ids", "weights", "limit", *(f"{name}_scale" for name in _UP))}
    for name in _UP:
        values |= plane_arguments(inputs, name, inter, d)
    args = ArgPack(_UP_ENTRY, values | outputs | {"patterns": pattern_argument(inputs, _UP, x.device)})
    constants = up_constants(formats_of(inputs, _UP), hidden=d, inter=inter, top_k=top_k, n_tok=n_tok)
    grid = (_n_row_blocks(inter, block_rows(d, n_tok) // 2), 1 + n_tok * top_k, 1)  # half of a tile's rows are of w3
    return [_call(_UP_ENTRY, constants, grid, args)]


def _calls_down(inputs: Inputs, outputs: Outputs) -> list[KernelCall]:
    mid, ids = inputs["mid"], inputs["ids"]
    (n_tok, n_slots, inter), d = mid.shape, n_rows_of(inputs, "sw2")
    _check_tokens("moe_down", n_tok, ids, (n_tok, n_slots - 1))
    values: Inputs = {k: inputs[k] for k in ("mid", "ids", "w2_scale", "sw2_scale")}
    for name in _DOWN:
        values |= plane_arguments(inputs, name, d, inter)
    args = ArgPack(_DOWN_ENTRY, values | outputs | {"patterns": pattern_argument(inputs, _DOWN, mid.device)})
    top_k = n_slots - 1
    constants = down_constants(formats_of(inputs, _DOWN), hidden=d, inter=inter, top_k=top_k, n_tok=n_tok)
    return [_call(_DOWN_ENTRY, constants, (_n_row_blocks(d, block_rows(inter, n_tok)), 1 + n_tok * top_k, 1), args)]


def _n_row_blocks(n_rows: int, of_block: int) -> int:
    return -(-n_rows // of_block)


def up_constants(formats: tuple[str, ...], *, hidden: int, inter: int, top_k: int, n_tok: int) -> Constants:
    """Constants of a launch of ``moe_up`` with w1, w3, sw1 and sw3 of these formats."""
    sizes = {"HIDDEN": hidden, "INTER": inter, "TOP_K": top_k, "N_TOK": n_tok}
    shared = shared_bytes(hidden, n_tok, formats)
    return constant_set(**sizes, SHARED_BYTES=shared, **format_constants(_UP, formats))


def down_constants(formats: tuple[str, ...], *, hidden: int, inter: int, top_k: int, n_tok: int) -> Constants:
    """Constants of a launch of ``moe_down`` with w2 and sw2 of these formats."""
    sizes = {"HIDDEN": hidden, "INTER": inter, "TOP_K": top_k, "N_TOK": n_tok}
    shared = shared_bytes(inter, n_tok, formats)
    return constant_set(**sizes, SHARED_BYTES=shared, **format_constants(_DOWN, formats))


def _call(entry: Entry, constants: Constants, grid: tuple[int, int, int], args: ArgPack) -> KernelCall:
    values = dict(constants)
    n_tok, shared = values["N_TOK"], values["SHARED_BYTES"]
    assert isinstance(n_tok, int)
    assert isinstance(shared, int)
    return KernelCall(entry, constants, grid, (threads(n_tok), 1, 1), shared, args, pdl=True)


_FLASH = {"hidden": 4096, "inter": 2048, "top_k": 6}  # of DeepSeek-V4-Flash
# (w1 and w3, w2, shared) of the checkpoints there are: NVFP4, the official one, two mixtures of GGUF files.
_CHECKPOINTS = (
    ("nvfp4", "nvfp4", "q8_0"),
    ("mxfp4", "mxfp4", "fp8_block"),
    ("iq2_xxs", "q2_k", "q8_0"),
    ("q4_k", "q4_k", "q8_0"),
)
MOE_UP = register(
    Operation(
        name="moe_up",
        reference=_reference_up,
        outputs=_outputs_up,
        calls=_calls_up,
        entries=(_UP_ENTRY,),
        cases=up_cases,
        variants=tuple(
            (_UP_ENTRY, up_constants((up, up, shared, shared), n_tok=n_tok, **_FLASH))
            for up, _, shared in _CHECKPOINTS
            for n_tok in (1, 2, 8)
        ),
        token_inputs={"x": 0, "ids": 0, "weights": 0},
        token_outputs={"mid": 0},
    )
)
MOE_DOWN = register(
    Operation(
        name="moe_down",
        reference=_reference_down,
        outputs=_outputs_down,
        calls=_calls_down,
        entries=(_DOWN_ENTRY,),
        cases=down_cases,
        variants=tuple(
            (_DOWN_ENTRY, down_constants((down, shared), n_tok=n_tok, **_FLASH))
            for _, down, shared in _CHECKPOINTS
            for n_tok in (1, 2, 8)
        ),
        workspaces=("parts", "counter"),
        token_inputs={"mid": 0, "ids": 0},
        token_outputs={"y": 0},
    )
)
