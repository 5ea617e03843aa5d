"""Torch references of the expert layer (spec model.md 2.7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ds4.kernels.numerics import Numerics
from ds4.kernels.proj.ref import ACT_BLOCK, Rows, products
from ds4.weights.dense_cache import Weight, Weights, dense, tiles
from ds4.weights.formats import block_scale

EXPERT_ROWS = 32
"""Prefill form: an expert's tokens are computed in blocks of this many rows, padded, so that the shape is fixed."""


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


def _ffn(
    xs: Sequence[Tensor], expert: Expert, weights: Sequence[Tensor] | None, limit: float, numerics: Numerics
) -> list[Tensor]:
    """One expert on blocks of f32 ``[n, d]``; ``weights`` ``[n, 1]`` each enter before w2, whose input is rounded."""
    rd = numerics.rd
    acts = []
    for i, gate_up in enumerate(products([_round_act(x, numerics) for x in xs], (expert.w1, expert.w3))):
        gate, up = gate_up.chunk(2, dim=1)
        a = swiglu(rd(gate), rd(up), limit)
        if weights is not None:
            a = weights[i] * a
        acts.append(_round_act(rd(a), numerics))
    return [rd(y) for y in products(acts, (expert.w2,))]


def _moe_prefill(
    x: Tensor, ids: Tensor, weights: Tensor, experts: Sequence[Expert], live: slice, limit: float, numerics: Numerics
) -> Tensor:
    n, d = x.shape
    top_k = ids.shape[1]
    flat = torch.arange(n * top_k).view(n, top_k)[live].reshape(-1)
    by_expert, order = ids.reshape(-1)[flat].sort(stable=True)
    counts = torch.bincount(by_expert, minlength=len(experts)).tolist()
    sorted_pairs = flat[order]
    flat_weights = weights.reshape(-1, 1)
    outs = []
    for expert, pairs in zip(experts, sorted_pairs.split(counts), strict=True):
        if pairs.shape[0] == 0:
            continue
        blocks = pairs.split(EXPERT_ROWS)
        xs = [F.pad(x[b // top_k], (0, 0, 0, EXPERT_ROWS - b.shape[0])) for b in blocks]
        ws = [F.pad(flat_weights[b], (0, 0, 0, EXPERT_ROWS - b.shape[0])) for b in blocks]
        ys = _ffn(xs, expert, ws, limit, numerics)
        outs += [y[: b.shape[0]] for y, b in zip(ys, blocks, strict=True)]
    # One row a (token, slot) pair keeps the slots apart: each token sums them in the order of selection.
    slot_out = x.new_zeros(n * top_k, d).index_copy(0, sorted_pairs, torch.cat(outs))
    return slot_out.view(n, top_k, d).sum(1)


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
    routed = _moe_prefill(x, ids, weights, experts, live, limit, numerics)
    return numerics.rd(routed + _ffn([x], shared, None, limit, numerics)[0])
