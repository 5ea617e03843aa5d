"""Attention of one layer: sliding window, CSA or HCA (spec model.md 2.3 to 2.6)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ds4.config import ModelConfig
from ds4.kernels.attn import attn_decode, attn_prefill, query
from ds4.kernels.attn.op import ATTN_DECODE
from ds4.kernels.cases import Inputs
from ds4.kernels.common import apply_rope, rms_norm
from ds4.kernels.kv_publish.cases import Kind
from ds4.kernels.kv_publish.op import KV_PUBLISH_CSA, KV_PUBLISH_HCA, KV_PUBLISH_SWA
from ds4.kernels.packing import Planes
from ds4.kernels.proj import proj, proj_grouped, proj_grouped_tiles, proj_in, proj_in_tiles, proj_tiles
from ds4.kernels.proj.op import FORMATS, PROJ_IN, PROJ_OA, PROJ_OB, PROJ_Q, segment_inputs
from ds4.kernels.threads import each
from ds4.kv.cache import LayerCache
from ds4.model.compressor import Compressor
from ds4.model.context import Context
from ds4.model.indexer import Indexer
from ds4.model.params import Params, small
from ds4.model.steps import RATIO_TABLES, StepBuilder, planes_of
from ds4.weights.dense_cache import Weight

QUERIES = 32
"""Prefill form: a tile's queries attend so many at a time."""


