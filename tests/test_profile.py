"""ds4.profiling without a GPU: arithmetic on recorded numbers, and the whole measurement with the emulation of the
kernels and a clock that ticks. tests/test_profile_plan.py has the plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from cuemu.backend import CpuBackend, missing

from ds4 import cli_bench
from ds4.cli import main
from ds4.cli_bench import Wanted, count_dispatch, profile
from ds4.engine import LLM
from ds4.errors import Ds4Error
from ds4.graph import capture
from ds4.model.device_params import DeviceParams
from ds4.model.steps import DecodeStep
from ds4.model.transformer import Transformer
from ds4.profiling import clock, environment, measure, tables
from ds4.profiling.clock import TimedBackend
from ds4.profiling.dispatch import CountingBackend, dispatch_record, planned
from ds4.profiling.measure import Recording, moe_record, profile_record
from ds4.profiling.plan import PlannedPart, StepPlan
from ds4.profiling.traffic import Traffic
from ds4.sampling import SamplingParams

needs_emulation = pytest.mark.skipif(missing() is not None, reason=str(missing()))


class Ticks:
    """A clock on which every mark is a microsecond after the one before."""

    def __init__(self) -> None:
        self.now = 0
        self.holds = 0

    def hold(self) -> None:
        self.holds += 1

    def mark(self) -> int:
        self.now += 1
        return self.now

    def seconds(self, first: int, last: int) -> float:
        return (last - first) * 1e-6


# Arithmetic on recorded numbers


def recorded(graph: Sequence[float] = (1e-6, 3e-6, 2e-6)) -> tuple[Recording, StepPlan]:
    """Three steps of a step of four operations, with the experts' in one layer, times such that medians are 1, 2, 3, 4
    us; 100 bytes of weights, 10 an expert, 5 of the cache."""
    traffic = {"fixed": 100.0, "n_experts": 8, "cache": 5.0, "activations": 0.0}
    parts = [
        PlannedPart("embed", None, "-", 1, Traffic(expert=0.0, **traffic), 100.0),
        PlannedPart("moe_up", 0, "csa", 1, Traffic(expert=10.0, **traffic), 100.0),
        PlannedPart("moe_down", 0, "csa", 2, Traffic(expert=10.0, **traffic), 100.0),
        PlannedPart("embed", None, "-", 1, Traffic(expert=0.0, **traffic), 100.0),
    ]
    times = [[1e-6, 9e-6, 3e-6, 4e-6], [1e-6, 2e-6, 3e-6, 4e-6], [1e-6, 1e-6, 3e-6, 4e-6]]
    found = Recording(2, times, [5e-6, 6e-6, 20e-6], list(graph), [{0: 3}, {0: 4}, {0: 9}])
    return found, StepPlan(2, 7, 2, tuple(parts))


def test_profile_of_recorded_times():
    record = profile_record(*recorded(), copy_gb_s=0.1)
    assert {key: record[key] for key in ("schema", "n_tok", "position", "steps")} == {
        **{"schema": 1, "n_tok": 2, "position": 7, "steps": 3}
    }
    rows = {row["operation"]: row for row in record["operations"]}
    assert {name: row["us"] for name, row in rows.items()} == pytest.approx({"embed": 5, "moe_up": 2, "moe_down": 3})
    assert {name: row["percent"] for name, row in rows.items()} == pytest.approx(
        {"embed": 50, "moe_up": 20, "moe_down": 30}
    )
    assert {name: row["bytes"] for name, row in rows.items()} == {"embed": 210, "moe_up": 145, "moe_down": 145}
    assert (rows["embed"]["calls"], rows["moe_down"]["launches"]) == (2, 2)
    assert rows["moe_up"]["gb_s"] == pytest.approx(145 / 2e-6 / 1e9)
    assert rows["moe_up"]["percent_of_copy"] == pytest.approx(100 * 145 / 2e-6 / 1e8)
    step = record["step"]
    assert step["parts_us"] == pytest.approx(sum(row["us"] for row in record["operations"]))
    assert (step["eager_us"], step["graph_us"]) == pytest.approx((6, 2))
    assert step["bytes"] == 500
    assert step["gb_s"] == pytest.approx(500 / 2e-6 / 1e9)
    without = profile_record(*recorded(graph=()), copy_gb_s=0.1)["step"]
    assert without["graph_us"] is None
    assert without["gb_s"] == pytest.approx(500 / 6e-6 / 1e9)


def test_experts_of_recorded_times():
    record = moe_record(*recorded(), copy_gb_s=0.1)
    (row,) = record["layers"]
    assert (row["layer"], row["kind"], row["distinct_experts"]) == (0, "csa", 4)
    assert (row["gate_up_us"], row["down_us"]) == pytest.approx((2, 3))
    assert row["bytes"] == 290
    assert row["gb_s"] == pytest.approx(290 / 5e-6 / 1e9)
    assert row["percent_of_copy"] == pytest.approx(100 * 290 / 5e-6 / 1e8)
    assert record["all"] == pytest.approx({key: row[key] for key in record["all"]})


def test_distinct_experts():
    ids = torch.tensor([[3, 1, 2], [1, 5, 3]], dtype=torch.int32)
    assert measure.distinct_experts(ids) == 4
    assert measure.distinct_experts(ids[:1]) == 3


def test_tables_are_narrow():
    found, small = recorded()
    large = profile_record(found, small, 4812.3)
    for row in large["operations"]:
        row |= {"operation": "kv_publish_csa", "launches": 172, "us": 12345.6, "bytes": 1885 * 10**6}
        row |= {"percent": 100.0, "gb_s": 4812.3, "percent_of_copy": 100.0}
    wide = moe_record(found, small, 4812.3)
    wide["layers"] = [row | {"layer": 42, "gate_up_us": 1234.5, "bytes": 10**9} for row in wide["layers"]]
    for text in (tables.profile_text(large), tables.moe_text(wide)):
        assert max(map(len, text.splitlines())) <= 60
    row = next(line for line in tables.profile_text(large).splitlines() if line.startswith("kv_publish_csa"))
    assert row.split() == ["kv_publish_csa", "172", "12345.6", "100.0", "1885", "4812", "100.0"]
    assert tables.moe_text(wide).splitlines()[-2].split() == ["42", "csa", "1234.5", "3.0", "1000", "0", "0.0", "4"]


# Backends that time, replay and count


class Log:
    """A backend whose launches add 1 to ``value``."""

    def __init__(self) -> None:
        self.value = torch.zeros(1)
        self.ran: list[Any] = []

    def run(self, calls: Sequence[Any]) -> None:
        self.ran += calls
        self.value += len(calls)


def test_timed_backend():
    log, ticks = Log(), Ticks()
    groups: Any = [["a", "b"], ["c"], ["d"]]
    timed = TimedBackend(log, ticks, groups, {1: log.value})
    for _ in range(2):
        timed.run([call for group in groups for call in group])
    assert log.ran == ["a", "b", "c", "d"] * 2
    assert timed.seconds() == pytest.approx([1e-6] * 3)
    assert timed.times() == [pytest.approx(pair) for pair in [(0, 1e-6), (2e-6, 3e-6), (4e-6, 5e-6)]]
    assert timed.copies[1].item() == 7  # as it was between groups 1 and 2 of the second run
    assert ticks.holds == 6
    with pytest.raises(ValueError, match="not those"):
        timed.run(["a", "b", "c"])  # type: ignore[list-item]


def test_counting_backend():
    calls: Any = ["a", "b", "a"]
    log = Log()
    counting = CountingBackend(log)
    counting.run(calls)
    assert counting.counts == {"a": 2, "b": 1}
    assert log.ran == calls


# The whole measurement, with the emulation in the GPU's place


@pytest.fixture(scope="module")
def llm():
    """The bundled model as on a GPU, on the CPU's emulation of the kernels."""
    made = LLM(ctx=64, draft="off")
    made.model = Transformer(made.config, DeviceParams(made.checkpoint, "cpu"), made.numerics, "cpu")
    made.backend = CpuBackend()
    return made


