"""FP32 copies of packed weights for the torch references, bounded in memory.

Weights stay packed in the memory-mapped file; a reference asks for the dense form and gets it from here. The least
recently used copies go first when the budget is full.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from ds4.weights.tensor import PackedTensor, empty

Weight = PackedTensor | Tensor

BUDGET_BYTES = 2 << 30
"""Upper bound of the dense copies held at a time; a single larger tensor is made, used and dropped."""


class DenseCache:
    """Least-recently-used cache of dense FP32 tensors, keyed by the packed tensors they were made from."""

    def __init__(self, budget_bytes: int = BUDGET_BYTES) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._entries: OrderedDict[object, Tensor] = OrderedDict()

    def get(self, key: PackedTensor | tuple[PackedTensor, ...]) -> Tensor:
        """Dense f32 of one packed matrix, or of several stacked along their rows."""
        found = self._entries.get(key)
        if found is not None:
            self._entries.move_to_end(key)
            return found
        weights = key if isinstance(key, tuple) else (key,)
        made = _transposed(weights)
        size = made.numel() * made.element_size()
        if size <= self.budget_bytes:
            while self.used_bytes + size > self.budget_bytes:
                _, dropped = self._entries.popitem(last=False)
                self.used_bytes -= dropped.numel() * dropped.element_size()
            self._entries[key] = made
            self.used_bytes += size
        return made


def _transposed(weights: tuple[PackedTensor, ...]) -> Tensor:
    """f32 ``[sum(out), in]`` whose memory is ``[in, sum(out)]``.

    Kept transposed: BLAS libraries stream a matrix-vector product over long rows better than over short ones.
    """
    n_cols = weights[0].shape[1]
    first = weights[0].data
    shape = (n_cols, sum(w.shape[0] for w in weights))
    made = empty(shape) if first.device.type == "cpu" else torch.empty(shape, device=first.device)
    start = 0
    for w in weights:
        for rows, tile in w.tiles():
            # The detour over a transposed tile is faster than a strided copy of the tile.
            made[:, start + rows.start : start + rows.stop] = tile.t().contiguous()
        start += w.shape[0]
    return made.t()


CACHE = DenseCache()


def dense(w: Weight) -> Tensor:
    """f32 ``[out, in]`` of a packed weight; a torch tensor is returned as it is."""
    return w if isinstance(w, Tensor) else CACHE.get(w)


def dense_concat(weights: tuple[Weight, ...]) -> Tensor:
    """f32 ``[sum(out), in]`` of several weights with the same input, stacked along their rows."""
    if len(weights) == 1:
        return dense(weights[0])
    packed = tuple(w for w in weights if isinstance(w, PackedTensor))
    if len(packed) == len(weights):
        return CACHE.get(packed)
    return torch.cat([dense(w) for w in weights])
