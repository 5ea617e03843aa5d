"""What the quantisers share: a few rows at a time, and blocks as columns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_TILE = 1 << 18  # weights encoded at a time on a CPU: few enough for the intermediate results to stay in its cache
_TILE_DEVICE = 1 << 24  # elsewhere: enough to fill the device


def by_row_tiles(
    encode: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, block: int, row_block: int = 1
) -> tuple[Tensor, ...]:
    """Encode a few rows at a time, so that intermediate results stay small.

    encode   (f32 [n, n_cols]) -> tensors whose rows follow those of the argument
    x        [n_rows, n_cols], any float type
    block    what n_cols is a multiple of
    row_block  rows that must be encoded together: tiles begin at multiples of it
    returns  what ``encode`` returns, for all rows
    Error:   ValueError for another shape
    """
    if x.dim() != 2 or x.shape[1] % block or not x.numel():
        raise ValueError(f"a matrix with rows of a multiple of {block} weights is needed, not shape {list(x.shape)}")
    tile = _TILE if x.device.type == "cpu" else _TILE_DEVICE
    n = max(1, tile // x.shape[1] // row_block) * row_block
    starts = range(0, x.shape[0], n)
    tiles = [encode(x[start : start + n].to(torch.float32)) for start in starts]
    return tuple(torch.cat(pieces) for pieces in zip(*tiles, strict=True))


def as_columns(x: Tensor, block: int) -> Tensor:
    """f32 [n_rows, n_cols] -> new f32 [block, n]: one column for each block, in order.  Reductions over a block then
    run along whole rows, which is several times faster than over a short last dimension."""
    return x.reshape(-1, block).t().contiguous()


def column_sums(x: Tensor) -> Tensor:
    """f32 [n, m], n a power of two -> f32 [m], added in an order that does not depend on m or on the device."""
    while x.shape[0] > 1:
        half = x.shape[0] // 2
        x = x[:half] + x[half:]
    return x[0]


def columns_to_pairs(codes: Tensor) -> Tensor:
    """u8 0..15 [2n, m], a column for each block -> u8 [m, n]: code 2i in the low nibble of byte i, 2i + 1 in the high
    one, which is the official order."""
    return (codes[0::2] | (codes[1::2] << 4)).t()


def columns_to_runs(codes: Tensor) -> Tensor:
    """u8 0..15 [2n, m], a column for each block -> u8 [m, n]: code i in the low nibble of byte i, i + n in the high
    one, which is ggml's order."""
    half = codes.shape[0] // 2
    return (codes[:half] | (codes[half:] << 4)).t()
