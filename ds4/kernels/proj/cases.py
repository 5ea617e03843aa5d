"""Cases of ``proj_in``, ``proj_q``, ``proj_oa`` and ``proj_ob``, and the matrices of V4-Flash that they are for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ds4.kernels.cases import Case, Close, Compare, Group, Inputs
from ds4.kernels.packing import PACKINGS
from ds4.kernels.packing.fp8_block import TILE

Segments = tuple[tuple[str, int], ...]  # (format, rows) of each matrix
ALL: Segments = (("f32", 5), ("f16", 33), ("bf16", 1), ("q8_0", 33), ("fp8_block", 5))
_NAN = 0x7F  # e4m3; counts 480 in the kernels
_MEAN_CODE = 100.1  # root of the mean square of all e4m3 numbers
_MEAN_BYTE = 73.9  # and of all int8 numbers


@dataclass(frozen=True)
class Recipe:
    """Matrices of a layer as one kind of checkpoint stores them. ``n_tok``: the variants and decode cases there are."""

    title: str
    k: int
    segments: Segments
    n_tok: tuple[int, ...] = (1, 2, 8)
    groups: int = 1


def _layer(fp8: str, other: str, *compressors: int) -> Segments:
    """q_a and kv, then the rest of what reads a sublayer's input."""
    return (fp8, 1024), (fp8, 512), *((other, n) for n in compressors)


_CSA, _HCA = (1024, 1024, 256, 256, 64), (512, 512)
# Released checkpoints, and GGUF files with Q8_0 (kernels.md a.2).
RECIPES = {
    "proj_in": (
        Recipe("native CSA", 4096, _layer("fp8_block", "bf16", *_CSA)),
        Recipe("native HCA", 4096, _layer("fp8_block", "bf16", *_HCA)),
        Recipe("GGUF CSA", 4096, _layer("q8_0", "f16", *_CSA)),
        Recipe("native SWA", 4096, _layer("fp8_block", "bf16"), (1,)),
    ),
    "proj_q": (
        Recipe("native CSA", 1024, (("fp8_block", 32768), ("fp8_block", 8192))),
        Recipe("GGUF CSA", 1024, (("q8_0", 32768), ("f16", 8192))),
        Recipe("native HCA", 1024, (("fp8_block", 32768),), (1,)),
    ),
    "proj_oa": (
        Recipe("native", 4096, (("fp8_block", 8192),), groups=8),
        Recipe("GGUF", 4096, (("q8_0", 8192),), groups=8),
    ),
    "proj_ob": (Recipe("native", 8192, (("fp8_block", 4096),)), Recipe("GGUF", 8192, (("q8_0", 4096),))),
}


def tolerance(k: int, size: float = 1.0) -> Close:
    """For sums of k products that are of magnitude ``size``."""
    reason = "FP32 sums of k products in another order: sqrt(k) roundings of partial sums up to 4 times the result"
    return Close(4 * 2.0**-24 * k**0.5 * size, 2e-6, reason)


