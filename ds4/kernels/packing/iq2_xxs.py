"""IQ2_XXS as planes: codes i32 [rows, K / 16], d f16 [rows, K / 256].

A chunk of 128 weights is four pairs of words, one for each lane t = 0..3 that reads it: pattern t of each block b =
0..3 of 32 weights.  The first word has the pattern's number in byte b.  The second, W, has signs and scales: bit b +
4 j of W ^ rotate_right(W, 4) is the sign of weight 2 j (j < 4) or 2 j - 7 of the pattern, so that two instructions
give 32 signs.  In the file a pattern always has an even number of minus signs; here each sign is the difference of a
bit and the next one in a circle of eight, which comes to the same and leaves one of them free, 28 + b: lane t's four
are the scale s of block t.
weight = d * (0.5 + s) / 4 * magnitude * sign.
Source:  spec kernels.md b.1, weights.md 4.5; the patterns are ``ds4.weights.formats.iq2_xxs.patterns``.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ds4.kernels.packing.planes import Packing, Plane
from ds4.weights.formats.block_scale import look_up
from ds4.weights.formats.iq2_xxs import BLOCK, BLOCK_BYTES, weights
from ds4.weights.formats.plain import elements

# The file's signs, seven bits from the lowest weight on, in the order of the circle.
_ORDER = (0, 2, 4, 6, 1, 3, 5)
_SIGNS = 0x01111111  # of pattern b in W ^ rotate_right(W, 4), shifted right by b: all but the last


@functools.cache
def _spread(device: torch.device) -> Tensor:
    """i32 [128]: for seven sign bits of the file, bits 4 j of the circle."""
    signs = torch.arange(128, device=device).unsqueeze(-1) >> torch.tensor(_ORDER, device=device) & 1
    return (signs << torch.arange(0, 28, 4, device=device)).sum(1).to(torch.int32)


def pack(data: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, d) of uint8 [n, K / 256 * 66]."""
    n, blocks = data.shape[0], data.reshape(data.shape[0], -1, BLOCK_BYTES)
    chunks = blocks[..., 2:].reshape(n, -1, 4, 8)  # [row, chunk, b, bytes]
    numbers = chunks[..., :4].transpose(2, 3).contiguous().view(torch.int32).squeeze(-1)
    words = elements(chunks[..., 4:], torch.int32).squeeze(-1)
    lanes = []
    for t in range(4):
        signs = look_up(_spread(data.device), words >> 7 * t & 127)  # [row, chunk, b]
        circle = words[..., t] >> 28 << 28
        for b in range(4):
            circle = circle | signs[..., b] << b
        for distance in (4, 8, 16):  # each bit becomes the sum of those from it on
            circle = circle ^ (circle >> distance & (1 << 32 - distance) - 1)
        lanes.append(circle)
    codes = torch.stack((numbers, torch.stack(lanes, dim=-1)), dim=-1)
    return codes.view(n, -1), elements(blocks[..., :2], torch.float16).flatten(1)


def unpack(codes: Tensor, d: Tensor) -> tuple[Tensor]:
    """Inverse of :func:`pack`."""
    numbers, words = _file_order(codes)
    groups = torch.cat((numbers, words.unsqueeze(-1).view(torch.uint8)), dim=-1)
    blocks = groups.flatten(1).unflatten(1, (-1, BLOCK_BYTES - 2))
    return (torch.cat((d.unsqueeze(-1).view(torch.uint8), blocks), dim=-1).flatten(1),)


def decode(codes: Tensor, d: Tensor) -> Tensor:
    """f32 [n, K], exact."""
    numbers, words = _file_order(codes)
    return weights(numbers.view(-1, 32), words.view(-1, 8), d.view(-1, 1)).view(codes.shape[0], -1)


def _file_order(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Pattern numbers u8 [n, K / 32, 4] and words i32 [n, K / 32] as the file has them."""
    numbers, circles = codes.view(codes.shape[0], -1, 4, 2).unbind(-1)  # [row, chunk, t]
    by_block = numbers.unsqueeze(-1).contiguous().view(torch.uint8).transpose(2, 3)
    signs = circles ^ (circles >> 4 & 0x0FFFFFFF)
    words = circles >> 28 << 28
    for t in range(4):
        sevens = [signs[..., t] >> b & _SIGNS for b in range(4)]
        for b, seven in enumerate(sevens):
            for j, k in enumerate(_ORDER):
                words[..., b] |= (seven >> 4 * j & 1) << 7 * t + k
    return by_block.flatten(1, 2).contiguous(), words.flatten(1)


PACKING = Packing(
    "iq2_xxs",
    (
        Plane("codes", torch.int32, 16, BLOCK),
        Plane("d", torch.float16, 1, BLOCK),
    ),
    pack,
    unpack,
    decode,
)
