"""A runner that does with a list what a CUDA graph does, on the CPU's emulation of the kernels."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Sequence
from dataclasses import replace

from ds4.graph.runner import EagerRunner
from ds4.kernels.entry import KernelCall


def frozen(call: KernelCall) -> KernelCall:
    """``call`` with its arguments as they are now: what is written into its pack later does not reach it."""
    pack = copy.copy(call.args)
    pack._cells = [type(cell)(cell.value) for cell in call.args._cells]
    pack._params = (ctypes.c_void_p * max(1, len(pack._cells)))(*[ctypes.addressof(cell) for cell in pack._cells])
    return replace(call, args=pack)


class RecordedRunner(EagerRunner):
    """Lists are recorded once, by value, and replayed. ``recorded``: how many of them; ``replayed``: how often."""

    recorded = replayed = 0

    def ready(self, calls: Sequence[KernelCall]) -> list[KernelCall]:
        self.recorded += 1
        return [frozen(call) for call in calls]

    def launch(self, ready: Sequence[KernelCall]) -> None:
        self.replayed += 1
        super().launch(ready)
