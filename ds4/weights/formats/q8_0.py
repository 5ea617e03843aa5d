"""Q8_0: blocks of 32 weights in 34 bytes, an f16 scale ``d`` then 32 int8 codes; weight = d * code.

Source:  spec weights.md 4.1; bit for bit the quantiser of the ``gguf`` package.
"""

from __future__ import annotations

import torch

from ds4.weights.formats.block_scale import finite
from ds4.weights.formats.plain import elements
from ds4.weights.formats.tiling import by_row_tiles

BLOCK = 32
BLOCK_BYTES = 34


def dequantize(data: torch.Tensor, n_cols: int) -> torch.Tensor:
    """Decode packed rows.

    data     uint8 [n_rows, n_cols / 32 * 34], any strides
    returns  f32 [n_rows, n_cols], exact (an f16 times an 8-bit integer fits f32)
    """
    blocks = data.reshape(-1, BLOCK_BYTES)
    scale = finite(elements(blocks[:, :2], torch.float16).to(torch.float32))
    values = elements(blocks[:, 2:], torch.int8).to(torch.float32)
    return values.mul_(scale).view(data.shape[0], n_cols)


def quantize(x: torch.Tensor) -> torch.Tensor:
    """Encode rows: d = amax / 127 in f32, code = round half away from zero of x / d, d then stored as f16.

    x        f32 [n_rows, n_cols], n_cols a multiple of 32, finite
    returns  uint8 [n_rows, n_cols / 32 * 34]
    Error:   |x - decoded| <= amax / 254 plus the rounding of d to f16; none for decoded blocks whose largest code is
             127 or -127, as it is in whatever a quantiser of this rule wrote, and whose d is a normal f16.  (A block
             with a smaller largest code could be held too, but gets a scale of its own: the price of being bit for bit
             the quantiser of others.)
    """
    return by_row_tiles(_encode, x, BLOCK)[0]


def _encode(x: torch.Tensor) -> tuple[torch.Tensor]:
    blocks = x.reshape(x.shape[0], -1, BLOCK)
    scale = blocks.abs().amax(dim=-1, keepdim=True) / 127.0
    inverse = 1.0 / scale  # infinite for a scale of 0, or so small that it becomes 0 as f16
    inverse = torch.where(inverse.isinf(), torch.zeros_like(scale), inverse)
    scaled = blocks * inverse
    magnitude = scaled.abs()
    whole = magnitude.floor()
    codes = scaled.sign() * (whole + (2 * (magnitude - whole)).floor())
    packed = torch.cat((scale.to(torch.float16).view(torch.uint8), codes.to(torch.int8).view(torch.uint8)), dim=-1)
    return (packed.reshape(x.shape[0], -1),)
