"""A compiled kernel file in this process: launches, and errors with the place in the source."""

from __future__ import annotations

import ctypes
import math
import re
import shutil
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

from ds4.kernels.entry import KernelCall

from .builder import HERE
from .errors import KernelError

ORDERS = ("forward", "lifo", "random", "warps")  # as enum Order of include/cuemu/runtime.h
# Largest shared memory of a block in KiB (CUDA programming guide, compute capabilities).
SHARED_KIB = {
    "sm_80": 163,
    "sm_86": 99,
    "sm_89": 99,
    "sm_90a": 227,
    "sm_100a": 227,
    "sm_103a": 227,
    "sm_120a": 99,
    "sm_121a": 99,
}
_lock = threading.Lock()  # a library has one scheduler


@dataclass(frozen=True)
class Schedule:
    """How the threads of launches take turns, and for how long: see CpuBackend. ValueError for an unknown order."""

    order: str
    seed: int
    time_limit_s: float

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order {self.order!r} is not one of {', '.join(ORDERS)}")


class LaunchConfig(ctypes.Structure):
    """cuemu::LaunchConfig of include/cuemu/runtime.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("cluster", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("shared_limit", ctypes.c_uint64),
        ("order", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
        ("time_limit_s", ctypes.c_double),
        ("done", ctypes.c_void_p),
        ("predecessor_done", ctypes.c_void_p),
    )


def launch_config(call: KernelCall, schedule: Schedule) -> LaunchConfig:
    """The configuration of ``call``; its shared memory has to fit every architecture of the entry."""
    return LaunchConfig(
        call.grid,
        call.block,
        call.cluster or (1, 1, 1),
        call.shared_bytes,
        1024 * min(SHARED_KIB[architecture] for architecture in call.entry.architectures),
        ORDERS.index(schedule.order),
        schedule.seed,
        schedule.time_limit_s,
    )


class Module:
    """The kernels of one library; ``launch`` runs them to the end.

    ``n_threads``: of the largest launch so far, whose stacks stay until :meth:`free`.
    """

    def __init__(self, library: Path) -> None:
        self.library = library
        self.n_threads = 0
        self._code = ctypes.CDLL(str(library))
        self._code.cuemu_error.restype = ctypes.c_char_p

    def launch(self, call: KernelCall, schedule: Schedule) -> None:
        """Run ``call``. Raises KernelError with what went wrong, in which thread, and where in the source."""
        config = launch_config(call, schedule)
        kernel = getattr(self._code, f"{call.entry.name}__cuemu")
        with _lock:
            self.n_threads = max(self.n_threads, math.prod(call.block) * math.prod(call.cluster or (1,)))
            failed = kernel(ctypes.byref(config), ctypes.c_void_p(call.args.address))
            message = self._code.cuemu_error().decode() if failed else ""
        if failed:
            raise KernelError(f"{call.entry.name}: {with_places(message, self.library)}")

    def free(self) -> None:
        """Give the stacks back; the next launch makes new ones."""
        with _lock:
            self._code.cuemu_free()
            self.n_threads = 0


class Modules:
    """The libraries that a process has loaded, each once. The stacks of those used least recently are given back: a
    stack takes two of the 65,530 pieces that Linux lets a process have of its memory."""

    MOST_THREADS = 12_000

    def __init__(self) -> None:
        self._loaded: dict[Path, Module] = {}

    def get(self, library: Path) -> Module:
        """The library, which counts as used."""
        module = self._loaded.pop(library, None) or Module(library)
        self._loaded[library] = module
        total = sum(one.n_threads for one in self._loaded.values())
        for one in self._loaded.values():  # in the order of use
            if total <= self.MOST_THREADS or one is module:
                break
            total -= one.n_threads
            if one.n_threads:
                one.free()
        return module


def with_places(message: str, library: Path) -> str:
    """``message`` with every trace, "[1a2b 1c3d]" in offsets into ``library``, turned into "at file:line < file:line".

    The emulation's own frames are left out; without addr2line (binutils) the trace goes.
    """
    traces = re.findall(r"\[([0-9a-f ]*)\]", message)
    for trace in dict.fromkeys(traces):
        places = " < ".join(_places(trace.split(), library))
        message = message.replace(f" [{trace}]", f" at {places}" if places else "")
    return message


def _places(offsets: list[str], library: Path) -> list[str]:
    tool = shutil.which("addr2line")
    if not tool or not offsets:
        return []
    command = [tool, "--inlines", "--exe", str(library), *offsets]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    places = []
    for line in lines:
        path, _, number = line.split(" (")[0].rpartition(":")
        if path.endswith((".cu", ".cuh")) and not path.startswith(str(HERE / "include")):
            places.append(f"{Path(path).name}:{number}")
    return list(dict.fromkeys(places))
