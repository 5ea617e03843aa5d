"""The command that runs cases of registered operations under a sanitizer, with a made-up operation."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuemu import sanitize
from cuemu.backend import missing
from cuemu.calls import FIXTURES

from ds4.kernels import registry
from ds4.kernels.cases import Case, Exact, Inputs, Outputs
from ds4.kernels.entry import ArgPack, Entry, KernelCall
from ds4.kernels.registry import Operation

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

RACE = Entry("no_barrier", str(FIXTURES / "faults.cu"), (("y", "f32*"), ("right", "i32")))


def reversal(right: int, offset: float = 0) -> Operation:
    """An operation on the fixture no_barrier, faulty where ``right`` is 0; the reference is off by ``offset``."""

    def calls(inputs: Inputs, outputs: Outputs) -> list[KernelCall]:
        return [KernelCall(RACE, (), (1, 1, 1), (64, 1, 1), 0, ArgPack(RACE, {"y": outputs["y"], "right": right}))]

    case = Case("small", "smoke", lambda seed, device: {"x": torch.zeros(1, device=device)}, {"y": Exact()}, 256)
    return Operation(
        "reversal",
        reference=lambda inputs: {"y": torch.arange(63, -1, -1).float() + offset},
        outputs=lambda inputs: {"y": torch.empty(64)},
        calls=calls,
        entries=(RACE,),
        cases=lambda: [case],
    )


@pytest.mark.parametrize(
    ("right", "offset", "mode", "finding"),
    [
        (1, 0, "plain", None),
        (1, 0, "tsan", None),
        (0, 0, "tsan", r"reversal/small under tsan, order warps, seed 0: ThreadSanitizer: data race at faults\.cu:\d+"),
        (0, 0, "plain", "reversal/small seed 0: y: 32 of 64 differ"),
        (1, 1, "asan", "reversal/small seed 0: y: 64 of 64 differ"),
    ],
)
def test_sanitize_command(monkeypatch, capsys, right, offset, mode, finding):
    if missing(mode):
        pytest.skip(str(missing(mode)))
    monkeypatch.setattr(registry, "get", lambda name: reversal(right, offset))
    status = sanitize.main(["--mode", mode, "--op", "reversal", "--case", "small"])
    printed = capsys.readouterr().out
    assert status == (1 if finding else 0)
    assert re.search(finding or f"1 cases under {mode}: nothing found", printed)


def test_sanitize_command_takes_all_small_cases(monkeypatch, capsys):
    monkeypatch.setattr(registry, "get", lambda name: reversal(1))
    assert sanitize.main(["--mode", "plain", "--op", "reversal"]) == 0
    assert "1 cases" in capsys.readouterr().out
    assert sanitize.main(["--mode", "plain", "--op", "reversal", "--case", "large"]) == 2
    assert "no such case; there are: small" in capsys.readouterr().err


def test_sanitize_runs_as_a_module():
    command = [sys.executable, "-m", "tests.cuemu.sanitize", "--mode", "plain", "--op", "no_such_operation"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no operation no_such_operation" in done.stderr
