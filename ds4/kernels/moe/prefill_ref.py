"""Torch references of the experts' prefill form (spec model.md 2.7), with its roundings to BF16."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from ds4.kernels.cases import Inputs, Outputs
from ds4.kernels.moe.matrices import decoded, n_rows_of
from ds4.kernels.moe.ref import swiglu


def max_tiles(n_pairs: int, n_experts: int, tile: int) -> int:
    """The most tiles that ``n_pairs`` pairs of ``n_experts`` experts make."""
    return min(n_pairs, n_pairs // tile + n_experts)


def live_rows(count: Tensor | None, n_rows: int) -> int:
    """Rows with tokens of a chunk of ``n_rows``."""
    return n_rows if count is None else min(int(count), n_rows)


def group(inputs: Inputs) -> Outputs:
    """``moe_group``."""
    ids, n_experts, tile = inputs["ids"], inputs["n_experts"], inputs["tile"]
    n_rows, top_k = ids.shape
    live = ids[: live_rows(inputs["count"], n_rows)].flatten()
    order = torch.zeros(n_rows * top_k, dtype=torch.int32)
    order[: len(live)] = live.sort(stable=True).indices
    tiles = torch.zeros(max_tiles(n_rows * top_k, n_experts, tile), 4, dtype=torch.int32)
    n_tiles, first = 0, 0
    for expert, n in enumerate(torch.bincount(live, minlength=n_experts).tolist()):
        for at in range(0, n, tile):
            tiles[n_tiles] = torch.tensor([expert, first + at, min(tile, n - at), 0])
            n_tiles += 1
        first += n
    return {"order": order, "tiles": tiles, "n_tiles": torch.tensor([n_tiles], dtype=torch.int32)}


def up(inputs: Inputs) -> Outputs:
    """``moe_up_gemm``; NaN where nothing is specified."""
    x, weights = inputs["x"], inputs["weights"]
    (n_rows, d), top_k, inter = x.shape, weights.shape[1], n_rows_of(inputs, "sw1")

    def activated(names: tuple[str, str], expert: int, rows: Tensor) -> Tensor:
        gate, up = (rows.float() @ decoded(inputs, name, expert, inter, d).T for name in names)
        return swiglu(gate, up, inputs["limit"])

    mid = torch.full((n_rows, top_k + 1, inter), torch.nan, dtype=torch.bfloat16)
    for expert, pairs in _experts(inputs):
        t, slot = pairs // top_k, pairs % top_k
        mid[t, slot] = (activated(("w1", "w3"), expert, x[t]) * weights[t, slot, None]).bfloat16()
    live = live_rows(inputs["count"], n_rows)
    mid[:live, top_k] = activated(("sw1", "sw3"), 0, x[:live]).bfloat16()
    return {"mid": mid}


def down(inputs: Inputs) -> Outputs:
    """``moe_down_gemm``; NaN where nothing is specified."""
    mid = inputs["mid"]
    (n_rows, n_slots, inter), d = mid.shape, n_rows_of(inputs, "sw2")
    parts = torch.full((n_rows, n_slots, d), torch.nan, dtype=torch.bfloat16)
    for expert, pairs in _experts(inputs):
        t, slot = pairs // (n_slots - 1), pairs % (n_slots - 1)
        parts[t, slot] = (mid[t, slot].float() @ decoded(inputs, "w2", expert, d, inter).T).bfloat16()
    live = live_rows(inputs["count"], n_rows)
    parts[:live, -1] = (mid[:live, -1].float() @ decoded(inputs, "sw2", 0, d, inter).T).bfloat16()
    return {"parts": parts}


def combine(inputs: Inputs) -> Outputs:
    """``moe_combine``; NaN where nothing is specified."""
    parts = inputs["parts"].float()
    y = parts[:, 0].clone()
    for slot in range(1, parts.shape[1]):
        y += parts[:, slot]
    y[live_rows(inputs["count"], parts.shape[0]) :] = torch.nan
    return {"y": y}


def _experts(inputs: Inputs) -> Iterator[tuple[int, Tensor]]:
    """(expert, its pairs i64) as the tiles have them."""
    tiles = inputs["tiles"][: int(inputs["n_tiles"])].tolist()
    for expert, of_expert in groupby(tiles, key=lambda tile: tile[0]):
        yield expert, torch.cat([inputs["order"][first : first + n] for _, first, n, _ in of_expert]).long()
