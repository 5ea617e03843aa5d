"""Rounding to block-scaled 8- and 4-bit grids with power-of-two scales (spec model.md 5.1, 5.2), and their decoding.

Every rounding function works on the last dimension in blocks and is exact: a scale is a power of two, found on the bits
of the float, never through ``log2``.  Decoding goes through tables and ``index_select``, on a CPU the fastest look-up
that torch has: two 4-bit codes at a time, or one byte.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ds4.errors import Ds4Error

E4M3_MAX = 448.0
E2M1_MAX = 6.0
_E4M3_AMAX_FLOOR = 1e-4
_F32_EXPONENT = 0x7F800000
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


def nearest_e2m1(x: Tensor) -> Tensor:
    """f32 ``[...]`` -> the nearest E2M1 value, f32, ties to the even code; magnitudes above 6 become 6, and what
    becomes zero is +0."""
    x = x.clamp(-E2M1_MAX, E2M1_MAX)
    # Codes are half a power of two apart, and .5 below 1. Adding 1.5 * 2^23 steps leaves only whole steps in the sum.
    power = (x.view(torch.int32) & _F32_EXPONENT).view(torch.float32).clamp_min_(1.0)
    magic = power.mul_(0.5 * 1.5 * 2.0**23)
    return x.add_(magic).sub_(magic)


def e2m1_codes(x: Tensor) -> Tensor:
    """f32 ``[...]`` -> nearest E2M1 code (u8 0..15), ties to the even code; magnitudes above 6 become 6."""
    a = x.abs()
    # The codes are 2 a below 2, a + 2 up to 4 and a / 2 + 4 above, and elsewhere each of the three is too large.
    code = (a * 2).round_()
    code = torch.minimum(code, a.round().add_(2))
    code = torch.minimum(code, a.mul_(0.5).round_().add_(4)).clamp_max_(7).to(torch.uint8)
    return code.bitwise_or_(torch.signbit(x).to(torch.uint8) << 3)


def dequantize_e2m1(codes: Tensor, exponent: Tensor, block: int) -> Tensor:
    """Inverse of :func:`quantize_e2m1`; exact."""
    values = look_up(_e2m1_table(codes.device), codes).unflatten(-1, (-1, block))
    return values.mul_(e8m0_to_f32(exponent).unsqueeze(-1)).flatten(-2)


def round_e2m1(x: Tensor, block: int) -> Tensor:
    """``x`` rounded to the E2M1 grid with one power-of-two scale per ``block``."""
    return dequantize_e2m1(*quantize_e2m1(x, block), block)


def pack_nibbles(codes: Tensor) -> Tensor:
    """u8 0..15 ``[..., 2n]`` -> u8 ``[..., n]``: element 2i in the low nibble, 2i + 1 in the high one."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_nibbles`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def runs_to_pairs(packed: Tensor) -> Tensor:
    """ggml's nibble order to the official one.

    packed   u8 ``[..., n]``, n even, any strides: byte j holds weight j in the low nibble and j + n in the high one
    returns  u8 ``[..., n]``, new: byte j holds weight 2j in the low nibble and 2j + 1 in the high one
    """
    # Two bytes at a time: their low nibbles make one byte of the result, their high ones another.
    words = packed.clone(memory_format=torch.contiguous_format).view(torch.int16)
    low, high = (words & 15) | (words >> 4 & 240), (words >> 4 & 15) | (words >> 8 & 240)
    return torch.cat((low, high), dim=-1).to(torch.uint8)


def pairs_to_runs(packed: Tensor) -> Tensor:
    """Inverse of :func:`runs_to_pairs`."""
    low, high = packed.tensor_split(2, dim=-1)
    return torch.stack(((low & 15) | (high << 4), (low >> 4) | (high & 240)), dim=-1).flatten(-2)


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """``table [n]`` at ``index`` (integers of any type and shape, each < n); a new tensor of the shape of ``index``."""
    return table.index_select(0, index.to(torch.int32).flatten()).view(index.shape)


@functools.cache
def _e2m1_table(device: torch.device) -> Tensor:
    return torch.tensor(E2M1_VALUES, dtype=torch.float32, device=device)


@functools.cache
def _e2m1_pairs(device: torch.device) -> Tensor:
    """i64 [256]: the bits of the two f32 that a byte of two codes stands for, low nibble first."""
    values = _e2m1_table(device)
    return torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1).view(torch.int64).flatten()


@functools.cache
def _e2m1_spread_pairs(device: torch.device) -> Tensor:
    """i64 [0x1000]: the same for two codes in a byte each, the first one lower; code 8 is +0."""
    pairs = _e2m1_pairs(device).view(torch.float32).view(16, 1, 16, 2) + 0.0
    return pairs.expand(16, 16, 16, 2).contiguous().view(torch.int64).flatten()


def decode_e2m1_pairs(packed: Tensor) -> Tensor:
    """u8 ``[..., n]`` of two E2M1 codes, the even weight in the low nibble -> f32 ``[..., 2n]``."""
    return look_up(_e2m1_pairs(packed.device), packed).view(torch.float32)


def decode_e2m1_runs(words: Tensor) -> Tensor:
    """E2M1 codes in ggml's order, which puts a run of weights in the low nibbles of some bytes and the next run in the
    high ones.

    words    i64 [n, m], any strides: each row is 8 m bytes with two runs of 8 m weights
    returns  f32 [n, 16 m], new; code 8 is +0, as in ggml's table of integers
    """
    nibbles = torch.stack((words, words >> 4), dim=1).bitwise_and_(0x0F0F0F0F0F0F0F0F)
    values = look_up(_e2m1_spread_pairs(words.device), nibbles.view(torch.int16)).view(torch.float32)
    return values.view(words.shape[0], -1)


@functools.cache
def e4m3_table(device: torch.device) -> Tensor:
    """f32 [256]: the value of every e4m3 byte; unlike :func:`e4m3_to_f32` it has the not-a-numbers 0x7f and 0xff."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).to(torch.float32)


def finite(scale: Tensor) -> Tensor:
    """``scale`` itself; Ds4Error if one of these block scales is infinite or not a number."""
    # The sum is a quicker test; should it overflow, the numbers decide.
    if not math.isfinite(float(scale.sum())) and not bool(scale.isfinite().all()):
        raise Ds4Error("has a block scale that is not a finite number; the file is damaged")
    return scale
