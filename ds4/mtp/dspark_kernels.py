"""Block drafts of the DSpark head through kernels: its lists of launches, and the drafter that runs them.

Three lists follow each other: the context rows that are missing, from the tail (ds4/mtp/kernel_rows.py); the block
through the stages; and for each token its row's logits, biased by the token before it. What is drafted joins the step's
words, so that a step that verifies it can follow without the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from ds4.errors import Ds4Error
from ds4.kernels.draft.op import DRAFT_MEAN, DRAFT_PUSH
from ds4.kernels.entry import KernelCall
from ds4.kernels.launch import DECODE_ROWS
from ds4.model.steps import Decoder, StepBuilder
from ds4.mtp.drafter import Chooser, Draft, check_history
from ds4.mtp.dspark import DSpark, DSparkDrafter
from ds4.mtp.kernel_rows import DraftStep, KernelRows, calls_of
from ds4.mtp.rows import stage_cache
from ds4.mtp.tail import Tail
from ds4.sampling import Sampler


class KernelDSparkDrafter(KernelRows, DSparkDrafter):
    """Block drafts of one session through kernels (a :class:`ds4.mtp.drafter.KernelDrafter`).

    Raises Ds4Error for a block of more than 8 tokens. Confidence is the host's: drafts by ``draft_calls`` have none.
    """

    def __init__(self, dspark: DSpark, decoder: Decoder) -> None:
        DSparkDrafter.__init__(self, dspark)
        KernelRows.__init__(self, decoder)
        if dspark.block_size > DECODE_ROWS:
            raise Ds4Error(
                f"draft: a DSpark block of {dspark.block_size} tokens has no kernels, which take {DECODE_ROWS} at "
                "most; use --draft off, or --device cpu"
            )
        trunk = dspark.trunk
        self.caches = [stage_cache(dspark.config, trunk.formats(), trunk.device, decoded=False) for _ in dspark.stages]
        self.tail = Tail(self.tail.streams.shape[1:], 0, self._write, trunk.device, self._publish)
        self._chosen: dict[int, DraftStep] = {}

    def tap(self, s: StepBuilder, layer: int, streams: Tensor) -> None:
        """Append the launches that keep the means over streams of one of ``layers`` in the tail."""
        c = self.dspark.config
        for i, tapped in enumerate(c.dspark_target_layer_ids):
            if tapped == layer:
                s.add(DRAFT_MEAN, {"streams": streams, **self._tail_inputs(), "first": i * c.hidden_size})

    def _rows(self, s: StepBuilder, h: Tensor) -> None:
        self.dspark.rows_step(s, h, self.caches)

    @cached_property
    def _block(self) -> tuple[list[KernelCall], Tensor, Tensor]:
        """The block's launches; its streams f32 [b, m, d] and logits f32 [b, vocab], without bias."""
        s = StepBuilder(self.dspark.block_size, self._decoder.state)
        streams, logits = self.dspark.block_step(s, self.caches)
        return calls_of(s), streams, logits

    def _token(self, i: int) -> DraftStep:
        """The step that chooses token ``i`` of a block."""
        if i not in self._chosen:
            s = StepBuilder(1, self._decoder.state)
            made = self.dspark.choose_step(s, self._block[2][i : i + 1])
            calls = calls_of(s)
            s.add(DRAFT_PUSH, {"token": made["token"], "words": s.state.words})
            self._chosen[i] = DraftStep(calls, list(s.parts[-1].calls), made["biased"])
        return self._chosen[i]

    @torch.inference_mode()
    def draft_steps(self, k: int, n_pairs: int | None = None) -> list[DraftStep]:
        """See :class:`ds4.mtp.drafter.KernelDrafter`; ``k`` 1 to ``max_tokens``, ``position`` at least 1."""
        first, *others = (self._token(i) for i in range(k))
        calls = [*self.rows_calls(n_pairs or self.tail.n_unwritten()), *self._block[0], *first.calls]
        return [replace(first, calls=calls), *others]

    @torch.inference_mode()
    def draft(self, history: Sequence[int], k: int, sampler: Sampler) -> Draft:
        """As the torch form does: the host chooses each token from the logits, and has the confidence computed."""
        position, token = self.position, int(history[-1])
        check_history(history, position)
        k = min(k, self.max_tokens)
        if not position or k < 1:
            return Draft()
        chooser, state, backend = Chooser(sampler, history), self._decoder.state, self._decoder.backend
        head, confidence = self.dspark, []
        block, streams, _ = self._block
        rows = self.rows_calls(self.tail.n_unwritten())
        state.write(position, [token])
        backend.run([*rows, *block])
        self.tail.claim(token)
        with head.trunk.on_device():
            hidden = head.collapse(streams)
            for i in range(k):
                if i:
                    state.write(position, [], chain=token)
                step = self._token(i)
                backend.run(step.calls)
                confidence.append(head.confident(hidden[i], head.markov(token)))
                token = chooser.choose(step.logits[0].cpu())
        return Draft(chooser.tokens, chooser.probs, confidence)
