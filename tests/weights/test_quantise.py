"""Quantisers: what a format can hold comes back unchanged, scales are chosen by the stated rules, any shape works."""

from __future__ import annotations

import itertools

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from ds4.weights.formats import FORMATS, block_scale, tiling
from ds4.weights.tensor import PackedTensor

PROPERTY = settings(derandomize=True, deadline=None, max_examples=150)
FP4 = ("mxfp4", "mxfp4_official", "nvfp4", "nvfp4_modelopt", "nvfp4_sleepy")
E2M1 = torch.tensor(block_scale.E2M1_VALUES, dtype=torch.float64)
E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()


def bits(x: Tensor) -> Tensor:
    """For comparisons that tell -0 from 0."""
    return x.contiguous().view(torch.int32)


def round_trip(name: str, x: Tensor) -> Tensor:
    """``x`` quantised and decoded again."""
    fmt = FORMATS[name]
    data, *parts = fmt.encode(x)
    assert data.dtype == torch.uint8
    assert data.shape == (x.shape[0], fmt.row_bytes(x.shape[1]))
    assert data.is_contiguous()
    return PackedTensor("x", name, tuple(x.shape), data, parts=dict(zip(fmt.parts, parts, strict=True))).dequantize()


def gaussian(n_rows: int, n_cols: int, seed: int = 0) -> Tensor:
    return torch.randn(n_rows, n_cols, generator=torch.Generator().manual_seed(seed))


def arrays(shape: tuple[int, ...], low: int, high: int) -> st.SearchStrategy[Tensor]:
    """u8 of a shape: any bytes of low..high, and often many alike, so that small codes fill whole blocks."""
    few = st.lists(st.integers(low, high), min_size=1, max_size=3).flatmap(
        lambda values: hnp.arrays(np.uint8, shape, elements=st.sampled_from(values))
    )
    return st.one_of(hnp.arrays(np.uint8, shape, elements=st.integers(low, high)), few).map(torch.from_numpy)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp4_official"])
@PROPERTY
@given(codes=arrays((3, 64), 0, 15), exponent=arrays((3, 2), 0, 252))
def test_whatever_mxfp4_holds_comes_back(name: str, codes: Tensor, exponent: Tensor) -> None:
    """Every exponent whose codes are all finite in f32, every code, so also blocks of small codes alone, whose scale
    the quantiser chooses otherwise, and e = 0, below which it may not go."""
    x = block_scale.dequantize_e2m1(codes, exponent, 32)
    got = round_trip(name, x)
    assert torch.equal(got, x)
    if name == "mxfp4_official":
        assert torch.equal(bits(got), bits(x))


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_modelopt", "nvfp4_sleepy"])
@PROPERTY
@given(codes=arrays((1, 256), 0, 15), scale=arrays((1, 16), 0, 126))
def test_whatever_nvfp4_holds_comes_back(name: str, codes: Tensor, scale: Tensor) -> None:
    x = block_scale.dequantize_e4m3(scale, torch.tensor([[127]], dtype=torch.uint8), 16).repeat_interleave(16, dim=1)
    x = E2M1[codes.long()].float() * x
    got = round_trip(name, x)
    assert torch.equal(got, x)
    if name != "nvfp4":
        assert torch.equal(bits(got), bits(x))


@pytest.mark.parametrize("largest", [1, 2, 3, 4, 5, 6, 7])
def test_every_nvfp4_scale_with_every_largest_code(largest: int) -> None:
    """All 126 scales times a group whose largest code is small: those below e4m3's normal range cannot be halved."""
    codes = torch.arange(16).remainder(largest + 1).flip(0)
    codes[0] = largest
    x = (E4M3[1:, None] * E2M1[codes]).float()
    assert torch.equal(round_trip("nvfp4_modelopt", x), x)


@PROPERTY
@given(
    codes=arrays((130, 129), 0, 255).map(lambda c: torch.where(c & 0x7F == 0x7F, 0x80, c)),
    exponent=arrays((2, 2), 0, 245),
)
def test_whatever_fp8_holds_comes_back(codes: Tensor, exponent: Tensor) -> None:
    """Every finite code, every exponent that keeps them finite in f32, tiles of 1 row and 1 column at the edges."""
    spread = exponent.repeat_interleave(128, 0).repeat_interleave(128, 1)[:130, :129]
    x = block_scale.e4m3_to_f32(codes) * block_scale.e8m0_to_f32(spread)
    assert torch.equal(bits(round_trip("fp8_block", x)), bits(x))


@PROPERTY
@given(codes=hnp.arrays(np.int8, (4, 32), elements=st.integers(-127, 127)), d=hnp.arrays(np.uint16, (4, 1)))
def test_what_a_q8_0_quantiser_wrote_comes_back(codes: np.ndarray, d: np.ndarray) -> None:
    """A code of 127 in every block, any finite scale but 0, subnormal and negative ones too."""
    codes[:, 7] = 127
    scale = torch.from_numpy(d).view(torch.float16).float()
    scale = torch.where(scale.isfinite() & (scale != 0), scale, torch.tensor(0.25))
    x = torch.from_numpy(codes).float() * scale
    assert torch.equal(round_trip("q8_0", x), x)


