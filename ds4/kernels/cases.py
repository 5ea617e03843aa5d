"""Cases of an operation: inputs, how its results are compared, and what it moves; for tests and benchmarks alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Inputs = dict[str, Any]  # tensors and plain numbers by argument name
Outputs = dict[str, Tensor]
Group = Literal["smoke", "decode", "edges", "golden"]


@dataclass(frozen=True)
class Exact:
    """Bit for bit: NaN payloads and the sign of zero count."""


@dataclass(frozen=True)
class Close:
    """Within ``abs_tol + rel_tol * |want|`` for every element; ``reason`` derives the tolerance in a sentence.

    ``open_where_nan``: a NaN of the reference says that this element is not specified.
    """

    abs_tol: float
    rel_tol: float
    reason: str
    open_where_nan: bool = False

    def __post_init__(self) -> None:
        if min(self.abs_tol, self.rel_tol) < 0 or not self.reason:
            raise ValueError("a tolerance is not negative and has a reason")


Compare = Exact | Close


@dataclass(frozen=True)
class Case:
    """One set of inputs of an operation.

    ``make(seed, device)`` returns fresh inputs; the same seed gives the same values on every device. ``compare`` names
    every result of the operation. ``bytes_moved`` counts the bytes that the kernels have to read and write once,
    ``flops`` the arithmetic (a multiply-add is 2). Groups: "smoke" is small enough for the emulation on the CPU,
    "decode" has real dimensions, "edges" ties, extremes and odd sizes, "golden" data of other implementations.
    """

    name: str
    group: Group
    make: Callable[[int, torch.device], Inputs]
    compare: Mapping[str, Compare]
    bytes_moved: int
    flops: int = 0


def bits(x: Tensor) -> Tensor:
    """``x`` as integers of its element size, for comparisons bit for bit."""
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def difference(got: Tensor, want: Tensor, compare: Compare) -> str | None:
    """None if ``got`` is ``want`` under ``compare``, else one line with the count, the worst element and its index.

    Both are brought to the CPU. A NaN agrees with a NaN only, an infinity with itself only.
    """
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{got.dtype} {list(got.shape)} instead of {want.dtype} {list(want.shape)}"
    got, want = got.cpu(), want.cpu()
    if isinstance(compare, Exact):
        wrong = bits(got) != bits(want)
    else:
        g, w = got.double(), want.double()
        same = (g == w) | (w.isnan() if compare.open_where_nan else g.isnan() & w.isnan())
        wrong = ~(same | ((g - w).abs() <= compare.abs_tol + compare.rel_tol * w.abs()) & w.isfinite())
    n_wrong = int(wrong.sum())
    if not n_wrong:
        return None
    gap = torch.where(wrong, (got.double() - want.double()).abs().nan_to_num(nan=torch.inf), -1.0)
    worst = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
    values = f"{got[worst].item()} instead of {want[worst].item()}"
    return f"{n_wrong} of {got.numel()} differ, worst at {list(worst)}: {values}"
