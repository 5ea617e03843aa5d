"""Q2_K as planes: codes u8 [rows, K / 4], scales u8 [rows, K / 16], d f16 [rows, K / 128].

Codes keep the file's order within their 64 bytes of a block: byte 32 h + l holds weights 128 h + 32 g + l, g = 0..3, in
bits 2 g and 2 g + 1, so that four bytes, shifted and masked, are four neighbouring weights, one operand of dp4a.
Scale byte s of 16 weights: scale in the low nibble, minimum in the high one.  d: a pair (d, dmin) for each block.
weight = d * scale * code - dmin * minimum.
Source:  spec kernels.md b.1, weights.md 4.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.packing.planes import Packing, Plane
from ds4.weights.formats.plain import elements
from ds4.weights.formats.q2_k import BLOCK, BLOCK_BYTES, weights


def pack(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, d) of uint8 [n, K / 256 * 84]."""
    blocks = data.reshape(data.shape[0], -1, BLOCK_BYTES)
    d = elements(blocks[..., 80:], torch.float16).flatten(1)
    return blocks[..., 16:80].flatten(1), blocks[..., :16].flatten(1), d


def unpack(codes: Tensor, scales: Tensor, d: Tensor) -> tuple[Tensor]:
    """Inverse of :func:`pack`."""
    n = codes.shape[0]
    fields = (scales.view(n, -1, 16), codes.view(n, -1, 64), d.view(torch.uint8).view(n, -1, 4))
    return (torch.cat(fields, dim=-1).flatten(1),)


def decode(codes: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    """f32 [n, K]; both products are exact, their difference is rounded once."""
    return weights(codes.view(-1, 64), scales.view(-1, 16), d.view(-1, 2)).view(codes.shape[0], -1)


PACKING = Packing(
    "q2_k",
    (
        Plane("codes", torch.uint8, 64, BLOCK),
        Plane("scales", torch.uint8, 16, BLOCK),
        Plane("d", torch.float16, 2, BLOCK),
    ),
    pack,
    unpack,
    decode,
)
