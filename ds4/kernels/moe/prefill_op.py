"""The experts in the prefill form: ``moe_up_gemm`` and ``moe_down_gemm``, with what stands around them."""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.cases import Inputs, Outputs
from ds4.kernels.entry import ArgPack, Constants, Entry, KernelCall, constant_set
from ds4.kernels.moe import prefill_ref as ref
from ds4.kernels.moe.group_op import MOE_COMBINE, MOE_GROUP, moe_combine, moe_group
from ds4.kernels.moe.matrices import (
    N_PLANES,
    TEMPLATES,
    formats_of,
    matrix_inputs,
    n_rows_of,
    pattern_argument,
    plane_arguments,
)
from ds4.kernels.moe.prefill_cases import down_cases, up_cases
from ds4.kernels.moe.prefill_plan import ExpertPlan, Product, expert_tile
from ds4.kernels.packing import Planes
from ds4.kernels.picks import Pick
from ds4.kernels.registry import Operation, register, run

__all__ = [
    "MOE_COMBINE",
    "MOE_DOWN_GEMM",
    "MOE_GROUP",
    "MOE_UP_GEMM",
    "expert_tile",
    "moe_combine",
    "moe_down_gemm",
    "moe_group",
    "moe_up_gemm",
]

_PLAN = ("TOKENS", "STAGES", "SHARED_BYTES")
_SIZES = (("n_rows", "i32"), ("top_k", "i32"))
_GROUPED = (("order", "i32*"), ("tiles", "i32*"), ("n_tiles", "i32*"))


def _plane_params(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"{name}_{i}", "u8*") for name in names for i in range(N_PLANES))


_UP = Entry(
    "moe_up_gemm",
    "moe/moe_gemm_up.cu",
    (
        *(("x", "bf16*"), ("weights", "f32*"), *_GROUPED, ("count", "i32*"), *_plane_params("gate", "up")),
        *(("gate_scales", "f32*"), ("up_scales", "f32*"), ("patterns", "u64*"), ("mid", "bf16*")),
        *(("gate_scale", "f32"), ("up_scale", "f32"), ("limit", "f32"), *_SIZES),
    ),
    ("HIDDEN", "INTER", *_PLAN, "GATE_FORMAT", "UP_FORMAT"),
)
_DOWN = Entry(
    "moe_down_gemm",
    "moe/moe_gemm_down.cu",
    (
        *(("mid", "bf16*"), *_GROUPED, ("count", "i32*"), *_plane_params("down"), ("down_scales", "f32*")),
        *(("patterns", "u64*"), ("parts", "bf16*"), ("down_scale", "f32"), *_SIZES),
    ),
    ("HIDDEN", "INTER", *_PLAN, "DOWN_FORMAT"),
)
_PARAMETERS = {_UP: ("gate", "up"), _DOWN: ("down",)}  # matrices
_PICKS = {_UP: "moe_up", _DOWN: "moe_down"}


def moe_up_gemm(
    x: Tensor,
    weights: Tensor,
    order: Tensor,
    tiles: Tensor,
    n_tiles: Tensor,
    *,
    tile: int,
    w1: Planes,
    w3: Planes,
    sw1: Planes,
    sw3: Planes,
    limit: float,
    count: Tensor | None = None,
    w1_scale: Tensor | None = None,
    w3_scale: Tensor | None = None,
    sw1_scale: float = 1.0,
    sw3_scale: float = 1.0,
) -> Tensor:
    """The prefill form of ``moe_up``: the inputs of w2 of every (token, slot), rounded to BF16.

    x        bf16 [n_rows, d];  weights f32 [n_rows, top_k] as ``route`` gives them
    order, tiles, n_tiles   of :func:`moe_group` with this ``tile``, a multiple of 8
    count    i32 [1] or None: rows with tokens; results of the others are not specified
    w1 ...   as ``moe_up`` has them
    returns  bf16 [n_rows, top_k + 1, inter]
    Order:   that of gemm_tiles.cuh: row t depends neither on n_rows, count, tile or t, nor on the other tokens.
    Error:   the FP32 result within 1e-5 of its sums' size, then one rounding to BF16.
    Limits:  d a multiple of 32, inter of 16, of 128 where w1 or w3 is fp8_block.
    Source:  spec model.md 2.7.
    """
    inputs: Inputs = {"x": x, "weights": weights, "order": order, "tiles": tiles, "n_tiles": n_tiles, "tile": tile}
    inputs |= {"count": count, "limit": limit}
    for name, planes in (("w1", w1), ("w3", w3), ("sw1", sw1), ("sw3", sw3)):
        inputs |= matrix_inputs(name, planes)
    inputs |= {"w1_scale": w1_scale, "w3_scale": w3_scale, "sw1_scale": sw1_scale, "sw3_scale": sw3_scale}
    return run(MOE_UP_GEMM, inputs)["mid"]


