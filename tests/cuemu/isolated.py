"""Runs launches in a process of their own, under AddressSanitizer + UBSan or ThreadSanitizer.

The process works on copies of the tensors, each an allocation of its own, so that a step beyond a tensor is seen. The
tensors change only if all went well. A launch that may overlap its predecessor (``KernelCall.pdl``) is unordered with
it until its threads call ``pdl_wait``; all other launches run after one another.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ds4.kernels.entry import POINTERS, SCALARS, KernelCall

from .builder import Mode, kernel_library, runner
from .errors import CuemuError, KernelError, SanitizerError
from .module import Schedule, launch_config, with_places

_LAUNCH_FAILED = 3  # exit code of runner.cpp
_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:exitcode=66",
    "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=66",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
}
_FINDING = re.compile(r"runtime error: [^\n]+|AddressSanitizer: [\w-]+|ThreadSanitizer: [\w-]+(?: race)?")
_PLACE = re.compile(r"(?:^|[\s(/])([\w.-]+\.cuh?:\d+)")


@dataclass(frozen=True)
class _Extent:
    """Bytes of memory that tensors share: ``size`` from ``start`` on."""

    start: int
    size: int


def run_isolated(calls: Sequence[KernelCall], mode: Mode, schedule: Schedule) -> None:
    """Run ``calls`` in order. Raises SanitizerError for a finding, KernelError for what the scheduler finds."""
    extents = _extents([tensor for call in calls for tensor in call.args.tensors])
    lines = [f"buffer {extent.size}" for extent in extents]
    for call in calls:
        library = kernel_library(call.entry.path, call.constants, mode)
        lines.append(_plan_line(call, library, extents, schedule))
    with tempfile.TemporaryDirectory(prefix="cuemu-") as folder:
        data = Path(folder, "data")
        data.write_bytes(b"".join(ctypes.string_at(extent.start, extent.size) for extent in extents))
        _execute(Path(folder), lines, mode, schedule.time_limit_s)
        result = data.read_bytes()
    at = 0
    for extent in extents:
        ctypes.memmove(extent.start, result[at : at + extent.size], extent.size)
        at += extent.size


def _extents(tensors: Sequence[Tensor]) -> list[_Extent]:
    """The memory of contiguous ``tensors``, by address; tensors that overlap share one extent."""
    spans = sorted({(t.data_ptr(), t.numel() * t.element_size()) for t in tensors if t.numel()})
    extents: list[_Extent] = []
    for start, size in spans:
        last = extents[-1] if extents else None
        if last and start < last.start + last.size:
            extents[-1] = _Extent(last.start, max(last.size, start + size - last.start))
        else:
            extents.append(_Extent(start, size))
    return extents


def _plan_line(call: KernelCall, library: Path, extents: Sequence[_Extent], schedule: Schedule) -> str:
    """One call as runner.cpp reads it; a pointer becomes a buffer's number and an offset."""
    config = bytes(launch_config(call, schedule)).hex()
    words = ["call", f'"{library}"', call.entry.name, config, str(int(call.pdl))]
    cells = (ctypes.c_void_p * len(call.entry.params)).from_address(call.args.address)
    for (_, kind), cell in zip(call.entry.params, cells, strict=True):
        size = 8 if kind in POINTERS else ctypes.sizeof(SCALARS[kind])
        value = int.from_bytes(ctypes.string_at(cell, size), "little")  # the low bytes of a 64-bit cell
        owner = [i for i, extent in enumerate(extents) if 0 <= value - extent.start < extent.size]
        if kind in POINTERS and owner:
            words += ["buffer", str(owner[0]), str(value - extents[owner[0]].start)]
        else:
            words += ["value", str(value), "0"]
    return " ".join(words)


def _execute(folder: Path, plan: Sequence[str], mode: Mode, time_limit_s: float) -> None:
    """Run ``plan`` on the file "data" in ``folder``, which holds the buffers one after another."""
    (folder / "plan").write_text("".join(line + "\n" for line in plan))
    command = [*_fixed_addresses(), str(runner(mode)), *(str(folder / name) for name in ("plan", "data", "report"))]
    environment = {**os.environ, **_OPTIONS}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=time_limit_s)
    except subprocess.TimeoutExpired:
        raise KernelError(f"no end after {time_limit_s:g} s: an endless loop, or a wait that cannot end") from None
    print(done.stdout, end="")  # what kernels printed
    if done.returncode == 0:
        return
    if done.returncode == _LAUNCH_FAILED:
        library, _, message = (folder / "report").read_text().partition("\n")
        raise KernelError(with_places(message, Path(library)))
    finding = _FINDING.search(done.stderr)
    if finding is None:
        report = (folder / "report").read_text() if (folder / "report").exists() else ""
        raise CuemuError(f"the runner ended with status {done.returncode}: {report} {done.stderr.strip()[:2000]}")
    raise SanitizerError(f"{finding[0]}{_where(done.stderr)}", done.stderr)


@functools.cache
def sanitizer_missing(mode: Mode) -> str | None:
    """Why ``mode`` cannot be used on this machine, in one line; None if it can."""
    try:
        with tempfile.TemporaryDirectory(prefix="cuemu-") as folder:
            Path(folder, "data").touch()
            _execute(Path(folder), [], mode, 60)
    except CuemuError as error:
        return f"the compiler's {mode} does not work here: {' '.join(str(error).split())}"
    return None


def _where(report: str) -> str:
    """The first lines of kernel files that a report names, for the end of a message."""
    places = list(dict.fromkeys(_PLACE.findall(report)))
    return " at " + ", ".join(places[:4]) if places else ""


@functools.cache
def _fixed_addresses() -> list[str]:
    """Prefix that switches address randomisation off, which ThreadSanitizer wants; empty where that is not allowed."""
    tool = shutil.which("setarch")
    if tool and subprocess.run([tool, "-R", "true"], capture_output=True).returncode == 0:
        return [tool, "-R"]
    return []
