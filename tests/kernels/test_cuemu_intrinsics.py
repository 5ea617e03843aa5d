"""The intrinsics that the emulation of CUDA kernels defines, and the order in which it runs threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuemu.backend import CpuBackend, missing
from cuemu.calls import FIXTURES, kernel_call
from cuemu.errors import KernelError
from cuemu.module import ORDERS

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

INTRINSICS = FIXTURES / "intrinsics.cu"


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def int32(values: np.ndarray) -> np.ndarray:
    return values.astype(np.uint64).astype(np.uint32).view(np.int32)


def bytes_of(words: np.ndarray, kind: str) -> np.ndarray:
    """[n, 4] of i32 ``words``, as i64 of bytes of type ``kind``."""
    return words.view(kind).reshape(-1, 4).astype(np.int64)


def byte_perm(a: int, b: int, selector: int) -> int:
    pool = (a & 0xFFFFFFFF | (b & 0xFFFFFFFF) << 32).to_bytes(8, "little")
    picks = [selector >> 4 * i & 15 for i in range(4)]
    chosen = [(255 if pool[k & 7] & 128 else 0) if k & 8 else pool[k & 7] for k in picks]
    return int.from_bytes(bytes(chosen), "little", signed=True)


def test_integer_intrinsics():
    rng = np.random.default_rng(0)
    n = 300
    a, b = (rng.integers(-(2**31), 2**31, n).astype(np.int32) for _ in range(2))
    a[:6], b[:6] = (0, 1, -1, -(2**31), 2**31 - 1, 0x01010101), (0, -1, 1, -(2**31), 2**31 - 1, 0x01010101)
    b[100:200] = a[100:200] ^ rng.choice([0, 0xFF, 0xFF00FF], 100).astype(np.int32)
    out = torch.zeros(19, n, dtype=torch.int32)
    CpuBackend().run([kernel_call(INTRINSICS, "integers", (2, 1, 1), (256, 1, 1), *map(torch.tensor, (a, b)), out, n)])
    ua, ub = a.view(np.uint32).astype(np.uint64), b.view(np.uint32).astype(np.uint64)
    sa, sb, pa, pb = bytes_of(a, "i1"), bytes_of(b, "i1"), bytes_of(a, "u1"), bytes_of(b, "u1")
    equal = np.where(pa == pb, 255, 0).astype(np.uint8).view(np.int32).ravel()
    both = [(int(x) << 32) | int(y) for x, y in zip(ua, ub, strict=True)]
    wants = [
        ("dp4a", (sa * sb).sum(1) + 7),
        ("dp4a unsigned", (pa * pb).sum(1) + 7),
        ("byte_perm", np.array([byte_perm(int(x), int(y), int(x) >> 16 & 0xFFFF) for x, y in zip(a, b, strict=True)])),
        ("vadd4", (pa + pb).astype(np.uint8).view(np.int32).ravel()),
        ("vsub4", (pa - pb).astype(np.uint8).view(np.int32).ravel()),
        ("vcmpeq4", equal),
        ("vcmpne4", ~equal),
        ("popc", np.array([int(x).bit_count() for x in ua])),
        ("clz", np.array([32 - int(x).bit_length() for x in ua])),
        ("ffs", np.array([(int(x) & -int(x)).bit_length() for x in ua])),
        ("brev", int32(np.array([int(f"{int(x):032b}"[::-1], 2) for x in ua]))),
        ("mulhi", a.astype(np.int64) * b.astype(np.int64) >> 32),
        ("umulhi", int32(ua * ub >> np.uint64(32))),
        ("funnelshift_l", int32(ub << np.uint64(5) & np.uint64(0xFFFFFFFF) | ua >> np.uint64(27))),
        ("funnelshift_r", int32(ua >> np.uint64(5) | ub << np.uint64(27) & np.uint64(0xFFFFFFFF))),
        ("min", np.minimum(a, b)),
        ("max", np.maximum(a, b)),
        ("popcll", np.array([x.bit_count() for x in both])),
        ("clzll", np.array([64 - x.bit_length() for x in both])),
    ]
    for row, (name, want) in zip(out.numpy(), wants, strict=True):
        assert np.array_equal(row, want.astype(np.int32)), name


def test_float_intrinsics_round_once():
    g = seeded(9)
    n = 1000
    x, y = torch.randn(n, generator=g) * 50, torch.rand(n, generator=g) * 20 + 0.01
    x[:6] = torch.tensor([0.5, 1.5, -0.5, 3e9, -3e9, torch.nan])
    out, ints = torch.zeros(10, n), torch.zeros(5, n, dtype=torch.int32)
    CpuBackend().run([kernel_call(INTRINSICS, "floats", (4, 1, 1), (256, 1, 1), x, y, out, ints, n)])
    a, b = x.double(), y.double()
    exact = (a + b, a - b, b * b, a / b, a * b + a, (x * y + x).double())
    for row, want in zip(out, (*exact, None, x.clamp(0, 1).nan_to_num(0), 1 / b, b.sqrt()), strict=True):
        if want is not None:  # rounded twice, to FP64 and FP32; with these values that makes no difference
            assert torch.equal(row.nan_to_num(77), want.float().nan_to_num(77))
    assert not torch.equal(out[4].nan_to_num(77), out[5].nan_to_num(77))  # fused is not what the operators do
    torch.testing.assert_close(out[6], b.rsqrt().float(), rtol=2 * 2.0**-23, atol=0)  # two roundings
    for row, rounding in zip(ints, (torch.round, torch.trunc, torch.floor, torch.ceil), strict=False):
        want = rounding(a).nan_to_num(0).clamp(-(2**31), 2**31 - 1)
        assert torch.equal(row.double(), want)
    assert torch.equal(ints[4].view(torch.uint32).double(), torch.round(a).nan_to_num(0).clamp(0, 2**32 - 1))


def test_half_fused_multiply_add():
    n, g = 64, seeded(11)
    x, y = torch.randn(n, generator=g).half(), torch.randn(n, generator=g).bfloat16()
    fx, fy = torch.zeros(2, n).half(), torch.zeros(2, n).bfloat16()
    CpuBackend().run([kernel_call(INTRINSICS, "half_fma", (1, 1, 1), (n // 2, 1, 1), x, y, fx, fy, n)])
    for got, v in ((fx, x.double()), (fy, y.double())):
        other = v.view(-1, 2, 2).flip(1).flatten()
        want = (other * v + v).to(got.dtype)
        assert torch.equal(got, want.expand(2, n))
        assert not torch.equal(want, (other * v).to(got.dtype) + v.to(got.dtype))  # rounding twice is something else


@pytest.mark.parametrize("order", ORDERS)
def test_warp_collectives(order):
    x = torch.randint(0, 100, (32,), generator=seeded(10)).to(torch.int32)
    out, lane = torch.full((14, 32), -1, dtype=torch.int32), torch.arange(32)
    CpuBackend(order=order).run([kernel_call(INTRINSICS, "collectives", (1, 1, 1), (32, 1, 1), x, out)])
    v = x.tolist()
    everywhere = torch.ones(32, dtype=torch.int64)
    wants = [
        x[5] * everywhere,
        x[lane // 8 * 8 + (lane + 1) % 8],
        x[lane ^ 3],
        x[torch.where(lane < 2, lane, lane - 2)],
        x[torch.where(lane % 4 < 2, lane, lane - 2)],
        x[torch.where(lane > 28, lane, lane + 3)],
        sum((i & 1) << k for k, i in enumerate(v)) * everywhere,
        0 * everywhere,
        everywhere,
        torch.tensor([sum((i % 4 == j % 4) << k for k, j in enumerate(v)) for i in v]),
        x.sum() * everywhere,
        torch.where(lane < 16, x[:16].max(), x[16:].max()),
        x.min() * everywhere,
        int(np.bitwise_xor.reduce(x.numpy())) * everywhere,
    ]
    for i, (row, want) in enumerate(zip(out, wants, strict=True)):
        assert torch.equal(row.to(torch.int64) & 0xFFFFFFFF, want.to(torch.int64)), i


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", [32, 40, 256])
def test_votes_and_atomics(order, n):
    x = torch.randint(0, 1000, (n,), generator=seeded(n)).to(torch.int32)
    votes, total = torch.full((3, n), -1, dtype=torch.int32), torch.zeros(1)
    cells = torch.tensor([0, 0, 5000, -1, -1, 0, 0, 0, 0, 0], dtype=torch.int32)
    CpuBackend(order=order).run(
        [kernel_call(INTRINSICS, "votes_and_atomics", (1, 1, 1), (n, 1, 1), x, votes, cells, total)]
    )
    assert votes.unique(dim=1).flatten().tolist() == [int((x & 1).sum()), 1, 0]
    v = x.numpy()
    bitwise = [f.reduce(v) for f in (np.bitwise_and, np.bitwise_or, np.bitwise_xor)]
    assert cells.tolist() == [v.sum(), -v.sum(), v.min(), v.max(), *bitwise, n % 5, v[0], v[1]]
    assert total.item() == n / 2


@pytest.mark.parametrize("order", ORDERS)
def test_threads_that_have_left_count_for_no_barrier(order):
    y = torch.full((64,), -1, dtype=torch.int32)
    CpuBackend(order=order).run([kernel_call(INTRINSICS, "early_leavers", (1, 1, 1), (64, 1, 1), y, 32)])
    assert y.tolist() == [*range(31, -1, -1), *([-1] * 32)]


def test_orders_are_what_they_say():
    """Three blocks of four warps: who runs when, in each order and with two seeds."""

    def arrivals(order: str, seed: int = 0) -> list[list[int]]:
        y, count = torch.zeros(3 * 128, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        CpuBackend(order=order, seed=seed).run([kernel_call(INTRINSICS, "arrivals", (3, 1, 1), (128, 1, 1), y, count)])
        blocks = y.view(3, 128)
        assert blocks.sort(dim=1).values.tolist() == [[128 * b + i for i in range(128)] for b in blocks[:, 0] // 128]
        return blocks.tolist()

    forward = [list(range(128 * b, 128 * b + 128)) for b in range(3)]
    assert arrivals("forward") == forward
    assert arrivals("lifo") == [block[::-1] for block in forward[::-1]]
    for order in ("random", "warps"):
        runs = [arrivals(order, seed) for seed in range(6)]
        assert runs[0] == arrivals(order, 0)
        assert len({str(run) for run in runs}) == 6
        assert len({str([block[0] // 128 for block in run]) for run in runs}) > 1  # the order of the blocks
    for block in arrivals("warps"):
        warps = [block[i : i + 32] for i in range(0, 128, 32)]
        assert all(warp == list(range(warp[0], warp[0] + 32)) for warp in warps)
    assert len({str([block[i] % 128 // 32 for i in range(0, 128, 32)]) for block in arrivals("warps")}) > 1


@pytest.mark.parametrize("order", ORDERS)
def test_nanosleep_lets_others_run(order):
    y = torch.zeros(1, dtype=torch.int32)
    CpuBackend(order=order, time_limit_s=5).run([kernel_call(INTRINSICS, "polite_wait", (1, 1, 1), (64, 1, 1), y)])
    assert y.item() == 32


def test_assert_names_thread_and_line():
    y = torch.zeros(64, dtype=torch.int32)
    CpuBackend().run([kernel_call(INTRINSICS, "asserting", (1, 1, 1), (64, 1, 1), y, 64)])
    text = r"assertion failed: .*< limit.* thread \(40,0,0\) at intrinsics\.cu:\d+"
    with pytest.raises(KernelError, match=text):
        CpuBackend().run([kernel_call(INTRINSICS, "asserting", (1, 1, 1), (64, 1, 1), y, 40)])
