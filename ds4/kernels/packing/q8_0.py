"""Q8_0 as planes: codes i8 [rows, K], d f16 [rows, K / 32].

weight k = d[k / 32] * codes[k].  Four codes are one operand of dp4a, 16 of them one load.
Source:  spec kernels.md b.1, weights.md 4.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.packing.planes import Packing, Plane
from ds4.weights.formats.plain import elements
from ds4.weights.formats.q8_0 import BLOCK, BLOCK_BYTES


def pack(data: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, d) of uint8 [n, K / 32 * 34]."""
    blocks = data.reshape(data.shape[0], -1, BLOCK_BYTES)
    return elements(blocks[..., 2:], torch.int8).flatten(1), elements(blocks[..., :2], torch.float16).flatten(1)


def unpack(codes: Tensor, d: Tensor) -> tuple[Tensor]:
    """Inverse of :func:`pack`."""
    blocks = codes.view(torch.uint8).unflatten(1, (-1, BLOCK))
    return (torch.cat((d.unsqueeze(-1).view(torch.uint8), blocks), dim=-1).flatten(1),)


def decode(codes: Tensor, d: Tensor) -> Tensor:
    """f32 [n, K], exact."""
    values = codes.to(torch.float32)
    values.unflatten(1, (-1, BLOCK)).mul_(d.to(torch.float32).unsqueeze(-1))
    return values


PACKING = Packing(
    "q8_0",
    (Plane("codes", torch.int8, BLOCK, BLOCK), Plane("d", torch.float16, 1, BLOCK)),
    pack,
    unpack,
    decode,
)
