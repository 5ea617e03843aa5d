"""How ``gemm`` is launched: what gemm.cu computes from the tile of tokens, and the grid."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from ds4.kernels.picks import Pick, pick

_TILE_ROWS = 16  # mma_rows.cuh: kTileRows
_NARROW = ("q8_0", "fp8_block")  # formats of which a warp has two row tiles where there are many tokens


def threads(tokens: int) -> int:
    """Of a block: kThreads."""
    return 32 * _warps(tokens)


def _warps(tokens: int) -> int:
    return 8 if tokens >= 64 else 4 if tokens >= 32 else 2


def block_rows(fmt: str, tokens: int) -> int:
    """Rows of a matrix of this format that a block owns."""
    return _TILE_ROWS * _warps(tokens) * (2 if tokens >= 128 and fmt in _NARROW else 1)


def n_blocks(segments: Sequence[tuple[str, int]], groups: int, n_rows: int, tokens: int) -> int:
    """Blocks of a launch for up to ``n_rows`` tokens: units of rows times tiles of tokens.

    segments  (format, rows) of each matrix, whose rows are in ``groups`` equal parts
    """
    units = sum(groups * -(-rows // groups // block_rows(fmt, tokens)) for fmt, rows in segments)
    return units * -(-n_rows // tokens)


def gemm_pick(segments: Sequence[tuple[str, int]], groups: int, k: int, n_rows: int, device: torch.device) -> Pick:
    """The pick of a launch for up to ``n_rows`` tokens; see :func:`ds4.kernels.picks.pick`."""
    return pick(
        "gemm",
        n_cols=k,
        n_rows=sum(rows for _, rows in segments),
        formats=tuple(fmt for fmt, _ in segments),
        n_tok=n_rows,
        device=device,
        blocks=partial(n_blocks, segments, groups, n_rows),
    )
