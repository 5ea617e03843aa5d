"""Context rows of a draft stage: its attention's KV rows, made from an input without running the rest of the stage."""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.config import ModelConfig
from ds4.kernels.common import apply_rope, rms_norm
from ds4.kv.cache import LayerCache
from ds4.kv.spec import MAX_DRAFT, MAX_UNDONE, RowFormats, layer_spec
from ds4.model.attention import Attention
from ds4.model.context import Context


def publish_rows(attn: Attention, kv: Tensor, ctx: Context, cache: LayerCache) -> None:
    """Norm, rotate and store the raw KV projections f32 ``[n_rows, head_dim]`` of a launch (spec model.md 2.3)."""
    rd = ctx.numerics.rd
    kv = rd(apply_rope(rd(rms_norm(kv, attn.kv_norm, attn.eps)), ctx.cis(attn.ratio)))
    cache.publish(ctx.launch.take(kv), ctx.launch.start)


def stage_cache(
    config: ModelConfig, formats: RowFormats, device: torch.device | str = "cpu", *, decoded: bool = True
) -> LayerCache:
    """Empty ring of one draft stage; ``decoded`` unless kernels will write to it.

    A chained draft writes rows in front of the text, and tokens may be undone behind it: slots for both keep the rows
    that either needs.
    """
    spec = layer_spec(config, 0, max_draft=MAX_UNDONE + MAX_DRAFT)
    return LayerCache(spec, formats, 0, device=device, decoded=decoded)
