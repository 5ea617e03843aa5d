"""The router's prefill form: the decode form's choice of the same logits, bit for bit."""

from __future__ import annotations

import pytest
import torch
from cuemu.backend import CpuBackend, missing
from unit_data import load_unit, seeded

from ds4.kernels.cases import Inputs
from ds4.kernels.registry import run_kernels
from ds4.kernels.route.op import ROUTE, ROUTE_SELECT

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

N_EXPERTS, TOP_K = 70, 6  # as in the cases, so that their library serves


def inputs_of(logits: torch.Tensor, **more: torch.Tensor) -> Inputs:
    absent = dict.fromkeys(("bias", "tid2eid", "tokens", "count"))
    return {"logits": logits, **absent, "top_k": TOP_K, "route_scale": 2.5} | more


@pytest.mark.parametrize("form", ["bias", "plain", "hashed"])
def test_bits_are_those_of_the_decode_form(form: str) -> None:
    """``route`` of x and a matrix of ones and zeros has the logits x: sums of zeros and one product, which is exact."""
    logits = seeded(8, N_EXPERTS) * 3
    width = 72
    x, gate = torch.nn.functional.pad(logits, (0, width - N_EXPERTS)), torch.eye(N_EXPERTS, width)
    table = torch.stack([seeded(N_EXPERTS, seed=i).argsort()[:TOP_K] for i in range(5)]).int()
    given = {
        "bias": {"bias": seeded(N_EXPERTS, seed=9)},
        "plain": {},
        "hashed": {"tid2eid": table, "tokens": torch.tensor([4, 0, 3, 1, 1, 2, 0, 4]).int()},
    }[form]
    inputs = inputs_of(logits, **given)
    got = run_kernels(ROUTE_SELECT, inputs, CpuBackend(order="warps"))
    want = run_kernels(
        ROUTE,
        {name: inputs[name] for name in inputs if name not in ("logits", "count")} | {"x": x, "gate": gate},
        CpuBackend(),
    )
    for name in ("ids", "weights"):
        assert torch.equal(got[name], want[name])
    assert len(got["ids"].unique()) > TOP_K


def test_golden(golden) -> None:
    """The golden's logits in a row of as many experts as the cases have: those that it lacks have no chance."""
    g = load_unit(golden, "router")
    n, experts = len(g["x"]), g["gate_w"].shape[0]
    inputs = inputs_of(torch.zeros(n, N_EXPERTS), bias=torch.full((N_EXPERTS,), -torch.inf))
    inputs["logits"][:, :experts] = g["x"] @ g["gate_w"].T
    inputs["bias"][:experts] = g["bias"]
    ids = run_kernels(ROUTE_SELECT, inputs, CpuBackend())["ids"]
    assert torch.equal(ids[:, :2], g["indices_ref"].to(torch.int32))


def test_not_a_number_never_becomes_an_address() -> None:
    got = run_kernels(ROUTE_SELECT, inputs_of(torch.full((3, N_EXPERTS), torch.nan)), CpuBackend())
    assert got["ids"].min() >= 0
    assert got["ids"].max() < N_EXPERTS
    assert got["weights"].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.zeros(69)}, r"bias is \[69\], not \[70\]"),
        ({"tokens": torch.zeros(3, dtype=torch.int32)}, r"tokens is \[3\], not \[2\]"),
        ({"tokens": torch.zeros(2, dtype=torch.int32)}, "a table without tokens"),
        ({"top_k": 71}, "71 of 70 experts"),
    ],
)
def test_what_does_not_fit_is_refused(change: Inputs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_kernels(ROUTE_SELECT, inputs_of(torch.zeros(2, N_EXPERTS)) | change, CpuBackend())
