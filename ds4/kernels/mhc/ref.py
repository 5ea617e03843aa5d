"""Torch references of the mHC operations (spec model.md 2.2)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ds4.kernels.common import rms_norm
from ds4.kernels.numerics import Numerics
from ds4.kernels.proj.ref import Rows, matmul_rows


def hc_mix(streams: Tensor, fn: Tensor, norm_eps: float, rows: Rows = None) -> Tensor:
    """Mixing logits: ``(flat(streams) @ fn^T) * rsqrt(mean(flat^2) + norm_eps)``.

    streams f32 ``[n, hc_mult, d]``, fn f32 ``[n_mix, hc_mult * d]`` -> f32 ``[n, n_mix]``.
    """
    flat = streams.flatten(1)
    inv = (flat * flat).sum(-1, keepdim=True).mul_(1.0 / flat.shape[1]).add_(norm_eps).rsqrt_()
    return matmul_rows(flat, fn, rows) * inv


@lru_cache(maxsize=8)
def _scale_index(m: int, device: torch.device) -> Tensor:
    """Which of the three scales (pre, post, comb) belongs to each of the ``(2 + m) m`` mixing logits."""
    with torch.inference_mode(False):  # kept, and training may be the next to use it
        return torch.tensor([0] * m + [1] * m + [2] * (m * m), device=device)


def hc_sinkhorn(
    mix: Tensor, scale: Tensor, base: Tensor, hc_mult: int, iters: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Split mixing logits into pre ``[n, m]``, post ``[n, m]`` and the doubly stochastic comb ``[n, m, m]``.

    ``comb[j, k]``: j is the source stream (the softmax row, summed over later), k the destination. ``iters`` counts the
    softmax with its column pass as the first round; it ends on columns.
    """
    m = hc_mult
    z = mix * scale[_scale_index(m, scale.device)] + base
    gates = torch.sigmoid(z[:, : 2 * m])
    pre, post = gates[:, :m] + eps, 2 * gates[:, m:]
    comb = z[:, 2 * m :].unflatten(1, (m, m)).softmax(-1) + eps
    if comb.requires_grad or comb.device.type != "cpu":
        comb = comb / (comb.sum(1, keepdim=True) + eps)
        for _ in range(iters - 1):
            comb = comb / (comb.sum(2, keepdim=True) + eps)
            comb = comb / (comb.sum(1, keepdim=True) + eps)
    else:
        _sinkhorn_rounds(comb.numpy(), iters, eps)
    return pre, post, comb


@lru_cache(maxsize=4)
def _group_sums(m: int) -> tuple[np.ndarray, np.ndarray]:
    """f32 ``[m m, m m]`` each: a flattened m x m matrix times one holds its row (or column) sums in every place."""
    one, ones = np.eye(m, dtype=np.float32), np.ones((m, m), dtype=np.float32)
    return np.kron(one, ones), np.kron(ones, one)


def _sinkhorn_rounds(comb: np.ndarray, iters: int, eps: float) -> None:
    """The rounds in place, in NumPy: the calls cost more than the arithmetic, and NumPy's cost a fifth of torch's.

    (A quarter of a decode step otherwise.) The sums come from a product with a matrix of ones: a cheaper call than a
    reduction over four values.
    """
    dot, add, divide, tiny = np.dot, np.add, np.divide, np.float32(eps)
    by_row, by_column = _group_sums(comb.shape[1])
    flat = comb.reshape(comb.shape[0], -1)
    total = np.empty_like(flat)
    divide(flat, add(dot(flat, by_column, total), tiny, total), flat)
    for _ in range(iters - 1):
        divide(flat, add(dot(flat, by_row, total), tiny, total), flat)
        divide(flat, add(dot(flat, by_column, total), tiny, total), flat)


def hc_expand(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """``out[k] = post[k] * y + sum_j comb[j, k] * streams[j]`` (hc_post): f32 ``[n, m, d]``."""
    return torch.baddbmm(post.unsqueeze(-1) * y.unsqueeze(1), comb.transpose(1, 2), streams)


def hc_collapse(streams: Tensor, pre: Tensor) -> Tensor:
    """``sum_n pre[n] * streams[n]``: f32 ``[n, m, d]``, ``[n, m]`` -> ``[n, d]``."""
    return torch.bmm(pre.unsqueeze(1), streams).squeeze(1)


def mhc_boundary(
    y: Tensor | None,
    streams: Tensor,
    post: Tensor | None,
    comb: Tensor | None,
    *,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm: Tensor,
    sinkhorn_iters: int,
    hc_eps: float,
    norm_eps: float,
    numerics: Numerics,
    rows: Rows = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Everything between two sublayers: finish the previous one, mix, collapse, norm.

    y f32 ``[n, d]`` output of the previous sublayer with its ``post`` ``[n, m]`` and ``comb`` ``[n, m, m]``, or None at
    the first boundary; streams f32 ``[n, m, d]``; fn f32 ``[(2 + m) m, m d]``; norm f32 ``[d]``.
    Returns (streams, x, post, comb): the new streams and the normed input ``x`` ``[n, d]`` of the next sublayer.
    """
    if y is not None:
        assert post is not None
        assert comb is not None
        streams = numerics.rd(hc_expand(y, streams, post, comb))
    mix = hc_mix(streams, fn, norm_eps, rows)
    pre, post, comb = hc_sinkhorn(mix, scale, base, streams.shape[1], sinkhorn_iters, hc_eps)
    x = numerics.rd(hc_collapse(streams, pre))
    return streams, numerics.rd(rms_norm(x, norm, norm_eps)), post, comb
