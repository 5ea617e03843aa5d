"""Q6_K: 256 weights in 210 bytes, as sixteen sub-blocks of 16 with an int8 scale each.

bytes  0-127  low four bits;  128-191  high two bits;  192-207  int8 scales;  208-209  f16 d.
Weight w of half h = w / 128, quarter g = w % 128 / 32, l = w % 32: its low bits are in byte 64 h + 32 (g & 1) + l, low
nibble for g < 2 and high nibble above; its high bits in byte 128 + 32 h + l, shifted by 2 g.
weight = d * scale[w / 16] * (code - 32).
Source:  spec weights.md 4.3.
"""

from __future__ import annotations

import torch

from ds4.weights.formats.block_scale import finite
from ds4.weights.formats.plain import elements

BLOCK = 256
BLOCK_BYTES = 210


def dequantize(data: torch.Tensor, n_cols: int) -> torch.Tensor:
    """Decode packed rows.

    data     uint8 [n_rows, n_cols / 256 * 210], any strides
    returns  f32 [n_rows, n_cols], exact (11 by 8 by 6 bits)
    """
    blocks = data.reshape(-1, BLOCK_BYTES)
    d = finite(elements(blocks[:, 208:], torch.float16).to(torch.float32))
    scale = elements(blocks[:, 192:208], torch.int8)
    return weights(blocks[:, :128], blocks[:, 128:192], scale, d).view(data.shape[0], n_cols)


def weights(low: torch.Tensor, high: torch.Tensor, scale: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """f32 [n, 256] of blocks: low bits u8 [n, 128], high bits u8 [n, 64]; scales i8 [n, 16]; d f16 or f32 [n, 1]."""
    halves = low.reshape(-1, 2, 64)
    low = torch.cat((halves & 15, halves >> 4), dim=2)
    top = high.reshape(-1, 2, 32)
    high = torch.cat((top << 4, top << 2, top, top >> 2), dim=2) & 48
    codes = (low | high).view(torch.int8) - 32
    factor = d.to(torch.float32) * scale
    return codes.view(-1, 16, 16).to(torch.float32).mul_(factor.unsqueeze(-1)).view(-1, BLOCK)
