"""MXFP4 as planes, whichever layout it had: codes u8 [rows, K / 2 up to a whole chunk of 128], scales u8 (e8m0)
[rows, K / 32].

A chunk of 128 weights is 64 bytes, in the order of the lanes that read them and with the bits of each eight codes where
decoding takes fewest instructions (``lanes``, include/fp4_weights.cuh); this is the one order of all 4-bit formats
(``nvfp4`` too), whatever their files have.
weight = e2m1(code) * 2^(e - 127).  Code 8 is -0 in the official layout, +0 in ggml's.
Source:  spec kernels.md b.1, weights.md 1 and 4.6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.packing.lanes import CHUNK, CHUNK_BYTES, e2m1_by_lane, e2m1_pairs
from ds4.kernels.packing.planes import Packing, Plane
from ds4.weights.formats.block_scale import decode_e2m1_pairs, e8m0_to_f32, pairs_to_runs, runs_to_pairs
from ds4.weights.formats.mxfp4 import BLOCK, BLOCK_BYTES

_PLANES = (Plane("codes", torch.uint8, CHUNK_BYTES, CHUNK), Plane("scales", torch.uint8, 1, BLOCK))


def pack(data: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) of ggml's uint8 [n, K / 32 * 17]."""
    blocks = data.reshape(data.shape[0], -1, BLOCK_BYTES)
    return e2m1_by_lane(runs_to_pairs(blocks[..., 1:]).flatten(1)), blocks[..., 0]


def unpack(codes: Tensor, scales: Tensor) -> tuple[Tensor]:
    """Inverse of :func:`pack`."""
    blocks = pairs_to_runs(_pairs(codes, scales).unflatten(1, (-1, BLOCK // 2)))
    return (torch.cat((scales.unsqueeze(-1), blocks), dim=-1).flatten(1),)


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """f32 [n, K] as ggml reads it."""
    return _scaled(decode_e2m1_pairs(_pairs(codes, scales)).add_(0.0), scales)  # -0 + 0 = +0


def pack_official(data: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) of the official uint8 [n, K / 2] and [n, K / 32], which stay as they are."""
    return e2m1_by_lane(data), scales


def unpack_official(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`pack_official`."""
    return _pairs(codes, scales), scales


def decode_official(codes: Tensor, scales: Tensor) -> Tensor:
    """f32 [n, K]."""
    return _scaled(decode_e2m1_pairs(_pairs(codes, scales)), scales)


def _pairs(codes: Tensor, scales: Tensor) -> Tensor:
    return e2m1_pairs(codes, scales.shape[1] * BLOCK)


def _scaled(values: Tensor, scales: Tensor) -> Tensor:
    values.unflatten(1, (-1, BLOCK)).mul_(e8m0_to_f32(scales).unsqueeze(-1))
    return values


PACKING = Packing("mxfp4", _PLANES, pack, unpack, decode)
OFFICIAL = Packing("mxfp4_official", _PLANES, pack_official, unpack_official, decode_official)
