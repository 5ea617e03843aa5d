"""Compressors: pooling windows of tokens into entries (spec model.md 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ds4.config import ModelConfig
from ds4.kernels.common import rope_angles
from ds4.kernels.kv_publish import finish_entry, pool_csa, pool_hca
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

    def prefill(self, kv: Tensor, gate: Tensor, ctx: Context, state: Tensor | None) -> Tensor:
        """Entries of the whole tile f32 ``[n_rows / ratio, width]`` from its raw rows f32 ``[n_rows, out]``.

        Only entries closed by a token of this call are meaningful. Rows before the call's first token come from
        ``state``, to which the call's own rows are added; no state (training): the tile starts the text.
        """
        launch = ctx.launch
        score = gate + self.ape[launch.pos % self.ratio]
        before = self.ratio if self.overlap else 0
        if state is None:
            rows_kv, rows_score = F.pad(kv, (0, 0, before, 0)), F.pad(score, (0, 0, before, 0))
        else:
            rows = kv.new_zeros(2, before + launch.n_rows, kv.shape[1])
            offset = before - launch.tile_start
            first_needed = max(0, launch.start // self.ratio * self.ratio - before)
            if first_needed < launch.start:
                past = ring_read(state, first_needed, launch.start)
                rows[:, first_needed + offset : launch.start + offset] = past.transpose(0, 1)
            live = launch.row_slice
            rows[0, launch.start + offset : launch.end + offset] = kv[live]
            rows[1, launch.start + offset : launch.end + offset] = score[live]
            ring_write(state, launch.start, torch.stack((kv[live], score[live]), dim=1))
            rows_kv, rows_score = rows[0], rows[1]
        first_entry = launch.tile_start // self.ratio
        return self._entries(self._pool(rows_kv, rows_score, first_entry), first_entry, ctx)

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
