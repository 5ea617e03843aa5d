"""Bytes that the operations of a decode step have to move, counted from their tensors and the position.

Source:  spec kernels.md a.2, a.3; the bytes of a row and of a key are those of the cache's tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ds4.kernels.packing import PACKINGS
from ds4.kv.cache import KVCache, LayerCache
from ds4.model.steps import Part
from ds4.model.transformer import Transformer

_STEP = ("pos", "tokens")  # the step's own words
_ROUTED = {"moe_up": ("w1_", "w3_"), "moe_down": ("w2_",)}  # prefixes of the arenas among the inputs


def expected_distinct(n_experts: int, top_k: int, n_tok: int) -> float:
    """Distinct experts of ``n_tok`` tokens that choose ``top_k`` of ``n_experts`` each, independently and evenly.

    E (1 - (1 - k / E)^n): exact for one token, and more than neighbouring tokens of a text use.
    Source: spec kernels.md a.2.
    """
    return n_experts * (1 - (1 - top_k / n_experts) ** n_tok)


@dataclass(frozen=True)
class Traffic:
    """Bytes of one operation.

    fixed        weights read whatever is routed
    expert       weights of one routed expert; ``n_experts`` of them lie there
    cache        rows, keys and compressor state read and written
    activations  results written, and earlier results read; workspaces are left out, they stay in the L2 cache
    """

    fixed: float
    expert: float
    n_experts: int
    cache: float
    activations: float

    def weights(self, distinct: float) -> float:
        """Weight bytes where this many distinct experts are chosen."""
        return self.fixed + distinct * self.expert


@dataclass(frozen=True)
class Where:
    """A step of ``n_tok`` tokens whose first one is at ``position``."""

    n_tok: int
    position: int

    @property
    def end(self) -> int:
        return self.position + self.n_tok

    def closed(self, ratio: int) -> int:
        """Windows of the compressor that the step closes."""
        return self.end // ratio - self.position // ratio


def part_traffic(model: Transformer, cache: KVCache, parts: Sequence[Part], where: Where) -> Iterator[Traffic]:
    """The traffic of every operation of a step, in order."""
    cached = {_memory(t) for layer in cache.layers for t in _tensors(vars(layer))}
    produced: set[int] = set()
    top_k = model.config.num_experts_per_tok
    for part in parts:
        given = {_memory(t) for t in _tensors(part.inputs)}
        n_experts = len(model.blocks[part.layer].moe.experts) if part.layer is not None else 1
        distinct = expected_distinct(n_experts, top_k, where.n_tok)
        fixed = expert = activations = 0.0
        for name, tensor in part.inputs.items():
            if not isinstance(tensor, Tensor) or name in _STEP or _memory(tensor) in cached:
                continue
            if _memory(tensor) in produced:
                activations += _visible(part, name, tensor, where)
            elif name.startswith(_ROUTED.get(part.operation.name, ("\0",))):
                expert += tensor.nbytes / n_experts
            else:
                fixed += tensor.nbytes * _share(part, name, tensor, where.n_tok, distinct)
        results = part.operation.outputs(part.inputs)
        for name, tensor in results.items():
            if name not in part.operation.workspaces:
                activations += _visible(part, name, tensor, where)
        moved = _cache_bytes(part, cache.layers[part.layer], model, where) if part.layer is not None else 0
        yield Traffic(fixed, expert, n_experts, moved, activations)
        produced |= {_memory(t) for call in part.calls for t in call.args.tensors} - given


def _tensors(values: dict[str, Any]) -> Iterator[Tensor]:
    return (value for value in values.values() if isinstance(value, Tensor))


def _memory(tensor: Tensor) -> int:
    """What tells the memory of one tensor from another's; views share it, and meta tensors have it too."""
    return tensor.untyped_storage()._cdata


def _share(part: Part, name: str, tensor: Tensor, n_tok: int, distinct: float) -> float:
    """The part of a weight that is read: whole matrices, but single rows of what is looked up by token or expert."""
    operation = part.operation.name
    looked_up = operation == "embed" and name in {plane.name for plane in PACKINGS[part.inputs["format"]].planes}
    if looked_up or name == "tid2eid":
        return min(1.0, n_tok / tensor.shape[0])
    if operation == "route" and name == "gate" and part.inputs["tid2eid"] is not None:
        return distinct / tensor.shape[0]
    return 1.0


def _visible(part: Part, name: str, tensor: Tensor, where: Where) -> float:
    """Bytes of an activation; of the indexer's scores, which are as long as the context may get, those that exist."""
    if name != "scores":
        return tensor.nbytes
    return min(tensor.nbytes, where.n_tok * _scored(part, where) * tensor.element_size())


def _scored(part: Part, where: Where) -> int:
    """Keys that the indexer scores: all visible ones, or none where all of them are selected anyway."""
    n_keys = where.end // 4
    return n_keys if n_keys > part.inputs["top_k"] else 0


def _cache_bytes(part: Part, layer: LayerCache, model: Transformer, where: Where) -> float:
    count = _CACHE.get(part.operation.name)
    return count(part, layer, model, where) if count else 0


def _published(_part: Part, layer: LayerCache, _model: Transformer, where: Where) -> float:
    """Rows and states of the tokens written; the states of every window that they close read, its entry written."""
    spec = layer.spec
    moved = where.n_tok * layer.formats.row.row_bytes
    for state, entries in ((layer.state, layer.pool), (layer.key_state, layer.keys)):
        if state is None or entries is None:
            continue
        width = state.shape[2] * spec.ratio // spec.lookback  # of overlapping windows each row gives one half
        moved += where.n_tok * state[0].nbytes
        moved += where.closed(spec.ratio) * (spec.lookback * 2 * width * 4 + entries.shape[1])
    return moved


def _attended(part: Part, layer: LayerCache, model: Transformer, where: Where) -> float:
    """Rows of the windows once for all tokens; of the pool all visible ones once, or those that each token selected."""
    window = model.config.sliding_window
    rows = min(where.end, window + where.n_tok - 1)
    if layer.pool is not None:
        visible = where.end // layer.spec.ratio
        selected = part.inputs["selected"]
        rows += visible if selected is None else min(visible, where.n_tok * min(visible, selected.shape[1]))
    return rows * layer.formats.row.row_bytes


def _keys(part: Part, layer: LayerCache, _model: Transformer, where: Where) -> float:
    return _scored(part, where) * layer.formats.key.row_bytes


_CACHE: dict[str, Callable[[Part, LayerCache, Transformer, Where], float]] = {
    **{f"kv_publish_{kind}": _published for kind in ("swa", "csa", "hca")},
    "attn_decode": _attended,
    "index_score": _keys,
}
