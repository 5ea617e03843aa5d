"""Compressors: pooling windows of tokens into entries (spec model.md 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ds4.config import ModelConfig
from ds4.kernels.common import rope_angles
from ds4.kernels.kv_publish import finish_entry, pool_csa, pool_hca
from ds4.kernels.threads import each
from ds4.kv.cache import LayerCache
from ds4.kv.ring import ring_read, ring_write
from ds4.model.context import Context
from ds4.model.params import Params, small


class Compressor:
    """One compressor: CSA (ratio 4, overlapping windows) or HCA, for KV rows or, with ``indexer``, for keys.

    Its projections are part of the layer's ``proj_in``; here are the position bias, the pooling and the norm.
    """

    def __init__(
        self, config: ModelConfig, params: Params, prefix: str, ratio: int, width: int, *, indexer: bool
    ) -> None:
        self.ratio = ratio
        self.width = width
        self.overlap = ratio == 4
        self.before = ratio if self.overlap else 0  # rows that a window needs of the one in front of it
        self.indexer = indexer
        self.eps = config.rms_norm_eps
        out = width * (2 if self.overlap else 1)
        self.wkv = params.expect(f"{prefix}.wkv.weight", (out, config.hidden_size))
        self.wgate = params.expect(f"{prefix}.wgate.weight", (out, config.hidden_size))
        self.ape = small(params, f"{prefix}.ape", (ratio, out))
        self.norm = small(params, f"{prefix}.norm.weight", (width,))

    def _entries(self, pooled: Tensor, first_entry: int, ctx: Context) -> Tensor:
        positions = torch.arange(first_entry, first_entry + pooled.shape[0]) * self.ratio
        cis = rope_angles(positions, ctx.rope.compressed)
        return finish_entry(pooled, self.norm, cis, self.eps, ctx.numerics, indexer=self.indexer)

    def _pool(self, kv: Tensor, score: Tensor, first_entry: int) -> Tensor:
        return pool_csa(kv, score, first_entry) if self.overlap else pool_hca(kv, score, self.ratio)

    def prefill(
        self, kv: Sequence[Tensor], gate: Sequence[Tensor], ctxs: Sequence[Context], cache: LayerCache | None
    ) -> Tensor:
        """Entries f32 ``[n_entries, width]`` up to the end of successive tiles, as they are stored, from the tiles' raw
        rows f32 ``[n_rows, out]`` each. The tiles' own are added to the cache; where there is none yet there are zeros.

        Without a cache (training): those of the only tile, as they are.
        """
        if cache is None:
            score = gate[0] + self.ape[ctxs[0].launch.pos % self.ratio]
            return self._tile_entries(F.pad(torch.stack((kv[0], score)), (0, 0, self.before, 0)), 0, ctxs[0])
        formats = cache.formats
        pool, state, form = (
            (cache.keys, cache.key_state, formats.key) if self.indexer else (cache.pool, cache.state, formats.row)
        )
        assert pool is not None
        assert state is not None
        first = ctxs[0].launch
        raw = self._raw_rows(kv, gate, ctxs, state)
        out = kv[0].new_zeros(ctxs[-1].launch.tile_end // self.ratio, self.width)
        known = first.start // self.ratio
        out[:known] = form.unpack(pool[:known])

        def add(ctx: Context) -> None:
            at = slice(ctx.launch.start // self.ratio, ctx.launch.end // self.ratio)
            before = ctx.launch.tile_start // self.ratio
            entries = self._tile_entries(raw, first.tile_start, ctx)
            pool[at] = form.pack(entries[at.start - before : at.stop - before])
            out[at] = form.unpack(pool[at])

        each(add, ctxs)
        return out

    def _tile_entries(self, raw: Tensor, origin: int, ctx: Context) -> Tensor:
        """Entries of one tile f32 ``[n_rows / ratio, width]`` from ``_raw_rows``, whose first tile starts at
        ``origin``; only those closed by a token of this call are meaningful."""
        launch = ctx.launch
        at = launch.tile_start - origin
        values, scores = raw[:, at : at + self.before + launch.n_rows]
        first_entry = launch.tile_start // self.ratio
        return self._entries(self._pool(values, scores, first_entry), first_entry, ctx)

    def _raw_rows(self, kv: Sequence[Tensor], gate: Sequence[Tensor], ctxs: Sequence[Context], state: Tensor) -> Tensor:
        """Values and scores f32 ``[2, before + n, out]`` of tiles with ``n`` rows in all and of the rows in front.

        Rows before the first token come from ``state``, to which the tokens' own rows are added. Where there is no
        token there are zeros.
        """
        first, end = ctxs[0].launch, ctxs[-1].launch.end
        rows = kv[0].new_empty(2, self.before + ctxs[-1].launch.tile_end - first.tile_start, kv[0].shape[1])
        offset = self.before - first.tile_start
        rows[:, : first.start + offset] = 0
        rows[:, end + offset :] = 0
        needed = max(0, first.start // self.ratio * self.ratio - self.before)
        if needed < first.start:
            past = ring_read(state, needed, first.start)
            rows[:, needed + offset : first.start + offset] = past.transpose(0, 1)

        def fill(kv: Tensor, gate: Tensor, ctx: Context) -> None:
            live, at = ctx.launch.row_slice, slice(ctx.launch.start + offset, ctx.launch.end + offset)
            rows[0, at] = kv[live]
            torch.add(gate[live], self.ape[ctx.launch.pos[live] % self.ratio], out=rows[1, at])

        each(fill, kv, gate, ctxs)
        kept = max(first.start, end - state.shape[0])
        ring_write(state, kept, rows[:, kept + offset : end + offset].transpose(0, 1))
        return rows

    def decode(self, kv: Tensor, gate: Tensor, ctx: Context, state: Tensor) -> list[tuple[int, Tensor]]:
        """Append the call's tokens to ``state``; (index, entry f32 ``[1, width]``) of every window they close."""
        launch = ctx.launch
        score = gate + self.ape[launch.pos % self.ratio]
        for i, row in enumerate(launch.rows):
            slot = state[(launch.start + i) % state.shape[0]]
            slot[0] = kv[row]
            slot[1] = score[row]
        closed = []
        for entry in range(launch.start // self.ratio, launch.end // self.ratio):
            first = (entry - (1 if self.overlap else 0)) * self.ratio
            past = ring_read(state, max(first, 0), (entry + 1) * self.ratio)
            if first < 0:
                past = F.pad(past, (0, 0, 0, 0, self.ratio, 0))
            pooled = self._pool(past[:, 0], past[:, 1], entry)
            closed.append((entry, self._entries(pooled, entry, ctx)))
        return closed
