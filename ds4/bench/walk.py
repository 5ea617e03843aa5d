"""Measuring: a text grows from frontier to frontier, and at each some tokens are decoded, plainly and with drafts.

Decoded tokens stay in the text, so that every token of the longest context is processed once. Both ways take turns,
so that a machine whose speed changes treats them alike, and have to give the same tokens.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from ds4.ahead import decoding
from ds4.bench.energy import Meter
from ds4.bench.figures import Decode, Frontier, Prefill, Spread
from ds4.bench.forced import forced_drafter
from ds4.bench.prompts import Prompt
from ds4.draft_length import Costs, DraftLength
from ds4.errors import Ds4Error
from ds4.kernels.launch import PREFILL_ROWS
from ds4.sampling import Sampler, SamplingParams
from ds4.speculation import DraftStatistics

if TYPE_CHECKING:
    from ds4.engine import LLM, Session

WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Plan:
    """What is measured.

    frontiers  lengths of the context, ascending
    prompts    kinds of text (ds4.bench.prompts)
    tokens     decoded in a repeat; ``repeats`` of them at each frontier
    chunk      prompt tokens timed at a time
    draft      length of drafts, 0 for none
    accept     None: the model's draft head drafts; else drafts come from the plain answer, each token right this often
    """

    frontiers: tuple[int, ...]
    prompts: tuple[str, ...]
    tokens: int
    repeats: int
    chunk: int
    draft: DraftLength = 0
    accept: float | None = None

    def __post_init__(self) -> None:
        decoded = self.tokens * self.repeats
        gaps = [b - a for a, b in zip(self.frontiers, self.frontiers[1:], strict=False)]
        if any(gap <= decoded for gap in gaps):
            raise Ds4Error(
                f"bench: {decoded} tokens are decoded at each length of --ctx; put these further apart, or lower "
                "--tokens or --repeats"
            )

    @property
    def ctx(self) -> int:
        """Tokens that a session has to hold."""
        return self.frontiers[-1] + self.tokens * self.repeats + 1

    @property
    def work(self) -> int:
        """Tokens to process for one kind of prompt: what the progress bar counts."""
        return (self.frontiers[-1] + len(self.frontiers) * self.tokens * self.repeats) * (2 if self.draft else 1)


class Walk:
    """One session on its way through a text. ``history`` has one token more than the session has processed."""

    def __init__(self, session: Session, draft: DraftLength, costs: Costs, done: Callable[[int], None]) -> None:
        self.session = session
        self.history: list[int] = []
        self._draft, self._costs, self._done = draft, costs, done
        self._sampler = Sampler(SamplingParams())

    def prefill(self, ids: list[int], chunk: int) -> Prefill:
        """Process the rest of ``ids``, which begin with ``history``."""
        start, rates, total = self.session.position, [], 0.0
        for end in chunk_ends(start, len(ids), chunk):
            began, at = time.perf_counter(), self.session.position
            logits = self.session.prefill(ids[at:end]).cpu()
            seconds = time.perf_counter() - began
            total += seconds
            rates.append((end - at) / seconds)
            self._done(end - at)
        self.history = [*ids, self._sampler.sample(logits, ids)]
        return Prefill(len(ids) - start, total, Spread.of(rates))

    def decode(self, n: int, meter: Meter) -> Repeat:
        """Choose ``n`` tokens more."""
        speculation = decoding(self.session, self._sampler, self._draft, self._costs)
        joules, began, left = meter.joules(), time.perf_counter(), n
        while left:
            tokens = speculation.tokens(self.history, left)
            self.history += tokens
            left -= len(tokens)
        seconds, after = time.perf_counter() - began, meter.joules()
        self._done(n)
        used = after - joules if after is not None and joules is not None else None
        if used is not None and used < 0:  # the counter began anew
            used = None
        return Repeat(n, seconds, used, speculation.statistics)


@dataclass(frozen=True)
class Repeat:
    """Some tokens that were decoded one after the other."""

    tokens: int
    seconds: float
    joules: float | None
    statistics: DraftStatistics


def chunk_ends(start: int, end: int, chunk: int) -> list[int]:
    """Where chunks of about ``chunk`` tokens end, up to ``end``: all but the last on a tile of the prefill form.

    A remainder of less than half a chunk goes with the chunk before it, whose rate it would not be comparable to.
    """
    ends = [at for at in range(start // PREFILL_ROWS * PREFILL_ROWS + chunk, end, chunk) if at > start]
    if ends and end - ends[-1] < chunk / 2:
        ends.pop()
    return [*ends, end]


def _decoded(repeats: list[Repeat]) -> Decode:
    """All repeats of one way at one frontier."""
    steps: Counter[int] = Counter()
    times: dict[int, list[float]] = {}
    for one in repeats:
        for n_tok, count in one.statistics.steps.items():
            steps[n_tok] += count
            times.setdefault(n_tok, []).append(one.statistics.seconds[n_tok] / count * 1e3)
    joules = [one.joules for one in repeats if one.joules is not None]
    tokens = sum(one.tokens for one in repeats)
    return Decode(
        tokens,
        sum(one.seconds for one in repeats),
        Spread.of([one.tokens / one.seconds for one in repeats]),
        {str(n): steps[n] for n in sorted(steps)},
        {str(n): median(times[n]) for n in sorted(steps)},
        sum(one.statistics.drafted for one in repeats),
        sum(one.statistics.accepted for one in repeats),
        sum(joules) / tokens if len(joules) == len(repeats) else None,
    )


def warm_up(llm: LLM, plan: Plan, text: Prompt) -> None:
    """Whatever the first chunk and the first steps cost once: compiling, loading, dense copies of weights."""
    for walk in _walks(llm, plan, min(plan.ctx, plan.chunk + 4 * WARM_UP_TOKENS), lambda n: None):
        room = max(1, walk.session.ctx - 2 * WARM_UP_TOKENS)
        walk.prefill(text.upto([], min(room, plan.chunk)), plan.chunk)
        for _ in range(2):
            walk.decode(min(WARM_UP_TOKENS, walk.session.ctx - walk.session.position - 1), Meter())


def _walks(llm: LLM, plan: Plan, ctx: int, done: Callable[[int], None]) -> list[Walk]:
    """A plain walk, and one with drafts where drafts are wanted."""
    plain = llm.session(ctx)
    plain.drafter = None
    walks = [Walk(plain, 0, Costs(), done)]
    if plan.draft:
        drafting = llm.session(ctx)
        if plan.accept is not None:
            drafting.drafter = forced_drafter(lambda: walks[0].history, llm.config.vocab_size, plan.accept)
        walks.append(Walk(drafting, plan.draft, Costs(), done))
    return walks


def frontiers(llm: LLM, plan: Plan, text: Prompt, meter: Meter, done: Callable[[int], None]) -> Iterator[Frontier]:
    """Every frontier of one kind of text. ``done(n)``: n tokens more are processed.

    Raises Ds4Error where drafts change the tokens.
    """
    walks = _walks(llm, plan, plan.ctx, done)
    for ctx in plan.frontiers:
        ids = text.upto(walks[0].history, ctx)
        prefills = [one.prefill(ids, plan.chunk) for one in walks]
        repeats: list[list[Repeat]] = [[] for _ in walks]
        for number in range(plan.repeats):
            order = list(zip(walks, repeats, strict=True))
            if number % 2 and plan.accept is None:  # forced drafts are cut from the plain answer
                order.reverse()
            for one, into in order:
                into.append(one.decode(plan.tokens, meter))
        if any(one.history != walks[0].history for one in walks):
            raise Ds4Error("bench: the tokens with and without drafts differ; ds4 verify --one-answer says where")
        found = [_decoded(rows) for rows in repeats]
        yield Frontier(text.kind, ctx, prefills[0], found[0], found[1] if len(found) > 1 else None)
