"""Torch references of the cache writers (spec model.md 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.common import apply_rope, hadamard, rms_norm
from ds4.kernels.numerics import Numerics

CSA_RATIO = 4


def pool_csa(kv: Tensor, score: Tensor, first_entry: int) -> Tensor:
    """Overlapping compressor, ratio 4: f32 ``[4 (n + 1), 2 d]`` each -> ``[n, d]``.

    ``kv`` / ``score`` are the raw rows of the window before entry ``first_entry`` and of the ``n`` windows after it,
    ape already added. Entry e pools 8 candidates a channel: the first half columns of window e - 1, then the second
    half of window e; entry 0 has no window before it (weight 0).
    """
    d = kv.shape[1] // 2
    windows_kv = kv.unflatten(0, (-1, CSA_RATIO))
    windows_score = score.unflatten(0, (-1, CSA_RATIO))
    candidates = torch.cat((windows_kv[:-1, :, :d], windows_kv[1:, :, d:]), dim=1)
    before = windows_score[:-1, :, :d]
    if first_entry == 0:
        before = torch.cat((torch.full_like(before[:1], -torch.inf), before[1:]))
    weights = torch.cat((before, windows_score[1:, :, d:]), dim=1).softmax(1)
    return (weights * candidates).sum(1)


def pool_hca(kv: Tensor, score: Tensor, ratio: int) -> Tensor:
    """Plain compressor: f32 ``[ratio n, d]`` each -> ``[n, d]``; softmax over each window's tokens, per channel."""
    weights = score.unflatten(0, (-1, ratio)).softmax(1)
    return (weights * kv.unflatten(0, (-1, ratio))).sum(1)


def finish_entry(
    pooled: Tensor, norm: Tensor, cis: Tensor, eps: float, numerics: Numerics, *, indexer: bool = False
) -> Tensor:
    """Pooled values f32 ``[n, d]`` -> entries ready to be packed: norm, RoPE at the window's start, key rotation."""
    rd = numerics.rd
    entry = rd(apply_rope(rd(rms_norm(rd(pooled), norm, eps)), cis))
    return rd(hadamard(entry)) if indexer and numerics.index_rotate else entry
