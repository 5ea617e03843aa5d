"""Cases of ``gemm``, and the matrices of V4-Flash that it is for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ds4.kernels.cases import Case, Close, Compare, Group, Inputs
from ds4.kernels.packing import PACKINGS
from ds4.kernels.picks import Pick
from ds4.kernels.proj.cases import ALL, RECIPES, Segments, random_planes, tolerance, zeros


@dataclass(frozen=True)
class Launch:
    """Matrices as the network launches them, with the types of their results."""

    title: str
    k: int
    segments: Segments
    out: tuple[str, ...]
    groups: int = 1


def _launches() -> tuple[Launch, ...]:
    """Those of a layer, of the released checkpoints and of GGUF files with Q8_0 (kernels.md a.2)."""
    out = {"proj_in": "f32", "proj_q": "bf16", "proj_oa": "bf16", "proj_ob": "f32"}
    found = [
        Launch(f"{name} {one.title}", one.k, one.segments, (out[name],) * len(one.segments), one.groups)
        for name, recipes in RECIPES.items()
        for one in recipes
    ]
    return (*found, *(Launch(f"router {fmt}", 4096, ((fmt, 256),), ("f32",)) for fmt in ("bf16", "f16")))


LAUNCHES = _launches()


def compared(k: int, out: str) -> Close:
    """For results of this type that are sums of k products, of magnitude 1."""
    sums = tolerance(k)
    if out == "f32":
        return replace(sums, open_where_nan=True)
    reason = f"{sums.reason}; then BF16's neighbour, 2^-7 off at most"
    return Close(sums.abs_tol, 2.0**-7 + sums.rel_tol, reason, open_where_nan=True)


def make_inputs(
    seed: int,
    device: torch.device,
    *,
    n_rows: int,
    k: int,
    segments: Segments,
    out: tuple[str, ...] | None = None,
    groups: int = 1,
    count: int | None = None,
    pick: Pick | None = None,
    change: Callable[[Inputs], None] | None = None,
) -> Inputs:
    """Random inputs, changed in place by ``change``. x has groups only where there are several."""
    rng = torch.Generator().manual_seed(seed)
    shape = (n_rows, groups, k) if groups > 1 else (n_rows, k)
    inputs: Inputs = {"x": torch.randn(shape, generator=rng).bfloat16()}
    inputs["count"] = None if count is None else torch.tensor([count], dtype=torch.int32)
    inputs["formats"] = tuple(name for name, _ in segments)
    inputs["out"] = out or ("f32",) * len(segments)
    inputs["pick"] = pick
    for i, (name, rows) in enumerate(segments):
        inputs[f"w{i}"], inputs[f"s{i}"] = random_planes(rng, name, rows, k)
    if change is not None:
        change(inputs)
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}


def _case(title: str, group: Group, n_rows: int, k: int, segments: Segments, **options: Any) -> Case:
    make = partial(make_inputs, n_rows=n_rows, k=k, segments=segments, **options)
    out, groups = options.get("out") or ("f32",) * len(segments), options.get("groups", 1)
    compare: dict[str, Compare] = {f"y{i}": compared(k, kind) for i, kind in enumerate(out)}
    moved = sum(PACKINGS[name].nbytes(rows, k) for name, rows in segments) + 2 * n_rows * groups * k
    moved += sum(n_rows * rows * (4 if kind == "f32" else 2) for (_, rows), kind in zip(segments, out, strict=True))
    return Case(title, group, make, compare, bytes_moved=moved, flops=2 * n_rows * k * sum(n for _, n in segments))


def _not_finite(inputs: Inputs) -> None:
    """A NaN in the first row of every format and in a token, and a product that overflows."""
    inputs["x"][1, 7] = torch.nan
    inputs["x"][0, 9] = 3e38
    for i, name in enumerate(inputs["formats"]):
        values, scales = inputs[f"w{i}"], inputs[f"s{i}"]
        if scales is None:
            values[0, 3] = torch.nan
        else:
            scales[0, 0] = torch.nan
        if name == "f32":
            values[1:, 9] = 4.0


_NATIVE: Segments = (("fp8_block", 33), ("fp8_block", 5), ("bf16", 17), ("bf16", 8))
_GGUF: Segments = (("q8_0", 40), ("f16", 33))
_BOTH = ("bf16", "f32")


def cases() -> list[Case]:
    """Smoke and edges for the emulation, decode at the dimensions of V4-Flash."""
    small = [
        _case("native, 13 tokens, tiles of 8", "smoke", 13, 288, _NATIVE, out=_BOTH * 2, pick=Pick(8, 3)),
        _case("GGUF, a row and a tile of 128", "smoke", 5, 160, _GGUF, out=_BOTH, count=3, pick=Pick(128, 2)),
        _case("groups", "smoke", 9, 96, (("fp8_block", 150),), out=("bf16",), groups=3),
        _case("one token of many", "edges", 4, 96, (("fp8_block", 150),), groups=3, out=("bf16",), count=1),
        _case("a token", "edges", 1, 160, ALL),
        _case("zeros", "edges", 2, 160, ALL, change=zeros),
        _case("not finite", "edges", 2, 160, ALL, change=_not_finite),
        _case("all formats, two tiles of 64", "edges", 67, 1056, ALL, pick=Pick(64, 2)),
        _case("several units", "edges", 17, 64, (("q8_0", 300), ("f32", 130)), out=_BOTH, pick=Pick(16, 4)),
        _case("one block of columns", "edges", 3, 32, (("fp8_block", 16), ("q8_0", 1))),
    ]
    large = [
        _case(f"{one.title} n={n}", "decode", n, one.k, one.segments, out=one.out, groups=one.groups)
        for one in LAUNCHES
        for n in ((8, 512) if one.title.startswith("proj_in") else (512,))
    ]
    return [*small, *large]
