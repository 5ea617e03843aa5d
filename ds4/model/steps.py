"""The decode step as a list of kernel launches: what a GPU runs for every token, and the tests run on the CPU.

A list is made once for a model, a cache and a number of tokens. Its launches read the step's tokens and position from
device memory and lead from one to the next through tensors that were allocated when the list was made: running it needs
no allocation, no decision on the host and nothing of what the device computes (design.md, "The step lives on the
device"). The parts of the network append their launches themselves (``step`` methods in ds4/model).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ds4.errors import Ds4Error
from ds4.kernels.cases import Inputs, Outputs
from ds4.kernels.entry import Backend, KernelCall
from ds4.kernels.packing import PlaneMatrix, Planes
from ds4.kernels.registry import Operation, results_of
from ds4.kv.cache import KVCache
from ds4.weights.dense_cache import Weight

if TYPE_CHECKING:
    from ds4.model.transformer import Transformer

_POS, _TOKENS, _WORDS = 0, 4, 16  # places in the step's block of i32: kernels want their pointers on 16 bytes
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


class StepBuilder:
    """Collects launches; results of equal operations and shapes share their memory.

    ``parts``: the operations in order. ``layer``: whose part is being added. ``pos`` i32 [1]: position of the first
    token; ``tokens`` i32 [n_tok]; ``cis`` f32 [4, n_tok, rope / 2, 2]: rotary tables, made by the first operation
    (ds4/kernels/embed). Sharing is right because launches run in order and every result is used up before the next
    operation of the same kind: the next layer's, at the earliest.
    """

    def __init__(self, n_tok: int, device: torch.device) -> None:
        self.n_tok = n_tok
        self.device = device
        self.block = torch.zeros(_WORDS, dtype=torch.int32, device=device)
        self.pos = self.block[_POS : _POS + 1]
        self.tokens = self.block[_TOKENS : _TOKENS + n_tok]
        self.cis = torch.empty(0)
        self.parts: list[Part] = []
        self.layer: int | None = None
        self._made: dict[tuple, Outputs] = {}

    def add(self, operation: Operation, inputs: Inputs) -> Outputs:
        """Append an operation's launches; its results, filled when they run."""
        made = operation.outputs(inputs)
        key = (operation.name, *((name, tuple(t.shape), t.dtype) for name, t in sorted(made.items())))
        outputs = self._made.setdefault(key, made)
        self.parts.append(Part(operation, self.layer, inputs, outputs, operation.calls(inputs, outputs)))
        return results_of(operation, inputs, outputs)

    def workspace_bytes(self) -> int:
        """Bytes of all results and workspaces."""
        return sum(t.numel() * t.element_size() for outputs in self._made.values() for t in outputs.values())


class DecodeStep:
    """The launches of one decode step of ``n_tok`` tokens (1 to 8) on a model and a cache.

    ``parts``  the operations in order; ``calls``  their launches
    ``logits`` f32 [n_tok, vocab], ``token`` i32 [n_tok] greedy choices, ``status`` i32 [n_tok] 1 where a logit is not
               finite: overwritten by every run
    Raises Ds4Error for a checkpoint whose formats or sizes have no kernels.
    """

    def __init__(self, model: Transformer, cache: KVCache, n_tok: int) -> None:
        builder = StepBuilder(n_tok, cache.device)
        results = model.step(builder, cache)
        self.n_tok = n_tok
        self.parts = tuple(builder.parts)
        self.calls = [call for part in self.parts for call in part.calls]
        self.logits, self.token, self.status = (results[name] for name in ("logits", "token", "status"))
        self.workspace_bytes = builder.workspace_bytes()
        self._block = builder.block

    def run(self, ids: Sequence[int], start: int, backend: Backend) -> None:
        """Process the tokens ``ids`` at positions ``start ..``; asynchronous where the backend is."""
        words = torch.zeros(_WORDS, dtype=torch.int32)
        words[_POS] = start
        words[_TOKENS : _TOKENS + self.n_tok] = torch.tensor(list(ids), dtype=torch.int32)
        self._block.copy_(words)
        backend.run(self.calls)


class Decoder:
    """Decode steps of one session through kernels; the list for each number of tokens is made when first used."""

    def __init__(self, model: Transformer, cache: KVCache, backend: Backend) -> None:
        self.model, self.cache, self.backend = model, cache, backend
        self._steps: dict[int, DecodeStep] = {}

    def step(self, n_tok: int) -> DecodeStep:
        """The launches of a step of ``n_tok`` tokens."""
        if n_tok not in self._steps:
            self._steps[n_tok] = DecodeStep(self.model, self.cache, n_tok)
        return self._steps[n_tok]

    def decode(self, ids: Sequence[int], start: int) -> Tensor:
        """1 to 8 tokens at positions ``start ..`` -> logits f32 [n_tok, vocab], new, on the cache's device."""
        step = self.step(len(ids))
        step.run(ids, start, self.backend)
        return step.logits.clone()
