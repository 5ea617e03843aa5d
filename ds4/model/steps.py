"""The decode step as a list of kernel launches: what a GPU runs for every token, and the tests run on the CPU.

A list is made once for a model, a cache and a number of tokens. Its launches read the step's tokens and position from
device memory and lead from one to the next through tensors that were allocated when the list was made: running it needs
no allocation, no decision on the host and nothing of what the device computes (design.md, "The step lives on the
device"). The parts of the network append their launches themselves (``step`` methods in ds4/model).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ds4.errors import Ds4Error
from ds4.kernels.cases import Inputs, Outputs
from ds4.kernels.draft import words as at
from ds4.kernels.draft.op import ACCEPT
from ds4.kernels.entry import Backend, KernelCall
from ds4.kernels.packing import PlaneMatrix, Planes
from ds4.kernels.registry import Operation, results_of
from ds4.kv.cache import KVCache
from ds4.model.host_block import HostBlock
from ds4.weights.dense_cache import Weight

if TYPE_CHECKING:
    from ds4.model.transformer import Transformer

RATIO_TABLES = {4: 2, 128: 3}  # of embed's rotary tables, which belongs to the windows of this ratio


def planes_of(weight: Weight, formats: Sequence[str], where: str) -> Planes:
    """The planes of a matrix. Raises Ds4Error where the kernel ``where`` does not read its format."""
    assert isinstance(weight, PlaneMatrix), where
    if weight.format not in formats or weight.scale != 1.0:
        raise Ds4Error(
            f"tensor {weight.name} is stored as {weight.format}: the GPU kernel {where} reads {', '.join(formats)}; "
            "convert it (ds4 convert --dense) or use --device cpu"
        )
    return weight.planes


@dataclass(frozen=True)
class Part:
    """One operation of a step: in which layer (None before the first and after the last), its tensors and launches."""

    operation: Operation
    layer: int | None
    inputs: Inputs
    outputs: Outputs
    calls: Sequence[KernelCall]


class StepState:
    """The words that the launches of a session share on the device: ``words`` i32 [64] (ds4/kernels/draft/words.py).

    The host writes them before a step; launches that draft and accept go on from there without it.
    """

    def __init__(self, device: torch.device, n_words: int = at.WORDS) -> None:
        self.words = torch.zeros(n_words, dtype=torch.int32, device=device)
        self._host = HostBlock(self.words)

    def word(self, place: int, n: int = 1) -> Tensor:
        """i32 [n] of the words, a view."""
        return self.words[place : place + n]

    def write(self, pos: int, tokens: Sequence[int], *, last: int = 0, chain: int = 0) -> None:
        """The step's position and tokens; for a chained draft its pair's position and token."""
        words = [0] * (at.CHAIN + 1)
        words[at.POS], words[at.LAST], words[at.CHAIN] = pos, last, chain
        words[at.TOKENS : at.TOKENS + len(tokens)] = tokens
        self._host.send(words)


class StepBuilder:
    """Collects launches; results of equal operations and shapes share their memory.

    ``parts``: the operations in order. ``layer``: whose part is being added. ``state``: the session's words. ``pos``
    i32 [1]: position of the first token; ``tokens`` i32 [n_tok]: both are among the words, unless a list has its own.
    ``cis`` f32 [4, n_tok, rope / 2, 2]: rotary tables, made by the first operation (ds4/kernels/embed). Sharing is
    right because launches run in order and every result is used up before the next operation of the same kind: the next
    layer's, at the earliest.
    """

    def __init__(self, n_tok: int, state: StepState) -> None:
        self.n_tok = n_tok
        self.state = state
        self.pos = state.word(at.POS)
        self.tokens = state.word(at.TOKENS, n_tok)
        self.cis = torch.empty(0)
        self.parts: list[Part] = []
        self.layer: int | None = None
        self._made: dict[tuple, Outputs] = {}

    def add(self, operation: Operation, inputs: Inputs, into: Outputs | None = None) -> Outputs:
        """Append an operation's launches; its results, filled when they run.

        ``into``: tensors for results that outlive the next operation of the kind, instead of shared ones.
        """
        made = {name: t for name, t in operation.outputs(inputs).items() if name not in (into or {})}
        key = (operation.name, *((name, tuple(t.shape), t.dtype) for name, t in sorted(made.items())))
        outputs = {**self._made.setdefault(key, made), **(into or {})}
        self.parts.append(Part(operation, self.layer, inputs, outputs, operation.calls(inputs, outputs)))
        return results_of(operation, inputs, outputs)

    def last_row(self, pos: Tensor) -> StepBuilder:
        """The same list, to be gone on with for the last token alone; ``pos`` i32 [1] is its position."""
        s = copy.copy(self)
        s.n_tok, s.pos, s.tokens = 1, pos, torch.empty(0)
        s.cis = self.cis[:1, self.n_tok - 1 :]  # plain: of layers without a compressor, as others would need their own
        return s

    def workspace_bytes(self) -> int:
        """Bytes of all results and workspaces."""
        return sum(t.numel() * t.element_size() for outputs in self._made.values() for t in outputs.values())


class Tap(Protocol):
    """Keeps what layers make in a decode step, by launches of its own: a draft head is one (ds4/mtp).

    ``layers``  whose output streams it reads, ascending
    """

    layers: tuple[int, ...]

    def tap(self, s: StepBuilder, layer: int, streams: Tensor) -> None:
        """Append the launches that read a layer's output streams f32 ``[n_tok, m, d]``; the next ones change them."""


