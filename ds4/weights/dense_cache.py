"""FP32 forms of packed weights for the torch references, in bounded memory.

Weights stay packed in the memory-mapped file. A matrix that is small in FP32 is decoded once and kept, the least
recently used ones going first when the budget is full. A larger one is decoded anew at every use, a few rows at a time,
and never exists as a whole: models with such matrices do not fit the budget anyway, and then decoding to tiles in the
CPU's cache costs a third of what making, storing and dropping a whole copy does (docs/experiments.md).

Which way a weight goes depends on its shape alone, so it is part of the definition of a product, like the order of its
sum: what was used before cannot change a bit of the result.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor

from ds4.weights.tensor import Matrix, empty

Weight = Matrix | Tensor
Weights = tuple[Weight, ...]
"""Matrices with the same input, stacked along their rows."""

BUDGET_BYTES = 1 << 30
"""Upper bound of the dense copies held at a time; one that is larger by itself is made, used and dropped."""

TILED_BYTES = 16 << 20
"""Packed matrices (or stacks of them) above this size in FP32 are decoded tile by tile.  V4-Flash's attention and
expert matrices are above it, the bundled model's largest matrix has 2 MiB."""

SPAN = 1 << 21
"""Weights of a large matrix that one thread decodes and multiplies at a time, in whole blocks of rows (``spans``)."""

_SPAN_ROWS = 128  # a multiple of the rows that share their scales in any format


class DenseCache:
    """Least-recently-used cache of dense FP32 matrices, keyed by the packed tensors they are stacked from.

    Several threads may use it. Two that want the same new copy at once both make it, which costs time and no more.
    """

    def __init__(self, budget_bytes: int = BUDGET_BYTES) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._making_bytes = 0
        self._entries: OrderedDict[Weights, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, weights: Weights) -> Tensor | None:
        """The copy, if it is there."""
        with self._lock:
            found = self._entries.get(weights)
            if found is not None:
                self._entries.move_to_end(weights)
            return found

    def make(self, weights: tuple[Matrix, ...], *, evict: bool = True) -> Tensor:
        """A new copy, kept if it fits the budget; without ``evict`` only if it does so beside those that are there."""
        size = dense_bytes(weights)
        with self._lock:
            keep = size <= self.budget_bytes - self._making_bytes - (0 if evict else self.used_bytes)
            # Room is made first, so that old copies and the new one together stay within the budget.
            while keep and self.used_bytes + self._making_bytes + size > self.budget_bytes:
                _, dropped = self._entries.popitem(last=False)
                self.used_bytes -= dropped.nbytes
                del dropped
            self._making_bytes += size if keep else 0
        made: Tensor | None = None
        try:
            made = _transposed(weights)
        finally:
            with self._lock:
                self._making_bytes -= size if keep else 0
                if keep and made is not None and weights not in self._entries:
                    self._entries[weights] = made
                    self.used_bytes += size
        return made


def dense_bytes(weights: Weights) -> int:
    """Bytes of the stack of weights in FP32."""
    return 4 * weights[0].shape[1] * sum(w.shape[0] for w in weights)


def _transposed(weights: tuple[Matrix, ...]) -> Tensor:
    """f32 ``[sum(out), in]`` whose memory is ``[in, sum(out)]``.

    Kept transposed: BLAS libraries stream a matrix-vector product over long rows better than over short ones.
    """
    n_cols = weights[0].shape[1]
    device = weights[0].device
    shape = (n_cols, sum(w.shape[0] for w in weights))
    made = empty(shape) if device.type == "cpu" else torch.empty(shape, device=device)
    start = 0
    for w in weights:
        for rows, tile in w.tiles():
            # The detour over a transposed tile is faster than a strided copy of the tile.
            made[:, start + rows.start : start + rows.stop] = tile.t().contiguous()
        start += w.shape[0]
    return made.t()


CACHE = DenseCache()


def dense(weights: Weights, *, evict: bool = True) -> Tensor | None:
    """f32 ``[sum(out), in]``, or None if the product with these weights goes tile by tile (``tiles``).

    Copies of packed weights are shared: never write to them. A single f32 tensor is returned as it is. ``evict``: as
    for ``DenseCache.make``. ValueError if some weights are packed and some are not.
    """
    found = CACHE.find(weights)
    if found is not None:
        return found
    packed = tuple(w for w in weights if not isinstance(w, Tensor))
    if len(packed) == len(weights):
        return None if dense_bytes(packed) > TILED_BYTES else CACHE.make(packed, evict=evict)
    if packed:
        raise ValueError("the weights of one product must be all packed or all torch tensors")
    plain = [w.to(torch.float32) for w in weights if isinstance(w, Tensor)]
    return plain[0] if len(plain) == 1 else torch.cat(plain)


def tiles(weights: Weights, first: int = 0, last: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Rows first..last-1 of a stack of packed weights, a few at a time: (rows, f32 ``[n, in]``).

    A tile is decoded when it is asked for. Where tiles begin depends on the shapes, ``first`` and ``last`` alone.
    """
    start = 0
    for w in weights:
        assert not isinstance(w, Tensor)
        end = start + w.shape[0]
        low, high = max(first, start), end if last is None else min(last, end)
        if low < high:
            for rows, tile in w.tiles(low - start, high - start):
                yield slice(start + rows.start, start + rows.stop), tile
        start = end


def spans(weights: Weights, first: int = 0, last: int | None = None) -> Iterator[tuple[int, int]]:
    """Rows first..last-1 of a stack of packed weights in parts for several threads, each worth calling ``tiles`` for.

    Where they begin depends on the shapes alone; on another device than the CPU there is only one.
    """
    n_rows = sum(w.shape[0] for w in weights)
    last = n_rows if last is None else last
    step = n_rows
    if weights[0].device.type == "cpu":
        step = max(1, SPAN // weights[0].shape[1] // _SPAN_ROWS) * _SPAN_ROWS
    for start in range(first, last, step):
        yield start, min(start + step, last)
