"""Cases of ``moe_up`` and ``moe_down``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ds4.kernels.cases import Case, Close, Compare, Group, Inputs
from ds4.kernels.packing import PACKINGS
from ds4.kernels.packing.planes import Plane

# Weights are scaled for dot products of spread 1. Tensor cores cut sums off: of a chunk of 128 columns of 4096, a sum
# of spread 0.18, in 8 steps by 2^-23 of it at most, all towards zero. If all 32 chunks were off by two such spreads
# and none the other way, that would be 8 * 32 * 2^-23 * 0.36 = 1.1e-5; additions of slices and parts, and the
# reference's, are rounded and add less. The product of gate, up and weight multiplies that by values of a few units,
# which the relative part takes.
_MID = Close(1.5e-5, 1.5e-5, "FP32 dot products summed in another order, then SwiGLU")
_Y = Close(3e-5, 1.5e-5, "FP32 dot products summed in another order, of several experts")
UP_COMPARE: dict[str, Compare] = {"mid": _MID}
DOWN_COMPARE: dict[str, Compare] = {"y": _Y}


@dataclass(frozen=True)
class Shape:
    """Sizes of a case, and the formats: of w1, w3, sw1, sw3, or of w2, sw2."""

    n_tok: int
    d: int
    inter: int
    n_experts: int
    top_k: int
    formats: tuple[str, ...]


def _bytes(rng: torch.Generator, *shape: int) -> Tensor:
    """Random u8 of a shape; eight at a time, as random numbers are what takes time."""
    n = int(torch.tensor(shape).prod())
    words = torch.empty(-(-n // 8), dtype=torch.int64).random_(-(2**63), 2**63 - 1, generator=rng)
    return words.view(torch.uint8)[:n].view(shape)


def _fields(rng: torch.Generator, fmt: str, plane: Plane, shape: tuple[int, int]) -> Tensor:
    """Random contents of a plane: any codes there are, and scales of one magnitude."""
    if plane.dtype.is_floating_point:
        if plane.name == "values":
            return torch.randn(shape, generator=rng).to(plane.dtype)
        scales = (torch.rand(shape, generator=rng) + 0.5) * 2.0**-6
        return scales.to(plane.dtype)
    data = _bytes(rng, shape[0], shape[1] * plane.dtype.itemsize).view(plane.dtype)
    if plane.name == "scales" and fmt.startswith("nvfp4"):
        return data % 0x18 + 0x28  # e4m3 numbers from 2^-2 to 2
    if plane.name == "scales" and fmt.startswith("mxfp4"):
        return data % 4 + 120
    if plane.name == "scales" and fmt == "q4_k":
        return data & 63
    if fmt == "fp8_block":
        return torch.where(data & 127 == 127, data - 1, data)  # no not-a-number
    return data


def random_planes(rng: torch.Generator, fmt: str, n_rows: int, n_cols: int) -> dict[str, Tensor]:
    """Planes of a random matrix, made without quantising; its values have some spread or other."""
    planes = {}
    for plane in PACKINGS[fmt].planes:
        shape = (plane.n_rows(n_rows), plane.row_bytes(n_cols) // plane.dtype.itemsize)
        planes[plane.name] = _fields(rng, fmt, plane, shape)
    return planes


def spread(fmt: str, planes: dict[str, Tensor], n_cols: int) -> float:
    """Root of the mean square of the first 128 rows' values."""
    parts = []
    for plane in PACKINGS[fmt].planes:
        parts.append(planes[plane.name][: plane.n_rows(128), : plane.width(n_cols)].contiguous())
    return float(PACKINGS[fmt].decode(*parts).double().square().mean().sqrt())


def matrix(rng: torch.Generator, name: str, fmt: str, rows: int, n_cols: int, n_experts: int | None) -> Inputs:
    """A matrix's inputs. Its multipliers bring products with unit vectors to a spread of 1, give or take a half."""
    planes = random_planes(rng, fmt, rows * (n_experts or 1), n_cols)
    factor = 1 / (spread(fmt, planes, n_cols) * n_cols**0.5)
    scale: Tensor | float = factor
    if n_experts is not None:
        scale = factor * (torch.rand(n_experts, generator=rng) + 0.5)
    return {f"{name}_format": fmt, f"{name}_scale": scale, **{f"{name}_{key}": v for key, v in planes.items()}}