def moe_down_gemm(
    mid: Tensor,
    order: Tensor,
    tiles: Tensor,
    n_tiles: Tensor,
    *,
    tile: int,
    w2: Planes,
    sw2: Planes,
    count: Tensor | None = None,
    w2_scale: Tensor | None = None,
    sw2_scale: float = 1.0,
) -> Tensor:
    """The experts' outputs, rounded to BF16: parts[t, s] = w2_scale[e] w2[e] mid[t, s], e = ids[t, s].

    mid      bf16 [n_rows, top_k + 1, inter] of :func:`moe_up_gemm`; the others as there, matrices as in ``moe_down``
    returns  bf16 [n_rows, top_k + 1, d], for :func:`moe_combine`
    Order, Error: as :func:`moe_up_gemm`.
    Limits:  inter a multiple of 32, d of 16, of 128 where w2 is fp8_block.
    Source:  spec model.md 2.7.
    """
    inputs: Inputs = {"mid": mid, "order": order, "tiles": tiles, "n_tiles": n_tiles, "tile": tile, "count": count}
    inputs |= {"w2_scale": w2_scale, "sw2_scale": sw2_scale}
    return run(MOE_DOWN_GEMM, inputs | matrix_inputs("w2", w2) | matrix_inputs("sw2", sw2))["parts"]


def _outputs_up(inputs: Inputs) -> Outputs:
    n_rows, top_k, inter = inputs["x"].shape[0], inputs["weights"].shape[1], n_rows_of(inputs, "sw1")
    return {"mid": torch.empty(n_rows, top_k + 1, inter, dtype=torch.bfloat16, device=inputs["x"].device)}


def _outputs_down(inputs: Inputs) -> Outputs:
    mid = inputs["mid"]
    return {"parts": torch.empty(*mid.shape[:2], n_rows_of(inputs, "sw2"), dtype=torch.bfloat16, device=mid.device)}


def _matrix(inputs: Inputs, name: str, parameter: str, n_rows: int, n_cols: int) -> Inputs:
    """The arguments of a matrix of ``inputs`` under the kernel's names for it, with its multiplier."""
    planes, scale = plane_arguments(inputs, name, n_rows, n_cols), inputs[f"{name}_scale"]
    of_experts = scale is None or isinstance(scale, Tensor)
    scales = {f"{parameter}_scales": scale if of_experts else None, f"{parameter}_scale": 1.0 if of_experts else scale}
    return {f"{parameter}_{i}": planes[f"{name}_{i}"] for i in range(N_PLANES)} | scales


def _calls_up(inputs: Inputs, outputs: Outputs) -> list[KernelCall]:
    x, weights = inputs["x"], inputs["weights"]
    values: Inputs = {"x": x, "weights": weights, "limit": inputs["limit"], **outputs}
    if len(weights) != len(x):
        raise ValueError(f"moe_up_gemm: weights {list(weights.shape)} for x {list(x.shape)}")
    sizes = {"hidden": x.shape[1], "inter": n_rows_of(inputs, "sw1")}
    return _launches(_UP, inputs, ("w1", "w3"), sizes, values, x, weights.shape[1])


def _calls_down(inputs: Inputs, outputs: Outputs) -> list[KernelCall]:
    mid = inputs["mid"]
    sizes = {"hidden": n_rows_of(inputs, "sw2"), "inter": mid.shape[2]}
    return _launches(_DOWN, inputs, ("w2",), sizes, {"mid": mid, **outputs}, mid, mid.shape[1] - 1)


