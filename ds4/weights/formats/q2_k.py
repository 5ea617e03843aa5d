"""Q2_K: 256 weights in 84 bytes, as sixteen sub-blocks of 16 with a 4-bit scale and a 4-bit minimum each.

bytes  0-15  scale in the low nibble, minimum in the high one;  16-79  codes: those of weight w in byte
16 + 32 (w / 128) + w % 32, shifted by 2 (w % 128 / 32);  80-81  f16 d;  82-83  f16 dmin.
weight = d * scale * code - dmin * minimum.
Source:  spec weights.md 4.4.
"""

from __future__ import annotations

import torch

from ds4.weights.formats.block_scale import finite
from ds4.weights.formats.plain import elements

BLOCK = 256
BLOCK_BYTES = 84


def dequantize(data: torch.Tensor, n_cols: int) -> torch.Tensor:
    """Decode packed rows.

    data     uint8 [n_rows, n_cols / 256 * 84], any strides
    returns  f32 [n_rows, n_cols]; both products are exact, their difference is rounded once
    """
    blocks = data.reshape(-1, BLOCK_BYTES)
    d = finite(elements(blocks[:, 80:], torch.float16).to(torch.float32))
    return weights(blocks[:, 16:80].contiguous(), blocks[:, :16], d).view(data.shape[0], n_cols)


def weights(codes: torch.Tensor, scales: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """f32 [n, 256] of blocks: code bytes u8 [n, 64], dense; scale bytes u8 [n, 16]; d and dmin f16 or f32 [n, 2]."""
    packed = codes.view(-1, 2, 32)
    unpacked = torch.cat((packed, packed >> 2, packed >> 4, packed >> 6), dim=2).bitwise_and_(3).view(-1, 16, 16)
    d = d.to(torch.float32)
    values = unpacked.to(torch.float32).mul_((d[:, :1] * (scales & 15)).unsqueeze(-1))
    return values.sub_((d[:, 1:] * (scales >> 4)).unsqueeze(-1)).view(-1, BLOCK)
