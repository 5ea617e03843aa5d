"""MXFP4 in both byte orders: 32 weights share a power-of-two scale, e8m0 byte e; weight = e2m1(code) * 2^(e - 127).

ggml      17 bytes a block: e, then 16 bytes; byte j holds weight j in the low nibble and weight j + 16 in the high one.
          Code 8 is +0, since ggml decodes through a table of integers.
official  16 bytes a block: byte j holds weight 2j in the low nibble and 2j + 1 in the high one; code 8 is -0.  The e
          bytes lie in a tensor of their own, ``<base>.scale`` [rows, n_cols / 32].
Source:  spec weights.md 4.6 (ggml) and 1 (official).
"""

from __future__ import annotations

import torch

from ds4.weights.formats.block_scale import decode_e2m1_pairs, decode_e2m1_runs, e8m0_to_f32, finite
from ds4.weights.formats.plain import elements

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
