"""The words of a step on their way to a device that comes to them late."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ds4.model import host_block
from ds4.model.host_block import AHEAD, HostBlock


class Stream:
    """A device that reads a buffer only when somebody waits for it."""

    device = torch.device("cuda")
    shape = (4,)

    def __init__(self) -> None:
        self.todo: list[Callable[[], None]] = []
        self.seen: list[list[int]] = []

    def copy_(self, source: Tensor, non_blocking: bool) -> None:
        assert non_blocking
        self.todo.append(lambda: self.seen.append(source.tolist()))

    def run(self, n: int) -> None:
        while self.todo and n > 0:
            self.todo.pop(0)()
            n -= 1


class Event:
    """torch.cuda.Event of that device."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.behind = stream, 0  # copies in front of the last mark

    def record(self) -> None:
        self.behind = len(self.stream.seen) + len(self.stream.todo)

    def synchronize(self) -> None:
        self.stream.run(self.behind - len(self.stream.seen))


@pytest.fixture
def stream(monkeypatch) -> Stream:
    """Buffers are plain memory here: without a driver none can be pinned."""
    made, zeros = Stream(), torch.zeros
    pinned: list[bool] = []

    def unpinned(*size: object, pin_memory: bool, **options: object) -> Tensor:
        pinned.append(pin_memory)
        return zeros(*size, **options)

    monkeypatch.setattr(host_block.torch, "zeros", unpinned)
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(made))
    HostBlock(made)
    assert pinned == [True] * AHEAD
    return made


def test_no_buffer_is_written_before_it_is_copied(stream: Stream) -> None:
    host = HostBlock(stream)
    sent = [[step, step * 7, 5, 900 + step] for step in range(3 * AHEAD)]
    for step, words in enumerate(sent):
        host.send(words)
        assert len(stream.seen) == max(0, step + 1 - AHEAD), "waits for no more than it has to"
    stream.run(len(sent))
    assert stream.seen == sent


def test_elsewhere_than_on_a_gpu() -> None:
    block = torch.zeros(4, dtype=torch.int32)
    host = HostBlock(block)
    for words in ([1, 2, 3, 4], [5, 6], [2**31 - 1]):
        host.send(words)
        assert block[: len(words)].tolist() == words
    with pytest.raises(ValueError, match="broadcast"):
        host.send([1, 2, 3, 4, 5])
