"""scripts/gpu_check.py without a GPU: stages that fail, die or hang; the figures' arithmetic; the GPU's checks with the
emulation in the GPU's place; and the command itself with one real stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import bench_copy
import bench_kernels
import gpu_check
import gpu_checks
import gpu_machine
from cuemu.backend import CpuBackend, missing
from gpu_check import Outcome, Runner, Stage, item

from ds4.kernels import bandwidth, registry
from ds4.kernels.arch import DeviceFacts
from ds4.kernels.cases import Case, Exact

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
needs_emulation = pytest.mark.skipif(missing() is not None, reason=str(missing()))

# A stage of four items: the second fails, the third does what the stage is called.
FAKE = """
import json, os, sys, time
stage, report, first = sys.argv[1], sys.argv[3], int(sys.argv[5])
def say(**fields): print(json.dumps(fields), file=open(report, "a"))
for i in range(first, 4):
    say(begins=i, item=f"{stage}: {i}")
    if i == 2 and stage == "dies": print("bad luck"); os.abort()
    if i == 2 and stage == "hangs": time.sleep(60)
    if i == 1:
        say(ends=i, item=f"{stage}: {i}", status="failed", text="wrong", data=None)
        if stage == "loses the GPU": sys.exit(4)
    else:
        say(ends=i, item=f"{stage}: {i}", status="ok", text="", data=i)
sys.exit(3 if stage == "ends badly" else 1)
"""


@pytest.fixture
def runner(tmp_path):
    (tmp_path / "fake.py").write_text(FAKE)
    return Runner(tmp_path / "log", quick=False, command=[sys.executable, str(tmp_path / "fake.py")])


@pytest.mark.parametrize(
    ("stage", "statuses", "text"),
    [
        ("works", ["ok", "failed", "ok", "ok"], None),
        ("dies", ["ok", "failed", "failed", "ok"], "exit code -6: bad luck"),
        ("hangs", ["ok", "failed", "failed"], "no end within 2 s"),
        ("loses the GPU", ["ok", "failed", "ok", "ok"], None),
        ("ends badly", ["ok", "failed", "ok", "ok", "failed"], "exit code 3: "),
    ],
)
def test_a_stage_goes_on_behind_what_breaks_it(runner, stage, statuses, text):
    outcome = runner.run(Stage(stage, 2 if stage == "hangs" else 30), gpu=True)
    assert [one["status"] for one in outcome.items][: len(statuses)] == statuses
    assert outcome.count("failed") >= 1
    if text:
        assert text in outcome.items[statuses.index("failed", 2)]["text"]


def test_no_time_is_left_for_a_stage(runner):
    runner.end = 0
    assert runner.run(Stage("works", 30), gpu=True).items == [item("works", "failed", "no time left")]
    assert runner.run(Stage("works", 30), gpu=False).count("ok") == 3  # the total is for GPU machines


def test_limits_leave_room():
    limits = [stage.limit_s for stage in gpu_check.STAGES if stage.needs != "no gpu"]
    assert sum(limits) <= gpu_check.TOTAL_S < 540


def test_table_counts_by_kind(capsys):
    items = [
        item("n_tok: a", "ok", ""),
        item("n_tok: b", "failed", "row 1 differs"),
        item("graphs: a", "skipped", "why"),
    ]
    outcomes = [Outcome("machine", 1.0, [item("machine", "ok", "")]), Outcome("kernels", 2.5, items)]
    assert [line.split() for line in gpu_check.table(outcomes).splitlines()[1:]] == [
        ["machine", "1", "0", "0", "1.0"],
        ["n_tok", "1", "1", "0", "2.5"],
        ["graphs", "0", "0", "1"],
    ]
    gpu_check.report(outcomes, {"gpu": None, "why": "no driver"})
    printed = capsys.readouterr().out
    assert "FAILED n_tok: b: row 1 differs" in printed
    assert "skipped graphs: a: why" in printed
    assert "no GPU (no driver): not done: kernels, bench, moe, sanitizer, model, replay, prefill" in printed


def test_results_as_json(tmp_path, monkeypatch):
    machine = {"gpu": {"name": "NVIDIA H200"}, "driver": "580.0"}
    monkeypatch.setenv("OUT", str(tmp_path))
    started = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
    path = gpu_check.results_file(machine, started)
    assert path == tmp_path / "nvidia-h200-2026-01-02-0304.json"
    items = [item("bandwidth: x", "ok", "", {"copy_gb_s": 4000.0}), item("bench: route", "ok", "", [{"us": 3.0}])]
    gpu_check.write(path, gpu_check.document(machine, [Outcome("bench", 1.0, items)], started))
    content = json.loads(path.read_text())
    assert content["machine"] == machine
    assert content["kernels"] == [{"us": 3.0}]
    assert content["bandwidth"] == {"copy_gb_s": 4000.0}
    assert (content["stages"][0]["ok"], content["stages"][0]["failed"]) == (2, 0)
    monkeypatch.delenv("OUT")
    assert gpu_check.results_file({"gpu": None}, started) is None
    assert gpu_check.results_file(machine, started).parent == ROOT / "benchmarks" / "results"


def test_doctor_is_judged_by_whether_there_is_a_gpu(monkeypatch):
    checks = [gpu_machine.Check("driver", "missing", "none"), gpu_machine.Check("kernels", "missing", "not yet")]
    monkeypatch.setattr(gpu_machine, "diagnose", lambda limit: SimpleNamespace(checks=checks))
    for gpu, expected in ((False, LookupError), (True, AssertionError)):
        (_, driver), (_, kernels) = gpu_machine.doctor(gpu, LookupError)
        with pytest.raises(expected, match="none"):
            driver()
        with pytest.raises(expected, match="not yet"):
            kernels()


# The GPU's checks and benchmarks, with the emulation in the GPU's place


class Graph:
    """A graph that runs its calls, or a wrong one: ``baked`` makes every replay run them on the first inputs."""

    def __init__(self, backend, calls, baked=None):
        self.backend, self.calls, self.baked = backend, calls, baked

    def replay(self):
        if self.baked:
            self.baked()
        self.backend.run(self.calls)


class Event:
    """A clock that says 1 ms between any two events."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1.0


