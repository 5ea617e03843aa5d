"""One answer: every way to decode a text, compared with plain decoding, tokens and logits, bit for bit (design.md).

Plain decoding processes a prompt at once and then one token at a time, without a draft head. Every run does the same
two turns another way: with drafts of a fixed or an adapting length or from a drafter that is wrong on purpose, the
prompts in chunks, and in the middle of each answer nothing happens (live), tokens are undone and decoded again
(rewound), or the session goes through a file (restored). The second turn continues the session of the first. The
cache of a run grows with its text; that of plain decoding is as large as it will be from the beginning.

On a GPU all of that goes through kernels, plain decoding too, and the device's own loop drafts, verifies and accepts.
There are more runs there, with steps that are launched before it is known what those in front of them chose: of these
only the tokens are compared, as their logits never leave the device, and what they left in the cache.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds4.ahead import decoding
from ds4.draft_length import Costs
from ds4.engine import LLM
from ds4.one_answer_matrix import (
    ADVERSARIES,
    CHUNKS,
    KINDS,
    LENGTHS,
    MOST_CHUNKS,
    RESUMES,
    Adversary,
    Mode,
    Prompt,
    drafting_nothing,
    modes,
    plain_turn,
    prompts,
)
from ds4.sampling import Sampler, SamplingParams
from ds4.session import Session
from ds4.speculation import DraftStatistics, Speculation

_RUN_TOKENS = 100
"""Tokens of a run, at least, before more prompts are taken."""
_FIRST_TOKENS = 128
"""That a run's cache has room for at first; longer prompts, and answers behind shorter ones, make it grow."""


@dataclass
class Cell:
    """What was compared in one place of the matrix; ``rejected`` counts drafted tokens that were not accepted."""

    draft: str
    chunk: int | None
    resume: str
    runs: int = 0
    tokens: int = 0
    accepted: int = 0
    rejected: int = 0
    mismatches: int = 0


@dataclass(frozen=True)
class Mismatch:
    """A token, or the logits behind it, that differ from plain decoding; ``position`` is the token's in the text.

    ``logits`` are empty where they stayed on the device.
    """

    draft: str
    chunk: int | None
    resume: str
    kind: str
    prompt_tokens: int
    position: int
    token: int
    expected_token: int
    logits: list[float]
    expected_logits: list[float]


@dataclass
class Report:
    """``problems`` are one line each: mismatches, and cells that prove nothing. No problem: proven."""

    cells: list[Cell] = field(default_factory=list)
    first_mismatch: Mismatch | None = None
    problems: list[str] = field(default_factory=list)
    prompts: int = 0
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(cell.tokens for cell in self.cells)

    @property
    def mismatches(self) -> int:
        return sum(cell.mismatches for cell in self.cells)

    def to_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "mismatches": self.mismatches, **asdict(self)}


