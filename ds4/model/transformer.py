"""The whole network: embedding, blocks, head; the decode form and the prefill form (spec model.md 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ds4.config import ModelConfig
from ds4.kernels.cases import Inputs, Outputs
from ds4.kernels.embed.op import EMBED
from ds4.kernels.embed.op import FORMATS as EMBED_FORMATS
from ds4.kernels.head import hc_head, head
from ds4.kernels.head.op import FORMATS as HEAD_FORMATS
from ds4.kernels.head.op import HC_HEAD, LM_HEAD
from ds4.kernels.launch import PREFILL_ROWS, Launch
from ds4.kernels.numerics import Numerics
from ds4.kernels.threads import each, shared_pieces
from ds4.kv.cache import KVCache
from ds4.kv.spec import RowFormats
from ds4.model.block import Block, Residual
from ds4.model.context import Context, Rope, make_context
from ds4.model.params import Params, small, table
from ds4.model.steps import StepBuilder, Tap, planes_of
from ds4.weights.dense_cache import Weight

PASS_TILES = 16
"""Tiles of a prompt that go through a layer together: weights are decoded once for all of them, and an expert's tokens
come together. It bounds the memory that a prompt takes besides the cache, and changes no result."""


class Observer(Protocol):
    """Reads what layers make while tokens are processed; it changes nothing. A draft head is one (ds4/mtp).

    ``layers``  whose output streams it reads, ascending
    """

    layers: tuple[int, ...]

    def observe(self, launch: Launch, ids: Tensor, streams: Sequence[Tensor]) -> None:
        """One launch is done: input tokens i64 ``[n_rows]``, output streams of each layer f32 ``[n_rows, m, d]``."""


class Transformer:
    """DeepSeek-V4 trunk. On the CPU everything is torch; on a GPU decode steps are launches of kernels (``step``)."""

    def __init__(
        self, config: ModelConfig, params: Params, numerics: Numerics, device: torch.device | str = "cpu"
    ) -> None:
        self.config = config
        self.numerics = numerics
        self.device = torch.device(device)
        with self.on_device():
            self._take(config, params)

    def on_device(self) -> AbstractContextManager[object]:
        """Within it torch makes new tensors on the model's device."""
        return nullcontext() if self.device.type == "cpu" else self.device

    def _take(self, config: ModelConfig, params: Params) -> None:
        m, d = config.hc_mult, config.hidden_size
        self.rope = Rope(config, self.device)
        self.embed = params.expect("embed.weight", (config.vocab_size, d))
        self.blocks = [
            Block(config, params, f"layers.{i}", ratio, hash_routed=i < config.num_hash_layers)
            for i, ratio in enumerate(config.compress_ratios)
        ]
        self.hc_fn = table(params, "hc_head_fn", (m, m * d), (torch.float16,))
        self.hc_scale = small(params, "hc_head_scale", (1,))
        self.hc_base = small(params, "hc_head_base", (m,))
        self.norm = small(params, "norm.weight", (d,))
        self.head_weight = params.expect("head.weight", (config.vocab_size, d))

    def formats(self) -> RowFormats:
        """Row formats of the cache under this model's numerics."""
        n = self.numerics
        return RowFormats.of(self.config, kv_fp8=n.kv_fp8, kv_rope_bf16=n.kv_rope_bf16, index_fp4=n.index_fp4)

    def new_cache(self, ctx: int, *, first: int | None = None, decoded: bool = True) -> KVCache:
        """Empty state for ``ctx`` tokens, with room for the ``first`` of them (None: for all); ``decoded`` unless
        kernels will write to it (ds4/kv/cache.py)."""
        return KVCache(self.config, self.formats(), ctx, first=first, device=self.device, decoded=decoded)

    def _context(self, launch: Launch, ids: Sequence[int]) -> Context:
        row_ids = [0] * launch.n_rows
        for row, token in zip(launch.rows, ids, strict=True):
            row_ids[row] = token
        return make_context(self.config, self.rope, self.numerics, launch, torch.tensor(row_ids))

    def _streams(
        self,
        ctxs: Sequence[Context],
        cache: KVCache | None,
        observer: Observer | None = None,
        on_layer: Callable[[int], None] | None = None,
    ) -> list[Tensor]:
        """Final streams f32 ``[n_rows, m, d]`` of one decode launch or of successive prompt tiles; ``on_layer(n)`` is
        called when ``n`` layers are done."""
        rs = each(self._begin, ctxs)
        seen, last = {}, len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            layer = cache.layers[i] if cache is not None else None
            rs = [block(rs[0], ctxs[0], layer)] if ctxs[0].launch.decode else block.prefill(rs, ctxs, layer)
            if i == last or (observer is not None and i in observer.layers):
                seen[i] = each(Residual.resolve, rs, ctxs)
            if on_layer is not None:
                on_layer(i + 1)
        if observer is not None:
            for tile, ctx in enumerate(ctxs):
                observer.observe(ctx.launch, ctx.ids, [seen[i][tile] for i in observer.layers])
        return seen[last]

    def _begin(self, ctx: Context) -> Residual:
        return Residual(embedding_rows(self.embed, ctx.ids).unsqueeze(1).repeat(1, self.config.hc_mult, 1))

    def logits(self, streams: Tensor, rows: tuple[int, ...] | None) -> Tensor:
        """f32 ``[n_rows, m, d]`` -> f32 ``[n_rows, vocab]``; with ``rows`` only those rows are computed."""
        c = self.config
        x = hc_head(
            streams,
            self.hc_fn,
            self.hc_scale,
            self.hc_base,
            hc_eps=c.hc_eps,
            norm_eps=c.rms_norm_eps,
            numerics=self.numerics,
            rows=rows,
        )
        return head(x, self.norm, self.head_weight, norm_eps=c.rms_norm_eps, numerics=self.numerics, rows=rows)

    def decode(self, ids: Sequence[int], start: int, cache: KVCache, observer: Observer | None = None) -> Tensor:
        """Decode form: 1..8 tokens at positions ``start ..`` -> logits f32 ``[n_tok, vocab]``."""
        launch = Launch.decode_step(start, len(ids))
        (streams,) = self._streams([self._context(launch, ids)], cache, observer)
        return launch.take(self.logits(streams, launch.rows)).clone()

    def step(self, s: StepBuilder, cache: KVCache, tap: Tap | None = None) -> Outputs:
        """Launches of a whole decode step; the results of ``lm_head``."""
        tapped, last = () if tap is None else tap.layers, len(self.blocks) - 1
        r = Residual(self.embed_step(s))
        for i, (block, layer) in enumerate(zip(self.blocks, cache.layers, strict=True)):
            s.layer = i
            seen = partial(tap.tap, s, i - 1) if tap is not None and i - 1 in tapped else None
            r = block.step(r, s, layer, seen)
        s.layer = None
        made = self.head_step(r, s, (self.hc_fn, self.hc_scale, self.hc_base), self.norm)
        if tap is not None and last in tapped:
            tap.tap(s, last, r.streams)
        return made

    def embed_step(self, s: StepBuilder, weight: Weight | None = None) -> Tensor:
        """Launches that begin a step: the tokens' streams f32 ``[n_tok, m, d]``, and the rotary tables ``s.cis``.

        ``weight``: a table of another width, in place of the embedding.
        """
        embed = planes_of(self.embed if weight is None else weight, EMBED_FORMATS, "embed")
        begin = {"tokens": s.tokens, "pos": s.pos, "format": embed.packing.format, **embed.tensors}
        begun = s.add(EMBED, begin | {"plain": self.rope.plain, "compressed": self.rope.compressed})
        s.cis = begun["cis"]
        return begun["streams"]

    def head_step(self, r: Residual, s: StepBuilder, hc: tuple[Tensor, Tensor, Tensor], norm: Tensor) -> Outputs:
        """Launches that end a step: the results of ``lm_head``, and final streams in ``r.streams``.

        ``hc``: fn, scale and base of the collapse, which with ``norm`` are the trunk's or a draft block's.
        """
        planes = planes_of(self.head_weight, HEAD_FORMATS, "lm_head")
        end: Inputs = {"y": r.y, "streams": r.streams, "prev_post": r.post, "prev_comb": r.comb, "norm": norm}
        end |= dict(zip(("fn", "scale", "base"), hc, strict=True))
        x = s.add(HC_HEAD, end | {"hc_eps": self.config.hc_eps, "norm_eps": self.config.rms_norm_eps})["x"]
        return s.add(LM_HEAD, {"x": x, "format": planes.packing.format, **planes.tensors})

    def prefill(
        self,
        ids: Sequence[int],
        start: int,
        cache: KVCache,
        *,
        all_logits: bool = False,
        taken: list[int] | None = None,
        progress: Callable[[int], None] | None = None,
        observer: Observer | None = None,
    ) -> Tensor:
        """Prefill form: logits f32 ``[vocab]`` of the last token, or ``[n_tok, vocab]`` of all.

        Tokens go through the layers in passes of up to ``PASS_TILES`` tiles; results do not depend on the chunking.
        A pass's tokens are appended to ``taken`` when they are there to stay: broken off by an error or Ctrl-C, it
        leaves ``cache`` as behind the last of them. ``progress(n)`` is called after every layer of a pass, n being the
        share of the work that is done, counted in tokens.
        """
        with self.on_device(), shared_pieces() if self.device.type == "cpu" else nullcontext():
            kept, done, outs = [] if taken is None else taken, 0, []
            while done < len(ids):
                part = list(ids[done : done + PASS_TILES * PREFILL_ROWS - (start + done) % PREFILL_ROWS])
                after = done + len(part)
                with cache.undone_if(partial(is_length, kept, len(kept))):
                    ctxs = [self._context(*tile) for tile in _tiles(part, start + done)]
                    on_layer = None if progress is None else partial(self._share, progress, done, len(part))
                    streams = self._streams(ctxs, cache, observer, on_layer)
                    if all_logits:
                        outs += each(self._tile_logits, streams, ctxs)
                    elif after == len(ids):
                        last = ctxs[-1].launch.rows[-1]
                        outs.append(self.logits(streams[-1][last : last + 1], (0,))[0])
                    kept += part  # a single step: Ctrl-C comes before or after it
                done = after
            return torch.cat(outs)

    def _share(self, progress: Callable[[int], None], done: int, n: int, layers: int) -> None:
        progress(done + n * layers // len(self.blocks))

    def _tile_logits(self, streams: Tensor, ctx: Context) -> Tensor:
        return self.logits(streams, None)[ctx.launch.row_slice]

    def forward_text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Differentiable forward of one whole text without a cache: i64 ``[n]`` -> (logits ``[n, vocab]``, streams).

        ``n`` must be a multiple of every compress ratio; used for training with ``numerics="exact"``.
        """
        launch = Launch.prefill_tile(0, ids.shape[0], n_rows=ids.shape[0])
        ctx = make_context(self.config, self.rope, self.numerics, launch, ids)
        (streams,) = self._streams([ctx], None)
        return self.logits(streams, None), streams


def is_length(items: Sequence[int], n: int) -> bool:
    """Whether there are ``n`` of them."""
    return len(items) == n


def _tiles(ids: Sequence[int], start: int) -> Iterator[tuple[Launch, Sequence[int]]]:
    """The aligned tiles of tokens at positions ``start ..``."""
    done = 0
    while done < len(ids):
        n = min(len(ids) - done, PREFILL_ROWS - (start + done) % PREFILL_ROWS)
        yield Launch.prefill_tile(start + done, n), ids[done : done + n]
        done += n


def embedding_rows(w: Weight, ids: Tensor) -> Tensor:
    """Rows ``ids`` i64 ``[n]`` of an embedding as f32 ``[n, d]``; a packed table is read only where needed."""
    return w.take_rows(ids) if not isinstance(w, Tensor) else w[ids]
