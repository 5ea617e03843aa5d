"""What the decode loop knows about a draft head: :class:`Drafter`, and the row of tokens that one proposes.

A drafter belongs to one session. It reads the trunk's streams as an observer (ds4/model/transformer.py), keeps caches
of its own addressed by position, and proposes tokens. A rejection is a position set back, as in the trunk's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from ds4.kernels.entry import KernelCall
from ds4.kernels.launch import Launch
from ds4.kv.cache import LayerCache
from ds4.model.steps import Tap
from ds4.mtp.kernel_rows import DraftStep
from ds4.sampling import Sampler, draw, filtered_probs, uniform

DRAFT_STREAM = 2
"""Which of a position's random numbers draws its draft; 0 is the token's own, 1 that of the acceptance."""


@dataclass(frozen=True, eq=False)
class Draft:
    """Proposed tokens.

    tokens      in order; the first belongs behind the history that it was drafted from
    probs       f32 [vocab] for each token, the distribution it was drawn from; empty where nothing was drawn
    confidence  for each token the head's own guess whether it is accepted, a raw logit; empty where a head has none
    """

    tokens: list[int] = field(default_factory=list)
    probs: list[Tensor] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)


class Drafter(Protocol):
    """A draft head at work on one text.

    layers      trunk layers whose output streams it reads, ascending
    max_tokens  longest draft
    position    number of tokens observed
    caches      its state by stage, for those who count or store bytes
    """

    layers: tuple[int, ...]
    max_tokens: int
    caches: list[LayerCache]

    @property
    def position(self) -> int: ...

    def observe(self, launch: Launch, ids: Tensor, streams: Sequence[Tensor]) -> None:
        """The trunk has processed ``launch``, which continues at ``position``: tokens and streams of ``layers``.

        Every launch has to be shown, with drafts or without; tokens that turn out to be wrong are rewound later.
        ids      i64 [n_rows]           input tokens
        streams  f32 [n_rows, m, d]     for each of ``layers``, rows as the launch lays them out
        Error:   ValueError if the launch does not continue at ``position``.
        """

    def draft(self, history: Sequence[int], k: int, sampler: Sampler) -> Draft:
        """Up to ``k`` tokens behind ``history``, whose last token the trunk has not processed yet.

        history  ids of the whole text, ``position + 1`` of them; ValueError if there are more or fewer
        sampler  how the verifier will choose: drafts are chosen by the same parameters, with other random numbers
        """

    def rewind(self, position: int) -> None:
        """Only the first ``position`` tokens count; at most ``MAX_UNDONE`` (ds4/kv/spec.py) are undone, or all."""


@runtime_checkable
class KernelDrafter(Drafter, Tap, Protocol):
    """A draft head that works by kernels, beside a session's decode steps, which have the launches of ``tap``."""

    def begin(self, token: int) -> None:
        """A decode step is going to process up to 8 tokens from ``position`` on, the first of them ``token``."""

    def end(self, n: int) -> None:
        """It has processed ``n`` tokens."""

    def n_unwritten(self) -> int:
        """How many rows of the head are missing up to ``position``, 1 to 8; earlier ones are written first."""

    def draft_calls(self, k: int, n_pairs: int | None = None) -> list[KernelCall]:
        """Launches that draft ``k`` tokens greedily behind the step's first token, at the step's position: they join
        the step's tokens. To be run before anything else of this drafter.

        n_pairs  rows written first, those of the last positions; None: those that are missing now
        """

    def draft_steps(self, k: int, n_pairs: int | None = None) -> list[DraftStep]:
        """The launches of ``draft_calls`` token by token, for those who choose the tokens themselves."""

    def rows_calls(self, n_pairs: int) -> list[KernelCall]:
        """The launches of ``draft_calls`` that write rows, alone."""

    def drafted(self, token: int) -> None:
        """The launches of ``draft_calls`` or ``rows_calls`` have run behind ``token``."""


class Chooser:
    """Chooses the tokens of one draft in turn, as the verifier's sampler would choose them from these logits."""

    def __init__(self, sampler: Sampler, history: Sequence[int]) -> None:
        self.sampler = sampler
        self.history = list(history)
        self.tokens: list[int] = []
        self.probs: list[Tensor] = []

    def choose(self, logits: Tensor) -> int:
        """The next token, from its logits f32 ``[vocab]``. Raises Ds4Error where they are not finite."""
        params = self.sampler.params
        if params.temperature == 0:
            token = self.sampler.sample(logits, self.history)
        else:
            probs = filtered_probs(logits, params, self.history)
            token = draw(probs, uniform(self.sampler.seed, len(self.history), DRAFT_STREAM))
            self.probs.append(probs)
        self.history.append(token)
        self.tokens.append(token)
        return token


def check_history(history: Sequence[int], position: int) -> None:
    """Raise ValueError unless ``history`` is what was observed and one token more."""
    if len(history) != position + 1:
        raise ValueError(f"drafting after {position} tokens needs a history of {position + 1}, got {len(history)}")
