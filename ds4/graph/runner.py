"""Runners: they run a step's list of launches, and bring the words that it leaves to the host when they are asked.

Two with one interface. :class:`GraphRunner` replays graphs on a GPU; the words follow into pinned memory, behind each
replay and in front of the next, so that the host may look at them later. :class:`EagerRunner` launches one by one and
waits: the debugging path, and the tests' on the emulation of the kernels.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ds4.graph.capture import CudaGraph
from ds4.kernels.cuda_backend import CudaBackend
from ds4.kernels.driver import check
from ds4.kernels.entry import KernelCall
from ds4.model.steps import Decoder

EAGER = "DS4_EAGER"
"""Environment variable: any value but the empty one and 0 makes a GPU launch kernels one by one."""

SLOTS = 2
"""Lists that may have been launched and not looked at: one that runs, and the one behind it."""


@dataclass(frozen=True)
class Left:
    """What a list left: the ``words`` i32 [64] (ds4/kernels/draft/words.py), and the ``seconds`` it ran."""

    words: Sequence[int]
    seconds: float


class Runner(Protocol):
    """Runs lists in order. At most SLOTS of them may be launched before :meth:`left` or :meth:`forget`."""

    def ready(self, calls: Sequence[KernelCall]) -> Any:
        """A list made ready for :meth:`launch`: the only thing here that takes time or memory."""
        ...

    def launch(self, ready: Any) -> None:
        """Run a list, or enqueue it."""
        ...

    def left(self) -> Left:
        """What the oldest list left that was launched and not looked at; waits for that list and no other."""
        ...

    def forget(self) -> None:
        """Nobody will look at what was launched."""
        ...


class EagerRunner:
    """Launches one by one on the decoder's backend, whichever it is, and reads its words at once."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._left: deque[Left] = deque()

    def ready(self, calls: Sequence[KernelCall]) -> Sequence[KernelCall]:
        return calls

    def launch(self, ready: Sequence[KernelCall]) -> None:
        started = time.perf_counter()
        self._decoder.backend.run(ready)
        words = self._decoder.state.words.tolist()
        self._left.append(Left(words, time.perf_counter() - started))

    def left(self) -> Left:
        return self._left.popleft()

    def forget(self) -> None:
        self._left.clear()


class GraphRunner:
    """Replays graphs on torch's current stream. A launch is four calls of the driver: the graph, the words' copy into
    one of SLOTS places in turn, and an event in front and behind. Only :meth:`left` may wait, for such an event.

    Raises ValueError where the decoder's launches cannot be captured.
    """

    def __init__(self, decoder: Decoder) -> None:
        backend, words = decoder.backend, decoder.state.words
        if not isinstance(backend, CudaBackend):
            raise ValueError(f"graphs are a GPU's, not of {type(backend).__name__}")
        self._backend = backend
        self._n_bytes = words.numel() * words.element_size()
        self._address = words.data_ptr()
        memory = torch.zeros(SLOTS, words.numel(), dtype=words.dtype, device="cpu", pin_memory=words.is_cuda)
        self._memory = memory.numpy()
        self._places = [row.data_ptr() for row in memory]
        driver = backend.driver
        flags = driver.CUevent_flags.CU_EVENT_BLOCKING_SYNC  # who waits sleeps
        with backend.on_device():
            self._events = [
                [check(driver, driver.cuEventCreate(flags), "making an event") for _ in range(2)] for _ in range(SLOTS)
            ]
        self._launched = self._seen = 0

    def ready(self, calls: Sequence[KernelCall]) -> CudaGraph:
        return CudaGraph(self._backend, calls)

    def launch(self, ready: CudaGraph) -> None:
        if self._launched - self._seen >= SLOTS:
            raise ValueError(f"{SLOTS} lists are launched already, and nobody looked at what they left")
        driver, slot = self._backend.driver, self._launched % SLOTS
        begin, end = self._events[slot]
        with self._backend.on_device():
            stream = self._backend.stream()
            check(driver, driver.cuEventRecord(begin, stream), "marking a step's begin")
            ready.enqueue(stream)
            copied = driver.cuMemcpyDtoHAsync(self._places[slot], self._address, self._n_bytes, stream)
            check(driver, copied, "copying a step's words to the host")
            check(driver, driver.cuEventRecord(end, stream), "marking a step's end")
        self._launched += 1

    def left(self) -> Left:
        if self._seen == self._launched:
            raise ValueError("no list was launched that nobody looked at")
        driver, slot = self._backend.driver, self._seen % SLOTS
        begin, end = self._events[slot]
        doing = f"running a step on {self._backend.facts.name}"
        with self._backend.on_device():
            check(driver, driver.cuEventSynchronize(end), doing)
            ms = check(driver, driver.cuEventElapsedTime(begin, end), doing)
        self._seen += 1
        return Left(self._memory[slot].tolist(), ms / 1e3)

    def forget(self) -> None:
        """As Runner's. A place is not used again before its copy is done."""
        while self._seen < self._launched:
            self.left()


def runner_for(decoder: Decoder) -> Runner:
    """Graphs on a GPU, unless EAGER asks for single launches or the backend waits after each of them."""
    eager = os.environ.get(EAGER, "0") not in ("", "0")
    graphs = isinstance(decoder.backend, CudaBackend) and not decoder.backend.synchronous and not eager
    return GraphRunner(decoder) if graphs else EagerRunner(decoder)