def squared_errors(x: Tensor, scales: Tensor) -> Tensor:
    """f64 [n_blocks, n_scales]: of ``x`` [n_blocks, block] in E2M1 under each of ``scales`` [n_blocks, n_scales]."""
    grid = E2M1[:8] * scales.double().unsqueeze(-1)
    distance = (x.double().abs()[:, None, :, None] - grid[:, :, None, :]).abs().amin(-1)
    return distance.square().sum(-1)


def error_of(name: str, x: Tensor, block: int) -> Tensor:
    return (round_trip(name, x).double() - x.double()).view(-1, block).square().sum(-1)


@pytest.mark.parametrize("factor", [1.0, 2.0**-100, 2.0**100])
def test_mxfp4_scale_is_the_better_of_two(factor: float) -> None:
    x = gaussian(64, 128) * factor
    blocks = x.view(-1, 32) / factor
    lower = torch.exp2(blocks.abs().amax(-1).log2().floor() - 2)
    both = squared_errors(blocks, torch.stack((lower, 2 * lower), dim=1))
    assert 0.1 < float((both[:, 1] < both[:, 0]).double().mean()) < 0.9  # each of the two is the better one at times
    for name in ("mxfp4", "mxfp4_official"):
        torch.testing.assert_close(error_of(name, x / factor, 32), both.amin(-1), rtol=1e-5, atol=0)
        assert torch.equal(round_trip(name, x), round_trip(name, x / factor) * factor)


def test_mxfp4_beside_the_gguf_package() -> None:
    """Never worse than its quantiser, which always takes the smaller scale and breaks ties towards zero."""
    x = gaussian(64, 128, seed=1)
    packed = gguf.quantize(x.numpy(), gguf.GGMLQuantizationType.MXFP4)
    theirs = FORMATS["mxfp4"].dequantize(torch.from_numpy(packed), 128)
    their_error = (theirs.double() - x.double()).view(-1, 32).square().sum(-1)
    ours = error_of("mxfp4", x, 32)
    assert (ours <= their_error * (1 + 1e-6)).all()
    assert ours.sum() < 0.97 * their_error.sum()  # 0.0124 against 0.0132 of the squares of Gaussian weights
    x = torch.zeros(2, 32)
    x[0, :4] = torch.tensor([6.0, 0.75, 1.75, 3.5])
    x[1, 20] = -0.0
    packed = torch.from_numpy(gguf.quantize(x.numpy(), gguf.GGMLQuantizationType.MXFP4))
    assert FORMATS["mxfp4"].dequantize(packed, 32)[0, :4].tolist() == [6.0, 0.5, 1.5, 3.0]
    assert round_trip("mxfp4", x)[0, :4].tolist() == [6.0, 1.0, 2.0, 4.0]
    assert torch.equal(FORMATS["mxfp4"].encode(x)[0][1], packed[1])  # a block of zeros: no bit is set


@pytest.mark.parametrize("size", [1.0, 2.0**-7])
def test_nvfp4_scale_is_the_best_of_its_candidates(size: float) -> None:
    """Also where amax / 6 is below the normal e4m3 numbers, and the list of candidates longer."""
    x = gaussian(32, 256, seed=2) * size
    groups = x.view(-1, 16)
    sixth = groups.abs().amax(-1, keepdim=True) / 6
    nearest = (E4M3 - sixth.double()).abs().argmin(-1, keepdim=True)
    quarter = (E4M3 - sixth.double() * 1.5).abs().argmin(-1, keepdim=True)
    scales = E4M3[torch.cat((nearest - 1, nearest, nearest + 1, quarter), dim=1).clamp(1, 126)]
    best = squared_errors(groups, scales).amin(-1)
    if size == 1:
        for name in ("nvfp4", "nvfp4_modelopt", "nvfp4_sleepy"):
            torch.testing.assert_close(error_of(name, x, 16), best, rtol=1e-5, atol=0)
        alone = squared_errors(groups, scales[:, 1:2]).sum()
        assert best.sum() < 0.8 * alone  # what the three further candidates are worth
    else:
        assert (sixth < 2.0**-6).any()
        assert (error_of("nvfp4_modelopt", x, 16) <= best * (1 + 1e-5)).all()


def test_fp4_edges() -> None:
    """Zeros, the smallest and the largest floats, lone outliers; nothing becomes infinite or not-a-number."""
    x = torch.zeros(8, 256)
    x[1] = -0.0
    x[2] = 2.0**-149
    x[3] = torch.finfo(torch.float32).max
    x[4] = -torch.finfo(torch.float32).max
    x[5, ::64] = 1e30
    x[6, ::64] = -(2.0**-128)
    x[7] = torch.linspace(-1e-3, 1e-3, 256)
    for name in FP4:
        got = round_trip(name, x)
        assert got.isfinite().all(), name
        assert torch.equal(got[:2], x[:2]), name
        if name.startswith("mxfp4"):
            assert torch.equal(got[2], torch.zeros(256))
            assert torch.equal(got[3], torch.full((256,), 6 * 2.0**125))
            assert torch.equal(got[4], -got[3])
            assert torch.equal(got[6], x[6])  # code 1 under the smallest scale
        else:
            assert torch.equal(got[3], torch.full((256,), 6 * 448.0))
    assert torch.equal(bits(round_trip("mxfp4_official", x)[1]), bits(x[1]))


