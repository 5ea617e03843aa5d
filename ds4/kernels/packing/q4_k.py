"""Q4_K as planes: codes u8 [rows, K / 2], scales u8 [rows, K / 16], d f16 [rows, K / 128].

A chunk of 128 weights is 64 bytes of codes in the order of the lanes that read them (``lanes``), and 8 bytes of scales,
6 bits each in a byte of its own: those of its four blocks of 32, then their minima.  The file has eight pairs in 12
bytes; 3 % more bytes spare the kernels its puzzle of bits.  d: a pair (d, dmin) for each 256 weights.
weight = d * scale * code - dmin * minimum.
Source:  spec kernels.md b.1, weights.md 4.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.packing.lanes import nibble_pairs, nibbles_by_lane
from ds4.kernels.packing.planes import Packing, Plane
from ds4.weights.formats.block_scale import pairs_to_runs, runs_to_pairs
from ds4.weights.formats.plain import elements
from ds4.weights.formats.q4_k import BLOCK, BLOCK_BYTES, sub_block_scales, weights


def pack(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, d) of uint8 [n, K / 256 * 144]."""
    blocks = data.reshape(data.shape[0], -1, BLOCK_BYTES)
    pairs = runs_to_pairs(blocks[..., 16:].unflatten(-1, (4, 32))).flatten(1)
    fields = (field.view(-1, 2, 4) for field in sub_block_scales(blocks[..., 4:16].reshape(-1, 12)))
    scales = torch.cat((*fields,), dim=-1).view(data.shape[0], -1)
    return nibbles_by_lane(pairs), scales, elements(blocks[..., :4], torch.float16).flatten(1)


def unpack(codes: Tensor, scales: Tensor, d: Tensor) -> tuple[Tensor]:
    """Inverse of :func:`pack`."""
    n = codes.shape[0]
    scale, minimum = (field.view(n, -1, 8) for field in _fields(scales))
    low = scale[..., :4] | (scale[..., 4:] >> 4 << 6)
    middle = minimum[..., :4] | (minimum[..., 4:] >> 4 << 6)
    high = (scale[..., 4:] & 15) | (minimum[..., 4:] << 4)
    runs = _runs(codes).view(n, -1, 128)
    return (torch.cat((d.view(torch.uint8).view(n, -1, 4), low, middle, high, runs), -1).flatten(1),)


def decode(codes: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    """f32 [n, K]; both products are exact, their difference is rounded once."""
    return weights(_runs(codes).view(-1, 128), *_fields(scales), d.view(-1, 2)).view(codes.shape[0], -1)


def _fields(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima, u8 [blocks, 8] each."""
    scale, minimum = scales.view(-1, 2, 2, 4).unbind(2)
    return scale.reshape(-1, 8), minimum.reshape(-1, 8)


def _runs(codes: Tensor) -> Tensor:
    """The file's codes, u8 [n, K / 64, 32]: byte i with weight i of 64 low, i + 32 high."""
    return pairs_to_runs(nibble_pairs(codes).unflatten(1, (-1, 32)))


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