def _launches(
    entry: Entry, inputs: Inputs, names: tuple[str, ...], sizes: dict[str, int], values: Inputs, x: Tensor, top_k: int
) -> list[KernelCall]:
    """The routed experts' products, then the shared one's, whose launch has all tokens instead of tiles of pairs.

    ``names``: the routed matrices; ``values``: arguments that have the kernels' names; ``x``: the activations.
    """
    n_rows, order, tiles = x.shape[0], inputs["order"], inputs["tiles"]
    if order.shape != (n_rows * top_k,) or tiles.dim() != 2 or tiles.shape[1] != 4 or x.dtype != torch.bfloat16:
        shapes = f"order {list(order.shape)} and tiles {list(tiles.shape)}"
        raise ValueError(f"{entry.name}: {shapes} do not go with {x.dtype} {list(x.shape)} and {top_k} slots")
    rows, cols = (sizes[key] for key in (("hidden", "inter") if entry is _DOWN else ("inter", "hidden")))
    common = values | {"count": inputs["count"], "n_rows": n_rows, "top_k": top_k}
    calls = []
    for routed in (True, False):
        matrices = names if routed else tuple(f"s{name}" for name in names)
        formats, n_experts = formats_of(inputs, matrices), n_rows_of(inputs, matrices[0]) // rows
        args = dict(common)
        for name, parameter in zip(matrices, _PARAMETERS[entry], strict=True):
            args |= _matrix(inputs, name, parameter, rows, cols)
        for name in ("order", "tiles", "n_tiles"):
            args[name] = inputs[name] if routed else None
        args["patterns"] = pattern_argument(inputs, matrices, x.device)
        n_pairs, tile = (n_rows * top_k, inputs["tile"]) if routed else (n_rows, None)
        plan = Product(_PICKS[entry], formats, rows, cols, n_experts).plan(n_pairs, tile, x.device)
        n_tiles = tiles.shape[0] if routed else -(-n_rows // plan.pick.tokens)
        grid, block = (-(-rows // plan.rows), n_tiles, 1), (32 * plan.warps, 1, 1)
        constants = _constants(entry, plan, sizes)
        calls.append(KernelCall(entry, constants, grid, block, plan.shared_bytes, ArgPack(entry, args), pdl=True))
    return calls


def _constants(entry: Entry, plan: ExpertPlan, sizes: dict[str, int]) -> Constants:
    """Of a launch."""
    named = zip(_PARAMETERS[entry], plan.formats, strict=True)
    formats = {f"{parameter.upper()}_FORMAT": TEMPLATES[fmt] for parameter, fmt in named}
    dims = {"HIDDEN": sizes["hidden"], "INTER": sizes["inter"], "SHARED_BYTES": plan.shared_bytes}
    return constant_set(**dims, TOKENS=plan.pick.tokens, STAGES=plan.pick.stages, **formats)


def _variants(entry: Entry, *names: str) -> tuple[tuple[Entry, Constants], ...]:
    """Of formats at the dimensions of DeepSeek-V4-Flash: tiles of 64, and of 128 for the last format."""
    n = len(_PARAMETERS[entry])
    tiles = [*((64, name) for name in names), (128, names[-1])]
    plans = [ExpertPlan(Pick(tile, 2), (name,) * n) for tile, name in tiles]
    return tuple((entry, _constants(entry, plan, {"hidden": 4096, "inter": 2048})) for plan in plans)


# Neither has token inputs: tiles belong to a chunk. tests/kernels/test_moe_prefill_kernel.py takes tokens through all
# operations instead.
MOE_UP_GEMM = register(
    Operation(
        name="moe_up_gemm",
        reference=ref.up,
        outputs=_outputs_up,
        calls=_calls_up,
        entries=(_UP,),
        cases=up_cases,
        variants=_variants(_UP, "mxfp4", "fp8_block", "iq2_xxs", "q4_k", "q8_0", "nvfp4"),
        decode=False,
    )
)
MOE_DOWN_GEMM = register(
    Operation(
        name="moe_down_gemm",
        reference=ref.down,
        outputs=_outputs_down,
        calls=_calls_down,
        entries=(_DOWN,),
        cases=down_cases,
        variants=_variants(_DOWN, "mxfp4", "fp8_block", "q2_k", "q4_k", "q8_0", "nvfp4"),
        decode=False,
    )
)