def random_ids(rng: torch.Generator, shape: Shape) -> Tensor:
    """i32 [n_tok, top_k]: distinct experts for each token."""
    rows = [torch.randperm(shape.n_experts, generator=rng)[: shape.top_k] for _ in range(shape.n_tok)]
    return torch.stack(rows).to(torch.int32)


def on_device(device: torch.device, inputs: Inputs) -> Inputs:
    """``inputs`` with all tensors on ``device``."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def up_inputs(seed: int, device: torch.device, shape: Shape) -> Inputs:
    """Random inputs of ``moe_up``."""
    rng = torch.Generator().manual_seed(seed)
    inputs: Inputs = {
        "x": torch.randn(shape.n_tok, shape.d, generator=rng),
        "ids": random_ids(rng, shape),
        "weights": torch.rand(shape.n_tok, shape.top_k, generator=rng) + 0.1,
        "limit": 10.0,
    }
    for name, fmt in zip(("w1", "w3", "sw1", "sw3"), shape.formats, strict=True):
        inputs |= matrix(rng, name, fmt, shape.inter, shape.d, None if name.startswith("s") else shape.n_experts)
    return on_device(device, inputs)


def down_inputs(seed: int, device: torch.device, shape: Shape) -> Inputs:
    """Random inputs of ``moe_down``."""
    rng = torch.Generator().manual_seed(seed)
    inputs: Inputs = {
        "mid": torch.randn(shape.n_tok, shape.top_k + 1, shape.inter, generator=rng),
        "ids": random_ids(rng, shape),
    }
    for name, fmt in zip(("w2", "sw2"), shape.formats, strict=True):
        inputs |= matrix(rng, name, fmt, shape.d, shape.inter, None if name == "sw2" else shape.n_experts)
    return on_device(device, inputs)


Make = Callable[[int, torch.device], Inputs]
Change = Callable[[Inputs], None]


def _changed(make: Make, change: Change, seed: int, device: torch.device) -> Inputs:
    inputs = make(seed, torch.device("cpu"))
    change(inputs)
    return on_device(device, inputs)


def _same_experts(inputs: Inputs) -> None:
    """Every token the same experts, each with a ranking of its own."""
    ids = inputs["ids"]
    inputs["ids"] = torch.stack([ids[0].roll(t) for t in range(ids.shape[0])])


def _other_experts(inputs: Inputs) -> None:
    """No two tokens with a common expert."""
    n_tok, top_k = inputs["ids"].shape
    inputs["ids"] = torch.arange(n_tok * top_k, dtype=torch.int32).flip(0).view(n_tok, top_k)


def _repeated(inputs: Inputs) -> None:
    """Tokens that have an expert more than once, as no router gives, but a table of tokens could."""
    inputs["ids"] = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 2, 0], [2, 2, 1]], dtype=torch.int32)


def _zero_weights(inputs: Inputs) -> None:
    inputs["weights"][0] = 0
    inputs["weights"][1, 1] = 0


def _small_limit(inputs: Inputs) -> None:
    """Most gates and ups beyond the limit, on both sides."""
    inputs["limit"] = 0.25


def _no_scales(inputs: Inputs) -> None:
    """No multipliers at all; the matrices are large, so x is small."""
    for name in [name for name in inputs if name.endswith("_scale")]:
        inputs[name] = 1.0 if name.startswith("s") else None
    key = "x" if "x" in inputs else "mid"
    inputs[key] *= 2.0**-7


def _extreme_scales(inputs: Inputs) -> None:
    """The smallest scales that formats have, against activations of 2^100 and more; nothing here is normal in FP32 or
    f16 but the results."""
    key = "x" if "x" in inputs else "mid"
    inputs[key] *= 2.0**100
    for name in [name.removesuffix("_format") for name in inputs if name.endswith("_format")]:
        fmt, planes = inputs[f"{name}_format"], PACKINGS[inputs[f"{name}_format"]].planes
        tensor = inputs[f"{name}_d" if f"{name}_d" in inputs else f"{name}_scales"]
        if fmt.startswith("mxfp4"):
            tensor.copy_(tensor % 3)  # 2^-127, which FP32 has as a subnormal, to 2^-125
        elif fmt.startswith("nvfp4"):
            tensor.copy_(tensor % 7 + 1)  # subnormal e4m3 numbers
        else:
            tensor.mul_(2.0**-17)  # subnormal f16 numbers
        n_cols = inputs[key].shape[-1]
        now = spread(fmt, {plane.name: inputs[f"{name}_{plane.name}"] for plane in planes}, n_cols)
        factor = 1 / (now * n_cols**0.5) * 2.0**-100
        scale = inputs[f"{name}_scale"]
        inputs[f"{name}_scale"] = torch.full_like(scale, factor) if isinstance(scale, Tensor) else factor


def _case(name: str, group: Group, shape: Shape, make: Make, change: Change | None) -> Case:
    """Bytes: every (token, rank) pair counts as an expert of its own, but no more of them than there are."""
    up = len(shape.formats) == 4
    rows, cols = (shape.inter, shape.d) if up else (shape.d, shape.inter)
    pairs, half = shape.n_tok * shape.top_k, len(shape.formats) // 2
    sizes = [PACKINGS[fmt].nbytes(rows, cols) for fmt in shape.formats]
    moved = min(pairs, shape.n_experts) * sum(sizes[:half]) + sum(sizes[half:])
    moved += 4 * shape.n_tok * (shape.d + (shape.top_k + 1) * shape.inter)
    flops = 2 * half * (pairs + shape.n_tok) * rows * cols
    make = partial(_changed, make, change) if change else make
    return Case(name, group, make, UP_COMPARE if up else DOWN_COMPARE, moved, flops)


def _up(name: str, group: Group, shape: Shape, change: Change | None = None) -> Case:
    return _case(name, group, shape, partial(up_inputs, shape=shape), change)


def _down(name: str, group: Group, shape: Shape, change: Change | None = None) -> Case:
    return _case(name, group, shape, partial(down_inputs, shape=shape), change)


def _decode(make: Callable[[str, Group, Shape], Case], mixtures: Mapping[str, tuple[str, ...]]) -> list[Case]:
    """Cases at the dimensions of V4-Flash, 8 tokens for NVFP4 alone."""
    counts = [(name, n) for name in mixtures for n in (1, 2, 8) if name == "nvfp4" or n < 8]
    shapes = {(name, n): Shape(n, 4096, 2048, 32 if n > 2 else 16, 6, mixtures[name]) for name, n in counts}
    return [make(f"{name} n={n}", "decode", shape) for (name, n), shape in shapes.items()]


def up_cases() -> list[Case]:
    """Smoke and edges for the emulation; decode at the dimensions of V4-Flash, but with 16 or 32 experts instead of 256
    (matrices are made in seconds), so that 8 tokens share more of them than they would."""

    def small(n_tok: int, *formats: str, d: int = 256, inter: int = 32, n: int = 6, top_k: int = 2) -> Shape:
        return Shape(n_tok, d, inter, n, top_k, formats)

    nvfp4 = ("nvfp4", "nvfp4", "q8_0", "q8_0")
    smoke = [
        _up("nvfp4 8 tokens", "smoke", small(8, *nvfp4)),
        _up("mxfp4 and fp8", "smoke", small(3, "mxfp4", "mxfp4", "fp8_block", "fp8_block", inter=128, n=4)),
        _up("q4_k and q6_k", "smoke", small(3, "q4_k", "q4_k", "q6_k", "q6_k")),
        _up("iq2_xxs 8 tokens", "smoke", small(8, "iq2_xxs", "iq2_xxs", "q8_0", "q8_0")),
        _up("four formats", "smoke", small(3, "q2_k", "q6_k", "bf16", "f16")),
        _up("four others", "smoke", small(2, "f32", "nvfp4_modelopt", "nvfp4_sleepy", "mxfp4_official")),
    ]
    edges = [
        _up("all experts common", "edges", small(8, *nvfp4, top_k=3), _same_experts),
        _up(
            "q2_k, all experts common",
            "edges",
            small(8, "q2_k", "q2_k", "q2_k", "q2_k", d=2560, inter=16),
            _same_experts,
        ),
        _up("no expert common", "edges", small(4, *nvfp4, n=8), _other_experts),
        _up("every expert", "edges", small(3, *nvfp4, n=3, top_k=3)),
        _up("an expert twice", "edges", small(4, *nvfp4, n=3, top_k=3), _repeated),
        _up("two tiles of columns", "edges", small(8, "nvfp4", "q8_0", "bf16", "f32", d=1312, inter=16, n=3)),
        _up("rows of 4096", "edges", small(2, "q2_k", "iq2_xxs", "q6_k", "mxfp4", d=4096, inter=16, n=2, top_k=1)),
        _up("weights of zero", "edges", small(2, *nvfp4), _zero_weights),
        _up("clamps", "edges", small(2, *nvfp4), _small_limit),
        _up("no multipliers", "edges", small(2, *nvfp4), _no_scales),
        _up("extreme scales", "edges", small(2, "nvfp4", "mxfp4", "q8_0", "q4_k"), _extreme_scales),
        _up("150 experts", "edges", small(1, *nvfp4, inter=16, n=150, top_k=6)),
    ]
    flash = {
        "nvfp4": nvfp4,
        "mxfp4": ("mxfp4_official", "mxfp4_official", "fp8_block", "fp8_block"),
        "iq2_xxs": ("iq2_xxs", "iq2_xxs", "q8_0", "q8_0"),
        "q4_k": ("q4_k", "q4_k", "q8_0", "q8_0"),
    }
    return [*smoke, *edges, *_decode(_up, flash)]


def down_cases() -> list[Case]:
    """As :func:`up_cases`."""

    def small(n_tok: int, *formats: str, d: int = 64, inter: int = 256, n: int = 6, top_k: int = 2) -> Shape:
        return Shape(n_tok, d, inter, n, top_k, formats)

    nvfp4 = ("nvfp4", "q8_0")
    smoke = [
        _down("nvfp4 8 tokens", "smoke", small(8, *nvfp4)),
        _down("mxfp4 and fp8", "smoke", small(3, "mxfp4", "fp8_block")),
        _down("q2_k 8 tokens", "smoke", small(8, "q2_k", "q8_0")),
        _down("q4_k and q6_k", "smoke", small(3, "q4_k", "q6_k")),
        _down("iq2_xxs and bf16", "smoke", small(3, "iq2_xxs", "bf16")),
        _down("f16 and f32", "smoke", small(2, "f16", "f32")),
        _down("fp8 experts", "smoke", small(2, "fp8_block", "mxfp4_official", d=128, n=3)),
        _down("other layouts of nvfp4", "smoke", small(2, "nvfp4_modelopt", "nvfp4_sleepy")),
    ]
    edges = [
        _down("all experts common", "edges", small(8, *nvfp4, top_k=3), _same_experts),
        _down("q2_k, all experts common", "edges", small(8, "q2_k", "q2_k", d=32, inter=2560), _same_experts),
        _down("no expert common", "edges", small(4, *nvfp4, n=8), _other_experts),
        _down("every expert", "edges", small(3, *nvfp4, n=3, top_k=3)),
        _down("an expert twice", "edges", small(4, *nvfp4, n=3, top_k=3), _repeated),
        _down("odd sizes", "edges", small(8, "nvfp4", "q8_0", d=48, inter=1056, n=3)),
        _down("rows of 4096", "edges", small(2, "q4_k", "fp8_block", d=128, inter=4096, n=2, top_k=1)),
        _down("no multipliers", "edges", small(2, *nvfp4), _no_scales),
        _down("extreme scales", "edges", small(2, "mxfp4", "iq2_xxs"), _extreme_scales),
        _down("150 experts", "edges", small(1, *nvfp4, d=16, n=150, top_k=6)),
    ]
    flash = {
        "nvfp4": nvfp4,
        "mxfp4": ("mxfp4_official", "fp8_block"),
        "q2_k": ("q2_k", "q8_0"),
        "q4_k": ("q4_k", "q8_0"),
    }
    return [*smoke, *edges, *_decode(_down, flash)]
