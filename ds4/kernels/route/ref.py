"""Torch references of the router (spec model.md 2.7)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ds4.kernels.proj.ref import Rows, matmul_rows


def route_weights(scores: Tensor, ids: Tensor, route_scale: float) -> Tensor:
    """``route_scale * s[id] / sum(s[ids])``: scores f32 ``[n, e]``, ids i64 ``[n, k]`` -> f32 ``[n, k]``."""
    w = scores.gather(1, ids)
    return w / w.sum(-1, keepdim=True) * route_scale


def select(
    logits: Tensor, *, bias: Tensor | None, hash_ids: Tensor | None, top_k: int, route_scale: float
) -> tuple[Tensor, Tensor]:
    """Expert ids i64 ``[n, k]`` and weights f32 ``[n, k]`` of logits f32 ``[n, e]``, score = sqrt(softplus(logits)).

    Bias-routed (``bias`` f32 ``[e]``): the k largest score + bias, by falling value, ties to the lower id. Hash-routed:
    ``hash_ids`` i64 ``[n, k]`` from the token-id table. The bias selects only; weights come from the unbiased scores.
    """
    scores = torch.sqrt(F.softplus(logits))
    if hash_ids is not None:
        ids = hash_ids
    else:
        biased = scores if bias is None else scores + bias
        ids = biased.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    return ids, route_weights(scores, ids, route_scale)


def route(
    x: Tensor,
    gate: Tensor,
    *,
    bias: Tensor | None,
    hash_ids: Tensor | None,
    top_k: int,
    route_scale: float,
    rows: Rows = None,
) -> tuple[Tensor, Tensor]:
    """:func:`select` of the logits x gate^T of tokens x f32 ``[n, d]``, gate f32 ``[e, d]``."""
    logits = matmul_rows(x, gate, rows)
    return select(logits, bias=bias, hash_ids=hash_ids, top_k=top_k, route_scale=route_scale)
