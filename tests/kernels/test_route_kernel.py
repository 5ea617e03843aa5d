"""The router's kernels against the unit golden, and what its public function does with devices and arguments."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cuemu.backend import CpuBackend, missing
from unit_data import assert_close, load_unit, seeded

from ds4.kernels.registry import run_kernels
from ds4.kernels.route import ref
from ds4.kernels.route.op import ROUTE, route

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.mark.parametrize("order", ["forward", "lifo", "warps"])
def test_golden(golden: Path, order: str) -> None:
    """The golden's 16 tokens as two launches of 8."""
    g = load_unit(golden, "router")
    for first in (0, 8):
        part = slice(first, first + 8)
        inputs = {"x": g["x"][part].clone(), "gate": g["gate_w"], "bias": g["bias"], "tid2eid": None, "tokens": None}
        inputs |= {"top_k": 2, "route_scale": g["route_scale"].item()}
        got = run_kernels(ROUTE, inputs, CpuBackend(order=order, seed=1))
        assert torch.equal(got["ids"], g["indices_ref"][part])
        assert_close(got["weights"], g["weights_ref"][part])
        unbiased = run_kernels(ROUTE, inputs | {"bias": None}, CpuBackend(order=order, seed=1))
        assert not torch.equal(unbiased["ids"], g["indices_ref"][part])  # the bias does select


def test_not_a_number_never_becomes_an_address() -> None:
    inputs = {"x": torch.full((1, 32), torch.nan), "gate": seeded(5, 32), "bias": None, "tid2eid": None, "tokens": None}
    got = run_kernels(ROUTE, inputs | {"top_k": 3, "route_scale": 1.0}, CpuBackend())
    assert got["ids"].min() >= 0
    assert got["ids"].max() < 5
    assert got["weights"].isnan().all()


def test_cpu_tensors_go_through_the_reference() -> None:
    x, gate, bias = seeded(8, 64), seeded(12, 64, seed=1), seeded(12, seed=2)
    ids, weights = route(x, gate, bias=bias, top_k=3, route_scale=1.5, rows=(0, 5))
    want = ref.route(x, gate, bias=bias, hash_ids=None, top_k=3, route_scale=1.5, rows=(0, 5))
    assert torch.equal(ids, want[0])
    assert torch.equal(weights, want[1])
    table = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
    ids, _ = route(x[:2], gate, tid2eid=table, tokens=torch.tensor([1, 0]), top_k=2, route_scale=1.5)
    assert ids.tolist() == [[3, 4], [1, 2]]


def test_shapes_that_do_not_fit() -> None:
    inputs = {"x": seeded(1, 64), "gate": seeded(4, 32), "bias": None, "tid2eid": None, "tokens": None}
    with pytest.raises(ValueError, match="do not go together"):
        run_kernels(ROUTE, inputs | {"top_k": 2, "route_scale": 1.0}, CpuBackend())
