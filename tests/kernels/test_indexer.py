"""Indexer scores against the unit goldens; top-k against its definition (spec model.md 4)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from unit_data import assert_close, decode_fp8, half_split_rope, load_unit

from ds4.kernels.indexer import index_query, index_score, index_topk
from ds4.kernels.kv_publish import finish_entry, pool_csa
from ds4.kernels.numerics import Numerics
from ds4.kernels.proj import proj
from ds4.weights.formats import block_scale

EPS = 1e-6


def test_score(golden: Path) -> None:
    g = load_unit(golden, "index_score")
    assert_close(index_score(g["q"], g["kv"], g["weights"], Numerics()), g["score"])
    one_by_one = [index_score(q[None], g["kv"], w[None], Numerics()) for q, w in zip(g["q"], g["weights"], strict=True)]
    assert_close(torch.cat(one_by_one), g["score"])
    dots = torch.einsum("nhd,ed->nhe", g["q"], g["kv"])
    with pytest.raises(AssertionError):  # ReLU on the weighted sum instead of on each dot product
        assert_close((dots * g["weights"].unsqueeze(-1)).sum(1).relu(), g["score"])
    with pytest.raises(AssertionError):
        assert_close(index_score(g["q"], g["kv"], g["weights"].abs(), Numerics()), g["score"])


OFFICIAL = Numerics(act_fp8=True, index_rotate=True, index_fp4=True)


def test_whole_indexer(golden: Path) -> None:
    """Keys, queries and scores from raw inputs. Keys and queries are on the FP4 grid, so only sums can differ."""
    g = load_unit(golden, "indexer")
    n_heads, width = 8, 128
    wq_b = decode_fp8(g["wq_b"], g["wq_b_s"])
    q_cis, c_cis = torch.complex(g["q_cos"], g["q_sin"]), torch.complex(g["c_cos"], g["c_sin"])
    visible = torch.arange(4) < ((torch.arange(16) + 1) // 4).unsqueeze(1)
    assert torch.equal(visible, g["index_score"] > -1e29)

    def scores(numerics: Numerics = OFFICIAL, ape: Tensor = g["c_ape"], *, half_split: bool = False) -> Tensor:
        kv = F.pad(g["x"] @ g["c_wkv"].T, (0, 0, 4, 0))
        gate = F.pad(g["x"] @ g["c_wgate"].T + ape.repeat(4, 1), (0, 0, 4, 0))
        keys = finish_entry(pool_csa(kv, gate, 0), g["c_norm"], c_cis, EPS, numerics, indexer=True)
        if numerics.index_fp4:
            keys = block_scale.round_e2m1(keys, 32)
        raw = proj(g["qr"], wq_b, numerics).unflatten(1, (n_heads, width))
        if half_split:
            raw = half_split_rope(raw, q_cis.unsqueeze(1))
        cis = torch.ones_like(q_cis) if half_split else q_cis
        weights = (g["x"] @ g["weights_proj"].T) * (width**-0.5 * n_heads**-0.5)
        return index_score(index_query(raw, cis, numerics), keys, weights, numerics)

    def check(value: Tensor) -> None:
        assert_close(value[visible], g["index_score"][visible])

    check(scores())
    for switch in ("act_fp8", "index_rotate", "index_fp4"):
        with pytest.raises(AssertionError):
            check(scores(replace(OFFICIAL, **{switch: False})))
    with pytest.raises(AssertionError):
        check(scores(ape=torch.zeros_like(g["c_ape"])))
    with pytest.raises(AssertionError):
        check(scores(half_split=True))


@settings(derandomize=True, deadline=None)
@given(st.data())
def test_topk_is_the_best_visible_with_ties_to_the_smaller_index(data: st.DataObject) -> None:
    n_entries = data.draw(st.integers(1, 12))
    n_rows = data.draw(st.integers(1, 4))
    top_k = data.draw(st.integers(1, 14))
    values = st.sampled_from([-2.0, -1.0, 0.0, 1.0, float("-inf")])  # few values: many ties
    scores = [data.draw(st.lists(values, min_size=n_entries, max_size=n_entries)) for _ in range(n_rows)]
    n_visible = [data.draw(st.integers(0, n_entries)) for _ in range(n_rows)]
    chosen = index_topk(torch.tensor(scores), torch.tensor(n_visible), top_k)
    for row, n, mask in zip(scores, n_visible, chosen.tolist(), strict=True):
        best = sorted(range(n), key=lambda e: (-row[e], e))[:top_k]
        assert [e for e, is_chosen in enumerate(mask) if is_chosen] == sorted(best)
