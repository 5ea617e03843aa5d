"""Torch references of the projections.

Decode form: one matrix-vector product a token, always of the same shape, so that a token's result cannot depend on
its neighbours. Prefill form: one matrix product for the rows of the tile, whose number is fixed. A packed matrix that
is large in FP32 is decoded a few rows at a time, and each tile of it is multiplied like a matrix of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ds4.kernels.numerics import Numerics
from ds4.weights.dense_cache import Weight, Weights, dense, tiles
from ds4.weights.formats import block_scale

Rows = tuple[int, ...] | None
"""Rows that carry tokens in the decode form; None is the prefill form."""

ACT_BLOCK = 128


def matmul_rows(x: Tensor, w: Weight | Weights, rows: Rows) -> Tensor:
    """``x @ w^T``: f32 ``[n, k]``, ``[m, k]`` -> ``[n, m]``; in the decode form rows without tokens give zeros.

    Several weights count as one, stacked along their rows.
    """
    weights = w if isinstance(w, tuple) else (w,)
    if rows is None:
        return products([x], weights)[0]
    out = x.new_zeros(x.shape[0], sum(w.shape[0] for w in weights))
    stack = dense(weights)
    if stack is not None:
        _mv(stack, x, rows, out)
    else:
        for part, tile in tiles(weights):
            _mv(tile, x, rows, out[:, part])
    return out


def _mv(w: Tensor, x: Tensor, rows: tuple[int, ...], out: Tensor) -> None:
    for r in rows:
        torch.mv(w, x[r], out=out[r])


def products(xs: Sequence[Tensor], weights: Weights) -> list[Tensor]:
    """``x @ w^T`` of each x f32 ``[n_i, k]``: f32 ``[n_i, m]``; each a product of its own, whose shape others do not
    change. A tiled weight is decoded once for all of them."""
    stack = dense(weights)
    if stack is not None:
        return [F.linear(x, stack) for x in xs]
    outs = [x.new_empty(x.shape[0], sum(w.shape[0] for w in weights)) for x in xs]
    for part, tile in tiles(weights):
        for x, out in zip(xs, outs, strict=True):
            torch.mm(x, tile.t(), out=out[:, part])
    return outs


def _activations(x: Tensor, numerics: Numerics, act_fp8: bool) -> Tensor:
    return block_scale.round_e4m3(x, ACT_BLOCK) if act_fp8 and numerics.act_fp8 else x


def proj(x: Tensor, w: Weight, numerics: Numerics, rows: Rows = None, *, act_fp8: bool = True) -> Tensor:
    """``x W^T`` f32 ``[n, k]`` -> ``[n, m]``; ``act_fp8``: the official code has FP8 activations here (5.4, 5.6)."""
    return numerics.rd(matmul_rows(_activations(x, numerics, act_fp8), w, rows))


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
            + [matmul_rows(x, w, rows) for w in fp32]
        )
    weights = (*fp8, *bf16, *fp32)
    # One product over the concatenated rows, as the kernel does it: fewer calls, same K order.
    joined = matmul_rows(x, weights, rows)
    outs = list(joined.split([w.shape[0] for w in weights], dim=1))
    n_rounded = len(fp8) + len(bf16)
    return [numerics.rd(y) for y in outs[:n_rounded]] + outs[n_rounded:]


def proj_grouped(o: Tensor, w: Weight, numerics: Numerics, rows: Rows = None) -> Tensor:
    """Grouped projection (wo_a): f32 ``[n, g, k]``, weight ``[g * m, k]`` -> ``[n, g * m]``, group-major (2.6)."""
    n, n_groups = o.shape[:2]
    n_out = w.shape[0] // n_groups
    stack = dense((w,))
    if stack is not None and rows is None:
        return numerics.rd(torch.einsum("ngk,gmk->ngm", o, stack.unflatten(0, (n_groups, n_out))).flatten(1))
    out = o.new_zeros(n, n_groups * n_out)
    for g in range(n_groups):
        group = slice(g * n_out, (g + 1) * n_out)
        for part, tile in tiles((w,), group.start, group.stop) if stack is None else [(group, stack[group])]:
            if rows is None:
                torch.mm(o[:, g], tile.t(), out=out[:, part])
            else:
                _mv(tile, o[:, g], rows, out[:, part])
    return numerics.rd(out)
