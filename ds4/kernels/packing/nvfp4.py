"""NVFP4 as planes, whichever of its three layouts it had: codes u8 [rows, K / 2 up to a whole chunk of 128], scales u8
(e4m3) [rows, K / 16].

Codes are in the one order of all 4-bit formats (``mxfp4``).  weight = e2m1(code) * e4m3(scale), times
PackedTensor.scale, which is not in the planes.  In ggml's layout code 8 is +0, the sign of a scale is ignored and 0x7F
is 0; in the others 0x7F and 0xFF are not-a-numbers.  Scale bytes that a writer makes, 0..0x7E, mean the same in all.
Source:  spec kernels.md b.1, weights.md 2.1, 3.5 and 4.7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.packing.lanes import CHUNK, CHUNK_BYTES, e2m1_by_lane, e2m1_pairs
from ds4.kernels.packing.planes import Packing, Plane
from ds4.weights.formats import nvfp4, nvfp4_sleepy
from ds4.weights.formats.block_scale import decode_e2m1_pairs, e4m3_table, look_up, pairs_to_runs, runs_to_pairs
from ds4.weights.formats.nvfp4 import GROUP, scale_values

_PLANES = (Plane("codes", torch.uint8, CHUNK_BYTES, CHUNK), Plane("scales", torch.uint8, 1, GROUP))
_SCALES = nvfp4.BLOCK // GROUP


def pack(data: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) of ggml's uint8 [n, K / 64 * 36]."""
    blocks = data.reshape(data.shape[0], -1, nvfp4.BLOCK_BYTES)
    runs = blocks[..., _SCALES:].unflatten(-1, (_SCALES, GROUP // 2))
    return e2m1_by_lane(runs_to_pairs(runs).flatten(1)), blocks[..., :_SCALES].flatten(1)


def unpack(codes: Tensor, scales: Tensor) -> tuple[Tensor]:
    """Inverse of :func:`pack`."""
    runs = pairs_to_runs(_pairs(codes, scales).unflatten(1, (-1, _SCALES, GROUP // 2))).flatten(2)
    return (torch.cat((scales.unflatten(1, (-1, _SCALES)), runs), dim=-1).flatten(1),)


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """f32 [n, K] as ggml reads it, exact."""
    return _scaled(decode_e2m1_pairs(_pairs(codes, scales)).add_(0.0), scale_values(scales))  # -0 + 0 = +0


def pack_modelopt(data: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) of Model-Optimizer's uint8 [n, K / 2] and [n, K / 16], which stay as they are."""
    return e2m1_by_lane(data), scales


def unpack_modelopt(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`pack_modelopt`."""
    return _pairs(codes, scales), scales


def decode_modelopt(codes: Tensor, scales: Tensor) -> Tensor:
    """f32 [n, K], exact; also for the sleepy layout."""
    return _scaled(decode_e2m1_pairs(_pairs(codes, scales)), look_up(e4m3_table(scales.device), scales))


def pack_sleepy(data: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) of sleepyeldrazi's uint8 [n, K / 256 * 144]."""
    blocks = data.reshape(data.shape[0], -1, nvfp4_sleepy.BLOCK_BYTES)
    codes = blocks[..., : nvfp4_sleepy.CODE_BYTES].flatten(1)
    return e2m1_by_lane(codes), blocks[..., nvfp4_sleepy.CODE_BYTES :].flatten(1)


def unpack_sleepy(codes: Tensor, scales: Tensor) -> tuple[Tensor]:
    """Inverse of :func:`pack_sleepy`."""
    blocks = _pairs(codes, scales).unflatten(1, (-1, nvfp4_sleepy.CODE_BYTES))
    return (torch.cat((blocks, scales.unflatten(1, (blocks.shape[1], -1))), dim=-1).flatten(1),)


def _pairs(codes: Tensor, scales: Tensor) -> Tensor:
    return e2m1_pairs(codes, scales.shape[1] * GROUP)


def _scaled(values: Tensor, factor: Tensor) -> Tensor:
    values.unflatten(1, (-1, GROUP)).mul_(factor.unsqueeze(-1))
    return values


PACKING = Packing("nvfp4", _PLANES, pack, unpack, decode)
MODELOPT = Packing("nvfp4_modelopt", _PLANES, pack_modelopt, unpack_modelopt, decode_modelopt)
SLEEPY = Packing("nvfp4_sleepy", _PLANES, pack_sleepy, unpack_sleepy, decode_modelopt)
