"""Torch references of the cache writers (spec model.md 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.cases import Inputs, Outputs
from ds4.kernels.common import apply_rope, hadamard, rms_norm
from ds4.kernels.numerics import GROUPS, Numerics
from ds4.kernels.verify import poison
from ds4.kv.ring import ring_read, ring_write
from ds4.kv.rows import PackedKey, PackedRow

CSA_RATIO = 4
ROW, KEY = PackedRow(448, 64), PackedKey(128)
_SERVE = GROUPS["serve"]
# Names of a compressor's tensors: raw values, gates, position bias, norm, state, entries.
COMPRESSORS = {
    "comp": ("comp_kv", "comp_gate", "ape", "comp_norm", "state", "pool"),
    "idx": ("idx_kv", "idx_gate", "idx_ape", "idx_norm", "key_state", "keys"),
}


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
    """``state`` f32 ``[slots, 2, c]``, new, with the raw rows f32 ``[n, c]`` of positions ``start ..``; ape added. Of
    more rows than slots the last remain."""
    pos = torch.arange(start, start + kv.shape[0])
    state = state.clone()
    ring_write(state, start, torch.stack((kv, gate + ape[pos % ape.shape[0]]), dim=1))
    return state


def lengthened(state: Tensor, start: int, n_tok: int) -> Tensor:
    """``state`` f32 ``[slots, 2, c]`` with ``n_tok`` slots more, so that tokens ``start ..`` overwrite none before."""
    slots = state.shape[0]
    longer = state.new_zeros(slots + n_tok, *state.shape[1:])
    if start:
        past = max(0, start - slots)
        ring_write(longer, past, ring_read(state, past, start))
    return longer


def closed_entries(
    state: Tensor, start: int, n_tok: int, norm: Tensor, cis: Tensor, eps: float, ratio: int, *, indexer: bool = False
) -> tuple[int, Tensor]:
    """First index, and entries f32 ``[n, width]`` before packing, of the windows that tokens ``start ..`` close.

    ``state`` has the tokens' own rows and all that they are pooled with; ``cis`` complex64 ``[n_tok, 32]`` turns by the
    window's first position.
    """
    first, end = start // ratio, (start + n_tok) // ratio
    if first == end:
        return first, norm.new_empty(0, norm.shape[0])
    overlap = state.shape[2] > norm.shape[0]  # of CSA, which has two series in a row
    past = state[torch.arange((first - overlap) * ratio, end * ratio) % state.shape[0]]
    values, scores = past[:, 0], past[:, 1]
    pooled = pool_csa(values, scores, first) if overlap else pool_hca(values, scores, ratio)
    turn = cis[(first + 1) * ratio - 1 - start :: ratio]
    return first, finish_entry(pooled, norm, turn, eps, _SERVE, indexer=indexer)


def _published_entries(inputs: Inputs, names: tuple[str, ...], *, indexer: bool) -> tuple[Tensor, Tensor]:
    """State and entries of the compressor whose tensors have these names, both new, after the launch."""
    kv, gate, ape, norm, state, pool = (inputs[name] for name in names)
    start, n_tok = int(inputs["pos"]), kv.shape[0]
    raw = publish_raw(kv, gate, ape, lengthened(state, start, n_tok), start)
    cis, pool = torch.view_as_complex(inputs["entry_cis"]), pool.clone()
    first, entries = closed_entries(raw, start, n_tok, norm, cis, inputs["eps"], ape.shape[0], indexer=indexer)
    entries = entries[: max(0, len(pool) - first)]  # others have no room
    if len(entries):
        pool[first : first + len(entries)] = (KEY if indexer else ROW).pack(entries)
    return publish_raw(kv, gate, ape, state, start), pool


def kv_publish(inputs: Inputs) -> Outputs:
    """All results of a launch of any number of tokens by name; inputs as ds4/kernels/kv_publish/op.py describes them,
    left as they are."""
    start, eps = int(inputs["pos"]), inputs["eps"]
    ring = inputs["ring"].clone()
    ring_write(ring, start, packed_rows(inputs))
    results = {"qr": rms_norm(inputs["q_a"], inputs["q_norm"], eps), "ring": ring}
    for prefix, names in COMPRESSORS.items():
        if names[0] in inputs:
            state, pool = _published_entries(inputs, names, indexer=prefix == "idx")
            results |= {names[4]: state, names[5]: pool}
    return results


def packed_rows(inputs: Inputs) -> Tensor:
    """u8 ``[n_tok, 584]``: the tokens' rows."""
    return ROW.pack(ring_row(inputs["kv"], inputs["kv_norm"], torch.view_as_complex(inputs["cis"]), inputs["eps"]))


def kv_prefill(inputs: Inputs, token_inputs: tuple[str, ...]) -> Outputs:
    """All results of a chunk by name; inputs as ds4/kernels/kv_publish/prefill_op.py describes them, left as they are.

    What is not specified is as ds4.kernels.verify leaves it before a launch: kernels write nothing there.
    """
    n_rows, window, start = inputs["q_a"].shape[0], inputs["window"], int(inputs["pos"])
    count = n_rows if inputs["count"] is None else min(int(inputs["count"]), n_rows)
    live = inputs | {name: inputs[name][:count] for name in token_inputs}
    results = kv_publish(live)
    rows = torch.empty(window + n_rows, ROW.row_bytes, dtype=torch.uint8)
    qr = torch.empty_like(inputs["q_a"], dtype=torch.bfloat16)
    poison((qr, rows))
    past = min(window, start)
    rows[window - past : window] = ring_read(inputs["ring"], start - past, start)
    rows[window : window + count] = packed_rows(live)
    qr[:count] = results["qr"]
    return results | {"qr": qr, "rows": rows}
