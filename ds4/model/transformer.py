"""The whole network: embedding, blocks, head; the decode form and the prefill form (spec model.md 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
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
from ds4.kv.cache import KVCache
from ds4.kv.spec import RowFormats
from ds4.model.block import Block, Residual
from ds4.model.context import Context, Rope, make_context
from ds4.model.params import Params, small, table
from ds4.model.steps import StepBuilder, planes_of
from ds4.weights.dense_cache import Weight


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

    def new_cache(self, ctx: int, *, decoded: bool = True) -> KVCache:
        """Empty state for ``ctx`` tokens; ``decoded`` unless kernels will write to it (ds4/kv/cache.py)."""
        return KVCache(self.config, self.formats(), ctx, device=self.device, decoded=decoded)

    def _context(self, launch: Launch, ids: Sequence[int]) -> Context:
        row_ids = [0] * launch.n_rows
        for row, token in zip(launch.rows, ids, strict=True):
            row_ids[row] = token
        return make_context(self.config, self.rope, self.numerics, launch, torch.tensor(row_ids))

    def _streams(self, ctx: Context, cache: KVCache | None, observer: Observer | None = None) -> Tensor:
        """Final streams f32 ``[n_rows, m, d]`` of a launch."""
        e = embedding_rows(self.embed, ctx.ids)
        r = Residual(e.unsqueeze(1).repeat(1, self.config.hc_mult, 1))
        seen, last = {}, len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            r = block(r, ctx, cache.layers[i] if cache is not None else None)
            if i == last or (observer is not None and i in observer.layers):
                seen[i] = r.resolve(ctx)
        if observer is not None:
            observer.observe(ctx.launch, ctx.ids, [seen[i] for i in observer.layers])
        return seen[last]

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
        streams = self._streams(self._context(launch, ids), cache, observer)
        return launch.take(self.logits(streams, launch.rows)).clone()

    def step(self, s: StepBuilder, cache: KVCache) -> Outputs:
        """Launches of a whole decode step; the results of ``lm_head``."""
        embed, head_planes = (
            planes_of(w, formats, where)
            for w, formats, where in (
                (self.embed, EMBED_FORMATS, "embed"),
                (self.head_weight, HEAD_FORMATS, "lm_head"),
            )
        )
        begin = {"tokens": s.tokens, "pos": s.pos, "format": embed.packing.format, **embed.tensors}
        begin |= {"plain": self.rope.plain, "compressed": self.rope.compressed}
        begun = s.add(EMBED, begin)
        s.cis = begun["cis"]
        r = Residual(begun["streams"])
        for s.layer, (block, layer) in enumerate(zip(self.blocks, cache.layers, strict=True)):
            r = block.step(r, s, layer)
        s.layer = None
        end: Inputs = {"y": r.y, "streams": r.streams, "prev_post": r.post, "prev_comb": r.comb, "fn": self.hc_fn}
        end |= {"scale": self.hc_scale, "base": self.hc_base, "norm": self.norm}
        end |= {"hc_eps": self.config.hc_eps, "norm_eps": self.config.rms_norm_eps}
        x = s.add(HC_HEAD, end)["x"]
        return s.add(LM_HEAD, {"x": x, "format": head_planes.packing.format, **head_planes.tensors})

    def prefill(
        self,
        ids: Sequence[int],
        start: int,
        cache: KVCache,
        *,
        all_logits: bool = False,
        on_tile: Callable[[int], None] | None = None,
        observer: Observer | None = None,
    ) -> Tensor:
        """Prefill form, tile by tile: logits f32 ``[vocab]`` of the last token, or ``[n_tok, vocab]`` of all.

        ``on_tile(n_done)`` is called after every tile. The last token's logits do not depend on the chunking.
        """
        with self.on_device():
            return self._prefill(ids, start, cache, all_logits, on_tile, observer)

    def _prefill(
        self,
        ids: Sequence[int],
        start: int,
        cache: KVCache,
        all_logits: bool,
        on_tile: Callable[[int], None] | None,
        observer: Observer | None,
    ) -> Tensor:
        done, outs = 0, []
        while done < len(ids):
            p = start + done
            n = min(len(ids) - done, PREFILL_ROWS - p % PREFILL_ROWS)
            launch = Launch.prefill_tile(p, n)
            streams = self._streams(self._context(launch, ids[done : done + n]), cache, observer)
            done += n
            if all_logits:
                outs.append(self.logits(streams, None)[launch.row_slice])
            elif done == len(ids):
                last = launch.rows[-1]
                return self.logits(streams[last : last + 1], (0,))[0]
            if on_tile is not None:
                on_tile(done)
        return torch.cat(outs)

    def forward_text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Differentiable forward of one whole text without a cache: i64 ``[n]`` -> (logits ``[n, vocab]``, streams).

        ``n`` must be a multiple of every compress ratio; used for training with ``numerics="exact"``.
        """
        launch = Launch.prefill_tile(0, ids.shape[0], n_rows=ids.shape[0])
        ctx = make_context(self.config, self.rope, self.numerics, launch, ids)
        streams = self._streams(ctx, None)
        return self.logits(streams, None), streams


def embedding_rows(w: Weight, ids: Tensor) -> Tensor:
    """Rows ``ids`` i64 ``[n]`` of an embedding as f32 ``[n, d]``; a packed table is read only where needed."""
    return w.take_rows(ids) if not isinstance(w, Tensor) else w[ids]
