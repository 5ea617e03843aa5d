"""Cases of the experts' prefill form: ``moe_group``, ``moe_up_gemm``, ``moe_down_gemm`` and ``moe_combine``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ds4.kernels.cases import Case, Close, Compare, Exact, Group, Inputs
from ds4.kernels.moe import prefill_ref as ref
from ds4.kernels.moe.cases import matrix, on_device
from ds4.kernels.packing import PACKINGS

# The FP32 results differ as those of the decode form do (ds4/kernels/moe/cases.py). Where that takes them over the
# middle of two BF16 numbers, they round to neighbours: 2^-7 of a number that is a power of two. How seldom that
# happens, tests/kernels/test_moe_prefill_kernel.py looks at.
_ROUNDED = Close(3e-5, 2.0**-7, "FP32 dot products summed in another order, then a rounding to BF16", True)
_SUM = Close(0.0, 0.0, "the same FP32 additions", True)
_GROUPED: dict[str, Compare] = dict.fromkeys(("order", "tiles", "n_tiles"), Exact())


@dataclass(frozen=True)
class Chunk:
    """A chunk of a prompt and its experts. ``live``: rows with tokens, None for all without a count. ``ids``: which
    experts, a key of IDS."""

    n_rows: int
    n_experts: int
    top_k: int
    tile: int
    live: int | None = None
    ids: str = "random"


@dataclass(frozen=True)
class Experts:
    """Sizes and formats: of w1, w3, sw1, sw3, or of w2, sw2."""

    d: int
    inter: int
    formats: tuple[str, ...]


def _random(rng: torch.Generator, chunk: Chunk) -> Tensor:
    """Distinct experts for each token."""
    rows = [torch.randperm(chunk.n_experts, generator=rng)[: chunk.top_k] for _ in range(chunk.n_rows)]
    return torch.stack(rows)


def _skewed(rng: torch.Generator, chunk: Chunk) -> Tensor:
    """Expert 1 for every token, and of the others the last one for one token only."""
    ids = torch.randint(2, chunk.n_experts - 1, (chunk.n_rows, chunk.top_k), generator=rng)
    ids[:, chunk.top_k - 1] = 1
    ids[chunk.n_rows // 2, 0] = chunk.n_experts - 1
    return ids


def _one(rng: torch.Generator, chunk: Chunk) -> Tensor:
    """One expert in every slot, so that a token has it several times; the others have none."""
    return torch.full((chunk.n_rows, chunk.top_k), chunk.n_experts // 2)


def _repeated(rng: torch.Generator, chunk: Chunk) -> Tensor:
    """Any experts, the same more than once for a token as well."""
    return torch.randint(chunk.n_experts, (chunk.n_rows, chunk.top_k), generator=rng)


IDS: dict[str, Callable[[torch.Generator, Chunk], Tensor]] = {
    "random": _random,
    "skewed": _skewed,
    "one": _one,
    "repeated": _repeated,
}


def _ids(rng: torch.Generator, chunk: Chunk) -> Inputs:
    """ids i32 and count. Rows without tokens have other experts or what is none at all."""
    ids = IDS[chunk.ids](rng, chunk).to(torch.int32)
    if chunk.live is None:
        return {"ids": ids, "count": None}
    dead = ids[chunk.live :]
    dead[:, 1:] = torch.randint(-(2**31), 2**31 - 1, dead[:, 1:].shape, generator=rng, dtype=torch.int32)
    return {"ids": ids, "count": torch.tensor([chunk.live], dtype=torch.int32)}


def _grouped(rng: torch.Generator, chunk: Chunk) -> Inputs:
    """What ``moe_group`` gives, and its tile and count."""
    inputs = _ids(rng, chunk) | {"n_experts": chunk.n_experts, "tile": chunk.tile}
    return ref.group(inputs) | {"tile": chunk.tile, "count": inputs["count"]}


def _rows(rng: torch.Generator, chunk: Chunk, *shape: int) -> Tensor:
    """Random activations; rows without tokens hold NaN, which nothing may come from."""
    x = torch.randn(chunk.n_rows, *shape, generator=rng)
    x[x.shape[0] if chunk.live is None else chunk.live :] = torch.nan
    return x.bfloat16()


def group_inputs(seed: int, device: torch.device, chunk: Chunk) -> Inputs:
    """Random inputs of ``moe_group``."""
    rng = torch.Generator().manual_seed(seed)
    return on_device(device, _ids(rng, chunk) | {"n_experts": chunk.n_experts, "tile": chunk.tile})


def up_inputs(seed: int, device: torch.device, chunk: Chunk, experts: Experts, limit: float = 10.0) -> Inputs:
    """Random inputs of ``moe_up_gemm``."""
    rng = torch.Generator().manual_seed(seed)
    inputs: Inputs = {"x": _rows(rng, chunk, experts.d), **_grouped(rng, chunk), "limit": limit}
    inputs["weights"] = torch.rand(chunk.n_rows, chunk.top_k, generator=rng) + 0.1
    for name, fmt in zip(("w1", "w3", "sw1", "sw3"), experts.formats, strict=True):
        n = None if name.startswith("s") else chunk.n_experts
        inputs |= matrix(rng, name, fmt, experts.inter, experts.d, n)
    return on_device(device, inputs)


def down_inputs(seed: int, device: torch.device, chunk: Chunk, experts: Experts) -> Inputs:
    """Random inputs of ``moe_down_gemm``."""
    rng = torch.Generator().manual_seed(seed)
    inputs: Inputs = {"mid": _rows(rng, chunk, chunk.top_k + 1, experts.inter), **_grouped(rng, chunk)}
    for name, fmt in zip(("w2", "sw2"), experts.formats, strict=True):
        inputs |= matrix(rng, name, fmt, experts.d, experts.inter, None if name == "sw2" else chunk.n_experts)
    return on_device(device, inputs)


def combine_inputs(seed: int, device: torch.device, chunk: Chunk, d: int) -> Inputs:
    """Random inputs of ``moe_combine``, of so different magnitudes that their sums are rounded."""
    rng = torch.Generator().manual_seed(seed)
    count = None if chunk.live is None else torch.tensor([chunk.live], dtype=torch.int32)
    parts = _rows(rng, chunk, chunk.top_k + 1, d)
    parts *= torch.exp2(torch.randint(-12, 13, parts.shape, generator=rng))
    return on_device(device, {"parts": parts, "count": count})


def _plain(make: Callable[[int, torch.device], Inputs], seed: int, device: torch.device) -> Inputs:
    """Without multipliers of the experts; x is small instead."""
    inputs = make(seed, torch.device("cpu"))
    for name in ("w1", "w3", "w2"):
        if f"{name}_scale" in inputs:
            inputs[f"{name}_scale"] = None
    inputs["x" if "x" in inputs else "mid"] *= 2.0**-7
    return on_device(device, inputs)


def _product(
    name: str, group: Group, chunk: Chunk, experts: Experts, *, plain: bool = False, limit: float = 10.0
) -> Case:
    """A case of ``moe_up_gemm``, or with two formats of ``moe_down_gemm``. Bytes: each expert's matrices once, as far
    as there are pairs; activations once."""
    up, pairs = len(experts.formats) == 4, chunk.n_rows * chunk.top_k
    rows, cols = (experts.inter, experts.d) if up else (experts.d, experts.inter)
    half = len(experts.formats) // 2
    sizes = [PACKINGS[fmt].nbytes(rows, cols) for fmt in experts.formats]
    moved = min(pairs, chunk.n_experts) * sum(sizes[:half]) + sum(sizes[half:])
    slots = pairs + chunk.n_rows
    moved += 2 * ((chunk.n_rows if up else slots) * cols + slots * rows)
    make = partial(up_inputs, limit=limit) if up else down_inputs
    fixed = partial(make, chunk=chunk, experts=experts)
    compare: dict[str, Compare] = {"mid" if up else "parts": _ROUNDED}
    return Case(name, group, partial(_plain, fixed) if plain else fixed, compare, moved, 2 * half * slots * rows * cols)


def group_cases() -> list[Case]:
    """Small chunks; many experts; a chunk of V4-Flash."""

    def case(name: str, group: Group, chunk: Chunk) -> Case:
        pairs = chunk.n_rows * chunk.top_k
        return Case(name, group, partial(group_inputs, chunk=chunk), _GROUPED, 4 * (2 * chunk.n_experts + 1) * pairs)

    return [
        case("70 rows", "smoke", Chunk(70, 6, 2, 8)),
        case("70 rows, 37 live", "smoke", Chunk(70, 6, 2, 16, live=37)),
        case("one row", "edges", Chunk(1, 6, 2, 8)),
        case("9 rows, one live", "edges", Chunk(9, 6, 2, 8, live=1)),
        case("no row live", "edges", Chunk(9, 6, 2, 8, live=0)),
        case("skewed", "edges", Chunk(70, 6, 2, 8, ids="skewed")),
        case("one expert", "edges", Chunk(150, 3, 2, 8, live=149, ids="one")),
        case("an expert twice", "edges", Chunk(33, 3, 3, 8, ids="repeated")),
        case("300 experts", "edges", Chunk(40, 300, 6, 8)),
        case("4096 rows", "decode", Chunk(4096, 256, 6, 128)),
    ]


def up_cases() -> list[Case]:
    """Smoke and edges for the emulation, with few sets of constants: routed and shared experts of one format and tile
    have the same. Then V4-Flash's dimensions with 16 experts."""
    nvfp4 = Experts(256, 48, ("nvfp4",) * 4)
    mxfp4 = Experts(256, 128, ("mxfp4", "mxfp4", "fp8_block", "fp8_block"))
    return [
        _product("nvfp4", "smoke", Chunk(8, 3, 2, 8), nvfp4),
        _product("mxfp4 and fp8", "smoke", Chunk(3, 4, 2, 8), mxfp4),
        _product(
            "iq2_xxs, f16 and f32", "smoke", Chunk(3, 3, 2, 8), Experts(256, 16, ("iq2_xxs", "iq2_xxs", "f16", "f32"))
        ),
        _product("q4_k and q6_k", "smoke", Chunk(3, 6, 2, 8), Experts(256, 32, ("q4_k", "q4_k", "q6_k", "q6_k"))),
        _product("one row", "edges", Chunk(1, 5, 2, 8), nvfp4),
        _product("8 rows, one live", "edges", Chunk(8, 5, 2, 8, live=1), nvfp4),
        _product("no row live", "edges", Chunk(8, 5, 2, 8, live=0), nvfp4),
        _product("37 of 43 rows live", "edges", Chunk(43, 5, 2, 8, live=37), nvfp4),
        _product("skewed", "edges", Chunk(19, 5, 2, 8, ids="skewed"), nvfp4),
        _product("an expert twice", "edges", Chunk(8, 3, 3, 8, ids="repeated"), nvfp4),
        _product("clamps", "edges", Chunk(3, 5, 2, 8), nvfp4, limit=0.25),
        _product("no multipliers", "edges", Chunk(3, 5, 2, 8), nvfp4, plain=True),
        _product("tiles of 64", "edges", Chunk(70, 3, 2, 64, live=67), nvfp4),
        *(_product(name, "decode", Chunk(256, 16, 6, 64), Experts(4096, 2048, formats)) for name, formats in _FLASH_UP),
    ]


