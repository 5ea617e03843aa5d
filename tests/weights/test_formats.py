"""Stored formats: bit for bit against golden blocks and the gguf package."""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from ds4.errors import Ds4Error
from ds4.weights.formats import BY_GGML_TYPE, FORMATS, block_scale, nvfp4, q8_0
from ds4.weights.tensor import PackedTensor


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal including the sign of zero."""
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


@pytest.mark.parametrize("name", ["q8_0", "q4_k", "q6_k", "q2_k", "iq2_xxs", "mxfp4", "nvfp4"])
def test_golden_blocks(golden: Path, name: str) -> None:
    data = np.load(golden / "quant" / f"{name}.npz")
    blocks, values = torch.from_numpy(data["blocks"]), torch.from_numpy(data["values"])
    fmt = FORMATS[name]
    assert same_bits(fmt.dequantize(blocks, fmt.block), values)
    assert same_bits(fmt.dequantize(blocks[3:4, :].clone(), fmt.block), values[3:4])  # one block alone
    assert same_bits(fmt.dequantize(torch.cat((blocks, blocks), 1)[5:6, fmt.block_bytes :], fmt.block), values[5:6])
    # several blocks to a row, and rows that are a slice of wider ones
    wide = blocks.reshape(4, -1)
    assert same_bits(fmt.dequantize(wide, 4 * fmt.block), values.reshape(4, -1))
    half = wide[:, wide.shape[1] // 2 :]
    assert not half.is_contiguous()
    assert same_bits(fmt.dequantize(half, 2 * fmt.block), values.reshape(4, -1)[:, 2 * fmt.block :])


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "q8_0", "nvfp4"])
def test_random_blocks_equal_gguf_package(name: str) -> None:
    fmt = FORMATS[name]
    kind = gguf.GGMLQuantizationType(fmt.ggml_type)
    values = torch.randn(8, 256, generator=torch.Generator().manual_seed(1)) * 30
    assert fmt.quantize is not None
    blocks = fmt.quantize(values)
    if name == "nvfp4":  # every scale byte, with and without sign
        blocks = torch.randint(0, 256, (256, 36), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
        blocks[:, 0] = torch.arange(256)
        # 0xFF, a not-a-number that no writer makes, is 480 to the package and 0 to us; 0x7F is 0 to both
        blocks[:, :4] = blocks[:, :4].clamp(max=0xFE)
        blocks = blocks.view(64, 144)
    expected = torch.from_numpy(gguf.dequantize(blocks.numpy(), kind))
    assert same_bits(fmt.dequantize(blocks, 256), expected)


def reference_e2m1(packed: torch.Tensor, first_low: list[int], first_high: list[int]) -> torch.Tensor:
    """f32 [n, 2m] of u8 [n, m]: byte j has weight first_low[j] in the low nibble and first_high[j] in the high one."""
    values = torch.zeros(packed.shape[0], 2 * packed.shape[1])
    for j, (low, high) in enumerate(zip(first_low, first_high, strict=True)):
        for row, byte in enumerate(packed[:, j].tolist()):
            values[row, low] = block_scale.E2M1_VALUES[byte & 15]
            values[row, high] = block_scale.E2M1_VALUES[byte >> 4]
    return values


def test_sleepy_nvfp4_by_its_definition() -> None:
    """Codes first, pairs in natural order, then a scale for each 16; positive scales, negative ones and subnormals."""
    blocks = torch.randint(0, 256, (12, 144), generator=torch.Generator().manual_seed(9), dtype=torch.uint8)
    blocks[:, 128:] &= 0xF7  # no scale is a not-a-number
    scales = blocks[:, 128:].contiguous().view(torch.float8_e4m3fn).float()
    values = reference_e2m1(blocks[:, :128], list(range(0, 256, 2)), list(range(1, 256, 2)))
    expected = values * scales.repeat_interleave(16, dim=1)
    fmt = FORMATS["nvfp4_sleepy"]
    assert same_bits(fmt.dequantize(blocks, 256), expected)
    assert same_bits(fmt.dequantize(blocks.view(4, -1), 768), expected.view(4, 768))
    tensor = PackedTensor("x", "nvfp4_sleepy", (4, 768), blocks.view(4, -1), scale=2.0**-8)
    assert torch.equal(tensor.dequantize(rows=slice(1, 3)), expected.view(4, 768)[1:3] / 256)


def test_nibble_orders_and_layouts_are_told_apart() -> None:
    """The same bytes read in another order are other weights: what a mix-up would look like."""
    g = torch.Generator().manual_seed(10)
    codes = torch.randint(0, 256, (8, 64), generator=g, dtype=torch.uint8)
    scale = torch.randint(120, 130, (8, 4), generator=g, dtype=torch.uint8)
    official = FORMATS["mxfp4_official"].dequantize(codes, 128, scale)
    blocks = torch.cat((scale.unsqueeze(-1), codes.view(8, 4, 16)), dim=-1).flatten(1)
    as_ggml = FORMATS["mxfp4"].dequantize(blocks, 128)
    assert not torch.equal(as_ggml, official)
    assert torch.equal(as_ggml.view(8, 4, 32).sort(-1)[0], official.view(8, 4, 32).sort(-1)[0])  # permuted in a block
    runs = reference_e2m1(codes.view(32, 16), list(range(16)), list(range(16, 32))).view(8, 128)
    assert torch.equal(as_ggml, runs * torch.exp2(scale.float() - 127).repeat_interleave(32, dim=1))
    # Both NVFP4 layouts of type id 40 have 36 bytes for 64 weights.
    blocks = torch.randint(0, 127, (8, 144), generator=g, dtype=torch.uint8)
    ggml, sleepy = FORMATS["nvfp4"].dequantize(blocks, 256), FORMATS["nvfp4_sleepy"].dequantize(blocks, 256)
    assert ggml.shape == sleepy.shape
    assert not torch.equal(ggml, sleepy)


@pytest.mark.parametrize(("name", "byte"), [("nvfp4_sleepy", 0x7F), ("nvfp4_sleepy", 0xFF), ("mxfp4", 0xFF)])
def test_scales_that_are_not_numbers(name: str, byte: int) -> None:
    fmt = FORMATS[name]
    blocks = torch.zeros(2, 2 * fmt.block_bytes, dtype=torch.uint8)
    assert torch.equal(fmt.dequantize(blocks, 2 * fmt.block), torch.zeros(2, 2 * fmt.block))
    blocks[1, 0 if name == "mxfp4" else 140] = byte
    with pytest.raises(Ds4Error, match="block scale that is not a finite number"):
        fmt.dequantize(blocks, 2 * fmt.block)


@pytest.mark.parametrize(
    ("name", "byte"), [("nvfp4_modelopt", 0x7F), ("nvfp4_modelopt", 0xFF), ("mxfp4_official", 0xFF)]
)
def test_scales_in_parts_that_are_not_numbers(name: str, byte: int) -> None:
    fmt = FORMATS[name]
    scale = torch.zeros(2, 3, dtype=torch.uint8)
    data = torch.zeros(2, 3 * fmt.block_bytes, dtype=torch.uint8)
    assert torch.equal(fmt.dequantize(data, 3 * fmt.block, scale), torch.zeros(2, 3 * fmt.block))
    scale[1, 2] = byte
    with pytest.raises(Ds4Error, match="block scale that is not a finite number"):
        fmt.dequantize(data, 3 * fmt.block, scale)


def test_registry_agrees_with_gguf_package() -> None:
    ggml = [fmt for fmt in FORMATS.values() if fmt.ggml_type is not None]
    assert sorted(set(FORMATS) - {fmt.name for fmt in ggml}) == [
        "fp8_block",
        "mxfp4_official",
        "nvfp4_modelopt",
        "nvfp4_sleepy",
    ]
    for fmt in ggml:
        kind = gguf.GGMLQuantizationType(fmt.ggml_type)
        assert gguf.GGML_QUANT_SIZES[kind] == (fmt.block, fmt.block_bytes)
        assert kind.name.lower() == fmt.name
        assert BY_GGML_TYPE[kind] is fmt
        assert fmt.row_bytes(fmt.block * 3) == fmt.block_bytes * 3


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_q8_0_quantize_equals_gguf_package(scale: float) -> None:
    x = torch.randn(16, 320, generator=torch.Generator().manual_seed(3)) * scale
    x[0, :32] = 0
    x[1] = torch.arange(320) - 160  # exact halves after scaling, both signs
    x[2] = -0.0
    x[3, ::2] = 127 * 0.5
    assert torch.equal(q8_0.quantize(x), torch.from_numpy(gguf.quantize(x.numpy(), gguf.GGMLQuantizationType.Q8_0)))


def test_q8_0_tiny_values_become_zero() -> None:
    x = torch.full((1, 32), 1e-44)
    assert torch.equal(q8_0.dequantize(q8_0.quantize(x), 32), torch.zeros(1, 32))


def test_nvfp4_keeps_its_own_grid() -> None:
    blocks = torch.randint(0, 256, (64, 36), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    blocks[:, :4] %= 0x7F
    blocks[:, :4] += blocks[:, :4] == 0
    for sub in range(4):  # the largest code in every group, so that amax / 6 is the scale
        blocks[:, 4 + 8 * sub] |= 7
    values = nvfp4.dequantize(blocks, 64)
    assert torch.equal(nvfp4.dequantize(nvfp4.quantize(values), 64), values)


def test_nvfp4_error_bound_and_edges() -> None:
    x = torch.randn(32, 256, generator=torch.Generator().manual_seed(5))
    x[0] = 0
    x[1] = 1e30
    x[2] = -1e-30
    x[3, ::16] = 6 * 448
    packed = nvfp4.quantize(x)
    scales = packed.reshape(32, 4, 36)[..., :4]
    assert int(scales.max()) <= 0x7E
    decoded = nvfp4.dequantize(packed, 256)
    assert decoded.isfinite().all()
    assert torch.equal(decoded[0], torch.zeros(256))
    assert torch.equal(decoded[1], torch.full((256,), 6 * 448.0))
    assert torch.equal(decoded[2].abs(), torch.zeros(256))
    # Half the widest code gap (4..6) of the scale, plus 1/16 for rounding the scale itself.
    amax = x[4:].reshape(-1, 16).abs().amax(-1, keepdim=True)
    assert ((decoded[4:] - x[4:]).reshape(-1, 16).abs() <= amax / 6 * (1 + 6 / 16)).all()


def test_nvfp4_multiplier_uses_normal_scales() -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(6)) * 1e-3
    m = nvfp4.multiplier(x)
    assert math.frexp(m)[0] == 0.5  # a power of two: dividing is exact
    assert 224 < float(x.abs().max()) / 4 / m <= 448
    decoded = nvfp4.dequantize(nvfp4.quantize(x / m), 256) * m
    assert float((decoded - x).norm() / x.norm()) < 0.11
    assert nvfp4.multiplier(torch.zeros(1, 64)) == 1.0


def test_nearest_e2m1_against_brute_force() -> None:
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    x = torch.cat([torch.arange(-8, 8, 1 / 64), torch.tensor([-0.0, 1e-30, -1e-30, 1e30, -1e30])])
    codes, nearest = block_scale.e2m1_codes(x), block_scale.nearest_e2m1(x)
    assert torch.equal(nearest, torch.tensor(block_scale.E2M1_VALUES)[codes.long()])
    for value, code in zip(x.tolist(), codes.tolist(), strict=True):
        distance = (grid - min(abs(value), 6)).abs()
        best = (distance == distance.min()).nonzero().flatten().tolist()
        expected = next((b for b in best if b % 2 == 0), best[0])
        assert code & 7 == expected, value
        assert code >> 3 == (math.copysign(1, value) < 0), value


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "i32", "i64"])
def test_plain_formats_at_any_address(name: str) -> None:
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "i32": torch.int32, "i64": torch.int64}.get(
        name, torch.float32
    )
    values = torch.randint(-1000, 1000, (4, 6), generator=torch.Generator().manual_seed(7)).to(dtype)
    raw = values.view(torch.uint8)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), raw.flatten()])[1:].view(4, -1)
    tensor = PackedTensor("x", name, (4, 6), shifted)
    result = tensor.dequantize()
    assert torch.equal(result, values if name.startswith("i") else values.float())
    assert torch.equal(tensor.dequantize(rows=slice(1, 3)), result[1:3])
    assert tensor.nbytes == raw.numel()
    result.zero_()  # a new tensor, not a view
    assert raw.any()


def test_dequantize_scale_dtype_and_shapes() -> None:
    data = nvfp4.quantize(torch.randn(6, 64, generator=torch.Generator().manual_seed(8)))
    plain = PackedTensor("x", "nvfp4", (2, 3, 64), data).dequantize()
    scaled = PackedTensor("x", "nvfp4", (2, 3, 64), data, scale=0.5)
    assert torch.equal(scaled.dequantize(), plain * 0.5)
    assert scaled.dequantize(torch.bfloat16).dtype == torch.bfloat16
    scalar = PackedTensor("s", "f32", (), torch.tensor([[1.5]]).view(torch.uint8))
    assert scalar.dequantize().shape == ()
    with pytest.raises(ValueError, match="two dimensions"):
        scaled.dequantize(rows=slice(0, 1))
    assert repr(scaled) == "PackedTensor('x', nvfp4, [2, 3, 64], 216 bytes)"
