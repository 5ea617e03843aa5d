"""Attention core against the unit golden; query preparation against its definition (spec model.md 2.3, 2.5)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from unit_data import SUM_ORDER, assert_close, half_split_rope, load_unit, seeded

from ds4.kernels.attn import attn_decode, attn_prefill, query
from ds4.kernels.numerics import Numerics

EXACT = Numerics()


class Case:
    """unit_sparse_attn: per query a list of row numbers with -1 for none, and with duplicates, which count twice."""

    def __init__(self, golden: Path) -> None:
        g = load_unit(golden, "sparse_attn")
        self.q, self.kv, self.sink, self.expected = g["q"][0], g["kv"][0], g["attn_sink"], g["o_ref"][0]
        self.lists = [row[row >= 0].long() for row in g["topk_idxs"][0]]
        assert min(len(rows) for rows in self.lists) < g["topk_idxs"].shape[2]
        assert any(len(rows.unique()) < len(rows) for rows in self.lists)
        assert g["scale"].item() == pytest.approx(128**-0.5, rel=1e-6)

    def decode(self, lists: list[Tensor] | None = None, sink: Tensor | None = None) -> Tensor:
        rows = [self.kv[r] for r in (lists or self.lists)]
        return attn_decode(self.q, rows, self.sink if sink is None else sink, range(8), EXACT)

    def prefill(self, sink: Tensor | None = None) -> Tensor:
        """All lists one after the other as keys, each query seeing its own stretch: duplicates stay duplicates."""
        owner = torch.cat([torch.full((len(rows),), i) for i, rows in enumerate(self.lists)])
        mask = owner == torch.arange(8).unsqueeze(1)
        return attn_prefill(self.q, self.kv[torch.cat(self.lists)], self.sink if sink is None else sink, mask, EXACT)

    def check(self, o: Tensor) -> None:
        """The golden is rounded to bf16: its value lies within half a bf16 step of the FP32 result."""
        assert o.shape == self.expected.shape
        half_step = 2**-8 * self.expected.abs() + SUM_ORDER
        assert ((o - self.expected).abs() <= half_step).all()


@pytest.fixture(scope="module")
def case(golden: Path) -> Case:
    return Case(golden)


def test_both_forms(case: Case) -> None:
    case.check(case.decode())
    case.check(case.prefill())
    assert_close(case.decode(), case.prefill())


def test_sink_is_needed(case: Case) -> None:
    nothing = torch.full_like(case.sink, -1e30)
    for o in (case.decode(sink=nothing), case.prefill(sink=nothing), case.decode(sink=case.sink * 128**-0.5)):
        with pytest.raises(AssertionError):
            case.check(o)


def test_lists_are_taken_literally(case: Case) -> None:
    with pytest.raises(AssertionError):  # duplicates dropped
        case.check(case.decode([rows.unique() for rows in case.lists]))
    with pytest.raises(AssertionError):  # -1 read as a row
        case.check(case.decode([torch.cat((rows, torch.tensor([23]))) for rows in case.lists]))
    case.check(case.decode([rows.flip(0) for rows in case.lists]))  # the order is only an order of additions


def test_large_scores_and_sinks_do_not_overflow(case: Case) -> None:
    o = attn_decode(case.q * 1e3, [case.kv[r] for r in case.lists], case.sink, range(8), EXACT)
    assert torch.isfinite(o).all()
    assert case.decode(sink=torch.full_like(case.sink, 80.0)).abs().max() < 1e-20


def test_decode_fills_the_given_rows_only(case: Case) -> None:
    rows = [case.kv[r] for r in case.lists]
    o = attn_decode(case.q, [rows[6], rows[3]], case.sink, (6, 3), EXACT)
    assert torch.equal(o[[3, 6]], case.decode()[[3, 6]])
    assert o[[0, 1, 2, 4, 5, 7]].abs().max() == 0


def test_probabilities_are_rounded_to_bf16_in_the_official_numerics(case: Case) -> None:
    """The denominator keeps unrounded exponentials (spec model.md 2.5). The result is rounded as well, so the share of
    equal values tells: measured 1.0, against 0.77 without rounding and 0.93 with the denominator rounded too."""
    q, kv = case.q[:1], case.kv[case.lists[0]]
    scores = torch.einsum("hd,rd->hr", q[0], kv) * 128**-0.5
    p = torch.exp(scores - scores.amax(-1, keepdim=True))
    rounded = p.bfloat16().float()
    o = attn_decode(q, [kv], case.sink, (0,), Numerics(bf16=True))[0]

    def equal_share(above: Tensor, below: Tensor) -> float:
        denominator = below.sum(-1) + torch.exp(case.sink - scores.amax(-1))
        expected = (above @ kv / denominator.unsqueeze(-1)).bfloat16().float()
        return (o == expected).float().mean().item()

    assert equal_share(rounded, p) >= 0.99
    assert equal_share(p, p) <= 0.96
    assert equal_share(rounded, rounded) <= 0.96


def test_query() -> None:
    """RMS norm over the whole head, without weight, then rope on its last values."""
    q = seeded(3, 2, 128)
    cis = torch.polar(torch.ones(3, 32), seeded(3, 32, seed=1))
    d = q.double()
    normed = d / (d.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    turned = torch.view_as_complex(normed[..., 64:].unflatten(-1, (32, 2)).contiguous()) * cis.unsqueeze(1)
    expected = torch.cat((normed[..., :64], torch.view_as_real(turned).flatten(-2)), dim=-1).float()
    assert_close(query(q, cis, 1e-6, EXACT), expected)
    with pytest.raises(AssertionError):
        assert_close(half_split_rope(normed.float(), cis.unsqueeze(1)), expected)


def test_query_in_bf16_is_the_official_chain_of_bf16_tensors() -> None:
    q = seeded(16, 8, 128).bfloat16()
    chain = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + 1e-6)
    no_turn = torch.ones(16, 32, dtype=torch.complex64)
    assert torch.equal(query(q.float(), no_turn, 1e-6, Numerics(bf16=True)), chain.float())
    assert not torch.equal(query(q.float(), no_turn, 1e-6, EXACT).bfloat16(), chain)