def down_cases() -> list[Case]:
    """As :func:`up_cases`."""
    nvfp4 = Experts(48, 256, ("nvfp4", "nvfp4"))
    return [
        _product("nvfp4", "smoke", Chunk(8, 3, 2, 8), nvfp4),
        _product("mxfp4 and fp8", "smoke", Chunk(3, 2, 2, 8), Experts(128, 160, ("mxfp4", "fp8_block"))),
        _product("q2_k and bf16", "smoke", Chunk(3, 3, 2, 8), Experts(16, 256, ("q2_k", "bf16"))),
        _product("q4_k and iq2_xxs", "smoke", Chunk(3, 3, 2, 8), Experts(16, 256, ("q4_k", "iq2_xxs"))),
        _product("8 rows, one live", "edges", Chunk(8, 5, 2, 8, live=1), nvfp4),
        _product("37 of 43 rows live", "edges", Chunk(43, 5, 2, 8, live=37), nvfp4),
        _product("skewed", "edges", Chunk(19, 5, 2, 8, ids="skewed"), nvfp4),
        _product("an expert twice", "edges", Chunk(8, 3, 3, 8, ids="repeated"), nvfp4),
        _product("no multipliers", "edges", Chunk(3, 5, 2, 8), nvfp4, plain=True),
        _product("tiles of 64", "edges", Chunk(70, 3, 2, 64, live=67), nvfp4),
        *(
            _product(name, "decode", Chunk(256, 16, 6, 64), Experts(4096, 2048, formats))
            for name, formats in _FLASH_DOWN
        ),
    ]


