"""The headers for kernel authors (ds4/kernels/include): on the CPU they compute what torch and block_scale compute, and
they compile for every architecture."""

from __future__ import annotations

import math

import pytest
import torch
from cuemu.backend import CpuBackend, missing
from cuemu.calls import FIXTURES, kernel_call
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds4.kernels.arch import ARCHITECTURES
from ds4.kernels.compiler import compile_source
from ds4.weights.formats import block_scale

needs_emulation = pytest.mark.skipif(missing() is not None, reason=str(missing()))

HEADERS = FIXTURES / "headers.cu"


def run(name: str, n: int, *args: Tensor | int) -> None:
    """One thread for each of ``n`` elements."""
    CpuBackend().run([kernel_call(HEADERS, name, (-(-n // 256), 1, 1), (256, 1, 1), *args, n)])


def encoded(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """i32 codes of f32 ``x``: e4m3, e2m1, bf16, f16."""
    codes = torch.full((4, x.numel()), -1, dtype=torch.int32)
    run("encode", x.numel(), x, codes)
    e4m3, e2m1, bf16, f16 = codes
    return e4m3, e2m1, bf16, f16


def decoded(codes: Tensor) -> Tensor:
    """f32 [5, n] of i32 ``codes``: e4m3, e2m1, e8m0, bf16, f16."""
    values = torch.full((5, codes.numel()), torch.nan)
    run("decode", codes.numel(), codes, values)
    return values


def probes() -> Tensor:
    """FP32 values at, between and just beside those of all 16-bit floats, of both signs; infinities and zeros."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    values = torch.cat((every.view(torch.bfloat16).float(), every.view(torch.float16).float()))
    values = values[~values.isnan()]
    bits = values.view(torch.int32)
    beside = torch.cat((bits, bits + 1, bits - 1, bits + 0x8000, bits + 0x7FFF, bits + 0x1000))
    values = beside.view(torch.float32)
    random = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0))
    values = torch.cat((values, random.to(torch.int32).view(torch.float32)))
    return values[~values.isnan()].contiguous()


def bits16(x: Tensor) -> Tensor:
    return x.view(torch.int16).to(torch.int32) & 0xFFFF


@needs_emulation
def test_encoding_equals_torch(capsys):
    x = probes()
    e4m3, e2m1, bf16, f16 = encoded(x)
    # torch makes NaN of what lies beyond 448 and its neighbourhood; the kernels saturate, as block_scale does first
    want = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int32)
    assert torch.equal(e4m3, want)
    inside = x.abs() <= 464  # what torch itself rounds to a finite value
    assert torch.equal(e4m3[inside], x[inside].to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int32))
    assert torch.equal(e2m1, block_scale.e2m1_codes(x).to(torch.int32))
    assert torch.equal(bf16, bits16(x.to(torch.bfloat16)))
    assert torch.equal(f16, bits16(x.to(torch.float16)))
    by_toolkit = torch.full((2, x.numel()), -1, dtype=torch.int32)
    run("encode_by_toolkit", x.numel(), x, by_toolkit)
    assert torch.equal(by_toolkit[0], e4m3)
    assert torch.equal(by_toolkit[1], e2m1)
    with capsys.disabled():
        print(f" {x.numel()} values encoded in four formats as torch does ")


@needs_emulation
def test_nan_stays_nan_or_becomes_zero():
    e4m3, e2m1, bf16, f16 = encoded(torch.tensor([math.nan, -math.nan]))
    assert e4m3.tolist() == [0x7F, 0x7F]
    assert (e2m1 & 7).tolist() == [0, 0]
    assert bool(bf16.to(torch.int16).view(torch.bfloat16).isnan().all())
    assert bool(f16.to(torch.int16).view(torch.float16).isnan().all())


@needs_emulation
def test_decoding_equals_torch():
    codes = torch.arange(1 << 16, dtype=torch.int32)
    e4m3, e2m1, e8m0, bf16, f16 = decoded(codes)
    bytes_ = codes.to(torch.uint8)
    number = codes % 128 != 127
    assert torch.equal(e4m3[number], bytes_.view(torch.float8_e4m3fn).float()[number])
    assert torch.equal(e4m3.view(torch.int32), block_scale.e4m3_to_f32(bytes_).view(torch.int32))
    table = torch.tensor(block_scale.E2M1_VALUES)[(codes % 16).long()]
    assert torch.equal(e2m1.view(torch.int32), table.view(torch.int32))  # -0 too
    assert torch.equal(e8m0, block_scale.e8m0_to_f32(bytes_))
    assert torch.equal(bf16.view(torch.int32), codes << 16)
    want = codes.to(torch.int16).view(torch.float16).float()
    assert torch.equal(f16.nan_to_num(12345), want.nan_to_num(12345))


@needs_emulation
def test_decoding_words_equals_decoding_codes():
    words = torch.randint(-(2**31), 2**31, (1000,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    values = torch.full((1000, 14), torch.nan)
    run("decode_words", 1000, words, values)
    four = words.view(torch.uint8).view(1000, 4)
    low, high = four & 15, four >> 4
    eight = torch.stack((low, high), dim=-1).view(1000, 8)
    want = (
        block_scale.e4m3_to_f32(four),
        torch.tensor(block_scale.E2M1_VALUES)[eight.long()],
        words.view(torch.bfloat16).view(1000, 2).float(),
    )
    assert torch.equal(values.nan_to_num(12345), torch.cat(want, dim=1).nan_to_num(12345))


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """codes u8 [2, n, 32] and exponents u8 [2, n] of f32 ``x`` [n, 32]: e4m3, e2m1."""
    n = x.shape[0]
    codes, exponents = torch.full((2, n, 32), 99, dtype=torch.uint8), torch.full((2, n), 99, dtype=torch.uint8)
    CpuBackend().run([kernel_call(HEADERS, "quantise", (n, 1, 1), (32, 1, 1), x, codes, exponents, n)])
    return codes, exponents


@needs_emulation
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-130, 120), st.floats(0, 40))
def test_block_quantisation_equals_block_scale(seed, middle, spread):
    """Blocks of every magnitude FP32 has, with zeros among them: codes and scales of both formats, bit for bit."""
    g = torch.Generator().manual_seed(seed)
    exponent = middle + spread * (torch.rand(8, 32, generator=g) - 0.5)
    x = torch.randn(8, 32, generator=g) * torch.exp2(exponent.clamp(-140, 125))
    x[0] = 0
    x[1, ::2] = 0
    codes, exponents = quantised(x.contiguous())
    for i, (quantise, view) in enumerate(
        ((block_scale.quantize_e4m3, torch.uint8), (block_scale.quantize_e2m1, torch.uint8))
    ):
        want_codes, want_exponents = quantise(x, 32)
        assert torch.equal(exponents[i], want_exponents[:, 0])
        assert torch.equal(codes[i], want_codes.view(view))


@needs_emulation
def test_activations_equal_torch():
    edges = [0.0, -0.0, 19.99999, 20.0, 20.00001, 88.0, 89.0, 104.0, -87.0, -88.0, -89.0, -104.0, 3e38, -3e38]
    x = torch.cat((torch.tensor(edges), torch.linspace(-30, 30, 20_001), torch.linspace(-1e-3, 1e-3, 2001)))
    values = torch.full((3, x.numel()), torch.nan)
    run("activations", x.numel(), x, values)
    wide = x.double()
    wants = (torch.nn.functional.softplus(wide), torch.sigmoid(wide), torch.nn.functional.silu(wide))
    for got, want in zip(values, wants, strict=True):
        # expf, log1pf, the sum and the division are each within a last place or less, and so is e^-20, which softplus
        # drops above 20; where e^-x overflows, silu and sigmoid drop at most 3e-37
        gap = (got.double() - want).abs()
        assert bool((gap <= 4 * 2.0**-23 * want.abs() + 3e-37).all())


@needs_emulation
@pytest.mark.parametrize("x", [-math.inf, math.inf, math.nan])
def test_activations_of_what_is_not_finite(x):
    values = torch.zeros(3, 1)
    run("activations", 1, torch.tensor([x]), values)
    softplus, sigmoid, silu = values.flatten().tolist()
    if math.isnan(x):
        assert math.isnan(softplus)
        assert math.isnan(sigmoid)
        assert math.isnan(silu)
    else:
        assert (softplus, sigmoid) == ((0, 0) if x < 0 else (math.inf, 1))
        assert math.isnan(silu) if x < 0 else silu == math.inf


def butterfly(x: Tensor, width: int) -> Tensor:
    """The documented order: v + v[lane ^ offset], offset from half the width down to 1, in FP32."""
    lane = torch.arange(x.numel())
    offset = width // 2
    while offset:
        x = x + x[lane ^ offset]
        offset //= 2
    return x


@needs_emulation
@pytest.mark.parametrize(
    ("warps", "order", "mode"),
    [
        *((warps, order, "plain") for warps in (1, 2, 3, 32) for order in ("forward", "lifo", "warps")),
        (3, "forward", "tsan"),
    ],
)
def test_reductions_take_the_documented_order(warps, order, mode):
    if missing(mode):
        pytest.skip(str(missing(mode)))
    n = 32 * warps
    g = torch.Generator().manual_seed(warps)
    x = torch.randn(n, generator=g) * torch.exp2(torch.randint(-12, 12, (n,), generator=g).float())
    x[torch.randint(0, n, (4,), generator=g)] = x.max()  # ties
    values, indices = torch.full((8, n), torch.nan), torch.full((2, n), -1, dtype=torch.int32)
    block = (n, 1, 1) if warps == 1 else (16, n // 16, 1)
    CpuBackend(mode, order).run([kernel_call(HEADERS, "reductions", (1, 1, 1), block, x, values, indices)])
    of_warps = torch.zeros(32)
    of_warps[:warps] = butterfly(x, 32)[::32]
    assert torch.equal(values[0], butterfly(x, 32))
    assert torch.equal(values[1], butterfly(x, 4))
    assert torch.equal(values[2], x.view(-1, 8).amax(1).repeat_interleave(8))
    assert torch.equal(values[3], butterfly(of_warps, 32)[:1].expand(n))
    assert torch.equal(values[4], x.max().expand(n))
    assert torch.equal(values[7], 2 * values[3])  # exact, as a power of two
    first = x.view(warps, 32).argmax(1)  # torch's argmax takes the first of equal values on the CPU
    assert all(x.view(warps, 32)[i, : first[i]].lt(x.view(warps, 32)[i, first[i]]).all() for i in range(warps))
    assert torch.equal(indices[0].long(), (first + 32 * torch.arange(warps)).repeat_interleave(32))
    assert torch.equal(values[5], x[indices[0].long()])
    assert set(indices[1].tolist()) == {int((x == x.max()).nonzero()[0])}
    assert torch.equal(values[6], values[4])


@needs_emulation
def test_argmax_prefers_numbers_and_lower_indices():
    def argmax(*head: float) -> int:
        x = torch.full((64,), -math.inf)
        x[: len(head)] = torch.tensor(head)
        values, indices = torch.zeros(8, 64), torch.zeros(2, 64, dtype=torch.int32)
        CpuBackend().run([kernel_call(HEADERS, "reductions", (1, 1, 1), (64, 1, 1), x, values, indices)])
        return int(indices[1, 0])

    assert argmax(math.nan, 1.0, math.nan) == 1
    assert argmax(0.0, -0.0) == 0
    assert argmax(-0.0, 0.0) == 0
    assert argmax() == 0


@needs_emulation
def test_loads_and_stores_move_bytes():
    n = 5
    x = torch.randint(0, 256, (64 * n,), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    y, words = torch.zeros_like(x), torch.zeros(n, dtype=torch.int32)
    run("copies", n, x, y, words)
    assert torch.equal(y, x)
    assert torch.equal(words, x.view(n, 64)[:, 2:6].contiguous().view(torch.int32).flatten())


@needs_emulation
def test_tensor_core_fragments():
    """s8 is exact; the others, whose sums the twin takes in FP64, are off by the last rounding alone."""
    g = torch.Generator().manual_seed(3)
    a, b = (torch.randint(0, 256, (rows, 32), generator=g).to(torch.uint8) for rows in (16, 8))
    d = torch.full((16, 8), -1, dtype=torch.int32)
    warp = ((1, 1, 1), (32, 1, 1))
    CpuBackend().run([kernel_call(HEADERS, "mma_s8", *warp, a, b, d)])
    assert torch.equal(d, a.view(torch.int8).int() @ b.view(torch.int8).int().T)

    a, b = (torch.where(x % 128 == 127, 0, x).to(torch.uint8) for x in (a, b))
    f = torch.full((16, 8), torch.nan)
    CpuBackend().run([kernel_call(FIXTURES / "fp8_mma.cu", "mma_e4m3", *warp, a, b, f)])
    want = a.view(torch.float8_e4m3fn).double() @ b.view(torch.float8_e4m3fn).double().T
    assert torch.equal(f, want.float())

    p, q = (torch.randn(16, n, generator=g).bfloat16() for n in (16, 8))
    CpuBackend().run([kernel_call(HEADERS, "mma_bf16_transposed", *warp, p, q, f)])
    torch.testing.assert_close(f.double(), p.double().T @ q.double(), rtol=2.0**-23, atol=2.0**-30)


LIMITED = {"fp8_mma.cu": ARCHITECTURES[2:], "cluster.cu": ARCHITECTURES[3:]}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_headers_compile(architecture, capsys):
    """With NVRTC, without a warning or a spilled register; about a second each."""
    compiled = 0
    for file in ("headers.cu", "examples.cu", "intrinsics.cu", "faults.cu", *LIMITED):
        if architecture in LIMITED.get(file, ARCHITECTURES):
            cubin = compile_source(FIXTURES / file, (), architecture)
            assert not cubin.warnings
            assert not any(r.spill_store_bytes for r in cubin.resources.values())
            compiled += len(cubin.resources)
    with capsys.disabled():
        print(f" {compiled} fixture kernels compiled for {architecture} ")
