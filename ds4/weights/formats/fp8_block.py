"""FP8 with block scales: one e4m3 byte a weight, and one scale for every 128 x 128 of a matrix.

The scales are a tensor of their own, ``<base>.scale`` [ceil(rows / 128), ceil(n_cols / 128)]: e8m0 bytes, weight =
e4m3(byte) * 2^(e - 127), in the released checkpoints; f32 in the experts of Base, whose product is rounded once.
Source:  spec weights.md 1.
"""

from __future__ import annotations

import torch

from ds4.weights.formats.block_scale import E4M3_MAX, e4m3_table, e8m0_to_f32, finite, look_up
from ds4.weights.formats.tiling import by_row_tiles

TILE = 128


def dequantize(data: torch.Tensor, n_cols: int, scale: torch.Tensor) -> torch.Tensor:
    """Decode packed rows.

    data     uint8 [n_rows, n_cols], any strides
    scale    uint8 (e8m0) or f32 [n_rows, ceil(n_cols / 128)], one row for each row of data
    returns  f32 [n_rows, n_cols]; e4m3's not-a-number stays one
    Error:   Ds4Error for a scale that is not finite
    """
    return weights(data, finite(e8m0_to_f32(scale) if scale.dtype == torch.uint8 else scale))


def weights(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """f32 [n_rows, n_cols] of e4m3 bytes u8 [n_rows, n_cols] and scales f32 [n_rows, ceil(n_cols / 128)]."""
    values = look_up(e4m3_table(codes.device), codes)
    whole = codes.shape[1] // TILE * TILE
    values[:, :whole].unflatten(1, (-1, TILE)).mul_(scale[:, : whole // TILE, None])
    values[:, whole:].mul_(scale[:, whole // TILE :])
    return values


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode rows: each scale is the smallest power of two (not below 2^-127) under which no value exceeds 448, each
    code the nearest e4m3 number, ties to the even one.  Nearly always no other power of two is better: a larger one
    only coarsens the subnormal numbers.

    x        f32 [n_rows, n_cols], finite
    returns  (uint8 [n_rows, n_cols], scale uint8 (e8m0) [ceil(n_rows / 128), ceil(n_cols / 128)]): one row of scales
             for 128 rows, where ``dequantize`` wants one for each; a tile of zeros has e = 0
    Error:   none for values that a tile can hold; otherwise |x - decoded| <= max(|x| / 16, scale * 2^-10)
    """
    data, scale = by_row_tiles(_encode, x, 1, TILE)
    return data, scale


def _encode(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    n_rows, n_cols = x.shape
    edge = (-n_cols % TILE, -n_rows % TILE)
    tiles = torch.nn.functional.pad(x, (0, edge[0], 0, edge[1])).unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE))
    amax = tiles.abs().amax(dim=(1, 3))
    mantissa, exponent = torch.frexp(amax)  # amax = m 2^e with m in [1/2, 1), and 448 = 7/8 * 2^9
    scale = ((exponent + (127 - 9) + (mantissa > E4M3_MAX / 2**9)).clamp_min_(0) * (amax > 0)).to(torch.uint8)
    codes = (tiles / e8m0_to_f32(scale)[:, None, :, None]).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.flatten(2).flatten(0, 1)[:n_rows, :n_cols], scale
