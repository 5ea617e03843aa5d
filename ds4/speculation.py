"""Speculative decoding: one verified step of a session, and what drafting brought (spec model.md 7.3)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ds4.draft_length import Costs, DraftLength, Pace
from ds4.mtp.accept import Accepted, accept
from ds4.mtp.drafter import Draft
from ds4.sampling import Sampler
from ds4.session import Session


@dataclass
class DraftStatistics:
    """What drafting did in one generation. Times in seconds.

    mode           as asked for: "auto" or a number of tokens
    drafts         steps that verified a draft
    drafted        tokens in them
    cut            tokens that were drafted and not verified, because the head thought too little of them
    accepted       those that were kept
    tokens         chosen by the steps, with and without a draft
    draft_seconds  spent on drafting; none where a GPU drafts and verifies in one go, which is a step's time
    steps          decode steps by number of tokens
    seconds        time in them, likewise
    plain_seconds  of one step without a draft: measured in this generation or an earlier one; None if never
    stopped_after  tokens after which "auto" ended drafting because it did not pay; None if it never did
    """

    mode: DraftLength = 0
    drafts: int = 0
    drafted: int = 0
    cut: int = 0
    accepted: int = 0
    tokens: int = 0
    draft_seconds: float = 0.0
    steps: dict[int, int] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    plain_seconds: float | None = None
    stopped_after: int | None = None

    @property
    def mean_accepted(self) -> float:
        """Accepted tokens of a draft."""
        return self.accepted / self.drafts if self.drafts else 0.0

    @property
    def tokens_per_step(self) -> float:
        steps = sum(self.steps.values())
        return self.tokens / steps if steps else 0.0

    @property
    def step_seconds(self) -> dict[int, float]:
        """Mean time of a step by number of tokens."""
        return {n: self.seconds[n] / self.steps[n] for n in sorted(self.steps)}

    @property
    def gain(self) -> float | None:
        """Estimated speed relative to plain decoding; None where no plain step was ever measured."""
        spent = sum(self.seconds.values()) + self.draft_seconds
        return self.tokens * self.plain_seconds / spent if self.plain_seconds and spent else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "drafts": self.drafts,
            "drafted": self.drafted,
            "cut": self.cut,
            "accepted": self.accepted,
            "mean_accepted": self.mean_accepted,
            "tokens_per_step": self.tokens_per_step,
            "draft_seconds": self.draft_seconds,
            "steps": {str(n): self.steps[n] for n in sorted(self.steps)},
            "step_seconds": {str(n): s for n, s in self.step_seconds.items()},
            "plain_seconds": self.plain_seconds,
            "gain": self.gain,
            "stopped_after": self.stopped_after,
        }


@dataclass(frozen=True, eq=False)
class Step:
    """Tokens chosen by one step, and the rows f32 ``[len(tokens), vocab]`` they were chosen from, on any device."""

    tokens: list[int]
    logits: Tensor


class Speculation:
    """Decodes one answer in a session, with drafts where they pay.

    At temperature 0 the tokens and the logits they were chosen from are those of plain decoding, bit for bit; above it
    the distribution is (ds4/mtp/accept.py). With a seed above temperature 0 the draft length does not follow measured
    times, so that the seed gives the same text again.
    """

    def __init__(self, session: Session, sampler: Sampler, length: DraftLength, costs: Costs) -> None:
        self.session = session
        self.sampler = sampler
        self.statistics = DraftStatistics(mode=length)
        self._costs = costs
        params = sampler.params
        timed = params.temperature == 0 or params.seed is None
        most = session.drafter.max_tokens if session.drafter is not None else 0
        self._pace = Pace(length, most, costs, timed=timed)

    def step(self, history: Sequence[int], most: int) -> Step:
        """Process the last token of ``history`` and choose 1 to ``most`` tokens behind it.

        history  the session's tokens and one more, which has not been processed
        Afterwards the session has processed all of ``history`` and all chosen tokens but the last. Broken off, it
        may have processed up to 8 tokens behind ``history[:-1]``, which can be rewound.
        """
        session = self.session
        started = time.perf_counter()
        k = min(self._pace.next(), most - 1, session.ctx - session.position - 1)
        if session.loop(self.sampler) is not None:
            k = k if session.position else 0
            tokens, rows = session.speculate(history[-1], k)
            seconds = time.perf_counter() - started
            self._count(k, k, len(tokens) - 1, 0.0, seconds, confident=False)
            return Step(tokens, rows)
        draft = session.draft(history, k, self.sampler)
        n_drafted = k = len(draft.tokens)
        confident = bool(draft.confidence)
        if confident:
            k = self._pace.keep(draft.confidence)
            draft = Draft(draft.tokens[:k], draft.probs[:k], draft.confidence[:k])
        drafted = time.perf_counter()
        logits = session.decode([history[-1], *draft.tokens]).cpu()
        done = time.perf_counter()
        if k:
            accepted = accept(draft, logits, history, self.sampler)
        else:
            accepted = Accepted(0, self.sampler.sample(logits[0], history))
        session.rewind(k - accepted.n)
        self._count(n_drafted, k, accepted.n, drafted - started, done - drafted, confident=confident)
        return Step([*draft.tokens[: accepted.n], accepted.token], logits[: accepted.n + 1])

    def tokens(self, history: Sequence[int], most: int) -> list[int]:
        """As :meth:`step`, without the rows."""
        return self.step(history, most).tokens

    def _count(
        self, n_drafted: int, k: int, n: int, draft_seconds: float, step_seconds: float, *, confident: bool
    ) -> None:
        s = self.statistics
        self._costs.add(k + 1, step_seconds, draft_seconds, n_drafted)
        self._pace.add(k, n, n_drafted if confident else None)
        s.tokens += n + 1
        s.cut += n_drafted - k
        if n_drafted:
            s.draft_seconds += draft_seconds
        if k:
            s.drafts += 1
            s.drafted += k
            s.accepted += n
        s.steps[k + 1] = s.steps.get(k + 1, 0) + 1
        s.seconds[k + 1] = s.seconds.get(k + 1, 0.0) + step_seconds
        if self._costs.measured(1):
            s.plain_seconds = self._costs.step(1)
        if self._pace.stopped and s.stopped_after is None:
            s.stopped_after = s.tokens
