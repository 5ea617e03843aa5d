"""Rings addressed by absolute position: position p lies in slot ``p % slots`` (spec model.md 3.2, 6.4)."""

from __future__ import annotations

import torch
from torch import Tensor


def ring_write(ring: Tensor, start: int, values: Tensor) -> None:
    """Store ``values`` ``[n, ...]`` of positions ``start ..`` in ``ring`` ``[slots, ...]``; only the last fit."""
    slots = ring.shape[0]
    n = values.shape[0]
    keep = min(n, slots)
    first = start + n - keep
    if keep == 1:
        ring[first % slots] = values[-1]
        return
    split = min(keep, slots - first % slots)
    ring[first % slots : first % slots + split] = values[n - keep : n - keep + split]
    if split < keep:
        ring[: keep - split] = values[n - keep + split :]


def ring_read(ring: Tensor, start: int, end: int) -> Tensor:
    """Rows of positions ``start .. end - 1``, in order; at most ``slots`` of them."""
    slots = ring.shape[0]
    if end - start > slots:
        raise ValueError(f"a ring of {slots} slots cannot hold positions {start} to {end - 1}")
    first = start % slots
    if first + end - start <= slots:
        return ring[first : first + end - start]
    return torch.cat((ring[first:], ring[: (end - start) - (slots - first)]))
