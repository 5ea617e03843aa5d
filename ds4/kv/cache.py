"""The state of one session: per layer a window ring, compressed rows, indexer keys and compressor rings.

Everything is addressed by absolute position (position p in slot ``p % slots``, entry e in row e); nothing shifts and
nothing is cleared. Undoing tokens therefore means a smaller position and nothing else (design.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from ds4.config import ModelConfig
from ds4.kv.ring import ring_read, ring_write
from ds4.kv.spec import MAX_DRAFT, LayerSpec, RowFormats, layer_spec


class LayerCache:
    """State of one layer. Tensors that the layer's kind does not have are None.

    ring u8 ``[window + max_draft, row_bytes]``; pool u8 ``[ctx / ratio, row_bytes]``; keys u8 ``[ctx / 4, key_bytes]``;
    state / key_state f32 ``[slots, 2, width]``: the compressors' raw (kv, score + ape) per token. ``ring_f32`` is the
    ring decoded, or None: a torch decode step would otherwise decode 128 rows to add one. Kernels write ``ring`` only,
    so a cache that they write to has none.
    """

    def __init__(
        self, spec: LayerSpec, formats: RowFormats, ctx: int, *, device: torch.device | str, decoded: bool
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
            n_entries = ctx // spec.ratio
            # Not cleared: entries are read only once they are written, and pages are not touched before that.
            self.pool = torch.empty(n_entries, formats.row.row_bytes, dtype=torch.uint8, device=device)
            self.state = torch.zeros(spec.state_slots, 2, spec.state_width, device=device)
            if spec.has_index:
                self.keys = torch.empty(n_entries, formats.key.row_bytes, dtype=torch.uint8, device=device)
                self.key_state = torch.zeros(spec.state_slots, 2, spec.key_state_width, device=device)

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


class KVCache:
    """All layers' state for up to ``ctx`` tokens on ``device``. ``decoded``: keep each ring in FP32 as well."""

    def __init__(
        self,
        config: ModelConfig,
        formats: RowFormats,
        ctx: int,
        *,
        max_draft: int = MAX_DRAFT,
        device: torch.device | str = "cpu",
        decoded: bool = True,
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.ctx = ctx
        self.max_draft = max_draft
        self.layers = [
            LayerCache(layer_spec(config, ratio, max_draft), formats, ctx, device=device, decoded=decoded)
            for ratio in config.compress_ratios
        ]

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
