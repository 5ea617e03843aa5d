"""The DSpark head in the form it is trained in: many blocks of many texts at once, differentiable (spec model.md 7.2).

The same network as ``ds4/mtp/dspark.py``, which drafts one block of one text. Here every matrix is applied to many
blocks at once, the context rows of a text are made once for all its blocks, and every expert computes every token, with
weight zero where it was not chosen: few large products are what a CPU is good at. They are in BF16 under autograd, in
FP32 otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ds4.config import ModelConfig
from ds4.kernels.attn import query
from ds4.kernels.common import apply_rope, rms_norm, rope_angles, rope_frequencies
from ds4.kernels.head import hc_head
from ds4.kernels.mhc import hc_expand, mhc_boundary
from ds4.kernels.moe import swiglu
from ds4.kernels.numerics import resolve
from ds4.kernels.route import route

EXACT = resolve("exact")


def linear(x: Tensor, w: Tensor) -> Tensor:
    """``x w^T`` over the last dimension, f32; the product itself in BF16 while gradients are recorded."""
    if not torch.is_grad_enabled():
        return x @ w.T
    return (x.bfloat16() @ w.bfloat16().T).float()


class BlockStage:
    """One stage over blocks: weights by official name from ``tensors``, ``prefix`` "mtp.0" and so on."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor], prefix: str) -> None:
        self.config = config
        self.sites = [self._site(tensors, f"{prefix}.hc_{name}", f"{prefix}.{name}_norm") for name in ("attn", "ffn")]
        self.attn = {
            n.removeprefix(f"{prefix}.attn."): t for n, t in tensors.items() if n.startswith(f"{prefix}.attn.")
        }
        ffn = f"{prefix}.ffn"
        self.gate, self.bias = tensors[f"{ffn}.gate.weight"], tensors[f"{ffn}.gate.bias"]
        names = [*(f"{ffn}.experts.{e}" for e in range(len(self.gate))), f"{ffn}.shared_experts"]
        self.w1, self.w3 = (torch.cat([tensors[f"{name}.{w}.weight"] for name in names]) for w in ("w1", "w3"))
        self.w2 = torch.cat([tensors[f"{name}.w2.weight"] for name in names], dim=1)
        self.counts = torch.zeros(len(self.gate))

    def _site(self, tensors: Mapping[str, Tensor], mhc: str, norm: str) -> dict[str, Any]:
        """The arguments of ``mhc_boundary`` in front of one sublayer."""
        c = self.config
        site: dict[str, Any] = {part: tensors[f"{mhc}_{part}"] for part in ("fn", "scale", "base")}
        site |= {"norm": tensors[f"{norm}.weight"], "sinkhorn_iters": c.hc_sinkhorn_iters, "numerics": EXACT}
        return site | {"hc_eps": c.hc_eps, "norm_eps": c.rms_norm_eps}

    def rows(self, x: Tensor, cis: Tensor) -> Tensor:
        """KV rows f32 ``[..., head_dim]`` of inputs f32 ``[..., d]`` at the positions of ``cis``."""
        kv = rms_norm(linear(x, self.attn["wkv.weight"]), self.attn["kv_norm.weight"], self.config.rms_norm_eps)
        return apply_rope(kv, cis)

    def attention(self, x: Tensor, context: Tensor, mask: Tensor, cis: Tensor) -> Tensor:
        """x f32 ``[r, a, b, d]``, context rows ``[r, n, width]`` seen where mask ``[r, a, n]`` -> ``[r, a, b, d]``."""
        c, w = self.config, self.attn
        r, a, b, _ = x.shape
        heads, width = c.num_attention_heads, c.head_dim
        qr = rms_norm(linear(x, w["wq_a.weight"]), w["q_norm.weight"], c.rms_norm_eps)
        q = linear(qr, w["wq_b.weight"]).unflatten(-1, (heads, width)).flatten(0, 2)
        q = query(q, cis.flatten(0, 2), c.rms_norm_eps, EXACT).view(r, a, b * heads, width)
        own = self.rows(x, cis)
        before = linear_rows(q.flatten(1, 2), context).view(r, a, b * heads, -1)
        before = before.masked_fill(~mask.unsqueeze(2), -torch.inf)
        within = linear_rows(q.flatten(0, 1), own.flatten(0, 1)).view(r, a, b * heads, b)
        sink = w["attn_sink"].repeat(b).view(1, 1, -1, 1).expand(r, a, -1, 1)
        scores = torch.cat((width**-0.5 * before, width**-0.5 * within, sink), dim=-1)
        p = scores.softmax(-1)
        n = context.shape[1]
        o = linear_rows(p[..., :n].flatten(1, 2), context.transpose(1, 2)).view_as(q)
        o = o + linear_rows(p[..., n : n + b].flatten(0, 1), own.flatten(0, 1).transpose(1, 2)).view_as(q)
        o = apply_rope(o.view(-1, heads, width), cis.flatten(0, 2).unsqueeze(1), inverse=True)
        o = o.view(r * a * b, c.o_groups, -1)
        wo_a = w["wo_a.weight"].unflatten(0, (c.o_groups, -1))
        z = torch.cat([linear(o[:, g], wo_a[g]) for g in range(c.o_groups)], dim=-1)
        return linear(z, w["wo_b.weight"]).view(r, a, b, -1)

    def experts(self, x: Tensor) -> Tensor:
        """f32 ``[n, d]`` -> ``[n, d]``: chosen experts by their weights, and the shared one."""
        c = self.config
        ids, weights = route(
            x, self.gate, bias=self.bias, top_k=c.num_experts_per_tok, route_scale=c.routed_scaling_factor
        )
        with torch.no_grad():
            self.counts += torch.bincount(ids.flatten(), minlength=len(self.counts))
        dense = x.new_zeros(len(x), len(self.gate)).scatter(1, ids, weights)
        dense = F.pad(dense, (0, 1), value=1.0)  # the shared expert comes last
        act = swiglu(linear(x, self.w1), linear(x, self.w3), c.swiglu_limit)
        act = act.unflatten(1, (len(self.gate) + 1, -1)) * dense.unsqueeze(-1)
        return linear(act.flatten(1), self.w2)

    def __call__(self, streams: Tensor, context: Tensor, mask: Tensor, cis: Tensor) -> Tensor:
        """Streams f32 ``[r a b, m, d]`` -> the same; context as for ``attention``, cis ``[r, a, b, n_rope / 2]``."""
        streams, x, post, comb = mhc_boundary(None, streams, None, None, **self.sites[0])
        y = self.attention(x.view(*cis.shape[:3], -1), context, mask, cis).flatten(0, 2)
        streams, x, post, comb = mhc_boundary(y, streams, post, comb, **self.sites[1])
        return hc_expand(self.experts(x), streams, post, comb)


