"""One block: attention and experts between mHC boundaries (spec model.md 2.0)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds4.config import ModelConfig
from ds4.kernels.mhc import hc_expand, mhc_boundary
from ds4.kernels.mhc.op import OPERATIONS as BOUNDARIES
from ds4.kernels.mhc.op import Act
from ds4.kernels.threads import each
from ds4.kv.cache import LayerCache
from ds4.model.attention import Attention
from ds4.model.context import Context
from ds4.model.moe import MoE
from ds4.model.params import Params, small, table
from ds4.model.steps import StepBuilder


class Residual(NamedTuple):
    """Residual streams f32 ``[n, m, d]`` with the last sublayer's output not yet mixed in (the next boundary does it).

    ``y`` f32 ``[n, d]``, ``post`` f32 ``[n, m]``, ``comb`` f32 ``[n, m, m]``; all None before the first sublayer.
    """

    streams: Tensor
    y: Tensor | None = None
    post: Tensor | None = None
    comb: Tensor | None = None

    def resolve(self, ctx: Context) -> Tensor:
        """Streams with the pending output mixed in."""
        if self.y is None or self.post is None or self.comb is None:
            return self.streams
        return ctx.numerics.rd(hc_expand(self.y, self.streams, self.post, self.comb))


class Site:
    """mHC parameters and norm in front of one sublayer."""

    def __init__(self, config: ModelConfig, params: Params, prefix: str, name: str) -> None:
        m, d = config.hc_mult, config.hidden_size
        self.fn = table(params, f"{prefix}.hc_{name}_fn", ((2 + m) * m, m * d), (torch.float16,))
        self.scale = small(params, f"{prefix}.hc_{name}_scale", (3,))
        self.base = small(params, f"{prefix}.hc_{name}_base", ((2 + m) * m,))
        self.norm = small(params, f"{prefix}.{name}_norm.weight", (d,))
        self.iters, self.hc_eps, self.norm_eps = config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps

    def __call__(self, r: Residual, ctx: Context) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(streams, x, post, comb): the boundary in front of this site's sublayer."""
        return mhc_boundary(
            r.y,
            r.streams,
            r.post,
            r.comb,
            fn=self.fn,
            scale=self.scale,
            base=self.base,
            norm=self.norm,
            sinkhorn_iters=self.iters,
            hc_eps=self.hc_eps,
            norm_eps=self.norm_eps,
            numerics=ctx.numerics,
            rows=ctx.rows,
        )

    def step(self, r: Residual, s: StepBuilder, count: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same as launches; with ``count``, the prefill form's, x is rounded to bf16 as its products take it."""
        act: Act = "none" if count is None else "bf16"
        inputs = {
            "y": r.y,
            "streams": r.streams,
            "prev_post": r.post,
            "prev_comb": r.comb,
            "fn": self.fn,
            "scale": self.scale,
            "base": self.base,
            "norm": self.norm,
            "sinkhorn_iters": self.iters,
            "hc_eps": self.hc_eps,
            "norm_eps": self.norm_eps,
        }
        made = s.add(BOUNDARIES[act], inputs | {"count": count})
        return made["streams"], made["rounded" if act == "bf16" else "x"], made["post"], made["comb"]


class Block:
    """Attention and experts of one layer; ``ratio`` 0 for sliding layers and draft blocks."""

    attention: type[Attention] = Attention
    experts: type[MoE] = MoE

    def __init__(self, config: ModelConfig, params: Params, prefix: str, ratio: int, *, hash_routed: bool) -> None:
        self.attn_site = Site(config, params, prefix, "attn")
        self.ffn_site = Site(config, params, prefix, "ffn")
        self.attn = self.attention(config, params, f"{prefix}.attn", ratio)
        self.moe = self.experts(config, params, f"{prefix}.ffn", hash_routed=hash_routed)

    def __call__(self, r: Residual, ctx: Context, cache: LayerCache | None) -> Residual:
        """One launch, in either form."""
        if not ctx.launch.decode:
            return self.prefill([r], [ctx], cache)[0]
        assert cache is not None
        streams, x, post, comb = self.attn_site(r, ctx)
        y = self.attn.decode(x, ctx, cache)
        streams, x, post, comb = self.ffn_site(Residual(streams, y, post, comb), ctx)
        return Residual(streams, self.moe(x, ctx), post, comb)

    def prefill(self, rs: Sequence[Residual], ctxs: Sequence[Context], cache: LayerCache | None) -> list[Residual]:
        """Successive tiles of a prompt."""
        streams, xs, post, comb = zip(*each(self.attn_site, rs, ctxs), strict=True)
        rs = list(map(Residual, streams, self.attn.prefill(xs, ctxs, cache), post, comb))
        streams, xs, post, comb = zip(*each(self.ffn_site, rs, ctxs), strict=True)
        return list(map(Residual, streams, self.moe.prefill(xs, ctxs), post, comb))

    def step(
        self, r: Residual, s: StepBuilder, cache: LayerCache, seen: Callable[[Tensor], None] | None = None
    ) -> Residual:
        """Launches of the decode step; ``seen`` adds some that read the block's input streams f32 ``[n_tok, m, d]``."""
        streams, x, post, comb = self.attn_site.step(r, s)
        if seen is not None:
            seen(streams)
        return self.ffn_step(Residual(streams, self.attn.step(x, s, cache), post, comb), s)

    def ffn_step(self, r: Residual, s: StepBuilder) -> Residual:
        """Launches of the second half, behind attention."""
        streams, x, post, comb = self.ffn_site.step(r, s)
        return Residual(streams, self.moe.step(x, s), post, comb)