class DecodeStep:
    """The launches of one decode step of ``n_tok`` tokens (1 to 8) on a model and a cache, and those of a ``tap``.

    ``parts``  the operations in order; ``calls``  their launches
    ``logits`` f32 [n_tok, vocab], ``token`` i32 [n_tok] greedy choices, ``status`` i32 [n_tok] 1 where a logit is not
               finite: overwritten by every run
    Raises Ds4Error for a checkpoint whose formats or sizes have no kernels.
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        n_tok: int,
        state: StepState | None = None,
        tap: Tap | None = None,
    ) -> None:
        self.state = state or StepState(cache.device)
        builder = StepBuilder(n_tok, self.state)
        results = model.step(builder, cache, tap)
        self.n_tok = n_tok
        self.parts = tuple(builder.parts)
        self.calls = [call for part in self.parts for call in part.calls]
        self.logits, self.token, self.status = (results[name] for name in ("logits", "token", "status"))
        self.workspace_bytes = builder.workspace_bytes()

    @cached_property
    def accept(self) -> list[KernelCall]:
        """The launch that accepts the step's tokens but the first, a draft: greedily, into the session's words."""
        return ACCEPT.calls({"token": self.token, "status": self.status, "words": self.state.words}, {})

    def run(self, ids: Sequence[int], start: int, backend: Backend) -> None:
        """Process the tokens ``ids`` at positions ``start ..``; asynchronous where the backend is.

        Raises ValueError for another number of tokens than the step's.
        """
        if len(ids) != self.n_tok:
            raise ValueError(f"a step of {self.n_tok} tokens is given {len(ids)}")
        self.state.write(start, ids)
        backend.run(self.calls)


class Decoder:
    """Decode steps of one session through kernels; the list for each number of tokens is made when first used.

    ``state``  the words that all of them, and a draft head's, work on
    ``timed``  whether ``decode`` does more than run launches: then tokens are not drafted and verified in one go
    """

    timed = False

    def __init__(self, model: Transformer, cache: KVCache, backend: Backend) -> None:
        self.model, self.cache, self.backend = model, cache, backend
        self.state = StepState(cache.device)
        self._tap: Tap | None = None
        self._steps: dict[int, DecodeStep] = {}
        cache.holders.add(self)

    def forget(self) -> None:
        """Lists are made anew from now on."""
        self._steps.clear()

    def watch(self, tap: Tap | None) -> None:
        """From now on steps have the launches of this tap."""
        if tap is not self._tap:
            self._tap = tap
            self.forget()

    def step(self, n_tok: int) -> DecodeStep:
        """The launches of a step of ``n_tok`` tokens."""
        if n_tok not in self._steps:
            self._steps[n_tok] = DecodeStep(self.model, self.cache, n_tok, self.state, self._tap)
        return self._steps[n_tok]

    def decode(self, ids: Sequence[int], start: int) -> Tensor:
        """1 to 8 tokens at positions ``start ..`` -> logits f32 [n_tok, vocab], new, on the cache's device."""
        step = self.step(len(ids))
        step.run(ids, start, self.backend)
        return step.logits.clone()
