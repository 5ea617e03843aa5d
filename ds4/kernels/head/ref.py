"""Torch references of the head (spec model.md 2.2 hc_head, 2.0); that of sampling is in sample_ref.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.common import rms_norm
from ds4.kernels.mhc.ref import hc_collapse, hc_mix
from ds4.kernels.numerics import Numerics
from ds4.kernels.proj.ref import Rows, matmul_rows
from ds4.weights.dense_cache import Weight


def hc_head(
    streams: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    hc_eps: float,
    norm_eps: float,
    numerics: Numerics,
    rows: Rows = None,
) -> Tensor:
    """Weighted sum of streams f32 ``[n, m, d]`` -> ``[n, d]``, weights ``sigmoid(mix * scale + base) + hc_eps``."""
    weights = torch.sigmoid(hc_mix(streams, fn, norm_eps, rows) * scale + base) + hc_eps
    return numerics.rd(hc_collapse(streams, weights))


def head(x: Tensor, norm: Tensor, weight: Weight, *, norm_eps: float, numerics: Numerics, rows: Rows = None) -> Tensor:
    """Logits f32 ``[n, vocab]`` of collapsed hidden x f32 ``[n, d]``; the product is FP32 always."""
    return matmul_rows(numerics.rd(rms_norm(x, norm, norm_eps)), weight, rows)


def greedy(logits: Tensor) -> dict[str, Tensor]:
    """token i32 ``[n]``, the largest of logits f32 ``[n, vocab]``, the lowest on ties, the first NaN if any; top f32
    ``[n]``, its logit; status i32 ``[n]``, 1 where that is not finite."""
    token = logits.argmax(dim=1)
    top = logits.gather(1, token[:, None])[:, 0]
    return {"token": token.to(torch.int32), "top": top, "status": (~top.isfinite()).to(torch.int32)}


def lm_head(x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """logits f32 ``[n, vocab]`` of normed x f32 ``[n, d]`` and weight f32 ``[vocab, d]``, and their :func:`greedy`."""
    logits = matmul_rows(x, weight, None)
    return {"logits": logits, **greedy(logits)}
