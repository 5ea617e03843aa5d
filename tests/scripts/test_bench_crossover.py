"""Decode steps against the prefill form: the launches on the emulation, the crossover from made-up times."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from cuemu.backend import CpuBackend, missing

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import bench_crossover
from bench_crossover import Row, crossover, dense, experts, measure, table
from moe_layers import Plan

from ds4.errors import Ds4Error

CPU = torch.device("cpu")


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_both_forms_are_launched_and_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(d=128, inter=64, top_k=2, experts=4)
    for what, make in (("experts", experts("q8_0", plan, CPU)), ("dense", dense("bf16", (64, 128), CPU))):
        calls: list[int] = []
        (row,) = measure(what, make, [9], CpuBackend(), lambda c, calls=calls: calls.append(len(c)) or 1e-3 * len(c))
        assert calls[0] == 2 * (2 if what == "experts" else 1)  # of 8 tokens, and of one
        assert (row.n_tok, row.rows_us, row.grouped_us) == (9, pytest.approx(1e3 * calls[0]), 1e3 * calls[1])
    monkeypatch.setattr(bench_crossover, "GATE", 1e-9)
    with pytest.raises(Ds4Error, match="the forms differ by"):
        list(measure("dense", make, [1], CpuBackend(), lambda c: 0.0))


def test_crossover() -> None:
    rows = [Row("x", n, 10.0 * n, 100.0) for n in (1, 8, 16, 64)]
    assert crossover(rows) == 16
    assert crossover(rows[:2]) is None
    assert crossover([*rows, Row("x", 128, 1.0, 2.0)]) is None  # the last one counts
    assert "crossover: 16 tokens" in table(rows)
    assert "crossover: none" in table(rows[:2])


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bench_crossover.plot([Row("x", n, 10.0 * n, 100.0) for n in (1, 8, 64)], tmp_path / "x.png", "card")
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert bench_crossover.main(["--tokens", "8"]) == 2
    assert capsys.readouterr().err.startswith("bench_crossover: ")
