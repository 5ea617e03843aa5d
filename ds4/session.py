"""Session: one text in progress on a loaded model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ds4.errors import Ds4Error
from ds4.kernels.launch import DECODE_ROWS
from ds4.mtp.drafter import Draft
from ds4.profiling.environment import decoder_for, print_report
from ds4.sampling import Sampler

if TYPE_CHECKING:
    from ds4.engine import LLM

Progress = Callable[[int, int], None]
"""Called with (done, in all): tokens while a prompt is processed, bytes while weights are loaded."""


@contextmanager
def explained_memory(what: str) -> Iterator[None]:
    """Turns an allocation that failed on a GPU into a Ds4Error that says what it was for."""
    try:
        yield
    except torch.OutOfMemoryError:
        free, total = torch.cuda.mem_get_info()
        raise Ds4Error(
            f"device: no room for {what} ({free / 1e9:.1f} of {total / 1e9:.1f} GB of GPU memory free)"
        ) from None


@contextmanager
def one_thread() -> Iterator[None]:
    """For decode steps and drafts: matrix-vector products gain nothing from a second thread, small operations lose."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Session:
    """One text in progress: its tokens, its state, and where it stands.

    At temperature 0 the results do not depend on how the prompt was chunked, on how many tokens a decode step took, or
    on tokens that were undone: bit for bit (design.md, "Two forms").

    drafter  is shown every token and proposes the next ones; None where nothing is drafted. Another one can take its
             place while the session is empty.
    """

    def __init__(self, llm: LLM, ctx: int) -> None:
        self.llm = llm
        self.drafter = llm.new_drafter()
        self.ctx = ctx
        self.ids: list[int] = []
        with explained_memory(f"a context of {ctx} tokens; choose a smaller --ctx"):
            self.cache = llm.model.new_cache(ctx, decoded=llm.backend is None)
        self._decoder = decoder_for(llm.model, self.cache, llm.backend) if llm.backend is not None else None
        self._highest = 0

    @property
    def position(self) -> int:
        """Number of tokens processed."""
        return len(self.ids)

    def _check(self, ids: Sequence[int]) -> list[int]:
        ids = [int(i) for i in ids]
        if not ids:
            raise ValueError("no tokens given")
        vocab = self.llm.config.vocab_size
        bad = next((i for i in ids if not 0 <= i < vocab), None)
        if bad is not None:
            raise Ds4Error(f"token id {bad} is outside the vocabulary of {vocab}")
        if self.position + len(ids) > self.ctx:
            raise Ds4Error(
                f"ctx: {self.position + len(ids)} tokens do not fit the context of {self.ctx}; "
                "shorten the prompt or raise --ctx"
            )
        return ids

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int], chunk: int | None = None, progress: Progress | None = None) -> Tensor:
        """Process prompt tokens in the prefill form; logits f32 ``[vocab]`` of the last one.

        ``chunk`` tokens at a time (None: all at once); the result does not depend on it. Raises Ds4Error when the
        tokens do not fit the context. Broken off (Ctrl-C, an error in ``progress``), it leaves the session empty.
        """
        ids = self._check(ids)
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        step = chunk or len(ids)
        logits = torch.empty(0)
        try:
            for i in range(0, len(ids), step):
                part = ids[i : i + step]
                on_tile = partial(_report, progress, i, len(ids)) if progress else None
                logits = self.llm.model.prefill(part, self.position, self.cache, on_tile=on_tile, observer=self.drafter)
                self.ids += part
        except BaseException:  # rings have lost what the old position needs; position 0 needs nothing of them
            self.ids.clear()
            self._highest = 0
            self._drafter_back()
            raise
        self._highest = max(self._highest, self.position)
        if progress is not None:
            progress(len(ids), len(ids))
        return logits

    @torch.inference_mode()
    def decode(self, ids: Sequence[int]) -> Tensor:
        """Process 1 to 8 tokens in the decode form; logits f32 ``[n, vocab]``, a row a token."""
        ids = self._check(ids)
        if len(ids) > DECODE_ROWS:
            raise ValueError(f"a decode step takes at most {DECODE_ROWS} tokens, got {len(ids)}")
        self._highest = max(self._highest, self.position + len(ids))  # rows are there even if it is broken off
        if self._decoder is not None:
            logits = self._decoder.decode(ids, self.position)
        else:
            try:
                with one_thread():
                    logits = self.llm.model.decode(ids, self.position, self.cache, self.drafter)
            except BaseException:
                self._drafter_back()
                raise
        self.ids += ids
        return logits

    def _drafter_back(self) -> None:
        """The drafter may have been shown tokens of a step that then failed."""
        if self.drafter is not None and self.drafter.position > self.position:
            self.drafter.rewind(self.position)

    def draft(self, history: Sequence[int], k: int, sampler: Sampler) -> Draft:
        """Up to ``k`` proposed tokens behind ``history``, which is ``ids`` and one token more; none without a drafter.

        ``sampler`` is the one that will choose (ds4/mtp/drafter.py).
        """
        if self.drafter is None or k < 1:
            return Draft()
        with one_thread():
            return self.drafter.draft(history, k, sampler)

    def print_profile(self) -> None:
        """The table that DS4_PROFILE asks for (ds4.profiling.environment), on standard error; nothing without it."""
        print_report(self._decoder, self.llm.checkpoint)

    @property
    def undoable(self) -> int:
        """How many tokens ``rewind`` can undo now."""
        return min(self.cache.max_draft - (self._highest - self.position), self.position)

    def rewind(self, n: int) -> None:
        """Undo the last ``n`` tokens, at most so that the furthest token ever processed is ``max_draft`` ahead.

        Tokens that were undone count as processed: their rows have taken the place of older ones. Raises ValueError.
        """
        if not 0 <= n <= self.undoable:
            raise ValueError(f"can undo at most {self.undoable} more tokens here, asked for {n}")
        if n:
            del self.ids[-n:]
            if self.drafter is not None:
                self.drafter.rewind(self.position)

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write the session to a file for ``LLM.load_session``; bytes written (ds4/store.py). Raises Ds4Error."""
        from ds4 import store  # and safetensors with it: only where a session is saved

        return store.save(self, path)


def _report(progress: Progress, before: int, total: int, done: int) -> None:
    progress(before + done, total)