class Attention:
    """Projections, row publication, selection and the attention core of one layer."""

    def __init__(self, config: ModelConfig, params: Params, prefix: str, ratio: int) -> None:
        d, width, n_heads = config.hidden_size, config.head_dim, config.num_attention_heads
        self.ratio = ratio
        self.n_heads, self.width, self.n_groups = n_heads, width, config.o_groups
        self.window = config.sliding_window
        self.eps = config.rms_norm_eps
        o_rank = config.o_groups * config.o_lora_rank
        self.wq_a = params.expect(f"{prefix}.wq_a.weight", (config.q_lora_rank, d))
        self.q_norm = small(params, f"{prefix}.q_norm.weight", (config.q_lora_rank,))
        self.wq_b = params.expect(f"{prefix}.wq_b.weight", (n_heads * width, config.q_lora_rank))
        self.wkv = params.expect(f"{prefix}.wkv.weight", (width, d))
        self.kv_norm = small(params, f"{prefix}.kv_norm.weight", (width,))
        self.sink = small(params, f"{prefix}.attn_sink", (n_heads,))
        self.wo_a = params.expect(f"{prefix}.wo_a.weight", (o_rank, n_heads * width // config.o_groups))
        self.wo_b = params.expect(f"{prefix}.wo_b.weight", (d, o_rank))
        self.compressor: Compressor | None = None
        self.indexer: Indexer | None = None
        if ratio:
            self.compressor = Compressor(config, params, f"{prefix}.compressor", ratio, width, indexer=False)
        if ratio == 4:
            self.indexer = Indexer(config, params, f"{prefix}.indexer")

    def _inputs(self) -> tuple[list[Weight], list[Weight], list[Weight]]:
        """Weights of the layer's input projections in ``proj_in``'s three groups."""
        compressors = (self.compressor, self.indexer.compressor if self.indexer else None)
        fp32 = [w for c in compressors if c is not None for w in (c.wkv, c.wgate)]
        return [self.wq_a, self.wkv], [self.indexer.weights_proj] if self.indexer else [], fp32

    def _latents(self, q_a: Tensor, kv: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """qr (normed) and kv (normed and rotated) from their raw projections."""
        n = ctx.numerics
        qr = n.rd(rms_norm(q_a, self.q_norm, self.eps))
        return qr, n.rd(apply_rope(n.rd(rms_norm(kv, self.kv_norm, self.eps)), ctx.cis(self.ratio)))

    def _query(self, q: Tensor, ctx: Context) -> Tensor:
        """Queries f32 ``[n, h, width]``, normed and rotated, from their raw projection."""
        return query(q.unflatten(1, (self.n_heads, self.width)), ctx.cis(self.ratio), self.eps, ctx.numerics)

    def _project(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """qr (normed), q (normed and rotated), kv (normed and rotated) and the raw compressor/indexer projections."""
        q_a, kv, *raw = proj_in(x, *self._inputs(), ctx.numerics, ctx.rows)
        qr, kv = self._latents(q_a, kv, ctx)
        return qr, self._query(proj(qr, self.wq_b, ctx.numerics, ctx.rows), ctx), kv, raw

    def _groups(self, o: Tensor, ctx: Context) -> Tensor:
        """Attention's result f32 ``[n, h, width]``, rotated back, as ``wo_a`` takes it: f32 ``[n, g, k]``."""
        o = ctx.numerics.rd(apply_rope(o, ctx.cis(self.ratio).unsqueeze(-2), inverse=True))
        return o.flatten(1).unflatten(1, (self.n_groups, -1))

    def _output(self, o: Tensor, ctx: Context) -> Tensor:
        z = proj_grouped(self._groups(o, ctx), self.wo_a, ctx.numerics, ctx.rows)
        return proj(z, self.wo_b, ctx.numerics, ctx.rows)

    def decode(self, x: Tensor, ctx: Context, cache: LayerCache) -> Tensor:
        """x f32 ``[8, d]`` -> f32 ``[8, d]``; publishes the tokens' rows, then each attends what it may see."""
        launch, row_format = ctx.launch, cache.formats.row
        qr, q, kv, raw = self._project(x, ctx)
        cache.publish(launch.take(kv), launch.start)
        chosen: list[Tensor | None] = [None] * launch.n_tok
        if self.indexer is not None:
            assert cache.keys is not None
            assert cache.key_state is not None
            weights, raw = raw[0], raw[1:]
            for entry, key in self.indexer.compressor.decode(raw[2], raw[3], ctx, cache.key_state):
                cache.keys[entry] = cache.formats.key.pack(key)[0]
            chosen = self.indexer.select_decode(qr, weights, ctx, cache)
        if self.compressor is not None:
            assert cache.pool is not None
            assert cache.state is not None
            for entry, value in self.compressor.decode(raw[0], raw[1], ctx, cache.state):
                cache.pool[entry] = row_format.pack(value)[0]
        token_kv = []
        # The last token sees all rows that an earlier one sees: decoded once for all tokens that choose none of them.
        visible = None
        if cache.pool is not None and None in chosen:
            visible = row_format.unpack(cache.pool[: launch.end // self.ratio])
        for i in range(launch.n_tok):
            end = launch.start + i + 1
            rows = cache.window(max(0, end - self.window), end)
            if cache.pool is not None and end >= self.ratio:
                entries = chosen[i]
                if entries is not None:
                    pooled = row_format.unpack(cache.pool[entries])
                else:
                    assert visible is not None
                    pooled = visible[: end // self.ratio]
                rows = torch.cat((rows, pooled))
            token_kv.append(rows)
        return self._output(attn_decode(q, token_kv, self.sink, launch.rows, ctx.numerics), ctx)

    def step(self, x: Tensor, s: StepBuilder, cache: LayerCache) -> Tensor:
        """Launches of the decode step: f32 ``[n_tok, d]`` -> f32 ``[n_tok, d]``."""
        qr, weights = self.rows_step(x, s, cache)
        return self.query_step(qr, weights, s, cache)

    def rows_step(self, x: Tensor, s: StepBuilder, cache: LayerCache) -> tuple[Tensor, Tensor | None]:
        """Launches that write the cache: the normed query latent f32 ``[n_tok, q_lora]``, and the indexer's raw weights
        f32 ``[n_tok, h]`` where there is one."""
        inputs = self.input_planes("proj_in")
        made = s.add(PROJ_IN, {"x": x} | segment_inputs(inputs))
        raw = [made[f"y{i}"] for i in range(len(inputs))]
        return self._publish_step(raw, s, cache), raw[6] if self.indexer is not None else None

    def input_planes(self, where: str) -> list[Planes]:
        """Matrices of the input projections in the order of ``publish_inputs``, the indexer's weights last."""
        inputs = [self.wq_a, self.wkv]
        for compressor in (self.compressor, self.indexer.compressor if self.indexer else None):
            if compressor is not None:
                inputs += [compressor.wkv, compressor.wgate]
        if self.indexer is not None:
            inputs.append(self.indexer.weights_proj)
        return [planes_of(w, FORMATS, where) for w in inputs]

    def query_step(self, qr: Tensor, weights: Tensor | None, s: StepBuilder, cache: LayerCache) -> Tensor:
        """Launches that read the cache, of what ``rows_step`` gave: f32 ``[n_tok, d]``."""
        queries = [self.wq_b]
        if self.indexer is not None:
            queries.append(self.indexer.wq_b)
        made = s.add(PROJ_Q, {"x": qr} | segment_inputs([planes_of(w, FORMATS, "proj_q") for w in queries]))
        selected = None
        if self.indexer is not None and weights is not None:
            selected = self.indexer.step(made["y1"].unflatten(1, (self.indexer.n_heads, -1)), weights, s, cache)
        q = made["y0"].unflatten(1, (self.n_heads, self.width))
        o = self._core_step(q, selected, s, cache).view(s.n_tok, self.n_groups, -1)
        z = s.add(PROJ_OA, {"x": o} | segment_inputs([planes_of(self.wo_a, FORMATS, "proj_oa")]))["y0"]
        return s.add(PROJ_OB, {"x": z} | segment_inputs([planes_of(self.wo_b, FORMATS, "proj_ob")]))["y0"]

    def _core_step(self, q: Tensor, selected: Tensor | None, s: StepBuilder, cache: LayerCache) -> Tensor:
        """The launches of the core alone, from raw queries f32 ``[n_tok, h, width]``: what it makes of them."""
        return s.add(ATTN_DECODE, self._core_inputs(q, selected, s, cache))["o"]

    def _core_inputs(self, q: Tensor, selected: Tensor | None, s: StepBuilder, cache: LayerCache) -> Inputs:
        return {
            "q": q,
            "cis": self.cis_step(s),
            "sink": self.sink,
            "ring": cache.ring,
            "pool": cache.pool,
            "selected": selected,
            "pos": s.pos,
            "window": self.window,
            "ratio": self.ratio,
            "eps": self.eps,
        }

    def cis_step(self, s: StepBuilder) -> Tensor:
        """The layer's table at the tokens' positions, f32 ``[n_tok, rope / 2, 2]``."""
        return s.cis[1 if self.ratio else 0]

    def _publish_step(self, raw: list[Tensor], s: StepBuilder, cache: LayerCache) -> Tensor:
        """The launch that writes the cache; returns the normed query latent f32 ``[n_tok, q_lora]``."""
        operation = {"swa": KV_PUBLISH_SWA, "hca": KV_PUBLISH_HCA, "csa": KV_PUBLISH_CSA}[self.kind]
        return s.add(operation, self.publish_inputs(raw, s, cache))["qr"]

    @property
    def kind(self) -> Kind:
        return "swa" if self.compressor is None else "hca" if self.indexer is None else "csa"

    def publish_inputs(self, raw: Sequence[Tensor], s: StepBuilder, cache: LayerCache) -> Inputs:
        """What the operations that write the cache take, of the raw projections."""
        inputs: Inputs = {"q_a": raw[0], "kv": raw[1], "pos": s.pos, "cis": self.cis_step(s), "eps": self.eps}
        inputs |= {"q_norm": self.q_norm, "kv_norm": self.kv_norm, "ring": cache.ring}
        if self.compressor is not None:
            inputs |= {"comp_kv": raw[2], "comp_gate": raw[3], "entry_cis": s.cis[RATIO_TABLES[self.ratio]]}
            inputs |= {"ape": self.compressor.ape, "comp_norm": self.compressor.norm}
            inputs |= {"state": cache.state, "pool": cache.pool}
        if self.indexer is not None:
            inputs |= {"idx_kv": raw[4], "idx_gate": raw[5]}
            inputs |= {"idx_ape": self.indexer.compressor.ape, "idx_norm": self.indexer.compressor.norm}
            inputs |= {"key_state": cache.key_state, "keys": cache.keys}
        return inputs

    def prefill(self, xs: Sequence[Tensor], ctxs: Sequence[Context], cache: LayerCache | None) -> list[Tensor]:
        """x f32 ``[n_rows, d]`` of successive tiles -> f32 ``[n_rows, d]`` each; without a cache (training) there is
        one tile, the whole text."""
        n = ctxs[0].numerics
        q_a, kv, *raw = map(list, zip(*proj_in_tiles(xs, *self._inputs(), n), strict=True))
        qr, kv = map(list, zip(*each(self._latents, q_a, kv, ctxs), strict=True))
        weights: list[Tensor] = raw.pop(0) if self.indexer is not None else []
        rows = self._window_rows(kv, ctxs, cache)
        pools: list[Tensor | None] = [None] * len(xs)
        chosen: list[Tensor | None] = [None] * len(xs)
        if self.compressor is not None:
            entries = self.compressor.prefill(raw[0], raw[1], ctxs, cache)
            pools = [entries[: ctx.launch.tile_end // self.ratio] for ctx in ctxs]
        if self.indexer is not None:
            chosen = list(self.indexer.select_prefill(qr, weights, raw[2], raw[3], ctxs, cache))
        o = each(self._attended, proj_tiles(qr, self.wq_b, n), rows, pools, chosen, ctxs)
        return proj_tiles(proj_grouped_tiles(o, self.wo_a, n), self.wo_b, n)

    def _attended(self, q: Tensor, rows: Tensor, pool: Tensor | None, chosen: Tensor | None, ctx: Context) -> Tensor:
        """The core of one tile, from raw queries to what ``wo_a`` takes.

        A few queries at a time, so that few rows are multiplied that none of them may see; zeros where there is no
        token.
        """
        assert ctx.window_mask is not None
        launch, q = ctx.launch, self._query(q, ctx)
        front = rows.shape[0] - launch.n_rows  # in training there are no rows in front of the text, nor in its mask
        mask = ctx.window_mask[:, self.window - front :]
        o = []
        for first in range(0, launch.n_rows, QUERIES):
            last = min(first + QUERIES, launch.n_rows)
            if last <= launch.rows[0] or first > launch.rows[-1]:
                o.append(torch.zeros_like(q[first:last]))
                continue
            seen = slice(max(0, front + first - self.window), front + last)
            kv, attended = rows[seen], mask[first:last, seen]
            if pool is not None:
                n = (launch.tile_start + last) // self.ratio
                visible = (launch.pos[first:last] + 1) // self.ratio
                which = torch.arange(n) < visible.unsqueeze(1) if chosen is None else chosen[first:last, :n]
                kv, attended = torch.cat((kv, pool[:n])), torch.cat((attended, which), dim=1)
            o.append(attn_prefill(q[first:last], kv, self.sink, attended, ctx.numerics))
        return self._groups(torch.cat(o), ctx)

    def _window_rows(self, kv: list[Tensor], ctxs: Sequence[Context], cache: LayerCache | None) -> list[Tensor]:
        """For each tile the rows of positions ``tile_start - window ..`` to its end; zeros where there is none (yet).

        Without a cache: the text's own rows.
        """
        if cache is None:
            return kv
        first, end = ctxs[0].launch, ctxs[-1].launch.end
        rows = kv[0].new_empty(self.window + sum(ctx.launch.n_rows for ctx in ctxs), self.width)
        offset = self.window - first.tile_start
        rows[: first.start + offset] = 0
        rows[end + offset :] = 0
        seen = max(0, first.start - self.window)
        if seen < first.start:
            rows[seen + offset : first.start + offset] = cache.window(seen, first.start)
        packed = each(partial(self._store, rows, offset, cache), kv, ctxs)
        slots = cache.ring.shape[0]
        for ctx, tile in zip(ctxs, packed, strict=True):
            start, last = ctx.launch.start, ctx.launch.end
            if last > end - slots:  # earlier ones would be overwritten by the last
                cache.write(tile, rows[start + offset : last + offset], start)
        starts = [ctx.launch.tile_start - first.tile_start for ctx in ctxs]
        return [rows[start : start + self.window + ctx.launch.n_rows] for start, ctx in zip(starts, ctxs, strict=True)]

    @staticmethod
    def _store(rows: Tensor, offset: int, cache: LayerCache, kv: Tensor, ctx: Context) -> Tensor:
        packed, stored = cache.packed(kv[ctx.launch.row_slice])
        rows[ctx.launch.start + offset : ctx.launch.end + offset] = stored
        return packed
