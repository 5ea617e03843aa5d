"""What a run measured: rates with their spread, as dataclasses that become JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """A median and the extremes of ``n`` measurements."""

    median: float
    min: float
    max: float
    n: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Of one value or more."""
        return Spread(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class Prefill:
    """Prompt tokens behind the last frontier: how many, the seconds they took, tokens/s of the chunks."""

    tokens: int
    seconds: float
    tokens_per_second: Spread


@dataclass(frozen=True)
class Decode:
    """Tokens decoded at a frontier.

    tokens_per_second  of the repeats
    steps              decode steps by number of tokens; ``step_ms`` the median time of those of each number
    drafted, accepted  tokens
    joules_per_token   None where no counter tells
    """

    tokens: int
    seconds: float
    tokens_per_second: Spread
    steps: dict[str, int]
    step_ms: dict[str, float]
    drafted: int = 0
    accepted: int = 0
    joules_per_token: float | None = None

    @property
    def tokens_per_step(self) -> float:
        """What a step yields, at least 1."""
        return self.tokens / sum(self.steps.values())


@dataclass(frozen=True)
class Frontier:
    """One prompt at one length of the context; ``draft`` None where nothing was drafted."""

    prompt: str
    ctx: int
    prefill: Prefill
    plain: Decode
    draft: Decode | None
