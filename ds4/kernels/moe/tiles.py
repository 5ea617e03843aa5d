"""What expert_tiles.cuh computes from the length of a row: how the experts' kernels are launched."""

from __future__ import annotations

from collections.abc import Sequence

_CHUNK = 128  # mma_rows.cuh: kChunkCols
_TILE_ROWS = 16
_STAGED = 52 * 1024  # expert_tiles.cuh: the most that is staged at a time
_PATTERNS = 256 * 8 * 16  # iq2_weights.cuh: kPatternBytes
_MINIMA = ("q2_k", "q4_k")  # formats with kMinima
_SERVED = (2, 5, 8)  # members.cuh: tokens that code is compiled for


def threads(n_tok: int) -> int:
    """Of a block: kThreads."""
    return 32 * _warps(n_tok)


def block_rows(n_cols: int, n_tok: int) -> int:
    """Rows that a block owns, 16 a tile, of matrices with rows of ``n_cols``."""
    return _TILE_ROWS * max(2, _warps(n_tok) // _slices(n_cols))


def shared_bytes(n_cols: int, n_tok: int, formats: Sequence[str]) -> int:
    """Dynamic shared memory of a block for matrices of these formats with rows of ``n_cols``."""
    minima = any(fmt in _MINIMA for fmt in formats)
    counts = (1,) if n_tok == 1 else tuple(n for i, n in enumerate(_SERVED) if i == 0 or n_tok > _SERVED[i - 1])
    most = max(_plan_bytes(n_cols, n, _warps(n_tok), minima) for n in counts)
    return most + ("iq2_xxs" in formats) * _PATTERNS


def _warps(n_tok: int) -> int:
    return 16 if n_tok > 2 else 8


def _slices(n_cols: int) -> int:
    """mma_rows.cuh: slices_of."""
    return next((n for n, least in ((8, 4096), (4, 1024), (2, 256)) if n_cols >= least), 1)


def _plan_bytes(n_cols: int, n_tok: int, warps: int, minima: bool) -> int:
    """TilePlan::bytes of code for ``n_tok`` tokens in blocks of ``warps``."""
    slices = _slices(n_cols)
    step = slices * _CHUNK
    stage = min(-(-n_cols // step) * step, _STAGED // _staged(step, n_tok) * step)
    sums = 4 * warps * _TILE_ROWS * 8 * -(-3 * n_tok // 8)
    summed = 2 * 3 * n_tok * (-(-stage // 16 // 64) * 64 + 8)
    several_passes = warps // slices < 2
    return max(_staged(stage, n_tok) + several_passes * sums, sums) + minima * summed


def _staged(n_cols: int, n_tok: int) -> int:
    """mma_rows.cuh: staged_bytes."""
    return 2 * 3 * n_tok * (-(-n_cols // 64) * 64 + 32)
