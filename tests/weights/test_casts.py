"""Casts between 4-bit layouts: values stay bit for bit wherever the target can hold them, and changes are reported."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from ds4.errors import Ds4Error
from ds4.weights.formats import FORMATS, cast
from ds4.weights.formats.block_scale import E2M1_VALUES, pack_nibbles, pairs_to_runs, runs_to_pairs
from ds4.weights.formats.cast import MXFP4, NVFP4, Cast, cast_fp4, nvfp4_multiplier
from ds4.weights.tensor import PackedTensor

PROPERTY = settings(derandomize=True, deadline=None, max_examples=100)
E2M1 = torch.tensor(E2M1_VALUES, dtype=torch.float64)
ALL_CODES = torch.arange(256, dtype=torch.uint8).view(16, 16)  # 16 rows of 32 weights


def values(made: Cast) -> Tensor:
    """f32, decoded by the target's own function."""
    fmt = FORMATS[made.format]
    shape = (made.data.shape[0], made.data.shape[1] // fmt.block_bytes * fmt.block)
    return PackedTensor("x", made.format, shape, made.data, made.multiplier, made.parts).dequantize()


def official(exponents: list[int], codes: Tensor = ALL_CODES) -> tuple[Tensor, Tensor]:
    """(data, scale): official MXFP4 rows whose 32-blocks hold the rows of ``codes`` and have these k in turn."""
    scale = torch.tensor([k + 127 for k in exponents], dtype=torch.uint8)
    return codes.repeat(1, len(exponents)), scale.expand(codes.shape[0], -1).contiguous()


def definition(data: Tensor, scale: Tensor) -> Tensor:
    """f64 values of official MXFP4."""
    codes = torch.stack((data & 15, data >> 4), dim=-1).flatten(1).long()
    return E2M1[codes] * torch.exp2(scale.double() - 127).repeat_interleave(32, dim=1)


def e4m3(byte: Tensor) -> Tensor:
    return byte.contiguous().view(torch.float8_e4m3fn).double()


def test_nibble_orders() -> None:
    """Weight i of the pairs is weight i of the runs, and the two are inverse to each other; 32 weights and 16."""
    for n in (16, 8):
        codes = torch.randint(0, 16, (5, 3, 2 * n), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
        pairs, runs = pack_nibbles(codes), codes[..., :n] | codes[..., n:] << 4
        assert torch.equal(pairs_to_runs(pairs), runs)
        assert torch.equal(runs_to_pairs(runs), pairs)
        assert not torch.equal(runs, pairs)


@PROPERTY
@given(hnp.arrays(np.uint8, (3, 64)), hnp.arrays(np.uint8, (3, 4), elements=st.integers(0, 254)))
def test_mxfp4_shuffle_is_reversible_byte_by_byte(data: np.ndarray, scale: np.ndarray) -> None:
    codes, exponent = torch.from_numpy(data), torch.from_numpy(scale)
    ggml = cast_fp4("mxfp4_official", "mxfp4", codes, exponent)
    assert (ggml.format, ggml.multiplier, ggml.n_inexact, ggml.parts) == ("mxfp4", 1.0, 0, {})
    assert torch.equal(values(ggml).double(), definition(codes, exponent).float().double())
    back = cast_fp4("mxfp4", "mxfp4_official", ggml.data)
    assert torch.equal(back.data, codes)
    assert torch.equal(back.parts["scale"], exponent)


@PROPERTY
@given(hnp.arrays(np.uint8, (2, 144)))
def test_nvfp4_layouts_are_reversible_byte_by_byte(blocks: np.ndarray) -> None:
    """Through all three of them, for every scale byte that a writer makes; so nothing but places change."""
    ggml = torch.from_numpy(blocks)
    ggml.view(8, 36)[:, :4].clamp_(1, 0x7E)
    scale = float(np.float32(0.37))
    sleepy = cast_fp4("nvfp4", "nvfp4_sleepy", ggml, scale=scale)
    assert torch.equal(values(sleepy), FORMATS["nvfp4"].dequantize(ggml, 256) * scale)
    modelopt = cast_fp4("nvfp4_sleepy", "nvfp4_modelopt", sleepy.data, scale=scale)
    assert torch.equal(values(modelopt), values(sleepy))
    back = cast_fp4("nvfp4_modelopt", "nvfp4", modelopt.data, modelopt.parts["scale"], scale=scale)
    assert torch.equal(back.data, ggml)
    assert {c.multiplier for c in (sleepy, modelopt, back)} == {scale}
    assert {c.n_inexact for c in (sleepy, modelopt, back)} == {0}


@pytest.mark.parametrize("source", MXFP4)
@pytest.mark.parametrize("target", NVFP4)
@pytest.mark.parametrize("k_max", [127 - 1, 5, -3, -110])
def test_mxfp4_to_nvfp4_holds_18_octaves(source: str, target: str, k_max: int) -> None:
    """All codes under every exponent from k_max down to k_max - 17: codes verbatim, scales the powers 2^8 to 2^-9."""
    exponents = [max(-127, k_max - 17 + n % 18) for n in range(24)]
    data, scale = official(exponents)
    made = cast_fp4(source, target, *given_as(source, data, scale))
    assert (made.format, made.multiplier, made.n_inexact) == (target, 2.0 ** (k_max - 8), 0)
    assert torch.equal(values(made).double(), definition(data, scale).float().double())
    if target == "nvfp4_modelopt":
        assert torch.equal(made.data, data)
        expected = torch.exp2(torch.tensor(exponents).double() - k_max + 8)
        assert torch.equal(e4m3(made.parts["scale"]), expected.repeat_interleave(2).expand(16, -1))
    back = cast_fp4(target, source, made.data, *made.parts.values(), scale=made.multiplier)
    assert back.n_inexact == 0
    for ours, original in zip((back.data, *back.parts.values()), given_as(source, data, scale), strict=True):
        assert torch.equal(ours, original)


def given_as(source: str, data: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """Official MXFP4 in either layout."""
    if source == "mxfp4_official":
        return data, scale
    return (torch.cat((scale.unsqueeze(-1), pairs_to_runs(data.unflatten(1, (-1, 16)))), dim=-1).flatten(1),)


@pytest.mark.parametrize("octaves", [16, 17, 18, 19, 40])
def test_the_boundary_of_17_octaves(octaves: int) -> None:
    data, scale = official([0, -octaves])
    made = cast_fp4("mxfp4_official", "nvfp4_modelopt", data, scale)
    expected, got = definition(data, scale), values(made).double()
    assert torch.equal(got[:, :32], expected[:, :32])
    wrong = (got != expected).unflatten(1, (-1, 16)).any(-1).nonzero()
    wrong[:, 1] *= 16
    assert torch.equal(made.inexact, wrong)
    assert made.n_inexact == (0 if octaves <= 17 else int((wrong[:, 1] >= 32).sum()))
    assert (made.n_inexact > 0) == (octaves > 17)
    # What is out of reach is rounded to the nearest multiple of 2^-10 times the multiplier, not flushed to zero.
    step = 2.0 ** (-8 - 10)
    assert torch.equal(got[:, 32:], (expected[:, 32:] / step).round() * step)
    if octaves == 18:
        assert got[:, 32:].abs().max() == 6 * 2.0**-18


def test_a_block_beyond_reach_that_fits_all_the_same_is_not_reported() -> None:
    """18 octaves down, but with codes whose halves are codes too."""
    data, scale = official([0, -18], torch.tensor([[0x62] * 16], dtype=torch.uint8))  # 1 and 4
    made = cast_fp4("mxfp4_official", "nvfp4_modelopt", data, scale)
    assert made.n_inexact == 0
    assert torch.equal(values(made).double(), definition(data, scale))
    assert (made.data[0, 16:] == 0x41).all()  # .5 and 2


def test_blocks_of_zeros_do_not_count() -> None:
    """Neither for the largest exponent, nor as blocks out of reach; a tensor of zeros has the multiplier 1."""
    data, scale = official([-40, 90, -57, -127, 0], torch.tensor([[0x31] * 16], dtype=torch.uint8))
    data[:, 16:32] = 0x80  # k = 90: zeros, some negative
    data[:, 48:] = 0  # k = -127 and 0
    assert nvfp4_multiplier("mxfp4_official", data, scale) == 2.0**-48
    made = cast_fp4("mxfp4_official", "nvfp4_modelopt", data, scale)
    assert (made.multiplier, made.n_inexact) == (2.0**-48, 0)
    assert torch.equal(values(made).double(), definition(data, scale))
    assert torch.equal(made.data, data)
    zeros = cast_fp4("mxfp4_official", "nvfp4_modelopt", torch.zeros_like(data), scale)
    assert (zeros.multiplier, zeros.n_inexact) == (1.0, 0)
    assert not values(zeros).any()
    back = cast_fp4("nvfp4_modelopt", "mxfp4", zeros.data, zeros.parts["scale"])
    assert back.n_inexact == 0
    assert not values(back).any()


def test_a_shared_multiplier() -> None:
    """Two tensors, three octaves apart, under the larger multiplier of theirs; and under one that is too small."""
    pair = [official([3, -10]), official([0, -13])]
    shared = max(nvfp4_multiplier("mxfp4_official", *tensor) for tensor in pair)
    assert shared == 2.0**-5
    for tensor in pair:
        made = cast_fp4("mxfp4_official", "nvfp4_modelopt", *tensor, multiplier=shared)
        assert (made.multiplier, made.n_inexact) == (shared, 0)
        assert torch.equal(values(made).double(), definition(*tensor))
    low = cast_fp4(
        "mxfp4_official", "nvfp4_modelopt", *pair[0], multiplier=2.0**-9
    )  # 2^3 is 16 times the largest scale
    assert values(low).abs().max() == 6 * 448 * 2.0**-9
    assert set(low.inexact[:, 1].tolist()) <= {0, 16}
    assert low.n_inexact > 0
    again = cast_fp4(
        "nvfp4_modelopt", "nvfp4_modelopt", low.data, low.parts["scale"], scale=2.0**-9, multiplier=2.0**-7
    )
    assert again.multiplier == 2.0**-7
    changed = (values(again) != values(low)).unflatten(1, (-1, 16)).any(-1)
    assert int(changed.sum()) == again.n_inexact
    with pytest.raises(ValueError, match="has no multiplier"):
        cast_fp4("nvfp4_modelopt", "mxfp4", low.data, low.parts["scale"], multiplier=0.5)
    for bad in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="finite and above 0"):
            cast_fp4("mxfp4_official", "nvfp4", *pair[0], multiplier=bad)


@PROPERTY
@given(
    codes=hnp.arrays(np.uint8, (2, 128)),
    scale=hnp.arrays(np.uint8, (2, 16), elements=st.integers(0, 126)),
    same=hnp.arrays(np.bool_, (2, 8)),
    power=hnp.arrays(np.bool_, (2, 8)),
    multiplier=st.sampled_from([1.0, 2.0**-8, 2.0**-130, 0.75, 1 / 3]),
)
def test_folding_back_says_what_changed(
    codes: np.ndarray, scale: np.ndarray, same: np.ndarray, power: np.ndarray, multiplier: float
) -> None:
    """Pairs of scales that are equal or not, powers of two or not; MXFP4 takes over exactly those it can hold."""
    data, byte = torch.from_numpy(codes), torch.from_numpy(scale).view(2, 8, 2)
    byte = torch.where(torch.from_numpy(power).unsqueeze(-1) & (byte > 8), byte & 0x78, byte)
    byte[..., 1] = torch.where(torch.from_numpy(same), byte[..., 0], byte[..., 1])
    byte = byte.view(2, 16)
    before = E2M1[torch.stack((data & 15, data >> 4), dim=-1).flatten(1).long()] * (
        e4m3(byte).repeat_interleave(16, dim=1) * multiplier
    )
    made = cast_fp4("nvfp4_modelopt", "mxfp4_official", data, byte, scale=multiplier)
    changed = (values(made).double() != before).unflatten(1, (-1, 32)).any(-1)
    where = changed.nonzero()
    where[:, 1] *= 32
    assert torch.equal(made.inexact, where)
    power_of_two = torch.frexp(e4m3(byte) * multiplier).mantissa == 0.5
    certain = power_of_two[:, 0::2] & (byte[:, 0::2] == byte[:, 1::2])
    if multiplier > 1e-3:  # so that no exponent is below -127
        assert not (changed & certain).any()
        assert torch.equal(made.data.view(2, 8, 16)[certain] & 0x77, data.view(2, 8, 16)[certain] & 0x77)


def test_folding_back_with_a_half_of_zeros() -> None:
    """A half without codes, or with a scale of zero, agrees with any other; under a scale of zero codes are zeros."""
    data = torch.tensor([[0x25] * 8 + [0x08] * 8 + [0x77] * 8 + [0x19] * 8], dtype=torch.uint8)
    byte = torch.tensor([[0x38, 0x41, 0x00, 0x30]], dtype=torch.uint8)  # 1, 2.25, 0, 0.5
    made = cast_fp4("nvfp4_modelopt", "mxfp4_official", data, byte)
    assert made.n_inexact == 0
    assert made.parts["scale"].tolist() == [[127, 126]]
    assert torch.equal(values(made), FORMATS["nvfp4_modelopt"].dequantize(data, 64, byte))
    assert made.data[0, 16:24].tolist() == [0] * 8


def test_negative_scales() -> None:
    """modelopt's and sleepy's mean what they say, and the sign goes into the codes; ggml ignores it and 0x7F is 0."""
    codes = torch.randint(0, 256, (1, 128), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    byte = torch.tensor([[0xB8, 0x38, 0x80, 0xFE, 0x81, 0x7E, 0xC1, 0x01] * 2], dtype=torch.uint8)
    before = FORMATS["nvfp4_modelopt"].dequantize(codes, 256, byte)
    assert (before[0, :16] < 0).any()
    assert (before[0, :16] > 0).any()
    sleepy = torch.cat((codes, byte), dim=1)
    for target in NVFP4:
        for source, given_bytes in (("nvfp4_modelopt", (codes, byte)), ("nvfp4_sleepy", (sleepy,))):
            made = cast_fp4(source, target, *given_bytes)
            assert made.n_inexact == 0
            assert torch.equal(values(made), before)
            if "scale" in made.parts:
                assert int(made.parts["scale"].max()) < 0x80
    ggml = torch.randint(0, 256, (1, 36), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    ggml[0, :4] = torch.tensor([0x7F, 0xB8, 0xFF, 0x30])
    made = cast_fp4("nvfp4", "nvfp4_modelopt", ggml)
    assert made.n_inexact == 0
    assert torch.equal(values(made), FORMATS["nvfp4"].dequantize(ggml, 64))
    assert values(made)[0, 16:32].any()


def test_scales_and_multipliers_that_are_not_numbers() -> None:
    data, scale = official([0, 1])
    scale[3, 1] = 0xFF
    for target in (*MXFP4, *NVFP4[:2]):
        with pytest.raises(Ds4Error, match="block scale that is not a finite number"):
            cast_fp4("mxfp4_official", target, data, scale)
    byte = torch.full((16, 4), 0x38, dtype=torch.uint8)
    byte[2, 3] = 0x7F
    with pytest.raises(Ds4Error, match="block scale that is not a finite number"):
        cast_fp4("nvfp4_modelopt", "mxfp4", data, byte)
    byte[2, 3] = 0x38
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(Ds4Error, match="multiplier"):
            cast_fp4("nvfp4_modelopt", "mxfp4", data, byte, scale=bad)
    for target in ("mxfp4", "nvfp4"):  # an expert of zeros may have a multiplier of 0
        assert not values(cast_fp4("nvfp4_modelopt", target, data, byte, scale=0.0)).any()
    with pytest.raises(ValueError, match="can be cast"):
        cast_fp4("q8_0", "mxfp4", data)
    with pytest.raises(ValueError, match="only MXFP4"):
        nvfp4_multiplier("nvfp4", data)


def test_tiles_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are cast a few rows at a time; reported rows and the multiplier are those of the whole tensor."""
    data, scale = official([0, -18, -17, -40], torch.cat((ALL_CODES, ALL_CODES.flip(0))))
    scale[20] += 3
    whole = cast_fp4("mxfp4_official", "nvfp4_modelopt", data, scale)
    assert whole.multiplier == 2.0**-5
    monkeypatch.setattr(cast, "_TILE", 5 * 128)
    tiled = cast_fp4("mxfp4_official", "nvfp4_modelopt", data, scale)
    assert tiled.multiplier == whole.multiplier
    for one, other in zip((whole.data, *whole.parts.values()), (tiled.data, *tiled.parts.values()), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(whole.inexact, tiled.inexact)
    assert len(set(tiled.inexact[:, 0].tolist())) > 10


@pytest.mark.parametrize(("source", "target"), [("mxfp4", "nvfp4_modelopt"), ("nvfp4_modelopt", "mxfp4_official")])
def test_the_argument_is_never_written_to(source: str, target: str) -> None:
    """It may be a read-only memory map; blocks that are rounded anew are written to copies."""
    data, *parts = FORMATS[source].encode(torch.randn(4, 128, generator=torch.Generator().manual_seed(2)))
    if source == "mxfp4":
        data.view(4, 4, 17)[..., 0] = torch.tensor([127, 100, 90, 80])
    before = [tensor.clone() for tensor in (data, *parts)]
    assert cast_fp4(source, target, data, *parts).n_inexact > 0
    for tensor, original in zip((data, *parts), before, strict=True):
        assert torch.equal(tensor, original)
