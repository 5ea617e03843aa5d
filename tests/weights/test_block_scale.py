"""Properties of the block-scaled rounding (spec model.md 5.1, 5.2)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from ds4.weights.formats import block_scale

PROPERTY = settings(derandomize=True, deadline=None, max_examples=200)

GRIDS = pytest.mark.parametrize("grid", ["e4m3", "e2m1"])
BLOCK = {"e4m3": 64, "e2m1": 32}
MAX = {"e4m3": 448.0, "e2m1": 6.0}
FLOOR = {"e4m3": 1e-4, "e2m1": 6 * 2.0**-126}
QUANTIZE = {"e4m3": block_scale.quantize_e4m3, "e2m1": block_scale.quantize_e2m1}
ROUND = {"e4m3": block_scale.round_e4m3, "e2m1": block_scale.round_e2m1}
GRID_VALUES = {
    "e4m3": block_scale.e4m3_to_f32(torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)),
    "e2m1": torch.tensor(block_scale.E2M1_VALUES),
}


def bits(x: Tensor) -> Tensor:
    """For comparisons that tell -0 from 0."""
    return x.contiguous().view(torch.int32)


def tensors(n: int) -> st.SearchStrategy[Tensor]:
    """f32 ``[2, n]`` of values near each other or spread over the whole exponent range, on a common power of two."""
    wide = st.floats(-(2.0**20), 2.0**20, width=32)
    near = st.floats(-8, 8, width=32)
    arrays = st.one_of(hnp.arrays(np.float32, (2, n), elements=e, fill=e) for e in (wide, near))
    return st.builds(lambda a, k: torch.from_numpy(a) * 2.0**k, arrays, st.integers(-100, 90))


@GRIDS
@PROPERTY
@given(data=st.data())
def test_rounding_twice_is_rounding_once(grid: str, data: st.DataObject) -> None:
    x = data.draw(tensors(2 * BLOCK[grid]))
    once = ROUND[grid](x, BLOCK[grid])
    assert torch.equal(bits(ROUND[grid](once, BLOCK[grid])), bits(once))


@GRIDS
@PROPERTY
@given(data=st.data())
def test_scale_is_the_smallest_power_of_two_that_fits(grid: str, data: st.DataObject) -> None:
    """Per block. The quotient is formed with the FP32 reciprocal of the largest code, as the official code does it, so
    a largest value one ulp above the limit may still get the smaller scale; the clamp takes that ulp away."""
    block = BLOCK[grid]
    x = data.draw(tensors(2 * block))
    _, exponent = QUANTIZE[grid](x, block)
    assert exponent.shape == (2, 2)
    amax = x.unflatten(1, (2, block)).abs().amax(-1).clamp_min(FLOOR[grid]).double()
    quotient = amax / torch.exp2(exponent.double() - 127)
    assert (quotient <= MAX[grid] * (1 + 2.0**-23)).all()
    assert (quotient > MAX[grid] / 2).all()


@GRIDS
@PROPERTY
@given(data=st.data())
def test_every_value_goes_to_the_nearest_of_the_grid(grid: str, data: st.DataObject) -> None:
    block = BLOCK[grid]
    x = data.draw(tensors(block))
    _, exponent = QUANTIZE[grid](x, block)
    scale = torch.exp2(exponent.double() - 127)
    error = (ROUND[grid](x, block).double() - x.double()).abs()
    best = (GRID_VALUES[grid].double() * scale.unsqueeze(-1) - x.double().unsqueeze(-1)).abs().amin(-1)
    assert torch.equal(error, best)


@GRIDS
def test_blocks_have_scales_of_their_own(grid: str) -> None:
    """A block keeps its precision beside one that is a million times larger; with a shared scale it would vanish.
    This is what the golden of act_quant cannot see."""
    block = BLOCK[grid]
    x = torch.randn(4, 2 * block, generator=torch.Generator().manual_seed(0))
    factor = torch.ones(2 * block)
    factor[:block] = 2.0**20
    assert torch.equal(ROUND[grid](x * factor, block), ROUND[grid](x, block) * factor)
    assert ROUND[grid](x * factor, 2 * block)[:, block:].abs().max() == 0


@GRIDS
def test_scale_is_exact_where_the_largest_value_is_a_code(grid: str) -> None:
    """amax = max 2^k gets 2^k and not 2^(k + 1), which a logarithm in floating point may give; the next float up gets
    2^(k + 1) (the e4m3 reciprocal is rounded so that this holds there; see the property above for e2m1)."""
    for k in range(-20, 100):
        x = torch.zeros(1, BLOCK[grid])
        x[0, 5] = -MAX[grid] * 2.0**k
        codes, exponent = QUANTIZE[grid](x, BLOCK[grid])
        assert exponent.item() == 127 + k
        assert torch.equal(ROUND[grid](x, BLOCK[grid]), x)
        assert codes.view(torch.uint8)[0, 5] == (0xFE if grid == "e4m3" else 0xF)
        x[0, 5] *= 1 + 2.0**-21
        assert QUANTIZE[grid](x, BLOCK[grid])[1].item() == 128 + k


def test_scale_floor() -> None:
    """A block of zeros has a scale all the same: that of 1e-4 (e4m3), the smallest normal float (e2m1)."""
    assert block_scale.quantize_e4m3(torch.zeros(1, 64), 64)[1].item() == 127 + math.ceil(math.log2(1e-4 / 448))
    assert block_scale.quantize_e2m1(torch.zeros(1, 32), 32)[1].item() == 1
    for grid in ("e4m3", "e2m1"):
        x = torch.full((1, BLOCK[grid]), -0.0)
        assert torch.equal(bits(ROUND[grid](x, BLOCK[grid])), bits(x))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("scale", [2.0**-30, 1.0, 2.0**30])
def test_e2m1_ties_go_to_the_even_code(sign: int, scale: float) -> None:
    """All seven midpoints. The maker of the goldens breaks .75, 1.75 and 3.5 downwards, where hardware goes up."""
    x = torch.zeros(1, 32)
    x[0, :7] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    x[0, 7] = 6  # fixes the scale
    expected = torch.zeros(1, 32)
    expected[0, :8] = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0])
    assert torch.equal(block_scale.round_e2m1(sign * scale * x, 32), sign * scale * expected)
    assert block_scale.e2m1_codes(x[0, :7]).tolist() == [0, 2, 2, 4, 4, 6, 6]
    above = torch.nextafter(x[0, :7], torch.tensor(torch.inf))
    below = torch.nextafter(x[0, :7], torch.tensor(0.0))
    assert block_scale.e2m1_codes(above).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert block_scale.e2m1_codes(below).tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_e2m1_values_outside_the_grid_and_signs() -> None:
    codes = block_scale.e2m1_codes(torch.tensor([6.0, 7.0, 1e30, -7.0, -0.0, -0.1]))
    assert codes.tolist() == [7, 7, 7, 15, 8, 8]
    table = torch.tensor(block_scale.E2M1_VALUES)
    assert torch.equal(block_scale.e2m1_codes(table), torch.arange(16, dtype=torch.uint8))


def test_e4m3_conversion_equals_torch() -> None:
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    assert len(codes) == 254
    expected = codes.view(torch.float8_e4m3fn).to(torch.float32)
    assert torch.equal(bits(block_scale.e4m3_to_f32(codes)), bits(expected))
    assert torch.equal(bits(block_scale.e4m3_to_f32(codes.view(torch.float8_e4m3fn))), bits(expected))
    assert expected.max() == 448


def test_e4m3_ties_go_to_the_even_code() -> None:
    """Midpoints of all neighbours, normal and subnormal, through the quantiser (block maximum 448: scale 1)."""
    values = block_scale.e4m3_to_f32(torch.arange(127, dtype=torch.uint8))
    x = torch.zeros(3, 64)
    x[:, 63] = 448
    x[:, :42] = ((values[:-1] + values[1:]) / 2).view(3, 42)
    codes, exponent = block_scale.quantize_e4m3(x, 64)
    assert (exponent == 127).all()
    lower = torch.arange(126).view(3, 42)
    assert torch.equal(codes.view(torch.uint8)[:, :42].to(torch.int64), lower + lower % 2)


def test_e8m0() -> None:
    exponent = torch.arange(255, dtype=torch.uint8)
    assert block_scale.e8m0_to_f32(exponent).tolist() == [2.0 ** (e - 127) for e in range(255)]


@PROPERTY
@given(hnp.arrays(np.uint8, (3, 16), elements=st.integers(0, 15)), hnp.arrays(np.uint8, (3, 8)))
def test_nibbles(codes: np.ndarray, packed: np.ndarray) -> None:
    """Element 2i in the low nibble; both directions are inverse to each other."""
    one, other = torch.from_numpy(codes), torch.from_numpy(packed)
    assert torch.equal(block_scale.unpack_nibbles(block_scale.pack_nibbles(one)), one)
    assert torch.equal(block_scale.pack_nibbles(block_scale.unpack_nibbles(other)), other)
    assert torch.equal(block_scale.pack_nibbles(one) & 15, one[:, 0::2])
    assert torch.equal(block_scale.pack_nibbles(one) >> 4, one[:, 1::2])


@PROPERTY
@given(hnp.arrays(np.uint8, (2, 64)), hnp.arrays(np.uint8, (2, 2), elements=st.integers(100, 150)))
def test_stored_blocks_survive_decoding_and_rounding(packed: np.ndarray, exponent: np.ndarray) -> None:
    """Values of any stored FP4 block are on the grid they are rounded to, whatever scale they were stored with."""
    codes = block_scale.unpack_nibbles(torch.from_numpy(packed))[:, :64]
    values = block_scale.dequantize_e2m1(codes, torch.from_numpy(exponent), 32)
    assert torch.equal(bits(block_scale.round_e2m1(values, 32)), bits(values))
