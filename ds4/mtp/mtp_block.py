"""The preview generation's multi-token-prediction block (spec model.md 7.1), and drafting with it.

Convention (also of the bundled model's training): the pair (streams h_p of the trunk at position p, token x_{p+1}) is
processed at rotary position p and predicts x_{p+2}. The first pair of a text is (h_0, x_1); nothing is put before it.
Longer drafts are chained: the block's own streams and its own token make the next pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ds4.config import ModelConfig
from ds4.kernels.attn import attn_decode, query
from ds4.kernels.cases import Outputs
from ds4.kernels.common import rms_norm
from ds4.kernels.draft.op import DRAFT_JOIN
from ds4.kernels.draft.words import LAST
from ds4.kernels.head import hc_head, head
from ds4.kernels.launch import DECODE_ROWS, Launch
from ds4.kernels.proj import Rows, proj, proj_in
from ds4.kernels.proj.op import FORMATS, PROJ_OB, segment_inputs
from ds4.kv.cache import LayerCache
from ds4.kv.spec import MAX_DRAFT
from ds4.model.attention import Attention
from ds4.model.block import Block, Residual
from ds4.model.context import Context, make_context
from ds4.model.params import Params, small
from ds4.model.steps import StepBuilder, planes_of
from ds4.model.transformer import Transformer, embedding_rows
from ds4.mtp.drafter import Chooser, Draft, check_history
from ds4.mtp.rows import publish_rows, stage_cache
from ds4.mtp.tail import Tail
from ds4.sampling import Sampler


class PairAttention(Attention):
    """Attention of the block, which need not be finished for all tokens of a launch."""

    def decode_last(self, x: Tensor, ctx: Context, last: Context, cache: LayerCache) -> Tensor:
        """``decode``, but only the row of the last token has a meaning: ``last`` is the context of that token alone."""
        launch, n = ctx.launch, ctx.numerics
        q_a, kv = proj_in(x, [self.wq_a, self.wkv], [], [], n, ctx.rows)
        publish_rows(self, kv, ctx, cache)
        qr = n.rd(rms_norm(q_a, self.q_norm, self.eps))
        q = proj(qr, self.wq_b, n, last.rows).unflatten(1, (self.n_heads, self.width))
        q = query(q, ctx.cis(self.ratio), self.eps, n)
        rows = cache.window(max(0, launch.end - self.window), launch.end)
        return self._output(attn_decode(q, [rows], self.sink, last.launch.rows, last.numerics), last)


class PairBlock(Block):
    """A block with :class:`PairAttention`."""

    attention = PairAttention
    attn: PairAttention


class MTPBlock:
    """One ratio-0 block on top of the trunk's final streams; embedding and head are the trunk's."""

    def __init__(self, config: ModelConfig, params: Params, trunk: Transformer, prefix: str = "mtp.0") -> None:
        m, d = config.hc_mult, config.hidden_size
        self.config = config
        self.trunk = trunk
        self.enorm = small(params, f"{prefix}.enorm.weight", (d,))
        self.hnorm = small(params, f"{prefix}.hnorm.weight", (d,))
        self.norm = small(params, f"{prefix}.norm.weight", (d,))
        self.e_proj = params.expect(f"{prefix}.e_proj.weight", (d, d))
        self.h_proj = params.expect(f"{prefix}.h_proj.weight", (d, d))
        self.hc_fn = small(params, f"{prefix}.hc_head_fn", (m, m * d))
        self.hc_scale = small(params, f"{prefix}.hc_head_scale", (1,))
        self.hc_base = small(params, f"{prefix}.hc_head_base", (m,))
        self.block = PairBlock(config, params, prefix, 0, hash_routed=False)

    def _joined(self, h: Tensor, ctx: Context) -> Residual:
        """The pairs' streams f32 ``[n, m, d]`` in front of the block."""
        eps, n = self.config.rms_norm_eps, ctx.numerics
        e = proj(n.rd(rms_norm(embedding_rows(self.trunk.embed, ctx.ids), self.enorm, eps)), self.e_proj, n, ctx.rows)
        hn = n.rd(rms_norm(h, self.hnorm, eps))
        if ctx.rows is None:
            hp = torch.stack([proj(hn[:, i], self.h_proj, n) for i in range(h.shape[1])], dim=1)
        else:  # hnorm works on each stream by itself, so the streams are simply more rows of the same product
            m = h.shape[1]
            rows = tuple(m * row + i for row in ctx.rows for i in range(m))
            hp = proj(hn.flatten(0, 1), self.h_proj, n, rows).unflatten(0, (-1, m))
        return Residual(n.rd(e.unsqueeze(1) + hp))

    def context(self, launch: Launch, next_ids: Tensor) -> Context:
        """Context of a launch of pairs; ``next_ids`` i64 ``[n_rows]`` are the tokens behind its positions."""
        return make_context(self.config, self.trunk.rope, self.trunk.numerics, launch, next_ids)

    def streams(self, h: Tensor, ctx: Context, cache: LayerCache | None) -> Tensor:
        """Block output z f32 ``[n, m, d]`` from streams ``h`` ``[n, m, d]`` and next tokens ``ctx.ids`` ``[n]``."""
        return self.block(self._joined(h, ctx), ctx, cache).resolve(ctx)

    def fill(self, h: Tensor, ctx: Context, cache: LayerCache) -> None:
        """Store the pairs' rows in the block's ring, the same as ``streams`` does, and compute nothing else."""
        attn = self.block.attn
        _, x, _, _ = self.block.attn_site(self._joined(h, ctx), ctx)
        # wq_a goes along because the order of a sum may depend on the matrix: rows are the same bits in both ways.
        kv = proj_in(x, [attn.wq_a, attn.wkv], [], [], ctx.numerics, ctx.rows)[1]
        publish_rows(attn, kv, ctx, cache)

    def last_streams(self, h: Tensor, ctx: Context, last: Context, cache: LayerCache) -> Tensor:
        """Block output of the last token of a decode launch, whose context alone is ``last``; ``fill`` of the others.

        h and ids as for ``streams``; f32 ``[8, m, d]``, of which the last token's row has a meaning. The same bits as
        both calls give, for little more than the time of one.
        """
        streams, x, post, comb = self.block.attn_site(self._joined(h, ctx), ctx)
        y = self.block.attn.decode_last(x, ctx, last, cache)
        streams, x, post, comb = self.block.ffn_site(Residual(streams, y, post, comb), last)
        return Residual(streams, self.block.moe(x, last), post, comb).resolve(last)

    def logits(self, z: Tensor, rows: Rows = None) -> Tensor:
        """f32 ``[n, m, d]`` -> logits f32 ``[n, vocab]`` for the token after next."""
        c, n = self.config, self.trunk.numerics
        x = hc_head(
            z,
            self.hc_fn,
            self.hc_scale,
            self.hc_base,
            hc_eps=c.hc_eps,
            norm_eps=c.rms_norm_eps,
            numerics=n,
            rows=rows,
        )
        return head(x, self.norm, self.trunk.head_weight, norm_eps=c.rms_norm_eps, numerics=n, rows=rows)

    def forward_text(self, h: Tensor, next_ids: Tensor) -> Tensor:
        """Differentiable logits f32 ``[n, vocab]`` of a text: h ``[n, m, d]``, next_ids i64 ``[n]`` (x_1 .. x_n)."""
        launch = Launch.prefill_tile(0, h.shape[0], n_rows=h.shape[0])
        return self.logits(self.streams(h, self.context(launch, next_ids), None))

    def rows_step(self, s: StepBuilder, h: Tensor, z: Tensor, cache: LayerCache) -> tuple[Residual, Tensor]:
        """Launches that store the rows of pairs of streams ``h`` f32 ``[n, m, d]`` and ``s.tokens``, as ``fill`` does.

        z        f32 [n, m, d]  takes the streams of the block
        returns  what lies behind the first boundary, ``y`` still open; the normed query latent f32 [n, q_lora]
        """
        n, m, _ = h.shape
        embedded = self.trunk.embed_step(s)
        pair = {"embedded": embedded, "h": h, "enorm": self.enorm, "hnorm": self.hnorm}
        normed = s.add(DRAFT_JOIN, pair | {"eps": self.config.rms_norm_eps})
        e_proj, h_proj = (segment_inputs([planes_of(w, FORMATS, "proj_ob")]) for w in (self.e_proj, self.h_proj))
        e = s.add(PROJ_OB, {"x": normed["e"]} | e_proj)["y0"]
        rows, into = normed["hn"].flatten(0, 1), z.flatten(0, 1)
        for i in range(0, n * m, DECODE_ROWS):  # a launch takes so many rows
            part = slice(i, i + DECODE_ROWS)
            s.add(PROJ_OB, {"x": rows[part]} | h_proj, into={"y0": into[part]})
        # With these the block's first boundary adds e to every stream, and rounds once.
        post, comb = e.new_ones(n, m), torch.eye(m, device=e.device).repeat(n, 1, 1)
        streams, x, post, comb = self.block.attn_site.step(Residual(z, e, post, comb), s)
        qr, _ = self.block.attn.rows_step(x, s, cache)
        return Residual(streams, None, post, comb), qr

    def step(self, s: StepBuilder, h: Tensor, z: Tensor, cache: LayerCache) -> Outputs:
        """Launches of ``last_streams``, whose result is ``z[-1]``, and of ``logits``: what ``lm_head`` makes of it."""
        r, qr = self.rows_step(s, h, z, cache)
        assert r.post is not None
        assert r.comb is not None
        last = s.last_row(s.state.word(LAST))
        y = self.block.attn.query_step(qr[-1:], None, last, cache)
        r = self.block.ffn_step(Residual(r.streams[-1:], y, r.post[-1:], r.comb[-1:]), last)
        return self.trunk.head_step(r, last, (self.hc_fn, self.hc_scale, self.hc_base), self.norm)


