"""FP8 with block scales: one e4m3 byte a weight, and one scale for every 128 x 128 of a matrix.

The scales are a tensor of their own, ``<base>.scale`` [ceil(rows / 128), ceil(n_cols / 128)]: e8m0 bytes, weight =
e4m3(byte) * 2^(e - 127), in the released checkpoints; f32 in the experts of Base, whose product is rounded once.
Source:  spec weights.md 1.
"""

from __future__ import annotations

import torch

from ds4.weights.formats.block_scale import e4m3_table, e8m0_to_f32, finite, look_up

TILE = 128


def dequantize(data: torch.Tensor, n_cols: int, scale: torch.Tensor) -> torch.Tensor:
    """Decode packed rows.

    data     uint8 [n_rows, n_cols], any strides
    scale    uint8 (e8m0) or f32 [n_rows, ceil(n_cols / 128)], one row for each row of data
    returns  f32 [n_rows, n_cols]; e4m3's not-a-number stays one
    Error:   Ds4Error for a scale that is not finite
    """
    factor = finite(e8m0_to_f32(scale) if scale.dtype == torch.uint8 else scale)
    values = look_up(e4m3_table(data.device), data)
    whole = n_cols // TILE * TILE
    values[:, :whole].unflatten(1, (-1, TILE)).mul_(factor[:, : whole // TILE, None])
    values[:, whole:].mul_(factor[:, whole // TILE :])
    return values
