"""NVFP4 as NVIDIA Model-Optimizer stores it: 16 weights in 8 bytes, byte j with weight 2j in the low nibble and 2j + 1
in the high one; the block scales are a tensor of their own, ``<base>.weight_scale``, e4m3 [rows, n_cols / 16].

weight = e2m1(code) * e4m3(scale) * ``weight_scale_2``, which multiplies the whole tensor (PackedTensor.scale).
Source:  spec weights.md 2.1.
"""

from __future__ import annotations

import torch

from ds4.weights.formats.block_scale import decode_e2m1_pairs, e4m3_table, finite, look_up
from ds4.weights.formats.nvfp4 import GROUP as BLOCK
from ds4.weights.formats.nvfp4 import encode_groups
from ds4.weights.formats.tiling import by_row_tiles, columns_to_pairs

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


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode rows; the scales by the rule of ``nvfp4.encode_groups``.

    x        f32 [n_rows, n_cols], n_cols a multiple of 16, finite, already divided by ``weight_scale_2``
    returns  (uint8 [n_rows, n_cols / 2], scale uint8 (e4m3) [n_rows, n_cols / 16]); zeros keep their sign
    """
    data, scale = by_row_tiles(_encode, x, BLOCK)
    return data, scale


def _encode(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = encode_groups(x)
    return columns_to_pairs(codes).reshape(x.shape[0], -1), scale.view(x.shape[0], -1)
