"""NVFP4 as NVIDIA Model-Optimizer stores it: 16 weights in 8 bytes, byte j with weight 2j in the low nibble and 2j + 1
in the high one; the block scales are a tensor of their own, ``<base>.weight_scale``, e4m3 [rows, n_cols / 16].

weight = e2m1(code) * e4m3(scale) * ``weight_scale_2``, which multiplies the whole tensor (PackedTensor.scale).
Source:  spec weights.md 2.1.
"""

from __future__ import annotations

import torch

from ds4.weights.formats.block_scale import decode_e2m1_pairs, e4m3_table, finite, look_up

BLOCK = 16
BLOCK_BYTES = 8


def dequantize(data: torch.Tensor, n_cols: int, scale: torch.Tensor) -> torch.Tensor:
    """Decode packed rows, without ``weight_scale_2``.

    data     uint8 [n_rows, n_cols / 2], any strides
    scale    uint8 (e4m3) [n_rows, n_cols / 16]
    returns  f32 [n_rows, n_cols], exact
    Error:   Ds4Error for a scale of 0x7f or 0xff, not-a-number
    """
    values = decode_e2m1_pairs(data).view(-1, BLOCK)
    factor = finite(look_up(e4m3_table(data.device), scale))
    return values.mul_(factor.view(-1, 1)).view(data.shape[0], n_cols)
