"""FP8 with block scales as planes: codes u8 (e4m3) [rows, K], scales f32 [ceil(rows / 128), ceil(K / 128)].

The codes stay as shipped, but every row begins on 16 bytes.  Scales are f32 whether the checkpoint has e8m0 bytes or
f32, so that one kernel serves both, for 4 bytes in 16384; 2^(e - 127) is exact, and e can be read off its bits again.
weight = e4m3(code) * scale, rounded once if the scale is no power of two.
Source:  spec kernels.md b.1, weights.md 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.packing.planes import Packing, Plane
from ds4.weights.formats.block_scale import e8m0_to_f32
from ds4.weights.formats.fp8_block import TILE, weights

_PLANES = (Plane("codes", torch.uint8, 1, 1), Plane("scales", torch.float32, 1, TILE, row_block=TILE))


def pack(data: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) of uint8 [n, K] and e8m0 bytes [ceil(n / 128), ceil(K / 128)]."""
    return data, e8m0_to_f32(scale)


def unpack(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`pack`."""
    return codes, (scales.view(torch.int32) >> 23).to(torch.uint8)


def pack_f32(data: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales): uint8 [n, K] and f32 [ceil(n / 128), ceil(K / 128)] themselves."""
    return data, scale


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """f32 [n, K]."""
    return weights(codes, scales.repeat_interleave(TILE, dim=0)[: codes.shape[0]])


PACKING = Packing("fp8_block", _PLANES, pack, unpack, decode)
F32_SCALES = Packing("fp8_block", _PLANES, pack_f32, pack_f32, decode)