@pytest.mark.parametrize("name", FP4)
def test_fp4_error_bounds(name: str) -> None:
    x = gaussian(64, 256, seed=3)
    block = 32 if name.startswith("mxfp4") else 16
    error = (round_trip(name, x) - x).view(-1, block).abs()
    amax = x.view(-1, block).abs().amax(-1, keepdim=True)
    assert (error <= amax * (0.25 if block == 32 else 0.2)).all()


@pytest.mark.parametrize("shape", [(1, 1), (127, 128), (129, 127), (256, 300), (3, 1000), (300, 5)])
def test_fp8_of_any_shape(shape: tuple[int, int]) -> None:
    """Every tile by the definition: the smallest power of two under which nothing exceeds 448, the nearest codes."""
    x = gaussian(*shape, seed=4) * torch.exp2(gaussian(*shape, seed=5) * 20)
    data, scale = FORMATS["fp8_block"].encode(x)
    assert data.shape == shape
    assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    got = round_trip("fp8_block", x)
    codes = block_scale.e4m3_to_f32(data).double()
    for i, j in itertools.product(*map(range, scale.shape)):
        tile = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
        power = 2.0 ** (int(scale[i, j]) - 127)
        assert 224 < float(x[tile].abs().max()) / power <= 448
        assert torch.equal(got[tile].double(), codes[tile] * power)
        error = (got[tile].double() - x[tile].double()).abs()
        assert (error <= torch.maximum(x[tile].double().abs() / 16, torch.tensor(power * 2.0**-10))).all()


def test_fp8_ties_scales_and_zeros() -> None:
    x = torch.zeros(3, 384)
    x[0, :3] = torch.tensor([448.0, 17.0, 19.0])  # both halfway between codes 2 apart
    x[1, 128] = torch.nextafter(torch.tensor(448.0), torch.tensor(500.0))
    x[2, 256] = -0.0
    data, scale = FORMATS["fp8_block"].encode(x)
    assert scale.tolist() == [[127, 128, 0]]
    assert round_trip("fp8_block", x)[0, :3].tolist() == [448, 16, 20]
    assert data[2, 256] == 0x80
    assert FORMATS["fp8_block"].encode(torch.full((1, 1), 2.0**-149))[1].tolist() == [[0]]


@pytest.mark.parametrize("name", ["q8_0", *FP4, "fp8_block"])
def test_rows_do_not_depend_on_their_neighbours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on how the rows are cut into tiles, nor on the memory layout or float type of the argument."""
    x = gaussian(300, 256, seed=6) * torch.exp2(gaussian(300, 1, seed=7) * 4)
    whole = FORMATS[name].encode(x)
    step = 128 if name == "fp8_block" else 7
    pieces = [FORMATS[name].encode(x[row : row + step]) for row in range(0, 300, step)]
    for part, joined in zip(whole, zip(*pieces, strict=True), strict=True):
        assert torch.equal(part, torch.cat(joined))
    monkeypatch.setattr(tiling, "_TILE", 1000)
    for part, tiled in zip(whole, FORMATS[name].encode(x.t().contiguous().t()), strict=True):
        assert torch.equal(part, tiled)
    half = x.to(torch.bfloat16)
    for part, other in zip(FORMATS[name].encode(half), FORMATS[name].encode(half.float()), strict=True):
        assert torch.equal(part, other)


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_modelopt", "nvfp4_sleepy"])
def test_multiplier_brings_any_tensor_into_range(name: str) -> None:
    """A power of two, so that dividing by it and multiplying again changes nothing that the format holds."""
    fmt = FORMATS[name]
    assert fmt.multiplier is not None
    x = gaussian(16, 256, seed=8)
    relative = []
    for size in (2.0**-60, 1.0, 2.0**60):
        m = fmt.multiplier(x * size)
        got = round_trip(name, x * size / m) * m
        assert torch.equal(round_trip(name, got / m) * m, got)
        relative.append(float((got / size - x).square().sum() / x.square().sum()))
    assert relative[0] == relative[1] == relative[2] < 0.0075  # 0.0069 for Gaussian weights


def test_what_cannot_be_quantised() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        FORMATS["mxfp4"].encode(torch.zeros(2, 40))
    with pytest.raises(ValueError, match="matrix"):
        FORMATS["fp8_block"].encode(torch.zeros(8))
    with pytest.raises(ValueError, match="matrix"):
        FORMATS["q8_0"].encode(torch.zeros(0, 64))
    with pytest.raises(ValueError, match="cannot write format 'q4_k'"):
        FORMATS["q4_k"].encode(torch.zeros(1, 256))
    assert [type(FORMATS[n].quantize(torch.zeros(1, 256))) for n in ("mxfp4", "fp8_block")] == [Tensor, tuple]  # type: ignore[misc]