# Formats of the checkpoints there are, as moe/op.py has them.
_FLASH_UP = (
    ("NVFP4", ("nvfp4", "nvfp4", "q8_0", "q8_0")),
    ("MXFP4", ("mxfp4_official", "mxfp4_official", "fp8_block", "fp8_block")),
    ("IQ2_XXS", ("iq2_xxs", "iq2_xxs", "q8_0", "q8_0")),
    ("Q4_K", ("q4_k", "q4_k", "q8_0", "q8_0")),
)
_FLASH_DOWN = (
    ("NVFP4", ("nvfp4", "q8_0")),
    ("MXFP4", ("mxfp4_official", "fp8_block")),
    ("Q2_K", ("q2_k", "q8_0")),
    ("Q4_K", ("q4_k", "q8_0")),
)


def combine_cases() -> list[Case]:
    """One set of constants for the emulation."""

    def case(name: str, group: Group, chunk: Chunk, d: int) -> Case:
        moved = chunk.n_rows * d * (2 * chunk.top_k + 6)
        flops = chunk.n_rows * d * chunk.top_k
        return Case(name, group, partial(combine_inputs, chunk=chunk, d=d), {"y": _SUM}, moved, flops)

    def chunk(n_rows: int, live: int | None = None) -> Chunk:
        return Chunk(n_rows, 8, 6, 8, live)

    return [
        case("9 rows", "smoke", chunk(9), 2056),
        case("one row", "edges", chunk(1), 2056),
        case("9 rows, one live", "edges", chunk(9, 1), 2056),
        case("4096 rows", "decode", chunk(4096), 4096),
    ]