class MTPDrafter:
    """Chained drafts of one session (a :class:`ds4.mtp.drafter.Drafter`): the block run once for each token."""

    max_tokens = MAX_DRAFT - 1  # a decode step takes the token before the draft as well

    def __init__(self, block: MTPBlock) -> None:
        c = block.config
        self.block = block
        self.layers: tuple[int, ...] = (c.num_hidden_layers - 1,)
        self.caches = [stage_cache(c, block.trunk.formats(), block.trunk.device)]
        self.tail = Tail((c.hc_mult, c.hidden_size), 1, self._write, block.trunk.device)

    @property
    def position(self) -> int:
        return self.tail.position

    def _write(self, launch: Launch, h: Tensor, next_ids: Tensor) -> None:
        self.block.fill(h, self.block.context(launch, next_ids), self.caches[0])

    def observe(self, launch: Launch, ids: Tensor, streams: Sequence[Tensor]) -> None:
        self.tail.observe(launch, ids, streams[0])

    def rewind(self, position: int) -> None:
        self.tail.rewind(position)

    @torch.inference_mode()
    def draft(self, history: Sequence[int], k: int, sampler: Sampler) -> Draft:
        position = self.position
        check_history(history, position)
        chooser = Chooser(sampler, history)
        if not position:  # nothing was processed: there are no streams to start from
            return Draft()
        if k < 1:
            return Draft()
        token = int(history[-1])
        h, logits = self._step(*self.tail.unwritten(token))
        self.tail.claim(token)
        while True:
            token = chooser.choose(logits)
            n = len(chooser.tokens)
            if n == min(k, self.max_tokens):
                return Draft(chooser.tokens, chooser.probs)
            launch = Launch.decode_step(position - 1 + n, 1)
            rows, ids = h.new_zeros(launch.n_rows, *h.shape), torch.zeros(launch.n_rows, dtype=torch.int64)
            rows[launch.rows[0]], ids[launch.rows[0]] = h, token
            h, logits = self._step(launch, rows, ids)

    def _step(self, launch: Launch, h: Tensor, next_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(z f32 ``[m, d]``, logits f32 ``[vocab]``) of the last pair of h f32 ``[n_rows, m, d]`` and ``next_ids``."""
        ctx, last = self.block.context(launch, next_ids), launch
        if launch.n_tok > 1:
            last = Launch.decode_step(launch.end - 1, 1)
        row = last.rows[0]
        z = self.block.last_streams(h, ctx, replace(ctx, launch=last), self.caches[0])
        return z[row], self.block.logits(z, last.rows)[row]
