"""Torch references of the indexer (spec model.md 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.common import apply_rope, hadamard
from ds4.kernels.numerics import Numerics
from ds4.weights.formats import block_scale

KEY_BLOCK = 32


def index_query(q: Tensor, cis: Tensor, numerics: Numerics) -> Tensor:
    """Raw indexer queries f32 ``[n, h, d]`` -> rotated (RoPE, Hadamard) and rounded to FP4, as the keys are."""
    q = numerics.rd(apply_rope(q, cis.unsqueeze(-2)))
    if numerics.index_rotate:
        q = numerics.rd(hadamard(q))
    return block_scale.round_e2m1(q, KEY_BLOCK) if numerics.index_fp4 else q


def index_score(q: Tensor, keys: Tensor, weights: Tensor, numerics: Numerics) -> Tensor:
    """``I[e] = sum_h relu(q_h . k_e) * w_h``: f32 ``[n, h, d]``, ``[e, d]``, ``[n, h]`` -> ``[n, e]``.

    ``weights`` carry the factor ``d^-0.5 h^-0.5``; they may be negative. Official scores are bf16.
    """
    rd = numerics.rd
    dot = rd(torch.matmul(q, keys.T))
    return rd(rd(dot.relu() * weights.unsqueeze(-1)).sum(-2))


def index_topk(scores: Tensor, n_visible: Tensor, top_k: int) -> Tensor:
    """Mask bool ``[n, e]`` of the ``top_k`` best of the first ``n_visible[i]`` entries of each row.

    Ties go to the smaller index (the official order among ties is unspecified). Selected entries are used in ascending
    order of index, which a mask gives for free.
    """
    n_entries = scores.shape[1]
    visible = torch.arange(n_entries, device=scores.device) < n_visible.unsqueeze(1)
    if n_entries <= top_k:
        return visible
    order = scores.masked_fill(~visible, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    chosen = torch.zeros_like(visible).scatter_(1, order[:, :top_k], True)
    return chosen & visible
