"""DS4_PROFILE: a table of times at the end of every ``generate`` on a GPU, without a change of the program.

``DS4_PROFILE=moe`` prints the experts' table, ``DS4_PROFILE=step`` that of all operations. Operations run one by one
then, so the generation itself is slower than its figures.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from ds4.errors import Ds4Error
from ds4.kernels import bandwidth
from ds4.kernels.cuda_backend import CudaBackend
from ds4.kernels.entry import Backend
from ds4.kv.cache import KVCache
from ds4.model.steps import Decoder
from ds4.model.transformer import Transformer
from ds4.profiling.clock import Clock, CudaClock
from ds4.profiling.measure import WARM_UP, Recording, StepTimer, moe_record, profile_record
from ds4.profiling.plan import plan_step
from ds4.weights.checkpoint import Checkpoint

VARIABLE = "DS4_PROFILE"
RECORDS = {"moe": moe_record, "step": profile_record}


class ProfiledDecoder(Decoder):
    """A Decoder that times the operations of every step; the first WARM_UP steps of each n_tok do not count."""

    timed = True

    def __init__(self, model: Transformer, cache: KVCache, backend: Backend, clock: Clock, kind: str) -> None:
        super().__init__(model, cache, backend)
        self.kind = kind
        self._clock = clock
        self._timers: dict[int, StepTimer] = {}
        self._found: dict[int, Recording] = {}
        self._runs: dict[int, int] = {}
        self._positions: dict[int, int] = {}

    def forget(self) -> None:
        super().forget()
        self._timers.clear()

    def decode(self, ids: Sequence[int], start: int) -> Tensor:
        """As Decoder's, and timed."""
        n_tok = len(ids)
        step = self.step(n_tok)
        if n_tok not in self._timers:
            self._timers[n_tok] = StepTimer(step, self.backend, self._clock)
        found = self._found.setdefault(n_tok, Recording(n_tok))
        self._runs[n_tok] = self._runs.get(n_tok, 0) + 1
        self._positions[n_tok] = start
        self._timers[n_tok].run(ids, start, found if self._runs[n_tok] > WARM_UP else None)
        return step.logits.clone()

    def report(self, checkpoint: Checkpoint, copy_gb_s: float) -> str:
        """The tables of all n_tok that ran more than WARM_UP steps since the last report, which starts anew."""
        from ds4.profiling import tables  # and rich with it: only where a table is printed

        record, text = RECORDS[self.kind], {"moe": tables.moe_text, "step": tables.profile_text}[self.kind]
        texts = []
        for n_tok, found in sorted(self._found.items()):
            if found.parts:
                plan = plan_step(self.model, self.cache, self.step(n_tok), checkpoint, self._positions[n_tok])
                texts.append(text(record(found, plan, copy_gb_s)))
        self._found.clear()
        self._runs.clear()
        return "\n\n".join(texts) or f"{VARIABLE}: fewer than {WARM_UP + 1} decode steps, nothing to report"


def wanted() -> str | None:
    """The value of DS4_PROFILE, None where it is not set. Raises Ds4Error for one that means nothing."""
    kind = os.environ.get(VARIABLE)
    if kind and kind not in RECORDS:
        raise Ds4Error(f"{VARIABLE}: {kind!r} is not one of {', '.join(RECORDS)}")
    return kind or None


def decoder_for(model: Transformer, cache: KVCache, backend: Backend) -> Decoder:
    """The decoder of a session: one that times its steps where DS4_PROFILE asks for it."""
    kind = wanted()
    return Decoder(model, cache, backend) if kind is None else ProfiledDecoder(model, cache, backend, CudaClock(), kind)


def print_report(decoder: Decoder | None, checkpoint: Checkpoint) -> None:
    """The report of a decoder that ``decoder_for`` made to time its steps, on standard error; nothing of others."""
    if isinstance(decoder, ProfiledDecoder):
        print(decoder.report(checkpoint, copy_gb_s(decoder.backend, decoder.cache.device)), file=sys.stderr)


def copy_gb_s(backend: Backend, device: torch.device) -> float:
    """The copy bandwidth of the GPU, measured now."""
    assert isinstance(backend, CudaBackend)
    return bandwidth.measure(backend, device)["copy_gb_s"]
