"""Torch reference of the start of a decode step (spec model.md 1.3, 2.0)."""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.common import rope_angles

N_STREAMS = 4
CSA_RATIO, HCA_RATIO = 4, 128


def embed(rows: Tensor) -> Tensor:
    """Embedding rows f32 ``[n, d]`` -> residual streams f32 ``[n, 4, d]``: each stream begins as the row."""
    return rows.unsqueeze(1).expand(-1, N_STREAMS, -1).contiguous()


def rotary_tables(start: int, n_tok: int, plain: Tensor, compressed: Tensor) -> Tensor:
    """f32 ``[4, n_tok, n, 2]``, (cos, sin), for tokens ``start ..`` and frequencies f32 ``[n]``.

    Table 0: plain frequencies at the tokens' positions; 1: compressed ones there; 2 and 3: compressed ones at the first
    position of the window of 4 or 128 that the token closes, if it does (else where a window that ends there begins).
    """
    pos = torch.arange(start, start + n_tok, device=plain.device)
    first = [(pos + 1 - ratio).clamp_min(0) for ratio in (CSA_RATIO, HCA_RATIO)]
    tables = [rope_angles(pos, plain), *(rope_angles(p, compressed) for p in (pos, *first))]
    return torch.view_as_real(torch.stack(tables)).contiguous()