class _Run:
    """One text decoded another way than plainly, and compared."""

    def __init__(self, llm: LLM, cell: Cell, mode: Mode, costs: Costs, file: Path) -> None:
        self.llm, self.cell, self.mode, self.costs, self.file = llm, cell, mode, costs, file
        self.history: list[int] = []
        self.drafts: list[DraftStatistics] = []

    def compare(self, prompt: Prompt, expected: Sequence[tuple[list[int], Tensor]]) -> Mismatch | None:
        """Both turns against the tokens and rows of ``expected``; the first difference."""
        text = [t for ids, (answer, _) in zip(prompt.turns, expected, strict=True) for t in (*ids, *answer)]
        self.session = Session(self.llm, len(text), _FIRST_TOKENS)
        if self.mode.adversary is not None:
            propose = partial(ADVERSARIES[self.mode.adversary], self.llm.config.vocab_size, text)
            self.session.drafter = Adversary(propose)
        elif self.mode.length == 0:
            self.session.drafter = None
        self.cell.runs += 1
        found = None
        for ids, (tokens, rows) in zip(prompt.turns, expected, strict=True):
            wrong = self._turn(ids, tokens, rows)
            if wrong is not None:
                i, token, row = wrong
                at = len(self.history) - 1
                where = (self.cell.draft, self.cell.chunk, self.cell.resume, prompt.kind, len(prompt.turns[0]), at)
                found = Mismatch(*where, token, tokens[i], [] if row is None else row.tolist(), rows[i].tolist())
                self.cell.mismatches += 1
                break
        self.cell.accepted += sum(d.accepted for d in self.drafts)
        self.cell.rejected += sum(d.drafted + d.cut - d.accepted for d in self.drafts)
        return found

    def _turn(self, ids: Sequence[int], tokens: Sequence[int], rows: Tensor) -> tuple[int, int, Tensor | None] | None:
        """(index, token, its row if there is one) of the first difference in one turn; ``history`` then ends with that
        token."""
        self.history += ids
        sampler = Sampler(SamplingParams())
        logits = self._prefill().cpu()
        chosen: list[int] = [sampler.sample(logits, self.history)]
        from_rows: Sequence[Tensor | None] = [logits]
        speculation = self._speculation(sampler)
        i, resumed = 0, False
        while True:
            for token, row in zip(chosen, from_rows, strict=True):
                self.history.append(token)
                if token != tokens[i] or (row is not None and not torch.equal(row, rows[i])):
                    return i, token, row
                i += 1
            if not resumed and 2 * i >= len(tokens):
                resumed, undone = True, self._resume(i - 1)
                i -= undone
                speculation = self._speculation(sampler)
            if i == len(tokens):
                self.cell.tokens += i
                return None
            if self.mode.ahead:
                chosen = speculation.tokens(self.history, len(tokens) - i)
                from_rows = [None] * len(chosen)
            else:
                step = speculation.step(self.history, len(tokens) - i)
                chosen, from_rows = step.tokens, list(step.logits.cpu())

    def _speculation(self, sampler: Sampler) -> Speculation:
        make = decoding if self.mode.ahead else Speculation
        speculation = make(self.session, sampler, self.mode.length, self.costs)
        self.drafts.append(speculation.statistics)
        return speculation

    def _prefill(self) -> Tensor:
        """Process what is new in the history, the last tokens twice where the run is one with rewinds."""
        session, start = self.session, self.session.position
        size = self.cell.chunk or len(self.history)
        first = max(0, len(self.history) - start - MOST_CHUNKS * size)
        if first:
            session.prefill(self.history[start : start + first])
        logits = session.prefill(self.history[start + first :], chunk=size)
        if self.cell.resume == "rewound":
            session.rewind(min(session.undoable, session.position - start))
            logits = session.prefill(self.history[session.position :], chunk=size)
        return logits

    def _resume(self, n_decoded: int) -> int:
        """What happens in the middle of an answer; how many of the last chosen tokens it took back."""
        if self.cell.resume == "rewound":
            n = min(self.session.undoable, n_decoded)
            self.session.rewind(n)
            del self.history[len(self.history) - n :]
            return n
        if self.cell.resume == "restored":
            drafter, ctx = self.session.drafter, self.session.ctx
            self.session.save(self.file)
            self.session = self.llm.load_session(self.file, ctx)
            if self.mode.adversary is not None or self.mode.length == 0:  # not of the kind that a file keeps
                self.session.drafter = drafter
        return 0


def verify_one_answer(llm: LLM, tokens: int, progress: Callable[[int, int], None] | None = None) -> Report:
    """Compare at least ``tokens`` tokens over the matrix; ``progress(runs done, runs in all)``."""
    started, report, costs, ways = time.monotonic(), Report(), Costs(), modes(llm)
    report.prompts = max(1, min(len(LENGTHS) * len(KINDS), tokens // (len(ways) * _RUN_TOKENS)))
    n = max(4, -(-tokens // (len(ways) * report.prompts * 2)))
    cells: dict[tuple[str, int | None, str], Cell] = {}
    with tempfile.TemporaryDirectory(prefix="ds4-verify-") as folder:
        for i, prompt in enumerate(prompts(llm, report.prompts)):
            session = drafting_nothing(llm, sum(map(len, prompt.turns)) + 2 * n)
            first = plain_turn(session, prompt.turns[0], n)
            expected = [first, plain_turn(session, [first[0][-1], *prompt.turns[1]], n)]
            for j, mode in enumerate(ways):
                chunk, resume = CHUNKS[(i + j) % len(CHUNKS)], RESUMES[(i + i // len(LENGTHS) + j) % len(RESUMES)]
                cell = cells.setdefault((mode.name, chunk, resume), Cell(mode.name, chunk, resume))
                run = _Run(llm, cell, mode, costs, Path(folder) / "session.ds4")
                mismatch = run.compare(prompt, expected)
                report.first_mismatch = report.first_mismatch or mismatch
                if progress is not None:
                    progress(i * len(ways) + j + 1, report.prompts * len(ways))
    by_name = {mode.name: mode for mode in ways}
    report.cells = sorted(cells.values(), key=lambda c: (list(by_name).index(c.draft), RESUMES.index(c.resume)))
    report.problems = [problem for cell in report.cells for problem in _problems(cell, by_name[cell.draft])]
    report.seconds = time.monotonic() - started
    return report


def _problems(cell: Cell, mode: Mode) -> Iterator[str]:
    where = f"draft {cell.draft}, chunk {cell.chunk or 'whole'}, {cell.resume}"
    if cell.mismatches:
        yield f"{where}: {cell.mismatches} of {cell.runs} runs differ from plain decoding"
        return
    if mode.length != 0 and not cell.rejected:
        yield f"{where}: no draft was rejected, so it proves nothing"
    if mode.accepts and not cell.accepted:
        yield f"{where}: no draft was accepted, so it proves nothing"
