"""Q6_K as planes: low u8 [rows, K / 2], high u8 [rows, K / 4], scales i8 [rows, K / 16], d f16 [rows, K / 256].

Of each weight the low four bits are in one plane and the high two in another, both in the order of the lanes that read
a chunk of 128 weights (``lanes``): 64 and 32 bytes.
weight = d * scale[w / 16] * (code - 32).
Source:  spec kernels.md b.1, weights.md 4.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.packing.lanes import inverse, move_bits, nibble_pairs, nibbles_by_lane, two_bit_places
from ds4.kernels.packing.planes import Packing, Plane
from ds4.weights.formats.block_scale import pairs_to_runs, runs_to_pairs
from ds4.weights.formats.plain import elements
from ds4.weights.formats.q6_k import BLOCK, BLOCK_BYTES, weights

# Of a block's pairs one after another.
_HIGH = two_bit_places(((0, 1, 2, 3), (4, 5, 6, 7)))


def pack(data: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(low, high, scales, d) of uint8 [n, K / 256 * 210]."""
    n, blocks = data.shape[0], data.reshape(data.shape[0], -1, BLOCK_BYTES)
    low = nibbles_by_lane(runs_to_pairs(blocks[..., :128].unflatten(-1, (2, 64))).flatten(1))
    high = move_bits(elements(blocks[..., 128:192], torch.int64), _HIGH).view(torch.uint8)
    scales, d = elements(blocks[..., 192:208], torch.int8), elements(blocks[..., 208:], torch.float16)
    return low, high.view(n, -1), scales.flatten(1), d.flatten(1)


def unpack(low: Tensor, high: Tensor, scales: Tensor, d: Tensor) -> tuple[Tensor]:
    """Inverse of :func:`pack`."""
    n = low.shape[0]
    fields = (*_file_order(low, high), scales.view(torch.uint8), d.view(torch.uint8))
    sizes = (128, 64, 16, 2)
    return (torch.cat([f.reshape(n, -1, size) for f, size in zip(fields, sizes, strict=True)], dim=-1).flatten(1),)


def decode(low: Tensor, high: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    """f32 [n, K], exact."""
    bits, top = _file_order(low, high)
    values = weights(bits.reshape(-1, 128), top.view(-1, 64), scales.view(-1, 16), d.view(-1, 1))
    return values.view(low.shape[0], -1)


def _file_order(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Both code planes as the file has them, u8 [n, K / 128, 64] and [n, K / 4]."""
    runs = pairs_to_runs(nibble_pairs(low).unflatten(1, (-1, 64)))
    return runs, move_bits(high.view(torch.int64), inverse(_HIGH)).view(torch.uint8)


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