@pytest.fixture
def short(monkeypatch):
    """One step of warming up is enough."""
    for module in (measure, environment):
        monkeypatch.setattr(module, "WARM_UP", 1)


@needs_emulation
def test_a_profile_of_real_steps(llm, short):
    ticks = Ticks()
    record = profile(llm, Wanted(profile="moe", n_tok=2, ctx=9, steps=2), ticks, None, 1000.0)
    assert (record["steps"], record["n_tok"], len(record["layers"])) == (2, 2, 3)
    assert all(row["gate_up_us"] == pytest.approx(1) for row in record["layers"])
    k = llm.config.num_experts_per_tok
    assert all(k <= row["distinct_experts"] <= 2 * k for row in record["layers"])


@needs_emulation
def test_the_command(llm, short, monkeypatch):
    monkeypatch.setattr(cli_bench, "on_gpu", lambda wanted, n_more: llm)
    monkeypatch.setattr(environment, "copy_gb_s", lambda backend, device: 1000.0)
    monkeypatch.setattr(clock, "CudaClock", Ticks)
    monkeypatch.setattr(capture, "CudaGraph", lambda backend, calls: backend)
    result = CliRunner().invoke(main, ["bench", "--profile", "--ctx", "5", "--steps", "1"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 60
    step = DecodeStep(llm.model, llm.model.new_cache(8), 1)
    (total,) = (line.split() for line in lines if line.startswith("sum"))
    assert total[:4] == ["sum", str(len(step.calls)), f"{len(step.parts)}.0", "100.0"]
    assert "uninterrupted, launched from the host: 1.0 us" in lines
    assert "uninterrupted, as one CUDA graph: 1.0 us" in lines


@needs_emulation
def test_a_run_launches_what_the_plan_says(llm):
    mix = {2: 1, 1: 1}
    found = count_dispatch(llm, mix, 5)
    cache = llm.model.new_cache(8)
    steps = {n: DecodeStep(llm.model, cache, n) for n in mix}
    assert found == dispatch_record(steps, mix, planned(steps, mix))


@needs_emulation
def test_the_environment_variable(llm, short, monkeypatch, capsys):
    def generated() -> list[int]:
        params = SamplingParams(max_tokens=4)
        *_, stats = llm.generate("One, two,", params, raw=True)
        return stats.token_ids

    plain = generated()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("DS4_PROFILE", "moe")
    monkeypatch.setattr(environment, "CudaClock", Ticks)
    monkeypatch.setattr(environment, "copy_gb_s", lambda backend, device: 1000.0)
    assert generated() == plain
    table = capsys.readouterr().err.splitlines()
    assert table[1] == "medians of 2 steps; copy 1000 GB/s."
    assert [line.split()[0] for line in table[3:]] == ["layer", "0", "1", "2", "all"]


def test_a_wrong_value_of_the_variable(monkeypatch):
    monkeypatch.setenv("DS4_PROFILE", "all")
    with pytest.raises(Ds4Error, match="DS4_PROFILE: 'all' is not one of moe, step"):
        environment.wanted()
    monkeypatch.setenv("DS4_PROFILE", "")
    assert environment.wanted() is None
