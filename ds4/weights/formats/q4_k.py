"""Q4_K: 256 weights in 144 bytes, as eight sub-blocks of 32 with a 6-bit scale and a 6-bit minimum each.

bytes  0-1  f16 d;  2-3  f16 dmin;  4-15  packed scales s;  16-143  codes: byte 16 + 32 p + i holds weight i of
sub-block 2p in the low nibble and weight i of sub-block 2p + 1 in the high one.
scale  j < 4: s[j] & 63, minimum s[j + 4] & 63; j >= 4: low four bits from s[j + 4] (scale in its low nibble, minimum in
its high one), high two bits from the top of s[j - 4] (scale) and s[j] (minimum).
weight = d * scale * code - dmin * minimum.
Source:  spec weights.md 4.2.
"""

from __future__ import annotations

import torch

from ds4.weights.formats.block_scale import finite
from ds4.weights.formats.plain import elements

BLOCK = 256
BLOCK_BYTES = 144


def dequantize(data: torch.Tensor, n_cols: int) -> torch.Tensor:
    """Decode packed rows.

    data     uint8 [n_rows, n_cols / 256 * 144], any strides
    returns  f32 [n_rows, n_cols]; both products are exact, their difference is rounded once
    """
    blocks = data.reshape(-1, BLOCK_BYTES)
    d = finite(elements(blocks[:, :4], torch.float16).to(torch.float32))
    return weights(blocks[:, 16:].contiguous(), *sub_block_scales(blocks[:, 4:16]), d).view(data.shape[0], n_cols)


def sub_block_scales(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minima, 0..63, u8 [n, 8] each, of the bytes that hold them, u8 [n, 12]."""
    low, middle, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = torch.cat((low & 63, (high & 15) | (low >> 6 << 4)), dim=1)
    minimum = torch.cat((middle & 63, (high >> 4) | (middle >> 6 << 4)), dim=1)
    return scale, minimum


def weights(codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """f32 [n, 256] of blocks: codes u8 [n, 128], dense; scales and minima u8 [n, 8]; d and dmin f16 or f32 [n, 2]."""
    packed = codes.view(-1, 4, 32)
    unpacked = torch.stack((packed & 15, packed >> 4), dim=2).view(-1, 8, 32)
    d = d.to(torch.float32)
    values = unpacked.to(torch.float32).mul_((d[:, :1] * scale).unsqueeze(-1))
    return values.sub_((d[:, 1:] * minimum).unsqueeze(-1)).view(-1, BLOCK)