def _plane(name: str, index: int, n_rows: int, k: int) -> Tensor:
    """Zeros of the shape of a plane."""
    plane = PACKINGS[name].planes[index]
    return torch.zeros(plane.n_rows(n_rows), plane.row_bytes(k) // plane.dtype.itemsize, dtype=plane.dtype)


def random_planes(rng: torch.Generator, name: str, n_rows: int, k: int) -> tuple[Tensor, Tensor | None]:
    """(codes or values, scales or None) of a matrix whose product with normal activations has a spread of about 1.
    All codes occur but FP8's NaN; its scales are no powers of two."""
    first = _plane(name, 0, n_rows, k)
    if name == "q8_0":
        first[:] = torch.randint(-128, 128, first.shape, generator=rng, dtype=torch.int8)
        scales, mean = _plane(name, 1, n_rows, k), _MEAN_BYTE
    elif name == "fp8_block":
        first[:] = torch.randint(0, 256, first.shape, generator=rng, dtype=torch.uint8)
        first[(first & _NAN) == _NAN] = 0x7E
        scales, mean = _plane(name, 1, n_rows, k), _MEAN_CODE
    else:
        first[:] = torch.randn(first.shape, generator=rng) / k**0.5
        return first, None
    width = -(-k // (TILE if name == "fp8_block" else 32))
    scales[:, :width] = (0.5 + torch.rand(scales.shape[0], width, generator=rng)) / (mean * k**0.5)
    return first, scales


def make_inputs(
    seed: int,
    device: torch.device,
    *,
    n_tok: int,
    k: int,
    segments: Segments,
    groups: int = 1,
    blocks: int | None = None,
    change: Callable[[Inputs], None] | None = None,
) -> Inputs:
    """Random inputs, changed in place by ``change``. x has groups only where there are several."""
    rng = torch.Generator().manual_seed(seed)
    shape = (n_tok, groups, k) if groups > 1 else (n_tok, k)
    inputs: Inputs = {"x": torch.randn(shape, generator=rng), "formats": tuple(name for name, _ in segments)}
    inputs["blocks"] = blocks
    for i, (name, n_rows) in enumerate(segments):
        inputs[f"w{i}"], inputs[f"s{i}"] = random_planes(rng, name, n_rows, k)
    if change is not None:
        change(inputs)
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}


def _weight_planes(inputs: Inputs) -> dict[str, tuple[Tensor, Tensor | None]]:
    """The planes by format, where each format occurs once."""
    return {name: (inputs[f"w{i}"], inputs[f"s{i}"]) for i, name in enumerate(inputs["formats"])}


def zeros(inputs: Inputs) -> None:
    """A token of zeros, and rows of zeros; FP8 also minus zeros."""
    inputs["x"][1] = 0
    for i, name in enumerate(inputs["formats"]):
        inputs[f"w{i}"][::2] = 0x80 if name == "fp8_block" else 0


def _scaled(inputs: Inputs, x_factor: float, factors: dict[str, float]) -> None:
    """Activations and weights times a factor, the weights of each format times their own."""
    inputs["x"].mul_(x_factor)
    for name, (values, scales) in _weight_planes(inputs).items():
        (values if scales is None else scales).mul_(factors[name])


# Near the end of what their types hold: sums of about 2^120 (F16 and the scales of Q8_0 end at 2^16). Weights below the
# smallest normal number of BF16 and F16, and scales of Q8_0; F32 and the scales of FP8 stay 2^24 above FP32's, where
# the parts of a weight, or the weights of the reference, would be rounded. Activations of 2^60 make the sums as large.
_LARGE = 2.0**100, dict.fromkeys(("f32", "bf16", "fp8_block"), 2.0**20) | dict.fromkeys(("f16", "q8_0"), 2.0**8)
_DENORMAL = 2.0**60, {"f32": 2.0**-96, "f16": 2.0**-16, "bf16": 2.0**-130, "q8_0": 2.0**-13, "fp8_block": 2.0**-100}


def _not_finite(inputs: Inputs) -> None:
    """A NaN in a row of every format, an infinite activation, and a product that overflows. What meets the infinity has
    no zero among its parts (mma_rows.cuh): those of 1/3 have the bits 101010..."""
    inputs["x"][1, 7] = torch.inf
    for values, scales in _weight_planes(inputs).values():
        if scales is None:
            values[0, 3], values[1:, 7] = torch.nan, 1 / 3
        else:
            scales[0, 0] = torch.nan
    inputs["x"][0, 9] = 3e38
    _weight_planes(inputs)["f32"][0][1:, 9] = 4.0


def _case(title: str, group: Group, n_tok: int, k: int, segments: Segments, **options: Any) -> Case:
    make = partial(make_inputs, n_tok=n_tok, k=k, segments=segments, **options)
    compare: dict[str, Compare] = {f"y{i}": tolerance(k) for i in range(len(segments))}
    n_rows = sum(n for _, n in segments)
    n_values = options.get("groups", 1) * k + n_rows
    moved = sum(PACKINGS[name].nbytes(n, k) for name, n in segments) + 4 * n_tok * n_values
    return Case(title, group, make, compare, bytes_moved=moved, flops=2 * n_tok * n_rows * k)


def _scaled_case(title: str, x_factor: float, factors: dict[str, float]) -> Case:
    """ALL with factors, each result compared at its own magnitude."""
    case = _case(title, "edges", 2, 160, ALL, change=partial(_scaled, x_factor=x_factor, factors=factors))
    sizes = [x_factor * factors[name] for name, _ in ALL]
    return replace(case, compare={f"y{i}": tolerance(160, size) for i, size in enumerate(sizes)})


def _proj_in() -> list[Case]:
    native = _small("fp8_block", "bf16", (33, 5, 17, 1, 9, 8, 3))
    gguf = _small("q8_0", "f16", (33, 5, 17, 1, 9, 8, 3))
    names = [name for name, _ in ALL]
    turns = [tuple((names[(i + turn) % 5], (1, 5, 33)[(i + turn) % 3]) for i in range(8)) for turn in range(5)]
    return [
        _case("native, 8 tokens", "smoke", 8, 288, native),
        _case("GGUF, 2 tokens", "smoke", 2, 1056, gguf, blocks=5),
        *(_case(f"turn {i}", "edges", 1, 96, turn, blocks=1 + i) for i, turn in enumerate(turns)),
        _case("sliding layer", "edges", 3, 32, native[:2], blocks=1),
        _case("HCA layer", "edges", 5, 128, native[:4]),
        _case("F32", "edges", 8, 1056, (("f32", 33), ("f32", 1)), blocks=1),
        _case("zeros", "edges", 2, 160, ALL, change=zeros),
        _case("not finite", "edges", 2, 160, ALL, change=_not_finite),
        _scaled_case("large", *_LARGE),
        _scaled_case("denormal", *_DENORMAL),
    ]


def _small(fp8: str, other: str, rows: tuple[int, ...]) -> Segments:
    return tuple((fp8 if i < 2 else other, n) for i, n in enumerate(rows))


def _proj_q() -> list[Case]:
    two_scale_rows = (("fp8_block", 130), ("fp8_block", 65))
    return [
        _case("native, 8 tokens", "smoke", 8, 544, two_scale_rows, blocks=2),
        _case("GGUF, 2 tokens", "smoke", 2, 544, (("q8_0", 40), ("f16", 33))),
        _case("one matrix", "edges", 1, 1024, two_scale_rows[:1], blocks=3),
    ]


def _proj_oa() -> list[Case]:
    return [
        # Three groups of 50 rows: a warp's rows 124 to 127 and 128 of the second group take two rows of scales.
        _case("native, 8 tokens", "smoke", 8, 160, (("fp8_block", 150),), groups=3, blocks=2),
        _case("GGUF, 8 groups", "smoke", 2, 96, (("q8_0", 72),), groups=8, blocks=3),
        _case("a row a group", "edges", 1, 64, (("bf16", 4),), groups=4),
    ]


def _proj_ob() -> list[Case]:
    return [
        _case("native, 8 tokens, 3 tiles", "smoke", 8, 2080, (("fp8_block", 33),), blocks=1),
        _case("GGUF, 3 tokens, 3 tiles", "smoke", 3, 4128, (("q8_0", 33),), blocks=1),
        _case("BF16, 8 tokens, 2 tiles", "edges", 8, 1056, (("bf16", 33),)),
        _case("F16, 2 tokens, 2 tiles", "edges", 2, 4160, (("f16", 5),)),
    ]


_SMALL = {"proj_in": _proj_in, "proj_q": _proj_q, "proj_oa": _proj_oa, "proj_ob": _proj_ob}


def cases(name: str) -> list[Case]:
    """Smoke and edges for the emulation, decode at the dimensions of V4-Flash; of the operation called ``name``."""
    decode = [
        _case(f"{recipe.title} n={n}", "decode", n, recipe.k, recipe.segments, groups=recipe.groups)
        for recipe in RECIPES[name]
        for n in recipe.n_tok
    ]
    return [*_SMALL[name](), *decode]
