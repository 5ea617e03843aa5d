"""IQ2_XXS: 256 weights in 66 bytes; eight weights at a time are one of 256 patterns of magnitudes, with signs.

bytes  0-1  f16 d;  then for each 32 weights four pattern numbers and a little-endian u32 x.  Bits 7l .. 7l + 6 of x are
the signs of the first seven weights of pattern l, and the eighth makes the count of minus signs even; bits 28-31 are
the scale.  weight = d * (0.5 + scale) / 4 * magnitude (8, 25 or 43) * sign.
Source:  spec weights.md 4.5; the patterns come from the ``gguf`` package, imported when the first tensor is decoded.
"""

from __future__ import annotations

import functools

import torch

from ds4.weights.formats.block_scale import finite, look_up
from ds4.weights.formats.plain import elements

BLOCK = 256
BLOCK_BYTES = 66


@functools.cache
def patterns(device: torch.device) -> torch.Tensor:
    """i64 [256]: the eight int8 magnitudes of each pattern, as one number."""
    from gguf.quants import IQ2_XXS

    IQ2_XXS.init_grid()
    assert IQ2_XXS.grid is not None
    return torch.from_numpy(IQ2_XXS.grid).reshape(256, 8).to(torch.int8).view(torch.int64).flatten().to(device)


@functools.cache
def _signs(device: torch.device) -> torch.Tensor:
    """i64 [128]: eight int8, 0 or -1, for each number of seven sign bits."""
    bits = torch.arange(128).unsqueeze(-1) >> torch.arange(7) & 1
    bits = torch.cat((bits, bits.sum(dim=1, keepdim=True) & 1), dim=1)
    return (-bits).to(torch.int8).view(torch.int64).flatten().to(device)


def dequantize(data: torch.Tensor, n_cols: int) -> torch.Tensor:
    """Decode packed rows.

    data     uint8 [n_rows, n_cols / 256 * 66], any strides
    returns  f32 [n_rows, n_cols], exact (11 by 5 by 6 bits)
    """
    blocks = data.reshape(-1, BLOCK_BYTES)
    d = finite(elements(blocks[:, :2], torch.float16).to(torch.float32))
    groups = elements(blocks[:, 2:], torch.int32).view(-1, 8, 2)
    numbers = groups[..., 0].contiguous().view(torch.uint8)
    return weights(numbers, groups[..., 1].contiguous(), d).view(data.shape[0], n_cols)


def weights(numbers: torch.Tensor, x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """f32 [n, 256] of blocks: pattern numbers u8 [n, 32], x i32 [n, 8], d f16 or f32 [n, 1], each dense."""
    scale = d.to(torch.float32) * ((x >> 28 & 15) + 0.5) * 0.25
    signs = torch.stack((x, x >> 7, x >> 14, x >> 21), dim=-1).bitwise_and_(127)
    flip = look_up(_signs(x.device), signs).view(-1, 32)
    # Two's complement in every byte: magnitudes are not 0, so that adding 1 never carries into the next.
    codes = (look_up(patterns(x.device), numbers) ^ flip) + (flip & 0x0101010101010101)
    values = codes.view(torch.int8).view(-1, 32).to(torch.float32)
    return values.mul_(scale.view(-1, 1)).view(-1, BLOCK)
