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
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat((low & 63, (high & 15) | (low >> 6 << 4)), dim=1)
    minimum = torch.cat((middle & 63, (high >> 4) | (middle >> 6 << 4)), dim=1)
    packed = blocks[:, 16:].reshape(-1, 4, 32)
    codes = torch.stack((packed & 15, packed >> 4), dim=2).view(-1, 8, 32)
    values = codes.to(torch.float32).mul_((d[:, :1] * scale).unsqueeze(-1))
    return values.sub_((d[:, 1:] * minimum).unsqueeze(-1)).view(data.shape[0], n_cols)
