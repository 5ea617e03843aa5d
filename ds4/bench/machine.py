"""Where figures come from: the facts that a result needs beside it to be compared with another."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ds4 import __version__


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What the processor calls itself; its architecture where the system does not tell."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpu(device: str) -> dict[str, Any] | None:
    if device != "cuda":
        return None
    from ds4.doctor import driver_release
    from ds4.kernels.arch import device_facts

    facts = device_facts(torch.cuda.current_device())
    return {
        "name": facts.name,
        "architecture": facts.architecture,
        "memory_bytes": facts.memory,
        "sms": facts.n_sms,
        "l2_bytes": facts.l2,
        "driver": driver_release(),
    }


def describe(device: str) -> dict[str, Any]:
    """The machine, the software and the time, as a JSON-able dictionary; ``gpu`` None where the CPU computes."""
    return {
        "ds4": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": _gpu(device),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["ds4", *sys.argv[1:]]),
    }
