"""Torch references of the projections.

Decode form: one matrix-vector product a token, always of the same shape, so that a token's result cannot depend on
its neighbours. Prefill form: one matrix product for the rows of the tile, whose number is fixed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ds4.kernels.numerics import Numerics
from ds4.weights.dense_cache import Weight, dense, dense_concat
from ds4.weights.formats import block_scale

Rows = tuple[int, ...] | None
"""Rows that carry tokens in the decode form; None is the prefill form."""

ACT_BLOCK = 128


def matmul_rows(x: Tensor, w: Tensor, rows: Rows) -> Tensor:
    """``x @ w^T``: f32 ``[n, k]``, ``[m, k]`` -> ``[n, m]``; in the decode form rows without tokens give zeros."""
    if rows is None:
        return F.linear(x, w)
    out = x.new_zeros(x.shape[0], w.shape[0])
    for r in rows:
        torch.mv(w, x[r], out=out[r])
    return out


def _activations(x: Tensor, numerics: Numerics, act_fp8: bool) -> Tensor:
    return block_scale.round_e4m3(x, ACT_BLOCK) if act_fp8 and numerics.act_fp8 else x


def proj(x: Tensor, w: Weight, numerics: Numerics, rows: Rows = None, *, act_fp8: bool = True) -> Tensor:
    """``x W^T`` f32 ``[n, k]`` -> ``[n, m]``; ``act_fp8``: the official code has FP8 activations here (5.4, 5.6)."""
    return numerics.rd(matmul_rows(_activations(x, numerics, act_fp8), dense(w), rows))


def proj_in(
    x: Tensor,
    fp8: Sequence[Weight],
    bf16: Sequence[Weight],
    fp32: Sequence[Weight],
    numerics: Numerics,
    rows: Rows = None,
) -> list[Tensor]:
    """All projections of one sublayer input x f32 ``[n, k]``: f32 ``[n, m_i]`` each, ``fp8``, ``bf16``, then ``fp32``.

    The groups say what the official code does: FP8 activations and bf16 results; bf16 both ways; fp32 results.
    """
    if numerics.act_fp8:
        return (
            [proj(x, w, numerics, rows) for w in fp8]
            + [proj(x, w, numerics, rows, act_fp8=False) for w in bf16]
            + [matmul_rows(x, dense(w), rows) for w in fp32]
        )
    weights = (*fp8, *bf16, *fp32)
    # One product over the concatenated rows, as the kernel does it: fewer calls, same K order.
    joined = matmul_rows(x, dense_concat(weights), rows)
    outs = list(joined.split([w.shape[0] for w in weights], dim=1))
    n_rounded = len(fp8) + len(bf16)
    return [numerics.rd(y) for y in outs[:n_rounded]] + outs[n_rounded:]


def proj_grouped(o: Tensor, w: Weight, numerics: Numerics, rows: Rows = None) -> Tensor:
    """Grouped projection (wo_a): f32 ``[n, g, k]``, weight ``[g * m, k]`` -> ``[n, g * m]``, group-major (2.6)."""
    n_groups = o.shape[1]
    wg = dense(w).unflatten(0, (n_groups, -1))
    if rows is None:
        return numerics.rd(torch.einsum("ngk,gmk->ngm", o, wg).flatten(1))
    out = o.new_zeros(o.shape[0], n_groups, wg.shape[1])
    for r in rows:
        for g in range(n_groups):
            torch.mv(wg[g], o[r, g], out=out[r, g])
    return numerics.rd(out.flatten(1))
