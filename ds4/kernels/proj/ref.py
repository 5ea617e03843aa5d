"""Torch references of the projections.

Decode form: one matrix-vector product a token, always of the same shape, so that a token's result cannot depend on
its neighbours. Prefill form: several tiles of tokens, whose number of rows is fixed, and one matrix product for each. A
packed matrix that is large in FP32 is decoded a few rows at a time, once for all tiles, and each part of it is
multiplied like a matrix of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ds4.kernels.numerics import Numerics
from ds4.kernels.threads import each, spread
from ds4.weights.dense_cache import Weight, Weights, dense, spans, tiles
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


def products(xs: Sequence[Tensor], weights: Weights, *, tiled: bool = False) -> list[Tensor]:
    """``x @ w^T`` of each x f32 ``[n_i, k]``: f32 ``[n_i, m]``; each a product of its own, whose shape others do not
    change. A tiled weight is decoded once for all of them; with ``tiled`` every packed weight is one."""
    # A prompt goes through all matrices in turn: copies of the last ones would only push out those of the first.
    stack = None if tiled and not isinstance(weights[0], Tensor) else dense(weights, evict=False)
    if stack is not None:
        return each(partial(_linear, stack), xs)
    outs = [x.new_empty(x.shape[0], sum(w.shape[0] for w in weights)) for x in xs]
    spread([partial(_mm_span, xs, weights, span, outs) for span in spans(weights)])
    return outs


def _linear(w: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, w)


def _mm_span(xs: Sequence[Tensor], weights: Weights, span: tuple[int, int], outs: Sequence[Tensor]) -> None:
    for part, tile in tiles(weights, *span):
        for x, out in zip(xs, outs, strict=True):
            torch.mm(x, tile.t(), out=out[:, part])


def _activations(x: Tensor, numerics: Numerics, act_fp8: bool) -> Tensor:
    return block_scale.round_e4m3(x, ACT_BLOCK) if act_fp8 and numerics.act_fp8 else x


def proj(x: Tensor, w: Weight, numerics: Numerics, rows: Rows = None, *, act_fp8: bool = True) -> Tensor:
    """``x W^T`` f32 ``[n, k]`` -> ``[n, m]``; ``act_fp8``: the official code has FP8 activations here (5.4, 5.6)."""
    return numerics.rd(matmul_rows(_activations(x, numerics, act_fp8), w, rows))


def proj_tiles(xs: Sequence[Tensor], w: Weight, numerics: Numerics, *, act_fp8: bool = True) -> list[Tensor]:
    """:func:`proj` of several tiles in the prefill form."""
    if act_fp8 and numerics.act_fp8:
        xs = each(partial(block_scale.round_e4m3, block=ACT_BLOCK), xs)
    return _rounded(products(xs, (w,)), numerics)


def _rounded(ys: list[Tensor], numerics: Numerics) -> list[Tensor]:
    return each(numerics.rd, ys) if numerics.bf16 else ys


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
    if rows is None:
        return proj_in_tiles([x], fp8, bf16, fp32, numerics)[0]
    if numerics.act_fp8:
        return (
            [proj(x, w, numerics, rows) for w in fp8]
            + [proj(x, w, numerics, rows, act_fp8=False) for w in bf16]
            + [matmul_rows(x, w, rows) for w in fp32]
        )
    return _split(matmul_rows(x, (*fp8, *bf16, *fp32), rows), fp8, bf16, fp32, numerics)


def _split(
    joined: Tensor, fp8: Sequence[Weight], bf16: Sequence[Weight], fp32: Sequence[Weight], numerics: Numerics
) -> list[Tensor]:
    """The parts of one product over the concatenated rows, as the kernel does it: fewer calls, same K order."""
    outs = list(joined.split([w.shape[0] for w in (*fp8, *bf16, *fp32)], dim=1))
    n_rounded = len(fp8) + len(bf16)
    return [numerics.rd(y) for y in outs[:n_rounded]] + outs[n_rounded:]


def proj_in_tiles(
    xs: Sequence[Tensor],
    fp8: Sequence[Weight],
    bf16: Sequence[Weight],
    fp32: Sequence[Weight],
    numerics: Numerics,
) -> list[list[Tensor]]:
    """:func:`proj_in` of several tiles in the prefill form."""
    if numerics.act_fp8:
        made = [proj_tiles(xs, w, numerics) for w in fp8]
        made += [proj_tiles(xs, w, numerics, act_fp8=False) for w in bf16]
        made += [products(xs, (w,)) for w in fp32]
        return [list(ys) for ys in zip(*made, strict=True)]
    return [_split(joined, fp8, bf16, fp32, numerics) for joined in products(xs, (*fp8, *bf16, *fp32))]


def proj_grouped(o: Tensor, w: Weight, numerics: Numerics, rows: Rows = None) -> Tensor:
    """Grouped projection (wo_a): f32 ``[n, g, k]``, weight ``[g * m, k]`` -> ``[n, g * m]``, group-major (2.6)."""
    if rows is None:
        return proj_grouped_tiles([o], w, numerics)[0]
    n_groups = o.shape[1]
    n_out = w.shape[0] // n_groups
    stack = dense((w,))
    out = o.new_zeros(o.shape[0], w.shape[0])
    for g in range(n_groups):
        group = slice(g * n_out, (g + 1) * n_out)
        for part, tile in tiles((w,), group.start, group.stop) if stack is None else [(group, stack[group])]:
            _mv(tile, o[:, g], rows, out[:, part])
    return numerics.rd(out)


def proj_grouped_tiles(os: Sequence[Tensor], w: Weight, numerics: Numerics) -> list[Tensor]:
    """:func:`proj_grouped` of several tiles in the prefill form."""
    n_groups = os[0].shape[1]
    n_out = w.shape[0] // n_groups
    stack = dense((w,), evict=False)
    if stack is not None:
        return _rounded(each(partial(_grouped, stack.unflatten(0, (n_groups, n_out))), os), numerics)
    outs = [o.new_empty(o.shape[0], w.shape[0]) for o in os]
    pieces = []
    for g in range(n_groups):
        xs = [o[:, g] for o in os]
        pieces += [partial(_mm_span, xs, (w,), s, outs) for s in spans((w,), g * n_out, (g + 1) * n_out)]
    spread(pieces)
    return _rounded(outs, numerics)


def _grouped(w: Tensor, o: Tensor) -> Tensor:
    return torch.einsum("ngk,gmk->ngm", o, w).flatten(1)
