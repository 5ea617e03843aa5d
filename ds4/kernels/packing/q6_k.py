"""Q6_K as planes: low u8 [rows, K / 2], high u8 [rows, K / 4], scales i8 [rows, K / 16], d f16 [rows, K / 256].

Both code planes keep the file's order within a block.  Weight w, with h = w / 128, g = w % 128 / 32 and l = w % 32, has
its low four bits in byte 64 h + 32 (g & 1) + l of low (low nibble for g < 2, high nibble above), its high two bits in
byte 32 h + l of high, from bit 2 g on; four neighbouring bytes belong to four neighbouring weights.
weight = d * scale[w / 16] * (code - 32).
Source:  spec kernels.md b.1, weights.md 4.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.packing.planes import Packing, Plane
from ds4.weights.formats.plain import elements
from ds4.weights.formats.q6_k import BLOCK, BLOCK_BYTES, weights


def pack(data: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(low, high, scales, d) of uint8 [n, K / 256 * 210]."""
    blocks = data.reshape(data.shape[0], -1, BLOCK_BYTES)
    scales, d = elements(blocks[..., 192:208], torch.int8), elements(blocks[..., 208:], torch.float16)
    return blocks[..., :128].flatten(1), blocks[..., 128:192].flatten(1), scales.flatten(1), d.flatten(1)


def unpack(low: Tensor, high: Tensor, scales: Tensor, d: Tensor) -> tuple[Tensor]:
    """Inverse of :func:`pack`."""
    n = low.shape[0]
    fields = (low.view(n, -1, 128), high.view(n, -1, 64), scales.view(torch.uint8).view(n, -1, 16))
    return (torch.cat((*fields, d.unsqueeze(-1).view(torch.uint8)), dim=-1).flatten(1),)


def decode(low: Tensor, high: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    """f32 [n, K], exact."""
    values = weights(low.view(-1, 128), high.view(-1, 64), scales.view(-1, 16), d.view(-1, 1))
    return values.view(low.shape[0], -1)


PACKING = Packing(
    "q6_k",
    (
        Plane("low", torch.uint8, 128, BLOCK),
        Plane("high", torch.uint8, 64, BLOCK),
        Plane("scales", torch.int8, 16, BLOCK),
        Plane("d", torch.float16, 1, BLOCK),
    ),
    pack,
    unpack,
    decode,
)
