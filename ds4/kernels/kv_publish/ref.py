"""Torch references of the cache writers (spec model.md 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.cases import Inputs, Outputs
from ds4.kernels.common import apply_rope, hadamard, rms_norm
from ds4.kernels.numerics import GROUPS, Numerics
from ds4.kv.rows import PackedKey, PackedRow

CSA_RATIO = 4
ROW, KEY = PackedRow(448, 64), PackedKey(128)
_SERVE = GROUPS["serve"]


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


def ring_row(kv: Tensor, norm: Tensor, cis: Tensor, eps: float) -> Tensor:
    """Raw f32 ``[n, 512]`` -> rows of the ring before packing: norm, then RoPE by complex64 ``cis`` ``[n, 32]``."""
    return apply_rope(rms_norm(kv, norm, eps), cis)


def publish_raw(kv: Tensor, gate: Tensor, ape: Tensor, state: Tensor, start: int) -> Tensor:
    """``state`` f32 ``[slots, 2, c]``, new, with the raw rows f32 ``[n, c]`` of positions ``start ..``; ape added."""
    pos = torch.arange(start, start + kv.shape[0])
    state = state.clone()
    state[pos % state.shape[0]] = torch.stack((kv, gate + ape[pos % ape.shape[0]]), dim=1)
    return state


def closed_entries(
    state: Tensor, start: int, n_tok: int, norm: Tensor, cis: Tensor, eps: float, ratio: int, *, indexer: bool = False
) -> list[tuple[int, Tensor]]:
    """(index, entry f32 ``[1, width]`` before packing) of every window that tokens ``start ..`` close.

    ``state`` has the tokens' own rows already; ``cis`` complex64 ``[n_tok, 32]`` turns by the window's first position.
    """
    overlap = state.shape[2] > norm.shape[0]  # of CSA, which has two series in a row
    closed = []
    for entry in range(start // ratio, (start + n_tok) // ratio):
        first, end = (entry - overlap) * ratio, (entry + 1) * ratio
        past = state[torch.arange(first, end) % state.shape[0]]
        values, scores = past[:, 0], past[:, 1]
        pooled = pool_csa(values, scores, entry) if overlap else pool_hca(values, scores, ratio)
        turn = cis[end - 1 - start].unsqueeze(0)
        closed.append((entry, finish_entry(pooled, norm, turn, eps, _SERVE, indexer=indexer)))
    return closed


def _published_entries(inputs: Inputs, state: Tensor, pool: Tensor, norm: str, ratio: int, *, indexer: bool) -> Tensor:
    """``pool`` u8 ``[n_entries, bytes]``, new, with the entries that the launch closes."""
    start, n_tok = int(inputs["pos"]), inputs["q_a"].shape[0]
    cis = torch.view_as_complex(inputs["entry_cis"])
    pool = pool.clone()
    for entry, value in closed_entries(state, start, n_tok, inputs[norm], cis, inputs["eps"], ratio, indexer=indexer):
        if entry < pool.shape[0]:
            pool[entry] = (KEY if indexer else ROW).pack(value)[0]
    return pool


def kv_publish(inputs: Inputs) -> Outputs:
    """All results of a launch by name; inputs as ds4/kernels/kv_publish/op.py describes them, left as they are."""
    start, eps = int(inputs["pos"]), inputs["eps"]
    ring = inputs["ring"].clone()
    row = ring_row(inputs["kv"], inputs["kv_norm"], torch.view_as_complex(inputs["cis"]), eps)
    ring[torch.arange(start, start + len(row)) % ring.shape[0]] = ROW.pack(row)
    results = {"qr": rms_norm(inputs["q_a"], inputs["q_norm"], eps), "ring": ring}
    if "comp_kv" in inputs:
        ape = inputs["ape"]
        state = publish_raw(inputs["comp_kv"], inputs["comp_gate"], ape, inputs["state"], start)
        pool = _published_entries(inputs, state, inputs["pool"], "comp_norm", ape.shape[0], indexer=False)
        results |= {"state": state, "pool": pool}
    if "idx_kv" in inputs:
        key_state = publish_raw(inputs["idx_kv"], inputs["idx_gate"], inputs["idx_ape"], inputs["key_state"], start)
        keys = _published_entries(inputs, key_state, inputs["keys"], "idx_norm", CSA_RATIO, indexer=True)
        results |= {"key_state": key_state, "keys": keys}
    return results
