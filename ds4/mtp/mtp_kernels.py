"""Chained drafts of the MTP block through kernels: its lists of launches, and the drafter that runs them.

Pairs lie in the tail (ds4/mtp/tail.py), which the trunk's steps fill by a launch of their own, addressed by position.
A draft begins with the pairs whose rows are not in the block's ring yet, of which the last one goes through the whole
block; then one pair a token, made of the block's own streams and its own token. What is drafted joins the step's words,
so that a step that verifies it can follow without the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds4.kernels.draft.op import DRAFT_PUSH, DRAFT_TAP
from ds4.kernels.draft.words import CHAIN, LAST
from ds4.kernels.launch import DECODE_ROWS
from ds4.model.steps import Decoder, StepBuilder
from ds4.mtp.drafter import Chooser, Draft, check_history
from ds4.mtp.kernel_rows import DraftStep, KernelRows, calls_of
from ds4.mtp.mtp_block import MTPBlock, MTPDrafter
from ds4.mtp.rows import stage_cache
from ds4.mtp.tail import Tail
from ds4.sampling import Sampler


class KernelMTPDrafter(KernelRows, MTPDrafter):
    """Chained drafts of one session through kernels (a :class:`ds4.mtp.drafter.KernelDrafter`)."""

    def __init__(self, block: MTPBlock, decoder: Decoder) -> None:
        MTPDrafter.__init__(self, block)
        KernelRows.__init__(self, decoder)
        c, device = block.config, block.trunk.device
        self.caches = [stage_cache(c, block.trunk.formats(), device, decoded=False)]
        self.tail = Tail((c.hc_mult, c.hidden_size), 1, self._write, device, self._publish)
        self._z = torch.zeros(DECODE_ROWS, c.hc_mult, c.hidden_size, device=device)  # last row: the chain's streams
        self._first: dict[int, DraftStep] = {}
        self._chain: DraftStep | None = None

    def tap(self, s: StepBuilder, layer: int, streams: Tensor) -> None:
        """Append the launch that keeps the streams of ``layers`` in the tail."""
        s.add(DRAFT_TAP, {"streams": streams, **self._tail_inputs()})

    def _rows(self, s: StepBuilder, h: Tensor) -> None:
        self.block.rows_step(s, h, self._z[-len(h) :], self.caches[0])

    def _draft_step(self, s: StepBuilder, h: Tensor) -> DraftStep:
        made = self.block.step(s, h, self._z[-len(h) :], self.caches[0])
        calls = calls_of(s)
        s.add(DRAFT_PUSH, {"token": made["token"], "words": s.state.words})
        return DraftStep(calls, list(s.parts[-1].calls), made["logits"])

    def _begun(self, n: int) -> DraftStep:
        """The draft's first step, over the last ``n`` pairs."""
        if n not in self._first:
            self._first[n] = self._draft_step(*self._pairs(n))
        return self._first[n]

    def _chained(self) -> DraftStep:
        """A further step: the pair of the block's own streams and token."""
        if self._chain is None:
            s = StepBuilder(1, self._decoder.state)
            s.tokens, s.pos = s.state.word(CHAIN), s.state.word(LAST)
            self._chain = self._draft_step(s, self._z[-1:])
        return self._chain

    @torch.inference_mode()
    def draft_steps(self, k: int, n_pairs: int | None = None) -> list[DraftStep]:
        """See :class:`ds4.mtp.drafter.KernelDrafter`; ``k`` 1 to ``max_tokens``, ``position`` at least 1.

        n_pairs  rows written first, instead of those that are not yet. With k + 1 of them the same launches fit every
                 step that follows a draft of k, however much of it was accepted: rows written again are the same bits
        """
        return [self._begun(n_pairs or self.tail.n_unwritten()), *[self._chained()] * (k - 1)]

    @torch.inference_mode()
    def draft(self, history: Sequence[int], k: int, sampler: Sampler) -> Draft:
        """As the torch form does: the host chooses each token from the logits."""
        position = self.position
        check_history(history, position)
        k = min(k, self.max_tokens)
        if not position or k < 1:
            return Draft()
        chooser, state, backend = Chooser(sampler, history), self._decoder.state, self._decoder.backend
        step = self._begun(self.tail.n_unwritten())
        state.write(position, [int(history[-1])])
        backend.run(step.calls)
        self.tail.claim(int(history[-1]))
        while True:
            token = chooser.choose(step.logits[0].cpu())
            n = len(chooser.tokens)
            if n == k:
                return Draft(chooser.tokens, chooser.probs)
            step = self._chained()
            state.write(position, [], last=position - 1 + n, chain=token)
            backend.run(step.calls)
