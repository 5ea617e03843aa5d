"""Attention of one layer: sliding window, CSA or HCA (spec model.md 2.3 to 2.6)."""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.config import ModelConfig
from ds4.kernels.attn import attn_decode, attn_prefill, query
from ds4.kernels.attn.op import ATTN_DECODE
from ds4.kernels.cases import Inputs
from ds4.kernels.common import apply_rope, rms_norm
from ds4.kernels.kv_publish.op import KV_PUBLISH_CSA, KV_PUBLISH_HCA, KV_PUBLISH_SWA
from ds4.kernels.proj import proj, proj_grouped, proj_in
from ds4.kernels.proj.op import FORMATS, PROJ_IN, PROJ_OA, PROJ_OB, PROJ_Q, segment_inputs
from ds4.kv.cache import LayerCache
from ds4.model.compressor import Compressor
from ds4.model.context import Context
from ds4.model.indexer import Indexer
from ds4.model.params import Params, small
from ds4.model.steps import RATIO_TABLES, StepBuilder, planes_of
from ds4.weights.dense_cache import Weight


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

    def _project(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """qr (normed), q (normed and rotated), kv (normed and rotated) and the raw compressor/indexer projections."""
        n = ctx.numerics
        bf16: list[Weight] = []
        fp32: list[Weight] = []
        if self.indexer is not None:
            bf16.append(self.indexer.weights_proj)
        for compressor in (self.compressor, self.indexer.compressor if self.indexer else None):
            if compressor is not None:
                fp32 += [compressor.wkv, compressor.wgate]
        q_a, kv, *raw = proj_in(x, [self.wq_a, self.wkv], bf16, fp32, n, ctx.rows)
        cis = ctx.cis(self.ratio)
        qr = n.rd(rms_norm(q_a, self.q_norm, self.eps))
        q = proj(qr, self.wq_b, n, ctx.rows).unflatten(1, (self.n_heads, self.width))
        kv = n.rd(apply_rope(n.rd(rms_norm(kv, self.kv_norm, self.eps)), cis))
        return qr, query(q, cis, self.eps, n), kv, raw

    def _output(self, o: Tensor, ctx: Context) -> Tensor:
        o = ctx.numerics.rd(apply_rope(o, ctx.cis(self.ratio).unsqueeze(-2), inverse=True))
        z = proj_grouped(o.flatten(1).unflatten(1, (self.n_groups, -1)), self.wo_a, ctx.numerics, ctx.rows)
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
        inputs = [self.wq_a, self.wkv]
        for compressor in (self.compressor, self.indexer.compressor if self.indexer else None):
            if compressor is not None:
                inputs += [compressor.wkv, compressor.wgate]
        queries = [self.wq_b]
        if self.indexer is not None:
            inputs.append(self.indexer.weights_proj)
            queries.append(self.indexer.wq_b)
        made = s.add(PROJ_IN, {"x": x} | segment_inputs([planes_of(w, FORMATS, "proj_in") for w in inputs]))
        raw = [made[f"y{i}"] for i in range(len(inputs))]
        cis = s.cis[1 if self.ratio else 0]
        qr = self._publish_step(raw, cis, s, cache)
        made = s.add(PROJ_Q, {"x": qr} | segment_inputs([planes_of(w, FORMATS, "proj_q") for w in queries]))
        selected = None
        if self.indexer is not None:
            selected = self.indexer.step(made["y1"].unflatten(1, (self.indexer.n_heads, -1)), raw[6], s, cache)
        attended = {
            "q": made["y0"].unflatten(1, (self.n_heads, self.width)),
            "cis": cis,
            "sink": self.sink,
            "ring": cache.ring,
            "pool": cache.pool,
            "selected": selected,
            "pos": s.pos,
            "window": self.window,
            "ratio": self.ratio,
            "eps": self.eps,
        }
        o = s.add(ATTN_DECODE, attended)["o"].view(s.n_tok, self.n_groups, -1)
        z = s.add(PROJ_OA, {"x": o} | segment_inputs([planes_of(self.wo_a, FORMATS, "proj_oa")]))["y0"]
        return s.add(PROJ_OB, {"x": z} | segment_inputs([planes_of(self.wo_b, FORMATS, "proj_ob")]))["y0"]

    def _publish_step(self, raw: list[Tensor], cis: Tensor, s: StepBuilder, cache: LayerCache) -> Tensor:
        """The launch that writes the cache; returns the normed query latent f32 ``[n_tok, q_lora]``."""
        inputs: Inputs = {"q_a": raw[0], "kv": raw[1], "pos": s.pos, "cis": cis, "eps": self.eps, "ring": cache.ring}
        inputs |= {"q_norm": self.q_norm, "kv_norm": self.kv_norm}
        operation = KV_PUBLISH_SWA
        if self.compressor is not None:
            operation = KV_PUBLISH_HCA
            inputs |= {"comp_kv": raw[2], "comp_gate": raw[3], "entry_cis": s.cis[RATIO_TABLES[self.ratio]]}
            inputs |= {"ape": self.compressor.ape, "comp_norm": self.compressor.norm}
            inputs |= {"state": cache.state, "pool": cache.pool}
        if self.indexer is not None:
            operation = KV_PUBLISH_CSA
            inputs |= {"idx_kv": raw[4], "idx_gate": raw[5]}
            inputs |= {"idx_ape": self.indexer.compressor.ape, "idx_norm": self.indexer.compressor.norm}
            inputs |= {"key_state": cache.key_state, "keys": cache.keys}
        return s.add(operation, inputs)["qr"]

    def prefill(self, x: Tensor, ctx: Context, cache: LayerCache | None) -> Tensor:
        """x f32 ``[n_rows, d]`` -> f32 ``[n_rows, d]``; without a cache (training) the tile is the whole text."""
        assert ctx.window_mask is not None
        qr, q, kv, raw = self._project(x, ctx)
        keys = [self._window_rows(kv, ctx, cache)]
        # Without a cache nothing lies before the text, and the part of the mask in front of it is left out too.
        masks = [ctx.window_mask if cache is not None else ctx.window_mask[:, self.window :]]
        if self.compressor is not None:
            index_weights = None
            if self.indexer is not None:
                index_weights, raw = raw[0], raw[1:]
            entries = self.compressor.prefill(raw[0], raw[1], ctx, cache.state if cache else None)
            keys.append(self._pool_rows(entries, ctx, cache))
            if self.indexer is None or index_weights is None:
                n_visible = ((ctx.launch.pos + 1) // self.ratio).unsqueeze(1)
                masks.append(torch.arange(keys[1].shape[0]) < n_visible)
            else:
                key_state = cache.key_state if cache else None
                tile_keys = self.indexer.compressor.prefill(raw[2], raw[3], ctx, key_state)
                masks.append(self.indexer.select_prefill(qr, index_weights, ctx, cache, tile_keys))
        return self._output(attn_prefill(q, torch.cat(keys), self.sink, torch.cat(masks, dim=1), ctx.numerics), ctx)

    def _window_rows(self, kv: Tensor, ctx: Context, cache: LayerCache | None) -> Tensor:
        """Rows of positions ``tile_start - window ..`` to the end of the tile; zeros where there is none (yet).

        Without a cache: the text's own rows.
        """
        if cache is None:
            return kv
        launch = ctx.launch
        rows = kv.new_zeros(self.window + launch.n_rows, self.width)
        offset = self.window - launch.tile_start
        first = max(0, launch.start - self.window)
        if first < launch.start:
            rows[first + offset : launch.start + offset] = cache.window(first, launch.start)
        rows[launch.start + offset : launch.end + offset] = cache.publish(kv[launch.row_slice], launch.start)
        return rows

    def _pool_rows(self, entries: Tensor, ctx: Context, cache: LayerCache | None) -> Tensor:
        """Compressed rows up to the end of the tile, its own added to the pool; zeros where there is none."""
        if cache is None:
            return entries
        assert cache.pool is not None
        launch, row_format = ctx.launch, cache.formats.row
        first, last = launch.start // self.ratio, launch.end // self.ratio
        tile_first = launch.tile_start // self.ratio
        cache.pool[first:last] = row_format.pack(entries[first - tile_first : last - tile_first])
        rows = entries.new_zeros(tile_first + launch.n_rows // self.ratio, self.width)
        rows[:last] = row_format.unpack(cache.pool[:last])
        return rows
