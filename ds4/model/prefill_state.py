"""What the launches of a prompt's pass share: their words on the device, and the memory of their results."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from ds4.config import ModelConfig
from ds4.kernels.draft import words as at
from ds4.kv.cache import KVCache
from ds4.model.steps import StepBuilder, StepState

SCORES_BYTES = 1 << 27
"""Of the indexer's scores of the tokens that are chosen for at a time."""
_MIN_SCORED = 8


def scored_rows(n_rows: int, n_entries: int) -> int:
    """Tokens whose scores of ``n_entries`` entries take SCORES_BYTES: a power of two times 8, at most ``n_rows``."""
    rows = n_rows
    while rows > _MIN_SCORED and 4 * rows * n_entries > SCORES_BYTES:
        rows //= 2
    return rows


class PassState(StepState):
    """The words of a pass of up to ``n_rows`` tokens: position, tokens, their number, positions of parts of them.

    All begin on 16 bytes, as kernels want their pointers. The place of the first two is that of a decode step's.
    """

    def __init__(self, device: torch.device, n_rows: int, part_rows: int) -> None:
        self.n_rows, self.part_rows = n_rows, part_rows
        self._count = at.TOKENS + n_rows
        super().__init__(device, self._count + 4 * (1 + n_rows // part_rows))

    @property
    def count(self) -> Tensor:
        """i32 [1]: how many tokens there are."""
        return self.word(self._count)

    @property
    def starts(self) -> list[Tensor]:
        """i32 [1] each: the position of every ``part_rows``-th token."""
        return [self.word(self._count + 4 * (1 + i)) for i in range(self.n_rows // self.part_rows)]

    def begin(self, pos: int, tokens: Sequence[int], count: int | None = None) -> None:
        """``count``: another number than that of ``tokens``, which are then the first of them or none."""
        n_parts = self.n_rows // self.part_rows
        words = [pos, 0, 0, 0, *tokens, *[0] * (self.n_rows - len(tokens) + 4 * (1 + n_parts))]
        words[self._count] = len(tokens) if count is None else count
        words[self._count + 4 :: 4] = [pos + i * self.part_rows for i in range(n_parts)]
        self._host.send(words)


class PassBuilder(StepBuilder):
    """Collects the launches of a pass; ``n_tok`` is its capacity, ``count`` i32 [1] how many of them there are.

    ``score_rows``, ``starts``  tokens that the indexer chooses for at a time, and the words with their first positions
    ``marks``  for each layer that is done the number of operations behind which its output streams are complete
    """

    def __init__(self, config: ModelConfig, cache: KVCache, n_rows: int) -> None:
        entries = [layer.keys.shape[0] for layer in cache.layers if layer.keys is not None]
        self.score_rows = scored_rows(n_rows, max(entries, default=1))
        self.pass_state = PassState(cache.device, n_rows, self.score_rows)
        super().__init__(n_rows, self.pass_state)
        self.count, self.starts = self.pass_state.count, self.pass_state.starts
        self.marks: dict[int, int] = {}
        slots = config.num_experts_per_tok + 1
        queries = config.num_attention_heads * config.head_dim
        widths = {"wide": max(queries, slots * config.hidden_size)}
        widths["narrow"] = max(queries, slots * config.moe_intermediate_size)
        self._regions = {
            name: torch.empty(n_rows * n, dtype=torch.bfloat16, device=cache.device) for name, n in widths.items()
        }
        self._kept: dict[str, Tensor] = {}

    def region(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A result in one of two regions, ``wide`` and ``narrow``, each of which has one result at a time: queries and
        then the experts' outputs; what attention makes and then the experts' inputs of the down projections."""
        region = self._regions[name]
        assert dtype == region.dtype
        n = torch.Size(shape).numel()
        return region[:n].view(*shape)

    def kept(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of a name that all layers share."""
        if name not in self._kept:
            self._kept[name] = torch.empty(*shape, dtype=dtype, device=self.pos.device)
        assert self._kept[name].shape == torch.Size(shape)
        return self._kept[name]

    def resolved(self) -> None:
        """The streams of the layer in front of this one are complete in memory."""
        if self.layer:
            self.marks[self.layer - 1] = len(self.parts)

    def beside(self, n_tok: int) -> PassBuilder:
        """An empty list that shares the memory of this one."""
        s = copy.copy(self)
        s.n_tok, s.parts = n_tok, []
        return s

    def workspace_bytes(self) -> int:
        own = [*self._regions.values(), *self._kept.values()]
        return super().workspace_bytes() + sum(t.numel() * t.element_size() for t in own)
