"""How kernels of dense matrices are launched: what dense_rows.cuh computes from K and n_tok, and the grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds4.kernels.arch import device_facts

THREADS = 256
_CHUNK = 128  # mma_rows.cuh: kChunkCols
_TILE_ROWS = 16
_N_SMS = 132  # where there is no GPU: those of an H200


@dataclass(frozen=True)
class RowsPlan:
    """``unit_rows``: rows that a block works on at a time; ``per_sm``: blocks that a multiprocessor takes at once."""

    unit_rows: int
    per_sm: int
    shared_bytes: int


def rows_plan(n_cols: int, n_tok: int) -> RowsPlan:
    """dense_rows.cuh: RowsPlan, of rows of ``n_cols`` and 1 to 8 tokens."""
    slices = next((n for n, least in ((8, 4096), (4, 1024), (2, 256)) if n_cols >= least), 1)
    step = slices * _CHUNK
    most = (52 if n_tok > 2 else 26) * 1024 // _staged_bytes(step, n_tok) * step
    stage = min(-(-n_cols // step) * step, most)
    deep = 2 if n_tok > 2 else 1
    sums = 4 * 8 * _TILE_ROWS * 8 * -(-3 * n_tok // 8)
    return RowsPlan(_TILE_ROWS * 8 // slices * deep, 3 - deep, _staged_bytes(stage, n_tok) + 2 * sums)


def _staged_bytes(n_cols: int, n_tok: int) -> int:
    """mma_rows.cuh: staged_bytes."""
    return 2 * 3 * n_tok * (-(-n_cols // 64) * 64 + 32)


def n_blocks(plan: RowsPlan, n_units: int, device: torch.device) -> int:
    """All that the device takes at once; no more than there are units. No result depends on it."""
    n_sms = device_facts(device.index or 0).n_sms if device.type == "cuda" else _N_SMS
    return min(n_units, plan.per_sm * n_sms)
