"""Q2_K as planes: codes u8 [rows, K / 4], scales u8 [rows, K / 16], d f16 [rows, K / 128].

A chunk of 128 weights is 32 bytes of codes, in the order of the lanes that read them (``lanes``) and with the bits
where decoding takes few shifts (include/kquant_weights.cuh), and 8 bytes of scales and minima, 4 bits each: the scale
of half h of block b from bit 8 h + 4 (b / 2) + 16 (b % 2) on, its minimum from bit 32 + 4 b + 16 h on.  d: a pair (d,
dmin) for each 256 weights.
weight = d * scale * code - dmin * minimum.
Source:  spec kernels.md b.1, weights.md 4.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.packing.lanes import inverse, move_bits, two_bit_places
from ds4.kernels.packing.planes import Packing, Plane
from ds4.weights.formats.plain import elements
from ds4.weights.formats.q2_k import BLOCK, BLOCK_BYTES, weights

# Fields 0 1 2, 3 4 5 and 6 7 are each within seven bits, after shifts by 0, 6 and 12.
_CODES = two_bit_places(((0, 1, 2, 6), (3, 4, 5, 7)))
# Of sub-block 2 b + h of a chunk: its byte in the file has the scale in the low nibble.
_SCALES = tuple(
    place + bit
    for b in range(4)
    for h in range(2)
    for place in (8 * h + 4 * (b // 2) + 16 * (b % 2), 32 + 4 * b + 16 * h)
    for bit in range(4)
)


def pack(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, d) of uint8 [n, K / 256 * 84]."""
    n, blocks = data.shape[0], data.reshape(data.shape[0], -1, BLOCK_BYTES)
    codes = move_bits(elements(blocks[..., 16:80], torch.int64), _CODES).view(torch.uint8)
    scales = move_bits(elements(blocks[..., :16], torch.int64), _SCALES).view(torch.uint8)
    return codes.view(n, -1), scales.view(n, -1), elements(blocks[..., 80:], torch.float16).flatten(1)


def unpack(codes: Tensor, scales: Tensor, d: Tensor) -> tuple[Tensor]:
    """Inverse of :func:`pack`."""
    n = codes.shape[0]
    code_bytes, scale_bytes = _file_order(codes, scales)
    fields = (scale_bytes.view(n, -1, 16), code_bytes.view(n, -1, 64), d.view(torch.uint8).view(n, -1, 4))
    return (torch.cat(fields, dim=-1).flatten(1),)


def decode(codes: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    """f32 [n, K]; both products are exact, their difference is rounded once."""
    code_bytes, scale_bytes = _file_order(codes, scales)
    return weights(code_bytes.view(-1, 64), scale_bytes.view(-1, 16), d.view(-1, 2)).view(codes.shape[0], -1)


def _file_order(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes of codes and of scales as the file has them, u8 [n, K / 4] and [n, K / 16]."""
    parts = ((codes, _CODES), (scales, _SCALES))
    code_bytes, scale_bytes = (move_bits(p.view(torch.int64), inverse(to)).view(torch.uint8) for p, to in parts)
    return code_bytes, scale_bytes


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
