"""Unit goldens (spec model.md 8): loading, decoding of their packed operands, and the comparison all tests share."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ds4.weights.formats import block_scale

SUM_ORDER = 4e-6
"""Tolerance for FP32 results that differ only in the order of additions, relative to the largest value of the result:
measured 1e-6 at most (compressor_full, products of 256 terms), every deliberate mistake 1e-3 or more."""


def load_unit(golden: Path, name: str) -> dict[str, Tensor]:
    """Tensors of one unit golden; a missing file is an error, since the folder as a whole is there."""
    path = golden / "unit" / f"unit_{name}.safetensors"
    assert path.is_file(), f"{path} is missing"
    return load_file(path)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = SUM_ORDER) -> None:
    """Largest difference at most ``tolerance`` times the largest expected magnitude; 0 asks for equal values."""
    assert actual.shape == expected.shape
    difference = (actual - expected).abs().max().item()
    assert difference <= tolerance * expected.abs().max().item(), f"differs by {difference:.3e}"


def scale_bytes(scale: Tensor) -> Tensor:
    """E8M0 bytes of scales stored as f32; they must be powers of two."""
    exponent = (scale.view(torch.int32) >> 23).to(torch.uint8)
    assert torch.equal(block_scale.e8m0_to_f32(exponent), scale)
    return exponent


def decode_mxfp4(packed: Tensor, scale: Tensor, *, high_nibble_first: bool = False) -> Tensor:
    """u8 ``[m, k / 2]`` and f32 scales ``[m, k / 32]`` -> f32 ``[m, k]``; the flag makes the classic mistake."""
    codes = block_scale.unpack_nibbles(packed)
    if high_nibble_first:
        codes = codes.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return block_scale.dequantize_e2m1(codes, scale_bytes(scale), 32)


def decode_fp8(codes: Tensor, scale: Tensor) -> Tensor:
    """e4m3 ``[m, k]`` with one f32 scale per 128 x 128 -> f32 ``[m, k]``."""
    m, k = codes.shape
    exponent = scale_bytes(scale).repeat_interleave(128, 0)[:m]
    return block_scale.dequantize_e4m3(codes, exponent, k // scale.shape[1])


def half_split_rope(x: Tensor, cis: Tensor) -> Tensor:
    """The other rope convention (pairs i and i + n / 2), which this model does not use."""
    n = cis.shape[-1]
    a, b = x[..., -2 * n : -n], x[..., -n:]
    rotated = (a * cis.real - b * cis.imag, a * cis.imag + b * cis.real)
    return torch.cat((x[..., : -2 * n], *rotated), dim=-1)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
