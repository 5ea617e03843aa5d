"""The DSpark block drafter (spec model.md 7.2): one pass over a block of noise tokens drafts several tokens at once.

Context: every position p has a row in each stage's ring, made from the trunk's tapped layers. A draft at p lets a block
of b tokens (the one just chosen, then noise) at p + 1 .. p + b through the stages, where each of them attends the rows
up to p and all of the block. Row i of the result predicts position p + 2 + i, given the token drafted before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds4.config import ModelConfig
from ds4.errors import Ds4Error
from ds4.kernels.attn import attend
from ds4.kernels.attn.op import ATTN_DECODE
from ds4.kernels.cases import Outputs
from ds4.kernels.common import rms_norm, rope_angles
from ds4.kernels.draft.op import DRAFT_BLOCK, DRAFT_CHOOSE, DRAFT_NORM
from ds4.kernels.draft.words import CHAIN, LAST
from ds4.kernels.head import hc_head
from ds4.kernels.head.op import FORMATS as HEAD_FORMATS
from ds4.kernels.head.op import LM_HEAD
from ds4.kernels.launch import Launch
from ds4.kernels.proj import matmul_rows, proj
from ds4.kernels.proj.op import FORMATS, PROJ_IN, PROJ_OB, segment_inputs
from ds4.kv.cache import LayerCache
from ds4.kv.spec import MAX_DRAFT
from ds4.model.attention import Attention
from ds4.model.block import Block, Residual
from ds4.model.context import Context, make_context
from ds4.model.params import Params, small
from ds4.model.steps import StepBuilder, planes_of
from ds4.model.transformer import Transformer, embedding_rows
from ds4.mtp.block_form import BlockMoE, BlockProduct
from ds4.mtp.drafter import Chooser, Draft, check_history
from ds4.mtp.rows import publish_rows, stage_cache
from ds4.mtp.tail import Tail
from ds4.sampling import Sampler
from ds4.weights.dense_cache import dense


class BlockAttention(Attention):
    """Attention of a draft block over the context in front of it and over itself, in both directions."""

    def __init__(self, config: ModelConfig, params: Params, prefix: str, ratio: int) -> None:
        super().__init__(config, params, prefix, ratio)
        rank = config.o_lora_rank
        self._in, self._q = BlockProduct(self.wq_a, self.wkv), BlockProduct(self.wq_b)
        self._oa = [BlockProduct(self.wo_a, rows=(g * rank, (g + 1) * rank)) for g in range(self.n_groups)]
        self._ob = BlockProduct(self.wo_b)

    def block(self, x: Tensor, ctx: Context, cache: LayerCache) -> Tensor:
        """x f32 ``[b, d]`` -> f32 ``[b, d]``; the block's own rows are rounded as in a cache, but stored nowhere."""
        start, row_format, n = ctx.launch.start, cache.formats.row, ctx.numerics
        q_a, kv = self._in.proj(x, n).split((self.wq_a.shape[0], self.width), dim=1)
        qr, kv = self._latents(q_a, kv, ctx)
        q = self._query(self._q.proj(qr, n), ctx)
        context = cache.window(max(0, start - self.window), start)
        rows = torch.cat((context, row_format.unpack(row_format.pack(kv))))
        o = self._groups(attend(q, rows, self.sink, None, n), ctx)
        z = torch.cat([product(o[:, g]) for g, product in enumerate(self._oa)], dim=1)
        return self._ob.proj(n.rd(z), n)

    def context_step(self, kv: Tensor, s: StepBuilder, cache: LayerCache) -> None:
        """Launch that stores context rows, from their raw projections f32 ``[n_tok, head_dim]``."""
        no_queries = kv.new_zeros(kv.shape[0], self.q_norm.shape[0])
        self._publish_step([no_queries, kv], s, cache)

    def _core_step(self, q: Tensor, selected: Tensor | None, s: StepBuilder, cache: LayerCache) -> Tensor:
        """One launch a query, each at the block's last position (the word LAST), with a window that is longer by the
        block. So all attend the same rows: the block's own lie in the ring behind the context, where those of the text
        take their place before anything reads them as context.
        """
        n, o = s.n_tok, torch.empty_like(q)
        inputs = self._core_inputs(q, selected, s, cache) | {"pos": s.state.word(LAST), "window": self.window + n}
        cis = self.cis_step(s)
        for i in range(n):
            row = slice(i, i + 1)
            s.add(ATTN_DECODE, inputs | {"q": q[row], "cis": cis[row]}, into={"o": o[row]})
        return o


class Stage(Block):
    """One stage: a sliding block whose rows share each matrix product (ds4/mtp/block_form.py)."""

    attention, experts = BlockAttention, BlockMoE
    attn: BlockAttention

    def block(self, r: Residual, ctx: Context, cache: LayerCache) -> Residual:
        """All rows of a draft block behind the context in ``cache``."""
        streams, x, post, comb = self.attn_site(r, ctx)
        y = self.attn.block(x, ctx, cache)
        streams, x, post, comb = self.ffn_site(Residual(streams, y, post, comb), ctx)
        return Residual(streams, self.moe(x, ctx), post, comb)


