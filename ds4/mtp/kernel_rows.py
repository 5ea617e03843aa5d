"""What drafters that work by kernels share: rows of their caches, written from the tail by lists of launches.

What a head starts from lies in the tail (ds4/mtp/tail.py), which the trunk's steps fill by a launch of their own,
addressed by position. The rows that are missing up to a position are written when a draft is wanted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ds4.kernels.draft.op import DRAFT_PAIRS
from ds4.kernels.draft.words import PAIR
from ds4.kernels.entry import KernelCall
from ds4.kv.cache import LayerCache
from ds4.model.steps import Decoder, StepBuilder
from ds4.mtp.tail import Tail


@dataclass(frozen=True, eq=False)
class DraftStep:
    """Launches that draft one token: ``calls``, which make ``logits`` f32 [1, vocab] and choose greedily; ``push``, by
    which what they chose joins the step's."""

    calls: list[KernelCall]
    push: list[KernelCall]
    logits: Tensor


class KernelRows(ABC):
    """A part of a :class:`ds4.mtp.drafter.KernelDrafter`; the rest makes ``tail``, adds ``_rows``, ``draft_steps``."""

    tail: Tail
    caches: list[LayerCache]

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._fill: dict[int, list[KernelCall]] = {}

    def begin(self, token: int) -> None:
        self.tail.begin(self.tail.position, token)

    def end(self, n: int) -> None:
        self.tail.position += n

    @property
    def n_needed(self) -> int:
        """Of a prompt: its rings hold no more (a :class:`ds4.model.prefill_pass.LastTokens`)."""
        return max(cache.ring.shape[0] for cache in self.caches)

    def skip(self, position: int) -> None:
        if position > self.tail.position:
            self.tail.skip(position)

    def n_unwritten(self) -> int:
        return self.tail.n_unwritten()

    def drafted(self, token: int) -> None:
        self.tail.claim(token)

    @abstractmethod
    def draft_steps(self, k: int, n_pairs: int | None = None) -> list[DraftStep]:
        """See :class:`ds4.mtp.drafter.KernelDrafter`."""

    def draft_calls(self, k: int, n_pairs: int | None = None) -> list[KernelCall]:
        return [call for step in self.draft_steps(k, n_pairs) for call in (*step.calls, *step.push)]

    def _tail_inputs(self) -> dict[str, Tensor]:
        return {"words": self._decoder.state.words, "tail": self.tail.streams, "ids": self.tail.ids}

    def _pairs(self, n: int) -> tuple[StepBuilder, Tensor]:
        """A list begun with the launch that takes the tail's last ``n`` rows and tokens; the rows f32 [n, ...]."""
        s = StepBuilder(n, self._decoder.state)
        made = s.add(DRAFT_PAIRS, {**self._tail_inputs(), "n_pairs": n})
        s.tokens, s.pos = made["tokens"], s.state.word(PAIR)
        return s, made["h"]

    @abstractmethod
    def _rows(self, s: StepBuilder, h: Tensor) -> None:
        """Append the launches that store the rows of what ``_pairs`` took."""

    def _publish(self, first: int, end: int) -> None:
        """Store the rows of positions ``first .. end - 1``."""
        self._decoder.state.write(end, [int(self.tail.ids[end % len(self.tail.ids)])])
        self._decoder.backend.run(self.rows_calls(end - first))

    @torch.inference_mode()
    def rows_calls(self, n_pairs: int) -> list[KernelCall]:
        if n_pairs not in self._fill:
            s, h = self._pairs(n_pairs)
            self._rows(s, h)
            self._fill[n_pairs] = calls_of(s)
        return self._fill[n_pairs]


def calls_of(s: StepBuilder) -> list[KernelCall]:
    """All launches of a list."""
    return [call for part in s.parts for call in part.calls]
