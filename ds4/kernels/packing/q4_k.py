"""Q4_K as planes: codes u8 [rows, K / 2], scales u8 [rows, K / 16], d f16 [rows, K / 128].

Codes keep the file's order within their 128 bytes of a block: byte 32 p + i holds weight 64 p + i in the low nibble and
64 p + 32 + i in the high one, so that four bytes, masked, are four neighbouring weights, one operand of dp4a.
scales: a pair (scale, minimum) for each 32 weights, 6 bits each in a byte of its own instead of the file's 12 bytes for
eight pairs: 3 % more bytes for about 20 % fewer instructions.  d: a pair (d, dmin) for each block.
weight = d * scale * code - dmin * minimum.
Source:  spec kernels.md b.1, weights.md 4.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.packing.planes import Packing, Plane
from ds4.weights.formats.plain import elements
from ds4.weights.formats.q4_k import BLOCK, BLOCK_BYTES, sub_block_scales, weights


def pack(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, d) of uint8 [n, K / 256 * 144]."""
    blocks = data.reshape(data.shape[0], -1, BLOCK_BYTES)
    scales = torch.stack(sub_block_scales(blocks[..., 4:16].reshape(-1, 12)), dim=-1).view(data.shape[0], -1)
    return blocks[..., 16:].flatten(1), scales, elements(blocks[..., :4], torch.float16).flatten(1)


def unpack(codes: Tensor, scales: Tensor, d: Tensor) -> tuple[Tensor]:
    """Inverse of :func:`pack`."""
    n = codes.shape[0]
    scale, minimum = scales.view(n, -1, 8, 2).unbind(-1)
    low = scale[..., :4] | (scale[..., 4:] >> 4 << 6)
    middle = minimum[..., :4] | (minimum[..., 4:] >> 4 << 6)
    high = (scale[..., 4:] & 15) | (minimum[..., 4:] << 4)
    return (torch.cat((d.view(torch.uint8).view(n, -1, 4), low, middle, high, codes.view(n, -1, 128)), -1).flatten(1),)


def decode(codes: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    """f32 [n, K]; both products are exact, their difference is rounded once."""
    scale, minimum = scales.view(-1, 8, 2).unbind(-1)
    return weights(codes.view(-1, 128), scale, minimum, d.view(-1, 2)).view(codes.shape[0], -1)


PACKING = Packing(
    "q4_k",
    (
        Plane("codes", torch.uint8, 128, BLOCK),
        Plane("scales", torch.uint8, 16, BLOCK),
        Plane("d", torch.float16, 2, BLOCK),
    ),
    pack,
    unpack,
    decode,
)
