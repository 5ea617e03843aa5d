"""Stages of scripts/gpu_check.py about the machine and the model: facts, ds4 doctor, verify.sh, CPU against CUDA."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import kernel_parity
import torch

from ds4.doctor import Check, diagnose
from ds4.errors import CudaError, Ds4Error
from ds4.kernels.arch import device_facts
from ds4.kernels.compiler import nvrtc_version

Step = tuple[str, Callable[[], tuple[str, Any]]]
_CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,power.draw,temperature.gpu,persistence_mode"


def run_text(*command: str) -> str:
    """What a command prints, stripped; empty where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def clocks() -> dict[str, str]:
    """What nvidia-smi says about the first GPU's clocks, power and temperature; empty without it."""
    if not shutil.which("nvidia-smi"):
        return {}
    values = run_text("nvidia-smi", "-i", "0", f"--query-gpu={_CLOCKS}", "--format=csv,noheader").split(", ")
    names = _CLOCKS.split(",")
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}


def describe() -> tuple[str, Any]:
    """GPU (or why there is none), driver, versions, clocks."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu_cores": os.cpu_count(),
        "commit": run_text("git", "rev-parse", "HEAD") or None,
        "changed": bool(run_text("git", "status", "--porcelain")),
    }
    try:
        facts["nvrtc"] = nvrtc_version()
    except Ds4Error as error:
        facts["nvrtc"] = str(error)
    try:
        device = device_facts(0)
        if not torch.cuda.is_available():
            raise Ds4Error(f"{device.name} is there, but this torch ({torch.__version__}) cannot use it")
    except (Ds4Error, CudaError) as error:
        return f"no GPU: {error}", facts | {"gpu": None, "why": str(error)}
    facts["driver"] = run_text("nvidia-smi", "-i", "0", "--query-gpu=driver_version", "--format=csv,noheader") or None
    return device.name, facts | {"gpu": asdict(device) | {"architecture": device.architecture}, "clocks": clocks()}


def doctor(gpu: bool, skip: type[Exception]) -> Iterator[Step]:
    """The checks of ds4 doctor. Without a GPU what is missing is no failure."""

    def judge(check: Check) -> tuple[str, Any]:
        if check.status == "missing" and not gpu:
            raise skip(check.text)
        if check.status == "missing":
            raise AssertionError(check.text)
        return check.text, check.facts

    for check in diagnose(40).checks:
        yield check.name, partial(judge, check)


def model(root: Path, skip: type[Exception]) -> Iterator[Step]:
    """verify.sh on CUDA, and greedy decoding on CPU and CUDA; skipped where the engine refuses CUDA."""
    try:
        from ds4.engine import resolve_device

        resolve_device("cuda")
    except ImportError as error:
        raise skip(f"the engine cannot be imported here: {error}") from None
    except Ds4Error as error:
        raise skip(str(error)) from None
    yield "verify.sh --device cuda", partial(command, root, str(root / "verify.sh"), "--device", "cuda")
    yield f"greedy parity, {kernel_parity.TOKENS} tokens", parity
    one_answer = (sys.executable, "-m", "ds4", "verify", "--one-answer", "--device", "cuda", "--tokens", "2000")
    yield "one answer", partial(command, root, *one_answer)


def command(root: Path, *words: str) -> tuple[str, Any]:
    """A command that checks something; its last line. Raises AssertionError where it fails."""
    done = subprocess.run(words, capture_output=True, text=True, cwd=root, check=False)
    print(done.stdout, done.stderr, flush=True)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    if done.returncode:
        raise AssertionError(last)
    return last, {"command": " ".join(words)}


def parity() -> tuple[str, Any]:
    """Greedy decoding of the bundled model on CPU and CUDA (scripts/kernel_parity.py).

    Raises AssertionError with the first token that differs by more than the tolerance.
    """
    found = kernel_parity.parity()
    if found.wrong:
        raise AssertionError(f"{found.text()}; {found.wrong[0].text()}")
    return found.text(), found.record()
