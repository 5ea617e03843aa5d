"""``ds4 doctor`` as a command: table, JSON, exit codes; and how a failing GPU ends any command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from ds4 import cli_doctor
from ds4.cli import OneLineErrors, main
from ds4.doctor import Check, Report
from ds4.errors import CudaError

ROOT = Path(__file__).resolve().parent.parent
GOOD = [
    Check("torch", "ok", "2.13.0, CUDA 13.0"),
    Check("gpu 0", "ok", "NVIDIA H200, 140.1 of 150.1 GB free, sm_90a", {"index": 0}),
    Check("g++", "note", "not found; only the tests need it (apt install g++)"),
]
LONG = "/a/very/long/path/" + "x" * 70 + " cannot be written; make it writable or set XDG_CACHE_HOME"
BAD = [*GOOD, Check("driver", "missing", "no NVIDIA driver found\n(libcuda)"), Check("cache", "missing", LONG)]


def run(monkeypatch, checks, *arguments, width=60):
    """The command's result where the checks find this."""
    monkeypatch.setattr(cli_doctor, "diagnose", lambda: Report(checks))
    return CliRunner().invoke(main, ["doctor", *arguments], env={"COLUMNS": str(width)})


def test_all_is_well(monkeypatch):
    result = run(monkeypatch, GOOD)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert result.stdout.splitlines() == [
        "ok    torch  2.13.0, CUDA 13.0",
        "ok    gpu 0  NVIDIA H200, 140.1 of 150.1 GB free, sm_90a",
        "note  g++    not found; only the tests need it (apt install",
        "             g++)",
        "",
        "--device cuda will work.",
    ]


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_narrow_terminals_wrap_and_lose_nothing(monkeypatch, width):
    result = run(monkeypatch, BAD, width=width)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= width
    text = "".join("".join(lines).split())
    for check in BAD:
        assert "".join(check.text.split()) in text
        assert "".join(check.name.split()) in text
    assert "--devicecudawillnotwork:driver,cache.--devicecpudoes." in text


def test_no_finding_is_no_success(monkeypatch):
    result = run(monkeypatch, [])
    assert result.exit_code == 1
    assert "no check ran" in result.stdout


@pytest.mark.parametrize(("checks", "ok"), [(GOOD, True), (BAD, False)])
def test_json(monkeypatch, checks, ok):
    result = run(monkeypatch, checks, "--json")
    assert result.exit_code == (0 if ok else 1)
    report = json.loads(result.stdout)
    assert report["ok"] is ok
    assert [check["name"] for check in report["checks"]] == [check.name for check in checks]
    assert report["checks"][1]["facts"] == {"index": 0}


def test_unknown_options_are_an_error():
    result = CliRunner().invoke(main, ["doctor", "--gpu"])
    assert result.exit_code == 2
    assert result.stderr.startswith("ds4: error: ")


def test_the_program_on_this_machine():
    done = subprocess.run(
        [sys.executable, "-m", "ds4", "doctor", "--json"], cwd=ROOT, capture_output=True, text=True, timeout=150
    )
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["ok"] else 1)
    assert done.stderr == ""


def test_a_failing_gpu_ends_the_program_with_its_own_exit_code():
    @click.group(cls=OneLineErrors)
    def program():
        pass

    @program.command()
    def launch():
        raise CudaError("launching rms_norm (grid (1, 1, 1)): CUDA_ERROR_ILLEGAL_ADDRESS,\nan illegal address")

    result = CliRunner().invoke(program, ["launch"])
    assert result.exit_code == 3
    assert result.stdout == ""
    assert result.stderr == (
        "ds4: error: CUDA: launching rms_norm (grid (1, 1, 1)): CUDA_ERROR_ILLEGAL_ADDRESS, an illegal address\n"
    )
