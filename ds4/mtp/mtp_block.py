"""The preview generation's multi-token-prediction block (spec model.md 7.1).

Convention (also of the bundled model's training): the pair (streams h_p of the trunk at position p, token x_{p+1}) is
processed at rotary position p and predicts x_{p+2}. The first pair of a text is (h_0, x_1); nothing is put before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.config import ModelConfig
from ds4.kernels.common import rms_norm
from ds4.kernels.head import hc_head, head
from ds4.kernels.launch import Launch
from ds4.kernels.proj import Rows, proj
from ds4.kv.cache import LayerCache
from ds4.model.block import Block, Residual
from ds4.model.context import Context, make_context
from ds4.model.params import Params, small
from ds4.model.transformer import Transformer, embedding_rows


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
        self.block = Block(config, params, prefix, 0, hash_routed=False)

    def streams(self, h: Tensor, ctx: Context, cache: LayerCache | None) -> Tensor:
        """Block output z f32 ``[n, m, d]`` from streams ``h`` ``[n, m, d]`` and next tokens ``ctx.ids`` ``[n]``."""
        eps, n = self.config.rms_norm_eps, ctx.numerics
        e = proj(n.rd(rms_norm(embedding_rows(self.trunk.embed, ctx.ids), self.enorm, eps)), self.e_proj, n, ctx.rows)
        # hnorm works on each stream by itself, so the streams are simply more rows of the same product.
        hn = n.rd(rms_norm(h, self.hnorm, eps))
        hp = torch.stack([proj(hn[:, i], self.h_proj, n, ctx.rows) for i in range(h.shape[1])], dim=1)
        return self.block(Residual(n.rd(e.unsqueeze(1) + hp)), ctx, cache).resolve(ctx)

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
        ctx = make_context(self.config, self.trunk.rope, self.trunk.numerics, launch, next_ids)
        return self.logits(self.streams(h, ctx, None))
