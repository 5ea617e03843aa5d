"""Times of launches on the device: marks between groups of them, and what the marks say afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ds4.kernels.entry import Backend, KernelCall

_HOLD_CYCLES = 200_000  # about 0.1 ms: longer than the host needs to enqueue the launches of one operation


class Clock(Protocol):
    """The device's time."""

    def hold(self) -> None:
        """Keep the device busy while the host enqueues what comes next, so that it is not timed waiting for it."""
        ...

    def mark(self) -> Any:
        """This point of the device's work."""
        ...

    def seconds(self, first: Any, last: Any) -> float:
        """Time between two marks; waits until the device has passed them."""
        ...


class CudaClock:
    """CUDA events on torch's current stream."""

    def hold(self) -> None:
        torch.cuda._sleep(_HOLD_CYCLES)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        last.synchronize()
        return first.elapsed_time(last) / 1e3


class TimedBackend:
    """Runs launches on ``backend``, group by group, with marks around each.

    ``groups``: the launches of a step in order, which ``run`` takes all at once. ``kept``: group number -> a tensor
    to copy when it has run, before the next overwrites it; ``copies`` has those of the last run.
    """

    def __init__(
        self,
        backend: Backend,
        clock: Clock,
        groups: Sequence[Sequence[KernelCall]],
        kept: Mapping[int, Tensor] | None = None,
    ) -> None:
        self._backend, self._clock, self._groups, self._kept = backend, clock, groups, kept or {}
        self._marks: list[tuple[Any, Any]] = []
        self.copies: dict[int, Tensor] = {}

    def run(self, calls: Sequence[KernelCall]) -> None:
        """Run the groups. Raises ValueError where ``calls`` are others."""
        if [id(call) for group in self._groups for call in group] != [id(call) for call in calls]:
            raise ValueError("the launches to run are not those of the groups to time")
        self._marks, self.copies = [], {}
        for number, group in enumerate(self._groups):
            self._clock.hold()
            first = self._clock.mark()
            self._backend.run(group)
            self._marks.append((first, self._clock.mark()))
            if number in self._kept:
                self.copies[number] = self._kept[number].clone()

    def seconds(self) -> list[float]:
        """The time of each group in the last run."""
        return [self._clock.seconds(first, last) for first, last in self._marks]

    def times(self) -> list[tuple[float, float]]:
        """When each group of the last run began and ended, in seconds after the first one began."""
        origin = self._marks[0][0]
        return [(self._clock.seconds(origin, first), self._clock.seconds(origin, last)) for first, last in self._marks]
