"""The stages of scripts/gpu_check.py in this process; stand-ins for the GPU, compute-sanitizer and the CUDA model."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import gpu_compile
import gpu_machine
import gpu_stages
import kernel_parity
from cuemu.backend import CpuBackend, missing
from gpu_stages import GPU_LOST, Item, Options, Skip

from ds4 import engine
from ds4.errors import CudaError, Ds4Error
from ds4.kernels import registry

ALL = Options(gpu=True, quick=False)


def raising(error: Exception):
    def run():
        raise error

    return run


def reported(monkeypatch, items, first=0):
    """Exit code of a stage of these items, and the lines about finished ones."""
    monkeypatch.setitem(gpu_stages.STAGES, "smoke", lambda options: iter(items))
    report = io.StringIO()
    code = gpu_stages.run("smoke", ALL, first, report)
    lines = [json.loads(line) for line in report.getvalue().splitlines()]
    return code, [(line["ends"], line["status"], line["text"]) for line in lines if "ends" in line]


def test_items_are_reported(monkeypatch):
    good = Item("good", lambda: ("fine", {"x": 1}))
    assert reported(monkeypatch, [good]) == (0, [(0, "ok", "fine")])
    items = [
        good,
        Item("skips", raising(Skip("no tool"))),
        Item("fails", raising(AssertionError("row 1\ndiffers"))),
        good,
    ]
    ends = [(0, "ok", "fine"), (1, "skipped", "no tool"), (2, "failed", "row 1 differs"), (3, "ok", "fine")]
    assert reported(monkeypatch, items) == (1, ends)
    assert reported(monkeypatch, items, first=3) == (0, ends[3:])
    broken = [Item("breaks", raising(KeyError("what"))), Item("loses", raising(CudaError("fault"))), good]
    assert reported(monkeypatch, broken) == (GPU_LOST, [(0, "failed", "KeyError: 'what'"), (1, "failed", "fault")])


def test_a_stage_that_cannot_run_is_skipped(monkeypatch):
    def nothing():
        raise Skip("no tool here")
        yield

    assert reported(monkeypatch, nothing()) == (0, [(0, "skipped", "no tool here")])
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name, path: None)
    with pytest.raises(Skip, match="no compute-sanitizer"):
        list(gpu_stages.sanitizer_items(ALL))


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_kernel_stage_with_the_emulation_as_the_gpu(monkeypatch):
    class Graph:
        def __init__(self, backend, calls):
            self.replay = lambda: backend.run(calls)

    route = registry.get("route")
    monkeypatch.setattr(gpu_stages, "all_operations", lambda: [route])
    monkeypatch.setattr(gpu_stages, "backend", lambda synchronous: CpuBackend())
    monkeypatch.setattr(gpu_stages, "GPU", torch.device("cpu"))
    monkeypatch.setattr(gpu_stages.gpu_checks, "CudaGraph", Graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    items = [item for item in gpu_stages.kernel_items(Options(gpu=True, quick=True)) if "f32 8 tokens" in item.name]
    assert [item.name.split(":")[0] for item in items] == ["references", "n_tok", "graphs"]
    assert [gpu_stages.outcome(item)[0]["status"] for item in items] == ["ok"] * 3


def test_what_is_compiled_for_a_gpu():
    found = gpu_compile.for_gpu("sm_90a")
    jobs = found["route/route.cu sm_90a"]
    constants = [dict(one) for _, one, _ in jobs]
    assert {one["N_TOK"] for one in constants if one["HIDDEN"] == 256} == {1, 2, 3, 8}  # the checks of single tokens
    assert {one["N_TOK"] for one in constants if one["HIDDEN"] == 4096} >= {1, 2, 8}  # as shipped
    assert len({one for _, one, _ in jobs}) == len(jobs)
    assert set(gpu_compile.for_all()) >= {"route/route.cu sm_80", "route/route.cu sm_121a"}


SANITIZER = """#!/bin/sh
case "$*" in *--quick*) echo "========= ERROR SUMMARY: 0 errors"; exit {probe};; esac
echo "========= Invalid __global__ write of size 4 bytes, an error"
exit {cases}
"""


@pytest.mark.parametrize(
    ("probe", "cases", "error"), [(0, 0, None), (1, 0, Skip), (0, 9, AssertionError)], ids=["works", "cannot", "finds"]
)
def test_compute_sanitizer(tmp_path, probe, cases, error):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER.format(probe=probe, cases=cases))
    tool.chmod(0o755)
    if error is None:
        assert "Invalid" in gpu_stages.sanitize(str(tool), "memcheck", ALL)[0]
    else:
        with pytest.raises(error, match="memcheck does not work here: ERROR" if probe else "smoke cases: Invalid"):
            gpu_stages.sanitize(str(tool), "memcheck", ALL)


def test_the_model_is_skipped_where_the_engine_takes_no_cuda(monkeypatch):
    def refuse(device):
        raise Ds4Error("device: torch finds no GPU")

    monkeypatch.setattr(engine, "resolve_device", refuse)
    with pytest.raises(Skip, match="device: torch finds no GPU"):
        list(gpu_machine.model(Path(), Skip))
    monkeypatch.setattr(engine, "resolve_device", lambda device: device)
    assert [name.split()[0] for name, _ in gpu_machine.model(Path(), Skip)] == ["verify.sh", "greedy", "one"]


@pytest.mark.parametrize("differing", [False, True])
def test_greedy_parity(monkeypatch, differing):
    found = kernel_parity.Parity(1, 0.01)
    found.add(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0] if differing else [1.0, 0.0]))
    monkeypatch.setattr(kernel_parity, "parity", lambda: found)
    if differing:
        with pytest.raises(AssertionError, match=r"0 of 1 next tokens agree.*; step 1: 1 instead of 0"):
            gpu_machine.parity()
    else:
        assert gpu_machine.parity() == (found.text(), found.record())
