"""Every registered operation on the CPU's emulation of its kernels.

The checks are those of scripts/gpu_checks.py, which a GPU machine runs on the kernels themselves. Most of the time goes
into compiling: one library for each source and set of constants, a few seconds each, kept in .pytest_cache.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuemu.backend import CpuBackend, missing

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from gpu_checks import SMALL, cases_of, check_complete, has_tokens

from ds4.kernels.cases import Case, Exact
from ds4.kernels.registry import Operation, all_operations
from ds4.kernels.verify import TOKEN_COUNTS, check_launches, check_tokens

CPU = torch.device("cpu")
OPERATIONS = all_operations()
CASES = [(operation, case) for operation in OPERATIONS for case in cases_of(operation, SMALL)]
SCHEDULES = (
    ("forward", 0),
    ("lifo", 0),
    ("warps", 0),
    ("random", 1),
)  # lifo runs the blocks backward, the rest shuffled
needs_emulation = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def ids(value) -> str:
    return getattr(value, "name", str(value))


@pytest.mark.parametrize("operation", OPERATIONS, ids=ids)
def test_cases_reach_every_kernel(operation):
    assert check_complete(operation) == []


@needs_emulation
@pytest.mark.parametrize(("operation", "case"), CASES, ids=ids)
def test_kernels_agree_with_the_reference(operation, case):
    for order, seed in SCHEDULES:
        assert check_launches(operation, case, CpuBackend("plain", order, seed), CPU) == [], f"order {order}"
    assert check_launches(operation, case, CpuBackend(), CPU, seed=1) == []


@needs_emulation
@pytest.mark.parametrize("operation", [op for op in OPERATIONS if op.token_inputs], ids=ids)
def test_rows_do_not_depend_on_the_number_of_tokens(operation):
    cases = [case for case in cases_of(operation, SMALL) if has_tokens(operation, case) >= TOKEN_COUNTS[-1]]
    assert [line for case in cases for line in check_tokens(operation, case, CpuBackend(), CPU)] == []


def test_counts(capsys):
    with capsys.disabled():
        entries = sum(len(operation.entries) for operation in OPERATIONS)
        print(
            f" {len(OPERATIONS)} operations, {entries} kernels, {len(CASES)} cases in {len(SCHEDULES)} thread orders "
        )
    assert {operation.name for operation, _ in CASES} == {operation.name for operation in OPERATIONS} != set()


# The checks themselves, on an operation in Python with a mistake in it


class Steps:
    """A backend whose calls are Python functions."""

    def run(self, calls):
        for call in calls:
            call()


def broken(fault: str) -> tuple[Operation, Case]:
    """An operation that doubles x and adds it to a sum, with one mistake."""

    def calls(inputs, outputs):
        def double():
            x, y, total, count = inputs["x"], outputs["y"], inputs["total"], outputs["count"]
            y.copy_(2 * x)
            total.add_(x.sum(0))
            count += 1
            if fault == "wrong result":
                y[1, 1] += 1
            if fault == "writes to its input":
                x[0, 0] = 1
            if fault == "reads what nobody wrote":
                y[0, 0] += outputs["scratch"][0]
            if fault == "leaves an element out":
                outputs["y"][1, 2] = float("nan")
            if fault == "counts on" and count > 1:
                y[0, 0] = 0

        return [double]

    def reference(inputs):
        return {"y": 2 * inputs["x"], "total": inputs["total"] + inputs["x"].sum(0)}

    def outputs(inputs):
        y = torch.zeros_like(inputs["x"])
        return {"y": y, "scratch": torch.zeros(1), "count": torch.zeros(1, dtype=torch.int32)}

    def make(seed, device):
        x = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
        return {"x": x.to(device), "total": torch.ones(3, device=device)}

    case = Case("small", "smoke", make, {"y": Exact(), "total": Exact()}, bytes_moved=60)
    fields = {"mutates": ("total",), "workspaces": ("scratch", "count")}
    return Operation("broken", reference, outputs, calls, (), lambda: [case], **fields), case


@pytest.mark.parametrize(
    ("fault", "findings"),
    [
        ("", []),
        ("wrong result", ["small seed 0: y: 1 of 6 differ, worst at [1, 1]"]),
        ("writes to its input", ["input changed: x: 1 of 6 differ"]),
        ("reads what nobody wrote", ["y: 1 of 6 differ, worst at [0, 0]: nan"]),
        ("leaves an element out", ["y: 1 of 6 differ, worst at [1, 2]: nan"]),
        ("counts on", ["second launch: y: 1 of 6 differ, worst at [0, 0]"]),
    ],
)
def test_a_mistake_is_found(fault, findings):
    found = check_launches(*broken(fault), Steps(), CPU)
    assert len(found) == len(findings), found
    for line, want in zip(found, findings, strict=True):
        assert want in line


def test_incomplete_cases_are_found():
    operation, case = broken("")
    assert "no smoke cases" in check_complete(replace(operation, cases=lambda: []))[0]
    assert "no smoke cases" in check_complete(replace(operation, cases=lambda: [replace(case, group="edges")]))[0]
    real = next(operation for operation in OPERATIONS if operation.token_inputs)
    unused = replace(real.entries[0], name="unused")
    assert check_complete(replace(real, entries=(*real.entries, unused))) == [f"{real.name}: no case launches unused"]
    few = [one for one in cases_of(real, SMALL) if has_tokens(real, one) < TOKEN_COUNTS[-1]]
    few = [replace(one, group="smoke") for one in few]
    assert f"{real.name}: no smoke or edges case has 8 tokens" in check_complete(replace(real, cases=lambda: few))
