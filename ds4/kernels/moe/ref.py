"""Torch references of the expert layer (spec model.md 2.7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ds4.kernels.numerics import Numerics
from ds4.kernels.proj.ref import ACT_BLOCK, Rows
from ds4.weights.dense_cache import Weight, dense, dense_concat
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


def _ffn(x: Tensor, expert: Expert, weight: Tensor | None, limit: float, numerics: Numerics) -> Tensor:
    """One expert on f32 ``[n, d]``; ``weight`` ``[n, 1]`` enters before w2, whose input is rounded."""
    rd = numerics.rd
    gate, up = F.linear(_round_act(x, numerics), dense_concat((expert.w1, expert.w3))).chunk(2, dim=1)
    a = swiglu(rd(gate), rd(up), limit)
    if weight is not None:
        a = weight * a
    return rd(F.linear(_round_act(rd(a), numerics), dense(expert.w2)))


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
    for expert, pair in zip(experts, sorted_pairs.split(counts), strict=True):
        for block in pair.split(EXPERT_ROWS):
            k = block.shape[0]
            if k == 0:
                continue
            xb = F.pad(x[block // top_k], (0, 0, 0, EXPERT_ROWS - k))
            wb = F.pad(flat_weights[block], (0, 0, 0, EXPERT_ROWS - k))
            outs.append(_ffn(xb, expert, wb, limit, numerics)[:k])
    # One row a (token, slot) pair keeps the slots apart: each token sums them in the order of selection.
    slot_out = x.new_zeros(n * top_k, d).index_copy(0, sorted_pairs, torch.cat(outs))
    return slot_out.view(n, top_k, d).sum(1)


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
    token_experts = [[*(experts[e] for e in chosen[r]), shared] for r in rows]
    gate_up = x.new_zeros(n, n_slots, 2 * inter)
    for r, slot_experts in zip(rows, token_experts, strict=True):
        for expert, out in zip(slot_experts, gate_up[r].unbind(), strict=True):
            torch.mv(dense_concat((expert.w1, expert.w3)), xq[r], out=out)
    gate, up = numerics.rd(gate_up).chunk(2, dim=-1)
    slot_weights = F.pad(weights, (0, 1), value=1.0)
    a = _round_act(numerics.rd(swiglu(gate, up, limit) * slot_weights.unsqueeze(-1)), numerics)
    slot_out = x.new_zeros(n, n_slots, d)
    for r, slot_experts in zip(rows, token_experts, strict=True):
        for expert, act, out in zip(slot_experts, a[r].unbind(), slot_out[r].unbind(), strict=True):
            torch.mv(dense(expert.w2), act, out=out)
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
    return numerics.rd(routed + _ffn(x, shared, None, limit, numerics))
