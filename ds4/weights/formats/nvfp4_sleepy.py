"""NVFP4 in sleepyeldrazi's GGUF dialect: 256 weights in 144 bytes, 128 bytes of e2m1 codes, then 16 e4m3 scales.

Byte j of the codes holds weight 2j in the low nibble and 2j + 1 in the high one; a scale serves 16 weights.
weight = e2m1(code) * e4m3(scale) * ``<base>.nvfp4_scale_2`` of its expert (PackedTensor.scale).
Files give such tensors the type id 40, which is ggml's own NVFP4, of the same size and another layout: only the suffix
``.nvfp4_weight`` of the name tells them apart.
Source:  spec weights.md 3.5.
"""

from __future__ import annotations

import torch

from ds4.weights.formats.block_scale import decode_e2m1_pairs, e4m3_table, finite, look_up
from ds4.weights.formats.nvfp4 import GROUP, encode_groups
from ds4.weights.formats.tiling import by_row_tiles, columns_to_pairs

BLOCK = 256
BLOCK_BYTES = 144
CODE_BYTES = 128


def dequantize(data: torch.Tensor, n_cols: int) -> torch.Tensor:
    """Decode packed rows, without ``nvfp4_scale_2``.

    data     uint8 [n_rows, n_cols / 256 * 144], any strides
    returns  f32 [n_rows, n_cols], exact
    Error:   Ds4Error for a scale of 0x7f or 0xff, not-a-number
    """
    blocks = data.reshape(-1, BLOCK_BYTES)
    values = decode_e2m1_pairs(blocks[:, :CODE_BYTES]).view(-1, GROUP)
    factor = finite(look_up(e4m3_table(data.device), blocks[:, CODE_BYTES:]))
    return values.mul_(factor.view(-1, 1)).view(data.shape[0], n_cols)


def quantize(x: torch.Tensor) -> torch.Tensor:
    """Encode rows; the scales by the rule of ``nvfp4.encode_groups``.

    x        f32 [n_rows, n_cols], n_cols a multiple of 256, finite, already divided by ``nvfp4_scale_2``
    returns  uint8 [n_rows, n_cols / 256 * 144]; zeros keep their sign
    """
    return by_row_tiles(_encode, x, BLOCK)[0]


def _encode(x: torch.Tensor) -> tuple[torch.Tensor]:
    codes, scale = encode_groups(x)
    packed = columns_to_pairs(codes).reshape(-1, CODE_BYTES)
    return (torch.cat((packed, scale.view(packed.shape[0], -1)), dim=1).view(x.shape[0], -1),)
