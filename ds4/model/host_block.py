"""The host's side of a step's block of words: written in place, sent without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

AHEAD = 4  # steps that the host may have enqueued before it waits


class Event(Protocol):
    """torch.cuda.Event, as far as it is used here."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class HostBlock:
    """Sends words to ``block``, i32 [n], on torch's current stream.

    A copy from pinned memory reads it when the stream comes to it, so that a buffer may be written again only when its
    copy is done. There are AHEAD of them with an event behind each copy, and the wait for the event of AHEAD steps ago
    is over as a rule before it begins. Elsewhere than on a GPU copies are done at once: one buffer, no events.
    """

    def __init__(self, block: Tensor) -> None:
        on_gpu = block.device.type == "cuda"
        self._block = block
        self._buffers = [
            torch.zeros(block.shape, dtype=torch.int32, device="cpu", pin_memory=on_gpu)
            for _ in range(AHEAD if on_gpu else 1)
        ]
        self._events: list[Event] = [torch.cuda.Event() for _ in self._buffers] if on_gpu else []
        self._words = [buffer.numpy() for buffer in self._buffers]
        self._turn = 0

    def send(self, words: Sequence[int]) -> None:
        """Write the first words of the block; those behind them say nothing. Allocates nothing."""
        turn = self._turn
        if self._events:
            self._events[turn].synchronize()
        self._words[turn][: len(words)] = words
        self._block.copy_(self._buffers[turn], non_blocking=True)
        if self._events:
            self._events[turn].record()
        self._turn = (turn + 1) % len(self._buffers)
