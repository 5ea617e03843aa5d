"""MXFP4 in both byte orders: 32 weights share a power-of-two scale, e8m0 byte e; weight = e2m1(code) * 2^(e - 127).

ggml      17 bytes a block: e, then 16 bytes; byte j holds weight j in the low nibble and weight j + 16 in the high one.
          Code 8 is +0, since ggml decodes through a table of integers.
official  16 bytes a block: byte j holds weight 2j in the low nibble and 2j + 1 in the high one; code 8 is -0.  The e
          bytes lie in a tensor of their own, ``<base>.scale`` [rows, n_cols / 32].
Source:  spec weights.md 4.6 (ggml) and 1 (official).
"""

from __future__ import annotations

import torch

from ds4.weights.formats.block_scale import (
    decode_e2m1_pairs,
    decode_e2m1_runs,
    e2m1_codes,
    e8m0_to_f32,
    finite,
    nearest_e2m1,
)
from ds4.weights.formats.plain import elements
from ds4.weights.formats.tiling import as_columns, by_row_tiles, column_sums, columns_to_pairs, columns_to_runs

BLOCK = 32
BLOCK_BYTES = 17
OFFICIAL_BLOCK_BYTES = 16


def dequantize(data: torch.Tensor, n_cols: int) -> torch.Tensor:
    """Decode packed rows in ggml's order.

    data     uint8 [n_rows, n_cols / 32 * 17], any strides
    returns  f32 [n_rows, n_cols], exact unless it overflows (e = 254 and code 6)
    Error:   Ds4Error for e = 255, not-a-number
    """
    blocks = data.reshape(-1, BLOCK_BYTES)
    scale = finite(e8m0_to_f32(blocks[:, :1]))
    values = decode_e2m1_runs(elements(blocks[:, 1:], torch.int64))
    return values.mul_(scale).view(data.shape[0], n_cols)


def dequantize_official(data: torch.Tensor, n_cols: int, scale: torch.Tensor) -> torch.Tensor:
    """Decode packed rows in the official order.

    data     uint8 [n_rows, n_cols / 2], any strides
    scale    uint8 [n_rows, n_cols / 32]
    returns  f32 [n_rows, n_cols], exact
    Error:   Ds4Error for a scale of 255, not-a-number
    """
    values = decode_e2m1_pairs(data).view(-1, BLOCK)
    return values.mul_(finite(e8m0_to_f32(scale)).reshape(-1, 1)).view(data.shape[0], n_cols)


def quantize(x: torch.Tensor) -> torch.Tensor:
    """Encode rows in ggml's order.

    A block's scale is 2^k or 2^(k + 1), whichever gives the smaller sum of squared errors, the smaller one if they are
    equal; 2^k is the largest power of two with amax >= 4 * 2^k (not below 2^-127), so that under it an amax above
    6 * 2^k becomes 6 * 2^k.  What is decoded is finite.  Codes are the nearest, ties to the even one.
    Not bit for bit the quantiser of the ``gguf`` package, which always takes 2^k (never a smaller error) and breaks
    ties towards zero.

    x        f32 [n_rows, n_cols], n_cols a multiple of 32, finite
    returns  uint8 [n_rows, n_cols / 32 * 17]; a block of zeros has e = 0, and zeros have code 0
    Error:   none for values that a block can hold; otherwise |x - decoded| <= amax / 4 in blocks of amax >= 2^-125
    """
    return by_row_tiles(_encode, x, BLOCK)[0]


def quantize_official(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode rows in the official order, by the rule of :func:`quantize`.

    x        f32 [n_rows, n_cols], n_cols a multiple of 32, finite
    returns  (uint8 [n_rows, n_cols / 2], scale uint8 [n_rows, n_cols / 32]); zeros keep their sign
    """
    data, scale = by_row_tiles(_encode_official, x, BLOCK)
    return data, scale


def _encode(x: torch.Tensor) -> tuple[torch.Tensor]:
    codes, exponent = encode_blocks(x)
    packed = columns_to_runs(codes.masked_fill_(codes == 8, 0))
    return (torch.cat((exponent.unsqueeze(-1), packed), dim=1).view(x.shape[0], -1),)


def _encode_official(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, exponent = encode_blocks(x)
    return columns_to_pairs(codes).reshape(x.shape[0], -1), exponent.view(x.shape[0], -1)


def encode_blocks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of both layouts, by the rule of :func:`quantize`.

    x        f32 [n_rows, n_cols], n_cols a multiple of 32, finite
    returns  (codes u8 0..15 [32, n], e8m0 bytes u8 [n]) of the n = n_rows * n_cols / 32 blocks in order; code 8 is -0
    """
    columns = as_columns(x, BLOCK)
    amax = columns.abs().amax(0)
    # frexp is exact where a logarithm may not be: amax = m 2^e with m in [1/2, 1)
    exponent = (torch.frexp(amax).exponent + (127 - 3)).clamp_min_(0)
    ratio = columns.div_(e8m0_to_f32(exponent))
    error = column_sums((nearest_e2m1(ratio) - ratio).square_())
    half = ratio * 0.5
    error_above = column_sums((nearest_e2m1(half) - half).square_()) * 4
    above = (error_above < error) & (exponent < 252)  # beyond, code 6 would be infinite
    ratio.mul_(torch.where(above, 0.5, 1.0))
    return e2m1_codes(ratio), ((exponent + above) * (amax > 0)).to(torch.uint8)