class DSpark:
    """The head's weights; embedding and head matrix are the trunk's.

    Block size, tapped layers, Markov rank and noise token are those of ``config``. Raises Ds4Error where it has none.
    """

    def __init__(self, config: ModelConfig, params: Params, trunk: Transformer) -> None:
        size, noise, rank = config.dspark_block_size, config.dspark_noise_token_id, config.dspark_markov_rank
        if size is None or noise is None or rank is None or not config.dspark_target_layer_ids:
            raise Ds4Error(
                "the DSpark draft head needs dspark_block_size, _noise_token_id, _markov_rank and its layers"
            )
        m, d, last = config.hc_mult, config.hidden_size, f"mtp.{config.n_mtp_layers - 1}"
        self.config = config
        self.trunk = trunk
        self.block_size, self.noise = size, noise
        self.layers = tuple(sorted(set(config.dspark_target_layer_ids)))
        # Taps come in the order of the layers, the matrix's columns in the order of the setting.
        self._order = [self.layers.index(i) for i in config.dspark_target_layer_ids]
        self.main_proj = params.expect("mtp.0.main_proj.weight", (d, len(self._order) * d))
        self.main_norm = small(params, "mtp.0.main_norm.weight", (d,))
        self.stages = [Stage(config, params, f"mtp.{i}", 0, hash_routed=False) for i in range(config.n_mtp_layers)]
        self.norm = small(params, f"{last}.norm.weight", (d,))
        self.hc_fn = small(params, f"{last}.hc_head_fn", (m, m * d))
        self.hc_scale = small(params, f"{last}.hc_head_scale", (1,))
        self.hc_base = small(params, f"{last}.hc_head_base", (m,))
        self.markov_w1 = params.expect(f"{last}.markov_head.markov_w1.weight", (config.vocab_size, rank))
        self.markov_w2 = params.expect(f"{last}.markov_head.markov_w2.weight", (config.vocab_size, rank))
        self._head = BlockProduct(trunk.head_weight)
        self.confidence = small(params, f"{last}.confidence_head.proj.weight", (1, d + rank))[0]

    def taps(self, streams: Sequence[Tensor]) -> Tensor:
        """f32 ``[n, taps * d]`` from the output streams f32 ``[n, m, d]`` of each of ``layers``: means over streams."""
        means = [self.trunk.numerics.rd(s.mean(1)) for s in streams]
        return torch.cat([means[i] for i in self._order], dim=1)

    def fill(self, launch: Launch, taps: Tensor, caches: Sequence[LayerCache]) -> None:
        """Store the context rows of a launch in every stage's ring, from f32 ``[n_rows, taps * d]``."""
        n = self.trunk.numerics
        ctx = make_context(self.config, self.trunk.rope, n, launch, torch.zeros(launch.n_rows, dtype=torch.int64))
        x = n.rd(rms_norm(proj(taps, self.main_proj, n, ctx.rows), self.main_norm, self.config.rms_norm_eps))
        for stage, cache in zip(self.stages, caches, strict=True):
            publish_rows(stage.attn, proj(x, stage.attn.wkv, n, ctx.rows), ctx, cache)

    def block(self, token: int, position: int, caches: Sequence[LayerCache]) -> list[Tensor]:
        """Output streams f32 ``[b, m, d]`` of each stage for ``token`` behind a context of ``position`` tokens."""
        b = self.block_size
        launch = Launch(False, position, b, b, tuple(range(b)), torch.arange(position, position + b))
        ids, rope = torch.tensor([token] + [self.noise] * (b - 1)), self.trunk.rope
        cis = rope_angles(launch.pos, rope.plain)  # of both tables: a stage has no compressor
        ctx = Context(launch, rope, self.trunk.numerics, cis, cis, None, ids)
        r = Residual(embedding_rows(self.trunk.embed, ids).unsqueeze(1).repeat(1, self.config.hc_mult, 1))
        outs = []
        for stage, cache in zip(self.stages, caches, strict=True):
            r = Residual(stage.block(r, ctx, cache).resolve(ctx))
            outs.append(r.streams)
        return outs

    def collapse(self, streams: Tensor) -> Tensor:
        """Hidden states f32 ``[n, d]`` of the last stage's streams f32 ``[n, m, d]``."""
        c, n = self.config, self.trunk.numerics
        w = (self.hc_fn, self.hc_scale, self.hc_base)
        return hc_head(streams, *w, hc_eps=c.hc_eps, norm_eps=c.rms_norm_eps, numerics=n)

    def logits(self, hidden: Tensor) -> Tensor:
        """A block's f32 ``[b, d]`` -> f32 ``[b, vocab]``, without what depends on the tokens drafted before."""
        return self._head(self.trunk.numerics.rd(rms_norm(hidden, self.norm, self.config.rms_norm_eps)))

    def markov(self, token: int) -> Tensor:
        """Row f32 ``[rank]`` of the token drafted before, for :meth:`bias` and :meth:`confident`."""
        rows = dense((self.markov_w1,)) if self.trunk.device.type == "cpu" else None
        return rows[token] if rows is not None else embedding_rows(self.markov_w1, torch.tensor([token]))[0]

    def bias(self, markov: Tensor) -> Tensor:
        """What the token before adds to the logits, f32 ``[vocab]``."""
        return matmul_rows(markov[None], self.markov_w2, (0,))[0]

    def confident(self, hidden: Tensor, markov: Tensor) -> float:
        """Confidence, a raw logit, from the collapsed hidden state f32 ``[d]``, which is not normed."""
        return float(self.confidence @ torch.cat((hidden, markov)))

    def rows_step(self, s: StepBuilder, taps: Tensor, caches: Sequence[LayerCache]) -> None:
        """Launches of ``fill`` in the decode form, from f32 ``[n_tok, taps * d]`` at the positions of ``s``."""
        self.trunk.embed_step(s)  # for the rotary tables alone
        main_proj = segment_inputs([planes_of(self.main_proj, FORMATS, "proj_ob")])
        x = s.add(PROJ_OB, {"x": taps} | main_proj)["y0"]
        x = s.add(DRAFT_NORM, {"x": x, "norm": self.main_norm, "eps": self.config.rms_norm_eps})["y"]
        weights = segment_inputs([planes_of(stage.attn.wkv, FORMATS, "proj_in") for stage in self.stages])
        made = s.add(PROJ_IN, {"x": x} | weights)
        for i, (stage, cache) in enumerate(zip(self.stages, caches, strict=True)):
            stage.attn.context_step(made[f"y{i}"], s, cache)

    def block_step(self, s: StepBuilder, caches: Sequence[LayerCache]) -> tuple[Tensor, Tensor]:
        """Launches of ``block``, ``collapse`` and ``logits`` for the step's first token, ``s`` being of ``block_size``.

        returns  streams of the last stage f32 [b, m, d]; logits f32 [b, vocab]
        """
        made = s.add(DRAFT_BLOCK, {"words": s.state.words, "noise": self.noise, "n_tok": self.block_size})
        s.tokens = made["tokens"]
        r = Residual(self.trunk.embed_step(s))
        for stage, cache in zip(self.stages, caches, strict=True):
            r = stage.step(r, s, cache)
        made = self.trunk.head_step(r, s, (self.hc_fn, self.hc_scale, self.hc_base), self.norm)
        return r.streams, made["logits"]

    def choose_step(self, s: StepBuilder, logits: Tensor) -> Outputs:
        """Launches that bias a block's row of logits f32 ``[1, vocab]`` by the token drafted last, and choose greedily.

        returns  biased f32 [1, vocab], token i32 [1]
        """
        s.tokens = s.state.word(CHAIN)
        markov = self.trunk.embed_step(s, self.markov_w1)[:, 0]
        planes = planes_of(self.markov_w2, HEAD_FORMATS, "lm_head")
        bias = s.add(LM_HEAD, {"x": markov, "format": planes.packing.format, **planes.tensors})["logits"]
        return s.add(DRAFT_CHOOSE, {"logits": logits, "bias": bias})


