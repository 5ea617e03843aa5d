"""Torch references of the expert layer (spec model.md 2.7)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ds4.kernels.numerics import Numerics
from ds4.kernels.proj.ref import ACT_BLOCK, Rows, products
from ds4.kernels.threads import each
from ds4.weights.dense_cache import Weight, Weights, dense, dense_bytes, tiles
from ds4.weights.formats import block_scale

EXPERT_ROWS = 32
"""Prefill form: an expert's tokens are multiplied in blocks of this many rows, padded, so that the shape is fixed."""

TILED_EXPERTS_BYTES = 128 << 20
"""Prefill form: the experts of a layer that together are above this size in FP32 are decoded tile by tile at every use.
A prompt wants nearly all of them, layer by layer, so that there is no keeping copies."""


class Expert(NamedTuple):
    """One SwiGLU: w1 (gate) and w3 (up) ``[inter, d]``, w2 (down) ``[d, inter]``."""

    w1: Weight
    w3: Weight
    w2: Weight


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """``silu(min(gate, limit)) * clamp(up, -limit, limit)``; the gate has no lower clamp."""
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def _round_act(x: Tensor, numerics: Numerics) -> Tensor:
    return block_scale.round_e4m3(x, ACT_BLOCK) if numerics.act_fp8 else x


def _activated(gate_up: Tensor, weights: Tensor | None, limit: float, numerics: Numerics) -> Tensor:
    """Input f32 ``[n, inter]`` of w2 from the products f32 ``[n, 2 inter]``; ``weights`` ``[n, 1]`` enter here, before
    it is rounded."""
    gate, up = numerics.rd(gate_up).chunk(2, dim=1)
    a = swiglu(gate, up, limit)
    if weights is not None:
        a = weights * a
    return _round_act(numerics.rd(a), numerics)


def _shared_ffn(xs: Sequence[Tensor], expert: Expert, limit: float, numerics: Numerics) -> list[Tensor]:
    """The shared expert on tiles of f32 ``[n, d]``."""
    gate_up = products(each(partial(_round_act, numerics=numerics), xs), (expert.w1, expert.w3))
    acts = each(partial(_activated, weights=None, limit=limit, numerics=numerics), gate_up)
    return [numerics.rd(y) for y in products(acts, (expert.w2,))]


