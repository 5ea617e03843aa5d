"""Lightning indexer of a CSA layer: which compressed rows a token attends (spec model.md 4)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ds4.config import ModelConfig
from ds4.kernels.indexer import index_query, index_score, index_topk
from ds4.kernels.indexer.op import INDEX_SCORE, INDEX_TOPK
from ds4.kernels.proj import proj, proj_tiles
from ds4.kernels.threads import each
from ds4.kv.cache import LayerCache
from ds4.model.compressor import Compressor
from ds4.model.context import Context
from ds4.model.params import Params
from ds4.model.steps import StepBuilder


class Indexer:
    """Indexer queries, keys and selection."""

    def __init__(self, config: ModelConfig, params: Params, prefix: str) -> None:
        self.n_heads = config.index_n_heads
        self.width = config.index_head_dim
        self.top_k = config.index_topk
        self.weight_scale = self.width**-0.5 * self.n_heads**-0.5
        self.wq_b = params.expect(f"{prefix}.wq_b.weight", (self.n_heads * self.width, config.q_lora_rank))
        self.weights_proj = params.expect(f"{prefix}.weights_proj.weight", (self.n_heads, config.hidden_size))
        self.compressor = Compressor(config, params, f"{prefix}.compressor", 4, self.width, indexer=True)

    def _query(self, q: Tensor, ctx: Context) -> Tensor:
        return index_query(q.unflatten(1, (self.n_heads, self.width)), ctx.cis_compressed, ctx.numerics)

    def select_prefill(
        self,
        qr: Sequence[Tensor],
        weights: Sequence[Tensor],
        kv: Sequence[Tensor],
        gate: Sequence[Tensor],
        ctxs: Sequence[Context],
        cache: LayerCache | None,
    ) -> list[Tensor]:
        """For each of successive tiles a mask bool ``[n_rows, n_entries]`` over all entries up to its end.

        qr f32 ``[n_rows, q_lora]``; weights f32 ``[n_rows, h]``, raw; kv and gate f32 ``[n_rows, 2 width]``, the
        compressor's raw rows.
        """
        keys = self.compressor.prefill(kv, gate, ctxs, cache)
        # A tile that sees no more entries than may be chosen needs no scores.
        scored = [i for i, ctx in enumerate(ctxs) if ctx.launch.tile_end // 4 > self.top_k]
        q = dict(zip(scored, proj_tiles([qr[i] for i in scored], self.wq_b, ctxs[0].numerics), strict=True))
        return each(partial(self._select, keys), [q.get(i) for i in range(len(ctxs))], weights, ctxs)

    def _select(self, keys: Tensor, q: Tensor | None, weights: Tensor, ctx: Context) -> Tensor:
        launch = ctx.launch
        n_visible, n_entries = (launch.pos + 1) // 4, launch.tile_end // 4
        if q is None:
            return index_topk(torch.empty(launch.n_rows, n_entries), n_visible, self.top_k)
        w = ctx.numerics.rd(weights * self.weight_scale)
        scores = index_score(self._query(q, ctx), keys[:n_entries], w, ctx.numerics)
        return index_topk(scores, n_visible, self.top_k)

    def select_decode(self, qr: Tensor, weights: Tensor, ctx: Context, cache: LayerCache) -> list[Tensor | None]:
        """Per token the chosen entries, i64 ascending, or None where all visible ones are chosen."""
        launch = ctx.launch
        if launch.end // 4 <= self.top_k:
            return [None] * launch.n_tok
        assert cache.keys is not None
        q = self._query(proj(qr, self.wq_b, ctx.numerics, ctx.rows), ctx)
        w = ctx.numerics.rd(weights * self.weight_scale)
        keys = cache.formats.key.unpack(cache.keys[: launch.end // 4])
        chosen: list[Tensor | None] = []
        for i, row in enumerate(launch.rows):
            n = (launch.start + i + 1) // 4
            if n <= self.top_k:
                chosen.append(None)
                continue
            scores = index_score(q[row : row + 1], keys[:n], w[row : row + 1], ctx.numerics)
            chosen.append(index_topk(scores, torch.tensor([n]), self.top_k)[0].nonzero().squeeze(1))
        return chosen

    def step(self, q: Tensor, weights: Tensor, s: StepBuilder, cache: LayerCache) -> Tensor:
        """Launches of the decode step: chosen entries i32 ``[n_tok, top_k]``, ascending, then -1.

        q f32 ``[n_tok, h, width]`` and weights f32 ``[n_tok, h]``, both raw.
        """
        inputs = {"q": q, "cis": s.cis[1], "weights": weights, "weight_scale": self.weight_scale}
        inputs |= {"keys": cache.keys, "pos": s.pos, "top_k": self.top_k}
        scores = s.add(INDEX_SCORE, inputs)["scores"]
        return s.add(INDEX_TOPK, {"scores": scores, "pos": s.pos, "top_k": self.top_k})["selected"]
