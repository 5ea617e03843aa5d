"""Router against the unit golden (spec model.md 2.7)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from unit_data import assert_close, load_unit, seeded

from ds4.kernels.route.ref import route, route_weights


@pytest.mark.parametrize("rows", [None, tuple(range(16))], ids=["prefill", "decode"])
def test_bias_routed(golden: Path, rows: tuple[int, ...] | None) -> None:
    g = load_unit(golden, "router")
    scale = g["route_scale"].item()

    def check(ids: Tensor, weights: Tensor) -> None:
        assert torch.equal(ids.to(torch.int32), g["indices_ref"])
        assert_close(weights, g["weights_ref"])

    ids, weights = route(g["x"], g["gate_w"], bias=g["bias"], hash_ids=None, top_k=2, route_scale=scale, rows=rows)
    check(ids, weights)
    with pytest.raises(AssertionError):  # the bias does select
        check(*route(g["x"], g["gate_w"], bias=None, hash_ids=None, top_k=2, route_scale=scale, rows=rows))
    scores = torch.nn.functional.softplus(g["x"] @ g["gate_w"].T).sqrt()
    check(ids, route_weights(scores, ids, scale))
    with pytest.raises(AssertionError):  # but it never enters the weights
        check(ids, route_weights(scores + g["bias"], ids, scale))
    with pytest.raises(AssertionError):
        check(ids, route_weights(scores.square(), ids, scale))


def test_hash_routed_ids_are_taken_as_given() -> None:
    x, gate = seeded(4, 32), seeded(8, 32, seed=1)
    table = torch.tensor([[7, 0, 3], [1, 2, 6], [5, 4, 0], [3, 7, 1]])
    ids, weights = route(x, gate, bias=None, hash_ids=table, top_k=3, route_scale=1.5)
    assert torch.equal(ids, table)
    scores = torch.log1p(torch.exp(x.double() @ gate.double().T)).sqrt().gather(1, table)
    assert_close(weights, (1.5 * scores / scores.sum(1, keepdim=True)).float())


def test_ties_go_to_the_lower_id() -> None:
    ids, weights = route(torch.ones(1, 4), torch.zeros(6, 4), bias=None, hash_ids=None, top_k=3, route_scale=2.5)
    assert ids.tolist() == [[0, 1, 2]]
    assert_close(weights, torch.full((1, 3), 2.5 / 3))
