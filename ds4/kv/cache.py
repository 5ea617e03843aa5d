"""The state of one session: per layer a window ring, compressed rows, indexer keys and compressor rings.

Everything is addressed by absolute position (position p in slot ``p % slots``, entry e in row e); nothing shifts and
nothing is cleared. Undoing tokens therefore means a smaller position and nothing else (design.md). Rings are as long as
they will ever be; pools and keys grow with the text, in steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from ds4.config import ModelConfig
from ds4.errors import Ds4Error
from ds4.kv.ring import ring_read, ring_write
from ds4.kv.spec import MAX_UNDONE, LayerSpec, RowFormats, layer_spec, pool_bytes_per_token

FIRST_TOKENS = 8192
"""Of a text that has just begun: what a session has room for at first."""


class LayerCache:
    """State of one layer. Tensors that the layer's kind does not have are None.

    ring u8 ``[window + max_draft, row_bytes]``; pool u8 ``[n_tokens / ratio, row_bytes]`` and keys u8 ``[n_tokens / 4,
    key_bytes]`` for as many tokens as there is room for now; state / key_state f32 ``[slots, 2, width]``: the
    compressors' raw (kv, score + ape) per token. ``ring_f32`` is the ring decoded, or None: a torch decode step would
    otherwise decode 128 rows to add one. Kernels write ``ring`` only, so a cache that they write to has none.
    """

    def __init__(
        self, spec: LayerSpec, formats: RowFormats, n_tokens: int, *, device: torch.device | str, decoded: bool
    ) -> None:
        self.spec = spec
        self.formats = formats
        self.ring = torch.zeros(spec.ring_slots, formats.row.row_bytes, dtype=torch.uint8, device=device)
        self.ring_f32 = torch.zeros(spec.ring_slots, formats.row.width, device=device) if decoded else None
        self.pool: Tensor | None = None
        self.state: Tensor | None = None
        self.keys: Tensor | None = None
        self.key_state: Tensor | None = None
        if spec.ratio:
            n_entries = n_tokens // spec.ratio
            # Not cleared: entries are read only once they are written, and pages are not touched before that.
            self.pool = torch.empty(n_entries, formats.row.row_bytes, dtype=torch.uint8, device=device)
            self.state = torch.zeros(spec.state_slots, 2, spec.state_width, device=device)
            if spec.has_index:
                self.keys = torch.empty(n_entries, formats.key.row_bytes, dtype=torch.uint8, device=device)
                self.key_state = torch.zeros(spec.state_slots, 2, spec.key_state_width, device=device)

    def resize(self, n_tokens: int) -> None:
        """Pool and keys in new memory, with room for ``n_tokens`` and the entries that fit. One after the other, so
        that only one of them is there twice at a time."""
        if self.pool is not None:
            self.pool = _resized(self.pool, n_tokens // self.spec.ratio)
        if self.keys is not None:
            self.keys = _resized(self.keys, n_tokens // self.spec.ratio)

    def cut(self, n_tokens: int) -> None:
        """Pool and keys with room for ``n_tokens``, fewer than now, where they are."""
        if self.pool is not None:
            self.pool = self.pool[: n_tokens // self.spec.ratio]
        if self.keys is not None:
            self.keys = self.keys[: n_tokens // self.spec.ratio]

    def publish(self, kv: Tensor, start: int) -> Tensor:
        """Store rows f32 ``[n, width]`` of positions ``start ..`` in the ring; returns them as stored (rounded)."""
        packed, stored = self.packed(kv)
        self.write(packed, stored, start)
        return stored

    def packed(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Rows f32 ``[n, width]`` as the ring holds them: u8 ``[n, row_bytes]``, and decoded again."""
        packed = self.formats.row.pack(kv)
        return packed, self.formats.row.unpack(packed)

    def write(self, packed: Tensor, stored: Tensor, start: int) -> None:
        """Put what ``packed`` gave into the ring, from position ``start`` on."""
        ring_write(self.ring, start, packed)
        if self.ring_f32 is not None:
            ring_write(self.ring_f32, start, stored)

    def window(self, start: int, end: int) -> Tensor:
        """Rows of positions ``start .. end - 1``, f32 ``[n, width]``."""
        if self.ring_f32 is not None:
            return ring_read(self.ring_f32, start, end)
        return self.formats.row.unpack(ring_read(self.ring, start, end))

    def live(self, position: int, window: int) -> dict[str, Tensor]:
        """What the next token can see when ``position`` tokens have been processed, in order of position.

        Two sessions whose live state is equal byte for byte continue identically; stale slots are not part of it.
        """
        spec = self.spec
        out = {"ring": _last(self.ring, position, min(position, window))}
        if self.pool is not None and self.state is not None:
            n_entries = position // spec.ratio
            back = min(position, spec.lookback)
            out["pool"] = self.pool[:n_entries]
            out["state"] = _last(self.state, position, back)
            if self.keys is not None and self.key_state is not None:
                out["keys"] = self.keys[:n_entries]
                out["key_state"] = _last(self.key_state, position, back)
        return out

    def rings(self) -> list[Tensor]:
        """The tensors in which new positions take the place of old ones."""
        return [t for t in (self.ring, self.ring_f32, self.state, self.key_state) if t is not None]

    def nbytes(self) -> int:
        tensors = (self.ring, self.pool, self.state, self.keys, self.key_state)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _last(ring: Tensor, position: int, n: int) -> Tensor:
    slots = torch.arange(position - n, position, device=ring.device) % ring.shape[0]
    return ring[slots]


