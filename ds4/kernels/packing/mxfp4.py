"""MXFP4 as planes, whichever layout it had: codes u8 [rows, K / 2], scales u8 (e8m0) [rows, K / 32].

Byte j of the codes holds weight 2 j in the low nibble and 2 j + 1 in the high one.  This is the one nibble order of all
4-bit kernels (``nvfp4`` too), and the official one.  It is the order in which both ways of decoding want the codes: the
conversion instruction of two e2m1 to two f16 takes a byte and gives neighbouring weights, low nibble first, and a byte
permutation takes four nibbles as four table indices, in order, and gives the four neighbouring int8 of a dp4a; so the
activations stay in their natural order.  Released checkpoints need no shuffle, and of ggml's order (weights j and j + n
in a byte) this is the only thing that has to be changed, once.
weight = e2m1(code) * 2^(e - 127).  Code 8 is -0 in the official layout, +0 in ggml's.
Source:  spec kernels.md b.1, weights.md 1 and 4.6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.packing.planes import Packing, Plane
from ds4.weights.formats.block_scale import decode_e2m1_pairs, e8m0_to_f32, pairs_to_runs, runs_to_pairs
from ds4.weights.formats.mxfp4 import BLOCK, BLOCK_BYTES

_PLANES = (Plane("codes", torch.uint8, BLOCK // 2, BLOCK), Plane("scales", torch.uint8, 1, BLOCK))


def pack(data: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) of ggml's uint8 [n, K / 32 * 17]."""
    blocks = data.reshape(data.shape[0], -1, BLOCK_BYTES)
    return runs_to_pairs(blocks[..., 1:]).flatten(1), blocks[..., 0]


def unpack(codes: Tensor, scales: Tensor) -> tuple[Tensor]:
    """Inverse of :func:`pack`."""
    blocks = pairs_to_runs(codes.unflatten(1, (-1, BLOCK // 2)))
    return (torch.cat((scales.unsqueeze(-1), blocks), dim=-1).flatten(1),)


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """f32 [n, K] as ggml reads it."""
    return _scaled(decode_e2m1_pairs(codes).add_(0.0), scales)  # -0 + 0 = +0


def pack_official(data: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales): the official uint8 [n, K / 2] and [n, K / 32] themselves."""
    return data, scales


def decode_official(codes: Tensor, scales: Tensor) -> Tensor:
    """f32 [n, K]."""
    return _scaled(decode_e2m1_pairs(codes), scales)


def _scaled(values: Tensor, scales: Tensor) -> Tensor:
    values.unflatten(1, (-1, BLOCK)).mul_(e8m0_to_f32(scales).unsqueeze(-1))
    return values


PACKING = Packing("mxfp4", _PLANES, pack, unpack, decode)
OFFICIAL = Packing("mxfp4_official", _PLANES, pack_official, pack_official, decode_official)
