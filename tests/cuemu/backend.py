"""The backend that tests use in the GPU's place."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from ds4.kernels.entry import Entry, KernelCall
from ds4.kernels.signature import check_entry

from .builder import MODES, Mode, kernel_library, toolchain_missing
from .isolated import run_isolated, sanitizer_missing
from .module import Modules, Schedule


@dataclass(frozen=True)
class CpuBackend:
    """Runs kernel launches on the CPU; a ``ds4.kernels.entry.Backend`` for tensors on the CPU.

    mode    "plain": in this process. "asan" (AddressSanitizer and UBSan) and "tsan" (ThreadSanitizer): in its own.
    order   which thread runs of those that can: "forward", the one that waits longest; "lifo", the one that waits
            shortest; "random"; "warps", those of a warp that is drawn anew at every barrier. Blocks run one after
            another, forward, backward (lifo) or shuffled.
    seed    of what is drawn.
    time_limit_s  seconds of CPU time that a launch may take (plain), or seconds that all of them may (sanitizers).

    ``run`` raises ValueError where an entry and its source disagree, SourceError or CompileError for a source that is
    not fit, KernelError for a launch that went wrong, SanitizerError for a finding.
    """

    mode: Mode = "plain"
    order: str = "forward"
    seed: int = 0
    time_limit_s: float = 120.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r} is not one of {', '.join(MODES)}")
        Schedule(self.order, self.seed, self.time_limit_s)

    def run(self, calls: Sequence[KernelCall]) -> None:
        """Run ``calls`` in order, to the end."""
        for call in calls:
            _check_once(call.entry)
            if call.args.device is not None and call.args.device.type != "cpu":
                raise ValueError(f"{call.entry.name}: tensors on {call.args.device}, not on the CPU")
        schedule = Schedule(self.order, self.seed, self.time_limit_s)
        if self.mode != "plain":
            run_isolated(calls, self.mode, schedule)
            return
        for call in calls:
            _MODULES.get(kernel_library(call.entry.path, call.constants, "plain")).launch(call, schedule)


def missing(mode: Mode = "plain") -> str | None:
    """What this machine lacks to run kernels in ``mode``, in one line; None if nothing."""
    lacking = toolchain_missing()
    return lacking if lacking or mode == "plain" else sanitizer_missing(mode)


@functools.cache
def _check_once(entry: Entry) -> None:
    check_entry(entry)


_MODULES = Modules()