def linear_rows(x: Tensor, rows: Tensor) -> Tensor:
    """``x rows^T`` of each batch: f32 ``[g, i, k]``, ``[g, j, k]`` -> ``[g, i, j]``, as :func:`linear`."""
    if not torch.is_grad_enabled():
        return x @ rows.transpose(1, 2)
    return (x.bfloat16() @ rows.bfloat16().transpose(1, 2)).float()


class BlockNet:
    """The whole head on weights by official name; embedding and head matrix, the trunk's, are among them."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
        assert config.dspark_block_size is not None
        assert config.dspark_noise_token_id is not None
        self.config, self.tensors = config, tensors
        self.block_size, self.noise = config.dspark_block_size, config.dspark_noise_token_id
        self.last = f"mtp.{config.n_mtp_layers - 1}"
        self.stages = [BlockStage(config, tensors, f"mtp.{i}") for i in range(config.n_mtp_layers)]
        self.frequencies = rope_frequencies(config.qk_rope_head_dim, config.rope_theta, 1.0, 0, 1.0, 1.0)

    def hidden(self, taps: Tensor, tokens: Tensor, starts: Tensor) -> Tensor:
        """Collapsed hidden states f32 ``[r, a, b, d]`` of blocks in texts.

        taps    f32 [r, n, taps * d]  of every position of r texts
        tokens  i64 [r, a]            the token each block begins with
        starts  i64 [r, a]            its position: the block sees the window in front of it
        """
        c, t, b = self.config, self.tensors, self.block_size
        x = rms_norm(linear(taps, t["mtp.0.main_proj.weight"]), t["mtp.0.main_norm.weight"], c.rms_norm_eps)
        back = starts.unsqueeze(-1) - torch.arange(taps.shape[1])
        mask = (back > 0) & (back <= c.sliding_window)
        pos = starts.unsqueeze(-1) + torch.arange(b)
        cis = rope_angles(pos, self.frequencies)
        cis_context = rope_angles(torch.arange(taps.shape[1]), self.frequencies)
        ids = F.pad(tokens.unsqueeze(-1), (0, b - 1), value=self.noise)
        streams = t["embed.weight"][ids.flatten()].unsqueeze(1).repeat(1, c.hc_mult, 1)
        for stage in self.stages:
            streams = stage(streams, stage.rows(x, cis_context), mask, cis)
        w = (t[f"{self.last}.hc_head_{part}"] for part in ("fn", "scale", "base"))
        out = hc_head(streams, *w, hc_eps=c.hc_eps, norm_eps=c.rms_norm_eps, numerics=EXACT)
        return out.view(*pos.shape, -1)

    def outputs(self, hidden: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Logits f32 ``[..., vocab]`` and confidence f32 ``[...]`` (a raw logit) of hidden states f32 ``[..., d]``.

        before  i64 [...]  the token in front of the one that is drafted
        """
        t, head = self.tensors, f"{self.last}.markov_head.markov"
        markov = t[f"{head}_w1.weight"][before]
        normed = rms_norm(hidden, t[f"{self.last}.norm.weight"], self.config.rms_norm_eps)
        logits = linear(normed, t["head.weight"]) + linear(markov, t[f"{head}_w2.weight"])
        joined = torch.cat((hidden, markov), dim=-1)
        return logits, joined @ t[f"{self.last}.confidence_head.proj.weight"][0]
