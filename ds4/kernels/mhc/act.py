"""int8 activations, as ``act.cuh`` makes them for weights that are dotted in integers.

The fp8 form is ``ds4.weights.formats.block_scale.quantize_e4m3`` with blocks of 128.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32  # activations that share a scale
SUM_BLOCK = 16  # activations that share a sum: Q2_K has a minimum per 16 weights, Q4_K per 32
_SMALLEST = 2.0**-100  # below it a block is zeros, so that 127 / amax stays finite


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round to int8 with one FP32 scale per 32: ``x ~ code * scale``, as Q8_0 does but for the scale's type.

    x        f32 [..., n], finite; n a multiple of 32
    returns  codes i8 [..., n], -127 to 127: rint(x * (127 / amax)), ties to even;
             scales f32 [..., n / 32]: amax * fp32(1 / 127), 0 where amax < 2^-100;
             sums i32 [..., n / 16] of the codes, for weights that are stored with minima
    Source:  spec kernels.md b.1, weights.md 4.1.
    """
    blocks = x.unflatten(-1, (-1, BLOCK))
    amax = blocks.abs().amax(-1)
    zero = amax < _SMALLEST
    # A tensor over a tensor: torch turns number / tensor into a reciprocal and a product, which round twice.
    inverse = torch.where(zero, 0.0, torch.full_like(amax, 127.0) / amax)
    codes = (blocks * inverse.unsqueeze(-1)).round().to(torch.int8).flatten(-2)
    sums = codes.unflatten(-1, (-1, SUM_BLOCK)).sum(-1, dtype=torch.int32)
    return codes, torch.where(zero, 0.0, amax * (1.0 / 127.0)), sums


def dequantize_int8(codes: Tensor, scales: Tensor) -> Tensor:
    """f32 [..., n] of codes i8 [..., n] and scales f32 [..., n / 32]."""
    return (codes.to(torch.float32).unflatten(-1, (-1, BLOCK)) * scales.unsqueeze(-1)).flatten(-2)