class DSparkDrafter:
    """Block drafts of one session (a :class:`ds4.mtp.drafter.Drafter`)."""

    def __init__(self, dspark: DSpark) -> None:
        c = dspark.config
        self.dspark = dspark
        self.layers = dspark.layers
        self.max_tokens = min(dspark.block_size, MAX_DRAFT - 1)
        trunk, width = dspark.trunk, len(c.dspark_target_layer_ids) * c.hidden_size
        self.caches = [stage_cache(c, trunk.formats(), trunk.device) for _ in dspark.stages]
        self.tail = Tail((width,), 0, self._write, trunk.device)

    @property
    def position(self) -> int:
        return self.tail.position

    def _write(self, launch: Launch, taps: Tensor, _ids: Tensor) -> None:
        self.dspark.fill(launch, taps, self.caches)

    def observe(self, launch: Launch, ids: Tensor, streams: Sequence[Tensor]) -> None:
        self.tail.observe(launch, ids, self.dspark.taps(streams))

    def rewind(self, position: int) -> None:
        self.tail.rewind(position)

    @torch.inference_mode()
    def draft(self, history: Sequence[int], k: int, sampler: Sampler) -> Draft:
        check_history(history, self.position)
        k = min(k, self.max_tokens)
        if k < 1:
            return Draft()
        self.tail.fill()
        head, token = self.dspark, int(history[-1])
        hidden = head.collapse(head.block(token, self.position, self.caches)[-1])
        chooser, confidence = Chooser(sampler, history), []
        for c, logits in zip(hidden[:k], head.logits(hidden)[:k], strict=True):
            markov = head.markov(token)
            confidence.append(head.confident(c, markov))
            token = chooser.choose(logits + head.bias(markov))
        return Draft(chooser.tokens, chooser.probs, confidence)
