"""The emulation of CUDA kernels on the CPU: example kernels of every kind agree with torch, in every thread order."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cuemu.backend import CpuBackend, missing
from cuemu.builder import kernel_library
from cuemu.calls import FIXTURES, kernel_call
from cuemu.module import ORDERS, Modules, Schedule
from torch import Tensor

from ds4.kernels.entry import KernelCall

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

EXAMPLES = FIXTURES / "examples.cu"
FP32 = 2.0**-24


@dataclass(frozen=True)
class Example:
    """Launches, what they write, and what that has to be: (name, got, want, largest allowed difference)."""

    calls: list[KernelCall]
    results: Callable[[], list[tuple[str, Tensor, Tensor, float]]]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rmsnorm(rows: int = 5, n: int = 512) -> Example:
    g = seeded(0)
    x, w = torch.randn(rows, n, generator=g).bfloat16(), torch.rand(n, generator=g)
    y, y8 = torch.empty_like(x), torch.empty(rows, n, dtype=torch.uint8)
    call = kernel_call(EXAMPLES, "rmsnorm", (rows, 1, 1), (128, 1, 1), x, w, y, y8, n, 1e-6)
    want = x.float() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-6).float() * w

    def results() -> list[tuple[str, Tensor, Tensor, float]]:
        # Neighbours on the grids, where the FP32 sums of kernel and torch fall on two sides of a rounding boundary.
        e4m3 = want.to(torch.float8_e4m3fn).float()
        got8 = y8.view(torch.float8_e4m3fn).float()
        return [
            ("bf16", y.float() / want, torch.ones_like(want), 2.0**-8),
            ("e4m3", (got8 - e4m3) / want.abs().clamp_min(2.0**-6), torch.zeros_like(want), 2.0**-3),
        ]

    return Example([call], results)


def gemv_q8_0(rows: int = 21, cols: int = 512) -> Example:
    g = seeded(1)
    scale = (torch.rand(rows, cols // 32, 1, generator=g) * 0.01).half()
    codes = torch.randint(-127, 128, (rows, cols // 32, 32), generator=g).to(torch.int8)
    w = torch.cat((scale.view(torch.uint8).view(rows, -1, 2), codes.view(torch.uint8)), dim=-1).contiguous()
    x, y = torch.randn(cols, generator=g), torch.full((rows,), torch.nan)
    call = kernel_call(EXAMPLES, "gemv_q8_0", (-(-rows // 4), 1, 1), (32, 4, 1), w, x, y, rows, cols)
    terms = (codes.double() * scale.double()).view(rows, cols) * x.double()
    # cols roundings of partial sums and products, each at most half a last place of the sum of magnitudes
    return Example([call], lambda: [("y", y, terms.sum(-1), float(cols * FP32 * terms.abs().sum(-1).max()))])


def attention(heads: int = 3, n_keys: int = 45, dim: int = 80, warps: int = 4) -> Example:
    g = seeded(2)
    q = torch.randn(heads, dim, generator=g)
    k, v = (torch.randn(heads, n_keys, dim, generator=g).half() for _ in range(2))
    out = torch.full((heads, dim), torch.nan)
    shared_bytes = 4 * (dim + warps * dim + 2 * warps)
    arguments = (q, k, v, out, n_keys, dim, dim**-0.5)
    call = kernel_call(EXAMPLES, "attention", (heads, 1, 1), (warps * 32, 1, 1), *arguments, shared_bytes=shared_bytes)
    scores = torch.einsum("hd,htd->ht", q.double(), k.double()) * dim**-0.5
    want = torch.einsum("ht,htd->hd", scores.softmax(-1), v.double())
    # a probability is wrong by the error of its score (dim roundings of terms of size 1) and of two exponentials
    return Example([call], lambda: [("out", out, want, float((dim + n_keys) * 4 * FP32 * v.abs().max()))])


def mma_gemm(m: int = 32, n: int = 24, k: int = 64) -> Example:
    g = seeded(3)
    a, b = torch.randn(m, k, generator=g).bfloat16(), torch.randn(n, k, generator=g).bfloat16()
    c = torch.full((m, n), torch.nan)
    call = kernel_call(EXAMPLES, "mma_gemm", (n // 8, m // 16, 1), (32, 1, 1), a, b, c, n, k)
    want = a.double() @ b.double().T
    # one rounding of the sum so far after every step of 16
    tolerance = float(k / 16 * FP32 * (a.abs().double() @ b.abs().double().T).max())
    return Example([call], lambda: [("c", c, want, tolerance)])


def pipeline(n: int = 22) -> Example:
    x, y = torch.randn(n, 128, generator=seeded(4)), torch.full((128,), torch.nan)
    call = kernel_call(EXAMPLES, "pipeline", (1, 1, 1), (128, 1, 1), x, y, n)
    want = torch.zeros(128)
    for row in x:  # the kernel's order
        want = want + row
    return Example([call], lambda: [("y", y, want, 0.0)])


def histogram(n: int = 1000) -> Example:
    ids = torch.randint(-5, 64, (n,), generator=seeded(5)).to(torch.int32)
    counts, negative = torch.zeros(64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    call = kernel_call(EXAMPLES, "histogram", (-(-n // 128), 1, 1), (128, 1, 1), ids, n, counts, negative)
    want = torch.bincount(ids[ids >= 0].long(), minlength=64)
    return Example([call], lambda: [("counts", counts, want, 0.0), ("negative", negative, (ids < 0).sum(), 0.0)])


def last_block_sum(blocks: int = 7, n: int = 900) -> Example:
    x = torch.randint(-100, 100, (n,), generator=seeded(6)).float()
    partial, out = torch.full((blocks,), torch.nan), torch.full((1,), torch.nan)
    arrived = torch.zeros(1, dtype=torch.int32)
    call = kernel_call(EXAMPLES, "last_block_sum", (blocks, 1, 1), (64, 1, 1), x, n, partial, arrived, out)
    return Example([call], lambda: [("out", out, x.sum(), 0.0)])  # integers: every order gives the same sum


def handover(n_tiles: int = 5) -> Example:
    x = torch.randint(0, 100, (n_tiles, 32), generator=seeded(7)).to(torch.int32)
    y = torch.full_like(x, -1)
    call = kernel_call(EXAMPLES, "handover", (1, 1, 1), (64, 1, 1), x, y, n_tiles)
    return Example([call], lambda: [("y", y, 2 * x.flip(-1), 0.0)])


def increment(n: int = 100, launches: int = 3) -> Example:
    x = [torch.arange(n, dtype=torch.int32), *(torch.empty(n, dtype=torch.int32) for _ in range(launches))]
    calls = [
        kernel_call(EXAMPLES, "increment", (2, 1, 1), (64, 1, 1), x[i], x[i + 1], n, pdl=i > 0) for i in range(launches)
    ]
    return Example(calls, lambda: [("y", x[-1], x[0] + launches, 0.0)])


def cluster_sum(blocks: int = 8, cluster: int = 4) -> Example:
    x = torch.randint(0, 100, (blocks, 32), generator=seeded(8)).to(torch.int32)
    y = torch.full_like(x, -1)
    call = kernel_call(
        FIXTURES / "cluster.cu", "cluster_sum", (blocks, 1, 1), (32, 1, 1), x, y, cluster=(cluster, 1, 1)
    )
    want = x.view(-1, cluster, 32).sum(1, keepdim=True).expand(-1, cluster, -1).reshape(blocks, 32)
    return Example([call], lambda: [("y", y, want, 0.0)])


EVERY = (
    rmsnorm,
    gemv_q8_0,
    attention,
    mma_gemm,
    pipeline,
    histogram,
    last_block_sum,
    handover,
    increment,
    cluster_sum,
)


def assert_right(example: Example) -> None:
    for name, got, want, tolerance in example.results():
        gap = (got.double() - want.double()).abs()
        assert bool((gap <= tolerance).all()), f"{name}: off by {gap.max()}, allowed {tolerance}"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("make", EVERY)
def test_example_agrees_with_torch(make, order):
    for seed in range(3 if order in ("random", "warps") else 1):
        example = make()
        CpuBackend("plain", order, seed).run(example.calls)
        assert_right(example)


@pytest.mark.parametrize("shape", [(1, 8), (2, 1000)])
def test_rmsnorm_of_other_widths(shape):
    example = rmsnorm(*shape)
    CpuBackend().run(example.calls)
    assert_right(example)


@pytest.mark.parametrize("order", ["forward", "warps"])
@pytest.mark.parametrize("mode", ["asan", "tsan"])
def test_examples_are_clean_under(mode, order, capsys):
    """Every example in one run of the sanitizer, about two seconds: no finding, and the results are right."""
    if missing(mode):
        pytest.skip(str(missing(mode)))
    examples = [make() for make in EVERY]
    CpuBackend(mode, order).run([call for example in examples for call in example.calls])
    for example in examples:
        assert_right(example)
    with capsys.disabled():
        print(f" {len(examples)} example kernels clean under {mode}, order {order} ")


def test_stacks_are_given_back_and_made_again(monkeypatch, tmp_path):
    """A process may load far more libraries than it may have stacks for."""

    def mapped() -> int:
        with open("/proc/self/maps") as maps:
            return sum(1 for _ in maps)

    modules = Modules()
    # Copies: a library that is loaded already would be the same one, with stacks from other tests.
    library = kernel_library(EXAMPLES, (), "plain")
    first, second = (Path(shutil.copy(library, tmp_path / name)) for name in ("first.so", "second.so"))
    example, schedule = rmsnorm(), Schedule("forward", 0, 60.0)
    monkeypatch.setattr(Modules, "MOST_THREADS", 100)
    before = mapped()
    for _ in range(3):
        module = modules.get(first)
        for call in example.calls:
            module.launch(call, schedule)
        assert module.n_threads == 128
        assert mapped() > before + 2 * 100
        assert all((got - want).abs().max() <= tol for _, got, want, tol in example.results())
        modules.get(second)  # leaves the first one's stacks, the oldest, no room
        assert module.n_threads == 0
        assert mapped() < before + 100