def _resized(old: Tensor, n: int) -> Tensor:
    with torch.inference_mode(False):  # as the first one: to be written to anywhere
        new = torch.empty(n, old.shape[1], dtype=old.dtype, device=old.device)
    kept = min(n, old.shape[0])
    new[:kept] = old[:kept]
    return new


class Holder(Protocol):
    """Has launches that point into a cache."""

    def forget(self) -> None:
        """Drop them: pools are going to be elsewhere."""


class KVCache:
    """All layers' state for up to ``ctx`` tokens on ``device``. ``decoded``: keep each ring in FP32 as well.

    capacity  tokens that pools have room for now: ``first`` to begin with (None: ``ctx``), more by :meth:`reserve`
    holders   are told to forget their launches before pools move; held weakly
    """

    def __init__(
        self,
        config: ModelConfig,
        formats: RowFormats,
        ctx: int,
        *,
        first: int | None = None,
        max_draft: int = MAX_UNDONE,
        device: torch.device | str = "cpu",
        decoded: bool = True,
    ) -> None:
        self.config = config
        self.formats = formats
        self.device = torch.device(device)
        self.ctx = ctx
        self.capacity = ctx if first is None else min(first, ctx)
        self.max_draft = max_draft
        self.holders: WeakSet[Holder] = WeakSet()
        self.layers = [
            LayerCache(layer_spec(config, ratio, max_draft), formats, self.capacity, device=device, decoded=decoded)
            for ratio in config.compress_ratios
        ]

    def reserve(self, n_tokens: int) -> bool:
        """Make room for ``n_tokens`` before the last of them is processed; whether tensors changed.

        The capacity doubles as often as it has to, up to ``ctx``. Layers grow one after the other: what is there twice
        meanwhile is one pool, half as large as its plan at most. Raises ValueError beyond ``ctx``, Ds4Error where there
        is no memory; the cache is then as it was.
        """
        if n_tokens <= self.capacity:
            return False
        if n_tokens > self.ctx:
            raise ValueError(f"a cache for {self.ctx} tokens is to hold {n_tokens}")
        capacity = self.capacity
        while capacity < n_tokens:
            capacity *= 2
        for holder in list(self.holders):  # first, as launches keep the tensors alive that they point to
            holder.forget()
        self._grow(min(capacity, self.ctx))
        return True

    def _grow(self, capacity: int) -> None:
        begun: list[LayerCache] = []
        try:
            for layer in self.layers:
                begun.append(layer)
                layer.resize(capacity)
        except BaseException as error:
            for layer in begun:
                layer.cut(self.capacity)
            for layer in begun:
                with suppress(RuntimeError):  # no room to give back what the cut left over: at the next growth
                    layer.resize(self.capacity)
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            more = pool_bytes_per_token(self.config, self.formats) * (capacity - self.capacity)
            raise Ds4Error(
                f"ctx: no memory for more than {self.capacity} tokens of context; the next {capacity - self.capacity} "
                f"take {int(more):,} bytes: free some, or end this text here"
            ) from None
        else:
            self.capacity = capacity
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # graphs are the driver's, which has no use for what torch keeps

    def live(self, position: int) -> dict[str, Tensor]:
        """Live state of every layer, keyed ``layers.N.<part>``; see :meth:`LayerCache.live`."""
        window = self.config.sliding_window
        return {f"layers.{i}.{k}": v for i, c in enumerate(self.layers) for k, v in c.live(position, window).items()}

    @contextmanager
    def undone_if(self, unfinished: Callable[[], bool]) -> Iterator[None]:
        """If what is done within it is broken off, by an error or Ctrl-C, and ``unfinished()``, then the next token
        sees what it would have seen before: rings are put back. Pools need not be: entries of later positions are read
        only once they are written again."""
        rings = [ring for layer in self.layers for ring in layer.rings()]
        before = [ring.clone() for ring in rings]
        try:
            yield
        except BaseException:
            while unfinished():
                with suppress(KeyboardInterrupt):  # pressed again: begin again
                    for ring, kept in zip(rings, before, strict=True):
                        ring.copy_(kept)
                    break
            raise

    def nbytes(self) -> int:
        return sum(layer.nbytes() for layer in self.layers)
