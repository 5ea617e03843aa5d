"""IQ2_XXS as planes: pattern numbers u8 [rows, K / 8], words i32 [rows, K / 32], d f16 [rows, K / 256].

Word g belongs to weights 32 g .. 32 g + 31: bits 7 l .. 7 l + 6 are the signs of the first seven weights of pattern l,
the eighth makes the number of minus signs even, and bits 28-31 are the scale s.
weight = d * (0.5 + s) / 4 * magnitude * sign.
The four numbers and the word of 32 weights are one aligned 4-byte read each, where the file has 66-byte blocks.
Source:  spec kernels.md b.1, weights.md 4.5; the patterns are ``ds4.weights.formats.iq2_xxs.patterns``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.packing.planes import Packing, Plane
from ds4.weights.formats.iq2_xxs import BLOCK, BLOCK_BYTES, weights
from ds4.weights.formats.plain import elements


def pack(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(numbers, words, d) of uint8 [n, K / 256 * 66]."""
    blocks = data.reshape(data.shape[0], -1, BLOCK_BYTES)
    groups = blocks[..., 2:].unflatten(-1, (8, 8))
    numbers, words = groups[..., :4].flatten(1), elements(groups[..., 4:], torch.int32).flatten(1)
    return numbers, words, elements(blocks[..., :2], torch.float16).flatten(1)


def unpack(numbers: Tensor, words: Tensor, d: Tensor) -> tuple[Tensor]:
    """Inverse of :func:`pack`."""
    groups = torch.cat((numbers.unflatten(1, (-1, 4)), words.unsqueeze(-1).view(torch.uint8)), dim=-1)
    blocks = groups.flatten(1).unflatten(1, (-1, BLOCK_BYTES - 2))
    return (torch.cat((d.unsqueeze(-1).view(torch.uint8), blocks), dim=-1).flatten(1),)


def decode(numbers: Tensor, words: Tensor, d: Tensor) -> Tensor:
    """f32 [n, K], exact."""
    return weights(numbers.view(-1, 32), words.view(-1, 8), d.view(-1, 1)).view(numbers.shape[0], -1)


PACKING = Packing(
    "iq2_xxs",
    (
        Plane("numbers", torch.uint8, 32, BLOCK),
        Plane("words", torch.int32, 8, BLOCK),
        Plane("d", torch.float16, 1, BLOCK),
    ),
    pack,
    unpack,
    decode,
)