def _routed_ffn(
    x: Tensor,
    weights: Tensor,
    top_k: int,
    limit: float,
    numerics: Numerics,
    tiled: bool,
    expert: Expert,
    pairs: Tensor,
) -> Tensor:
    """One expert on its (token, slot) pairs i64 ``[p]``, numbered ``token * top_k + slot``: f32 ``[p, d]``.

    x f32 ``[n, d]``, weights f32 ``[n * top_k, 1]``. Only the matrix products are taken block by block: what goes value
    by value does not care about rows, as long as all is computed by one thread in whole vectors.
    """
    padded = F.pad(pairs, (0, -pairs.shape[0] % EXPERT_ROWS))
    blocks = _round_act(x[padded // top_k], numerics).split(EXPERT_ROWS)
    gate_up = torch.cat(products(blocks, (expert.w1, expert.w3), tiled=tiled))
    acts = _activated(gate_up, weights[padded], limit, numerics).split(EXPERT_ROWS)
    return numerics.rd(torch.cat(products(acts, (expert.w2,), tiled=tiled))[: pairs.shape[0]])


def moe_tiles(
    xs: Sequence[Tensor],
    ids: Sequence[Tensor],
    weights: Sequence[Tensor],
    lives: Sequence[slice],
    experts: Sequence[Expert],
    shared: Expert,
    *,
    limit: float,
    numerics: Numerics,
) -> list[Tensor]:
    """:func:`moe` of several tiles of equal shape in the prefill form; an expert takes the tokens of all of them."""
    n, top_k = ids[0].shape
    every = torch.arange(len(xs) * n * top_k).view(len(xs), n, top_k)
    flat = torch.cat([every[t, live].reshape(-1) for t, live in enumerate(lives)])
    by_expert, order = torch.cat(list(ids)).reshape(-1)[flat].sort(stable=True)
    pairs = flat[order]
    split = pairs.split(torch.bincount(by_expert, minlength=len(experts)).tolist())
    x, w = torch.cat(list(xs)), torch.cat(list(weights)).reshape(-1, 1)
    tiled = len(experts) * sum(dense_bytes((matrix,)) for matrix in experts[0]) > TILED_EXPERTS_BYTES
    ffn = partial(_routed_ffn, x, w, top_k, limit, numerics, tiled)
    outs = each(ffn, *zip(*((e, p) for e, p in zip(experts, split, strict=True) if p.shape[0]), strict=True))
    out = torch.cat(outs)
    # Where a pair's result lies; pairs of rows without tokens point anywhere.
    place = torch.zeros_like(every).view(-1).index_copy_(0, pairs, torch.arange(pairs.shape[0])).view_as(every)
    return each(partial(_summed, out, numerics), place.unbind(), _shared_ffn(xs, shared, limit, numerics))


def _summed(out: Tensor, numerics: Numerics, place: Tensor, shared: Tensor) -> Tensor:
    """Slots in the order of selection, then the shared expert."""
    return numerics.rd(out[place].sum(1) + shared)


def _slot_products(xs: Sequence[Tensor], weights: Sequence[Weights], outs: Sequence[Tensor]) -> None:
    """``outs[i] = weights[i] @ xs[i]``, one matrix-vector product each; slots with equal weights one after another,
    while these are in the CPU's cache. Equal tiled weights are decoded once."""
    slots: dict[Weights, list[int]] = {}
    for i, w in enumerate(weights):
        slots.setdefault(w, []).append(i)
    for w, same in slots.items():
        stack = dense(w)
        if stack is not None:
            for i in same:
                torch.mv(stack, xs[i], out=outs[i])
            continue
        for part, tile in tiles(w):
            for i in same:
                torch.mv(tile, xs[i], out=outs[i][part])


def _moe_decode(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: Sequence[Expert],
    shared: Expert,
    rows: tuple[int, ...],
    limit: float,
    numerics: Numerics,
) -> Tensor:
    n, d = x.shape
    n_slots = ids.shape[1] + 1
    inter = shared.w2.shape[1]
    xq = _round_act(x, numerics)
    chosen = ids.tolist()
    slot_experts = [e for r in rows for e in (*(experts[i] for i in chosen[r]), shared)]
    gate_up = x.new_zeros(n, n_slots, 2 * inter)
    inputs = [row for r in rows for row in [xq[r]] * n_slots]
    _slot_products(inputs, [(e.w1, e.w3) for e in slot_experts], [y for r in rows for y in gate_up[r].unbind()])
    gate, up = numerics.rd(gate_up).chunk(2, dim=-1)
    slot_weights = F.pad(weights, (0, 1), value=1.0)
    a = _round_act(numerics.rd(swiglu(gate, up, limit) * slot_weights.unsqueeze(-1)), numerics)
    slot_out = x.new_zeros(n, n_slots, d)
    inputs = [act for r in rows for act in a[r].unbind()]
    _slot_products(inputs, [(e.w2,) for e in slot_experts], [y for r in rows for y in slot_out[r].unbind()])
    return numerics.rd(numerics.rd(slot_out).sum(1))


def moe(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: Sequence[Expert],
    shared: Expert,
    *,
    limit: float,
    numerics: Numerics,
    rows: Rows = None,
    live: slice = slice(None),
) -> Tensor:
    """``sum_slots weight * expert(x) + shared(x)``: f32 ``[n, d]``, ids i64 / weights f32 ``[n, k]`` -> f32 ``[n, d]``.

    Decode form: ``rows`` with tokens, one matrix-vector product a slot. Prefill form: ``live`` rows grouped by expert.
    Order: slots by selection rank, then the shared expert, for every token. The routing weight enters before w2.
    """
    if rows is not None:
        return _moe_decode(x, ids, weights, experts, shared, rows, limit, numerics)
    return moe_tiles([x], [ids], [weights], [live], experts, shared, limit=limit, numerics=numerics)[0]
