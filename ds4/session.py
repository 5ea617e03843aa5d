"""Session: one text in progress on a loaded model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ds4.errors import Ds4Error
from ds4.graph.loop import DeviceLoop, Outcome
from ds4.kernels.launch import DECODE_ROWS, Launch
from ds4.kernels.threads import one_thread
from ds4.kv.cache import FIRST_TOKENS
from ds4.model.prefill_pass import Prefiller
from ds4.model.steps import Decoder
from ds4.mtp.drafter import Draft, Drafter, KernelDrafter
from ds4.profiling.environment import decoder_for, print_report
from ds4.sampling import NOT_FINITE, Sampler, SamplingParams

if TYPE_CHECKING:
    from ds4.engine import LLM

Progress = Callable[[int, int], None]
"""Called with (done, in all): tokens while a prompt is processed, bytes while weights are loaded."""

_GREEDY = Sampler(SamplingParams(seed=0))


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


class Session:
    """One text in progress: its tokens, its state, and where it stands.

    At temperature 0 the results do not depend on how the prompt was chunked, on how many tokens a decode step took, or
    on tokens that were undone: bit for bit (design.md, "Two forms").

    drafter  is shown every token and proposes the next ones; None where nothing is drafted. Another one can take its
             place while the session is empty.
    first    tokens that there is room for at first (None: FIRST_TOKENS); no result depends on it
    """

    def __init__(self, llm: LLM, ctx: int, first: int | None = None) -> None:
        self.llm = llm
        self.ctx = ctx
        self.ids: list[int] = []
        with explained_memory(f"a context of {ctx} tokens; choose a smaller --ctx"):
            first = FIRST_TOKENS if first is None else first
            self.cache = llm.model.new_cache(ctx, first=first, decoded=llm.backend is None)
        self._decoder: Decoder | None = None
        self._prefiller: Prefiller | None = None
        if llm.backend is not None:
            self._decoder = decoder_for(llm.model, self.cache, llm.backend)
            self._prefiller = Prefiller(llm.model, self.cache, llm.backend)
        self._highest = 0
        self.drafter = llm.new_drafter(self._decoder)

    @property
    def drafter(self) -> Drafter | None:
        return self._drafter

    @drafter.setter
    def drafter(self, drafter: Drafter | None) -> None:
        self._drafter = drafter
        self._kernel_drafter: KernelDrafter | None = None
        self._loop: DeviceLoop | None = None
        if self._decoder is not None:
            if isinstance(drafter, KernelDrafter):
                self._kernel_drafter = drafter
            elif drafter is not None and drafter.layers:
                raise ValueError("a drafter that reads streams has to work by kernels here")
            self._decoder.watch(self._kernel_drafter)

    @property
    def position(self) -> int:
        """Number of tokens processed."""
        return len(self.ids)

    def _check(self, ids: Sequence[int]) -> list[int]:
        """The tokens that come next, with room for them made in the cache. Raises Ds4Error, and nothing has changed."""
        ids = [int(i) for i in ids]
        if not ids:
            raise ValueError("no tokens given")
        vocab = self.llm.config.vocab_size
        bad = next((i for i in ids if not 0 <= i < vocab), None)
        if bad is not None:
            raise Ds4Error(f"token id {bad} is outside the vocabulary of {vocab}")
        wanted, most = self.position + len(ids), self.llm.config.max_position_embeddings
        if wanted > self.ctx:
            missing = self.llm.session_bytes(wanted) - self.llm.session_bytes(self.ctx)
            more = f" or use --ctx {wanted}, which takes {missing:,} bytes more" if wanted <= most else ""
            raise Ds4Error(f"ctx: {wanted} tokens do not fit the context of {self.ctx}; shorten the prompt{more}")
        self.cache.reserve(wanted)
        return ids

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int], chunk: int | None = None, progress: Progress | None = None) -> Tensor:
        """Process prompt tokens in the prefill form; logits f32 ``[vocab]`` of the last one.

        ``chunk`` tokens at a time (None: all at once); the result does not depend on it. ``progress`` is told often, in
        tokens' worth of work. Raises Ds4Error when the tokens do not fit the context. Broken off (Ctrl-C, an error in
        ``progress``), it leaves a session of the tokens that were finished by then, which goes on as any other.
        """
        ids = self._check(ids)
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        step = chunk or len(ids)
        logits = torch.empty(0)
        try:
            for i in range(0, len(ids), step):
                logits = self._prefill(
                    ids[i : i + step],
                    taken=self.ids,
                    progress=partial(_report, progress, i, len(ids)) if progress else None,
                    observer=self.drafter,
                )
        except BaseException:
            if self.drafter is not None and self.drafter.position != self.position:
                self._forget()  # it was interrupted itself, and its rings have lost what the old position needs
            raise
        finally:
            self._highest = max(self._highest, self.position)
        if progress is not None:
            progress(len(ids), len(ids))
        return logits

    def _prefill(self, ids: Sequence[int], **options: Any) -> Tensor:
        """``Transformer.prefill`` from here on, by kernels where there are some."""
        if self._prefiller is None:
            return self.llm.model.prefill(ids, self.position, self.cache, **options)
        return self._prefiller.prefill(ids, self.position, **options)

    @torch.inference_mode()
    def rows(self, ids: Sequence[int]) -> Tensor:
        """The logits f32 ``[n, vocab]`` of every token of a text that an empty session begins with."""
        logits = self._prefill(self._check(ids), all_logits=True, taken=self.ids, observer=self.drafter)
        self._highest = self.position
        return logits

    def _forget(self) -> None:
        """Back to an empty session."""
        self.ids.clear()
        self._highest = 0
        self._drafter_back()

    @torch.inference_mode()
    def decode(self, ids: Sequence[int]) -> Tensor:
        """Process 1 to 8 tokens in the decode form; logits f32 ``[n, vocab]``, a row a token."""
        ids = self._check(ids)
        if len(ids) > DECODE_ROWS:
            raise ValueError(f"a decode step takes at most {DECODE_ROWS} tokens, got {len(ids)}")
        self._highest = max(self._highest, self.position + len(ids))  # rows are there even if it is broken off
        if self._decoder is not None:
            logits = self._decode_by_kernels(self._decoder, ids)
        else:
            try:
                with one_thread():
                    logits = self.llm.model.decode(ids, self.position, self.cache, self.drafter)
            except BaseException:
                self._drafter_back()
                raise
        self.ids += ids
        return logits

    def _decode_by_kernels(self, decoder: Decoder, ids: Sequence[int]) -> Tensor:
        if self._kernel_drafter is None:
            logits = decoder.decode(ids, self.position)
            if self.drafter is not None:  # reads no streams
                launch = Launch.decode_step(self.position, len(ids))
                rows = torch.zeros(launch.n_rows, dtype=torch.int64)
                rows[list(launch.rows)] = torch.tensor(ids)
                self.drafter.observe(launch, rows, [])
            return logits
        self._kernel_drafter.begin(ids[0])
        logits = decoder.decode(ids, self.position)
        self._kernel_drafter.end(len(ids))
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

    def loop(self, sampler: Sampler, *, drawing: bool = False) -> DeviceLoop | None:
        """The device's own loop over this session (ds4/ahead.py); None where there is none that chooses as this sampler
        does, or that drafts as this session's drafter: it does not look at the text.

        drawing  also for a sampler that draws; else for a greedy one, which :meth:`speculate` wants
        """
        params = sampler.params
        alike = params.repetition_penalty == 1 and (drawing or params.temperature == 0)
        if self._decoder is None or self._decoder.timed or self.drafter is not self._kernel_drafter or not alike:
            return None
        if self._loop is None:
            self._loop = DeviceLoop(self._decoder, self._kernel_drafter)
        return self._loop

    def reach(self, position: int) -> None:
        """The loop is going to process tokens up to ``position`` at most. Raises Ds4Error where there is no room."""
        self.cache.reserve(min(position, self.ctx))
        self._highest = max(self._highest, position)

    def take(self, token: int, loop: DeviceLoop) -> Outcome:
        """What the loop's oldest step chose behind ``token``; all of it but the last token is processed then.

        Raises Ds4Error where the logits that decided are not finite. Broken off, it leaves the session where it was.
        """
        try:
            outcome = loop.take()
            if not outcome.finite:
                raise Ds4Error(NOT_FINITE)
        except BaseException:
            self._drafter_back()
            raise
        self.ids += [token, *outcome.tokens[:-1]]
        return outcome

    @torch.inference_mode()
    def speculate(self, token: int, k: int) -> tuple[list[int], Tensor]:
        """Draft ``k`` tokens behind ``token``, verify and accept them greedily, all of it on the device.

        token    the next one, not processed yet
        k        0 to 7; 0 where no token is processed, or there is no draft head
        returns  1 to k + 1 tokens, of which the session has then processed all but the last, and the rows
                 f32 [n, vocab] that they were chosen from, on the device
        Raises Ds4Error where a logit that is needed is not finite, ValueError for a session that has no :meth:`loop`.
        """
        loop = self.loop(_GREEDY)
        if loop is None:
            raise ValueError("the session does not decode by kernels")
        (token,) = self._check([token])
        self.reach(self.position + k + 1)
        loop.start(self.position, token)
        loop.launch(k)
        outcome = self.take(token, loop)
        return outcome.tokens, loop.rows(outcome)

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
