"""Rounding to block-scaled 8- and 4-bit grids with power-of-two scales (spec model.md 5.1, 5.2).

Every function works on the last dimension in blocks and is exact: a scale is a power of two, found on the bits of the
float, never through ``log2``.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0
E2M1_MAX = 6.0
_E4M3_AMAX_FLOOR = 1e-4
_F32_SIGN_AND_E4M3 = -0x80000000 | 0x07F00000
_E2M1_AMAX_FLOOR = 6 * 2.0**-126
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def e8m0_to_f32(exponent: Tensor) -> Tensor:
    """``2^(byte - 127)`` of u8 ``exponent``; byte 0 gives 2^-127 (a denormal), as the format defines."""
    return (exponent.to(torch.int32) << 23).clamp_min_(0x00400000).view(torch.float32)


def pow2_ceil_exponent(amax: Tensor, grid_max: float) -> Tensor:
    """Biased exponent (i32, an E8M0 byte) of the smallest power of two >= ``amax * fp32(1 / grid_max)``."""
    # A Python scalar enters FP32 arithmetic rounded to FP32; a non-zero mantissa carries into the exponent.
    return ((amax * (1.0 / grid_max)).view(torch.int32) + 0x7FFFFF) >> 23


def quantize_e4m3(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """f32 ``[..., n]`` -> codes float8_e4m3fn ``[..., n]`` and scales u8 E8M0 ``[..., n / block]``."""
    blocks = x.unflatten(-1, (-1, block))
    amax = blocks.abs().amax(-1).clamp_min(_E4M3_AMAX_FLOOR)
    exponent = pow2_ceil_exponent(amax, E4M3_MAX)
    scale = (exponent << 23).view(torch.float32)
    codes = (blocks / scale.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.flatten(-2), exponent.to(torch.uint8)


def e4m3_to_f32(codes: Tensor) -> Tensor:
    """u8 or float8_e4m3fn ``[...]`` -> f32; several times faster on the CPU than torch's own conversion.

    The seven value bits are placed at the top of an f32's exponent and mantissa; one multiplication by 2^120 mends
    the bias and normalises subnormals exactly. NaN codes (0x7f, 0xff) do not occur in what ds4 stores.
    """
    # Sign-extended, so that one shift and one mask leave the sign at bit 31 and the value bits at 26..20.
    bits = (codes.view(torch.int8).to(torch.int32) << 20) & _F32_SIGN_AND_E4M3
    return bits.view(torch.float32) * 2.0**120


def dequantize_e4m3(codes: Tensor, exponent: Tensor, block: int) -> Tensor:
    """Inverse of :func:`quantize_e4m3`; exact."""
    values = e4m3_to_f32(codes).unflatten(-1, (-1, block))
    return (values * e8m0_to_f32(exponent).unsqueeze(-1)).flatten(-2)


def round_e4m3(x: Tensor, block: int) -> Tensor:
    """``x`` rounded to the e4m3 grid with one power-of-two scale per ``block`` (quantise, then dequantise)."""
    return dequantize_e4m3(*quantize_e4m3(x, block), block)


def quantize_e2m1(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """f32 ``[..., n]`` -> codes u8 0..15 ``[..., n]`` and scales u8 E8M0 ``[..., n / block]``.

    Ties go to the even code, as hardware conversion does: .25 -> 0, .75 -> 1, 2.5 -> 2, 5 -> 4.
    """
    blocks = x.unflatten(-1, (-1, block))
    amax = blocks.abs().amax(-1).clamp_min(_E2M1_AMAX_FLOOR)
    exponent = pow2_ceil_exponent(amax, E2M1_MAX)
    scale = (exponent << 23).view(torch.float32)
    return e2m1_codes(blocks / scale.unsqueeze(-1)).flatten(-2), exponent.to(torch.uint8)


def e2m1_codes(x: Tensor) -> Tensor:
    """f32 ``[...]`` -> nearest E2M1 code (u8 0..15), ties to the even code; magnitudes above 6 become 6."""
    a = x.abs()
    code = torch.zeros_like(a, dtype=torch.uint8)
    for threshold, tie_goes_up in zip((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0), (0, 1, 0, 1, 0, 1, 0), strict=True):
        code += (a >= threshold) if tie_goes_up else (a > threshold)
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def dequantize_e2m1(codes: Tensor, exponent: Tensor, block: int) -> Tensor:
    """Inverse of :func:`quantize_e2m1`; exact."""
    table = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=codes.device)
    values = table[codes.to(torch.int32)].unflatten(-1, (-1, block))
    return (values * e8m0_to_f32(exponent).unsqueeze(-1)).flatten(-2)


def round_e2m1(x: Tensor, block: int) -> Tensor:
    """``x`` rounded to the E2M1 grid with one power-of-two scale per ``block``."""
    return dequantize_e2m1(*quantize_e2m1(x, block), block)


def pack_nibbles(codes: Tensor) -> Tensor:
    """u8 0..15 ``[..., 2n]`` -> u8 ``[..., n]``: element 2i in the low nibble, 2i + 1 in the high one."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_nibbles`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