@pytest.fixture
def no_cuda(monkeypatch):
    """torch.cuda's functions that the scripts use, on a machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (1 << 23, 1 << 23))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for module in (gpu_checks, bench_kernels):
        monkeypatch.setattr(module, "CudaGraph", Graph)


@needs_emulation
def test_graph_check(no_cuda, monkeypatch):
    operation = registry.get("route")
    case = gpu_checks.remembered(operation.cases()[0])
    assert gpu_checks.check_graph(operation, case, CpuBackend(), CPU) == []
    first = case.make(0, CPU)["x"]

    def baked(backend, calls):
        x = next(t for t in calls[0].args.tensors if t.shape == first.shape)
        return Graph(backend, calls, lambda: x.copy_(first))

    monkeypatch.setattr(gpu_checks, "CudaGraph", baked)
    found = gpu_checks.check_graph(operation, case, CpuBackend(), CPU)
    assert found
    assert all("replay with other inputs" in line for line in found)


@needs_emulation
def test_kernel_benchmark(no_cuda, monkeypatch):
    operation = registry.get("route")
    small = replace(operation.cases()[0], group="decode")
    operation = replace(operation, cases=lambda: [small])
    monkeypatch.setattr(bench_kernels, "flush_buffer", lambda l2, device: torch.ones(1))
    backend = CpuBackend()
    object.__setattr__(backend, "facts", SimpleNamespace(l2=1 << 10))
    (row,) = bench_kernels.measure([operation], backend, CPU, copy_gb_s=2.0, repeats=2)
    n = bench_kernels.LAUNCHES
    assert (row["launches"], row["repeats"], row["us"], row["spread_percent"]) == (n, 2, pytest.approx(1e3 / n), 0)
    assert row["percent_of_copy"] == pytest.approx(100 * small.bytes_moved / (1e-3 / n) / 2e9)
    assert f"route {small.name}" in bench_kernels.table([row])


def test_benchmark_arithmetic():
    case = Case("one", "decode", lambda seed, device: {}, {"y": Exact()}, bytes_moved=8_000_000, flops=4_000_000)
    row = bench_kernels.row("op", case, [4e-6, 2e-6, 3e-6], 32, 4000.0)
    assert row["us"] == pytest.approx(3.0)
    assert row["gb_s"] == pytest.approx(8e6 / 3e-6 / 1e9)
    assert row["percent_of_copy"] == pytest.approx(100 * 8e6 / 3e-6 / 4e12)
    assert row["spread_percent"] == pytest.approx(100 * 2 / 3)
    assert bench_kernels.copies_for(1, 80 << 30) == bench_kernels.LAUNCHES
    assert bench_kernels.copies_for(1 << 30, 80 << 30) == 8
    assert bench_kernels.copies_for(30 << 30, 80 << 30) == 1
    assert bandwidth.sizes_for(80 << 30, 50 << 20) == [1 << 30, 4 << 30]
    assert bandwidth.sizes_for(1 << 30, 50 << 20) == [128 << 20]


@needs_emulation
def test_bandwidth_kernels_read_and_copy_everything():
    blocks, n = 3, 7 * 4096
    x = torch.randint(-100, 100, (n,), generator=torch.Generator().manual_seed(0)).float()
    y, sums = torch.full((n,), torch.nan), torch.full((blocks * 256,), torch.nan)
    CpuBackend().run(
        [
            bandwidth.bandwidth_call(bandwidth.COPY, x, y, blocks),
            bandwidth.bandwidth_call(bandwidth.READ, x, sums, blocks),
        ]
    )
    assert torch.equal(x, y)
    assert sums.sum() == x.sum()  # integers: exact in any order
    with pytest.raises(ValueError, match="do not fit"):
        bandwidth.bandwidth_call(bandwidth.READ, x, y, blocks)


@needs_emulation
def test_bandwidth_measurement(no_cuda, monkeypatch):
    monkeypatch.setattr(bandwidth, "SIZES", (1 << 20,))
    backend = CpuBackend()
    facts = DeviceFacts(0, "fake", (9, 0), 1 << 30, 2, 0, 0, 1 << 10)
    object.__setattr__(backend, "facts", facts)
    found = bandwidth.measure(backend, CPU, repeats=2)
    assert [(row["kind"], round(row["gb_s"], 6)) for row in found["rows"]] == [
        ("read", round((1 << 20) / 1e-3 / 1e9, 6)),
        ("copy", round((2 << 20) / 1e-3 / 1e9, 6)),
        ("memcpy", round((2 << 20) / 1e-3 / 1e9, 6)),
    ]
    assert "copy 2.1 GB/s, read 1.0 GB/s" in bench_copy.table(found)


# The command


def test_command_with_one_real_stage(tmp_path):
    """Facts of the machine and the compilation of a kernel or two: two processes that import torch, 3 s each."""
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = [str(ROOT / "scripts" / "gpu_check.sh"), "--quick", "--stage", "compile"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not done: kernels, bench, moe, sanitizer, model, replay, prefill" in done.stdout
    (path,) = tmp_path.glob("no-gpu-*.json")
    stages = {stage["stage"]: stage for stage in json.loads(path.read_text())["stages"]}
    assert stages["compile"]["ok"] >= 1
    assert stages["compile"]["failed"] == 0


def test_a_failure_is_the_exit_code(tmp_path, monkeypatch, capsys):
    results = {"machine": [item("machine", "ok", "no GPU", {"gpu": None, "why": "none"})]}
    results["compile"] = [item("compile: a.cu", "failed", "a.cu:3: wrong")]
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(Runner, "run", lambda self, stage, gpu: Outcome(stage.name, 0.0, results.get(stage.name, [])))
    assert gpu_check.main([]) == 1
    assert "FAILED compile: a.cu: a.cu:3: wrong" in capsys.readouterr().out
    del results["compile"]
    assert gpu_check.main([]) == 0
