"""The prefill form of a layer as launches: what a GPU runs for a prompt's tokens (ds4/model/prefill_pass.py).

As the ``step`` methods of the parts, for any number of tokens, with products on tensor cores: activations enter them as
BF16, as in the official code, and sums are FP32. A token's result does not depend on which others are in the launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.attn.prefill_op import ATTN_PREFILL
from ds4.kernels.cases import Inputs
from ds4.kernels.gemm.op import GEMM
from ds4.kernels.indexer.op import INDEX_SCORE, INDEX_TOPK
from ds4.kernels.kv_publish.prefill_op import KV_PREFILL
from ds4.kernels.moe.prefill_op import MOE_COMBINE, MOE_DOWN_GEMM, MOE_GROUP, MOE_UP_GEMM
from ds4.kernels.moe.prefill_plan import expert_tile
from ds4.kernels.packing import PACKINGS, Planes
from ds4.kernels.proj.op import FORMATS, segment_inputs
from ds4.kernels.route.select_op import ROUTE_SELECT
from ds4.kv.cache import LayerCache
from ds4.model.attention import Attention
from ds4.model.block import Block, Residual
from ds4.model.indexer import Indexer
from ds4.model.moe import MoE
from ds4.model.prefill_state import PassBuilder
from ds4.model.steps import planes_of
from ds4.weights.dense_cache import Weight

_FLOATS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def block_pass(block: Block, r: Residual, s: PassBuilder, cache: LayerCache) -> Residual:
    """Launches of one block."""
    streams, x, post, comb = block.attn_site.step(r, s, s.count)
    s.resolved()
    r = Residual(streams, attention_pass(block.attn, x, s, cache), post, comb)
    streams, x, post, comb = block.ffn_site.step(r, s, s.count)
    return Residual(streams, moe_pass(block.moe, x, s), post, comb)


def attention_pass(attn: Attention, x: Tensor, s: PassBuilder, cache: LayerCache) -> Tensor:
    """bf16 ``[n_rows, d]`` -> f32 ``[n_rows, d]``; writes the cache, then each token attends what it may see."""
    raw = gemm(x, attn.input_planes("gemm"), s, "f32")
    inputs = attn.publish_inputs(raw, s, cache)
    made = s.add(KV_PREFILL[attn.kind], inputs | {"count": s.count, "window": attn.window})
    queries: list[Weight] = [attn.wq_b]
    if attn.indexer is not None:
        queries.append(attn.indexer.wq_b)
    weights = [planes_of(w, FORMATS, "gemm") for w in queries]
    q = s.region("wide", (s.n_tok, attn.n_heads, attn.width), torch.bfloat16)
    y = gemm(made["qr"], weights, s, *("bf16", "f32")[: len(weights)], into={"y0": q.flatten(1)})
    chosen = None
    if attn.indexer is not None:
        chosen = choice_pass(attn.indexer, y[1].unflatten(1, (attn.indexer.n_heads, -1)), raw[6], s, cache)
    core: Inputs = {"q": q, "cis": attn.cis_step(s), "sink": attn.sink, "rows": made["rows"], "pool": cache.pool}
    core |= {"selected": chosen, "pos": s.pos, "count": s.count}
    core |= {"window": attn.window, "ratio": attn.ratio, "eps": attn.eps}
    o = s.add(ATTN_PREFILL, core, into={"o": s.region("narrow", q.shape, torch.bfloat16)})["o"]
    (z,) = gemm(o.view(s.n_tok, attn.n_groups, -1), [planes_of(attn.wo_a, FORMATS, "gemm")], s, "bf16")
    return gemm(z, [planes_of(attn.wo_b, FORMATS, "gemm")], s, "f32")[0]


def choice_pass(indexer: Indexer, q: Tensor, weights: Tensor, s: PassBuilder, cache: LayerCache) -> Tensor:
    """The entries that each token attends, i32 ``[n_rows, top_k]``, ascending, then -1; q and weights raw.

    So many tokens at a time that their scores of the whole context take SCORES_BYTES (ds4/model/prefill_state.py).
    """
    assert cache.keys is not None
    chosen = s.kept("chosen", (s.n_tok, indexer.top_k), torch.int32)
    scores = s.kept("scores", (s.score_rows, cache.keys.shape[0]), torch.float32)
    for i, pos in enumerate(s.starts):
        rows = slice(i * s.score_rows, (i + 1) * s.score_rows)
        inputs: Inputs = {"q": q[rows], "cis": s.cis[1][rows], "weights": weights[rows], "keys": cache.keys, "pos": pos}
        inputs |= {"weight_scale": indexer.weight_scale, "top_k": indexer.top_k}
        s.add(INDEX_SCORE, inputs, into={"scores": scores})
        s.add(INDEX_TOPK, {"scores": scores, "pos": pos, "top_k": indexer.top_k}, into={"selected": chosen[rows]})
    return chosen


def moe_pass(moe: MoE, x: Tensor, s: PassBuilder) -> Tensor:
    """bf16 ``[n_rows, d]`` -> f32 ``[n_rows, d]``."""
    where, up, down = moe.kernel_inputs
    gate = where["gate"]
    packing = PACKINGS[_FLOATS[gate.dtype]]
    router = Planes(packing, gate.shape[0], gate.shape[1], {packing.planes[0].name: gate})
    (logits,) = gemm(x, [router], s, "f32")
    rule = {name: where[name] for name in ("bias", "tid2eid", "top_k", "route_scale")}
    tokens = None if where["tid2eid"] is None else s.tokens
    picked = s.add(ROUTE_SELECT, {"logits": logits, "count": s.count, "tokens": tokens, **rule})
    n_experts, (inter, d) = gate.shape[0], moe.shared.w1.shape
    sizes = {"d": d, "inter": inter, "n_experts": n_experts, "n_pairs": s.n_tok * moe.top_k}
    tile = expert_tile((up["w1_format"], up["w3_format"]), down["w2_format"], **sizes, device=x.device)
    group = s.add(MOE_GROUP, {"ids": picked["ids"], "count": s.count, "n_experts": n_experts, "tile": tile})
    n_slots = moe.top_k + 1
    mid = s.region("narrow", (s.n_tok, n_slots, inter), torch.bfloat16)
    parts = s.region("wide", (s.n_tok, n_slots, d), torch.bfloat16)
    given = {"count": s.count, "tile": tile, **group}
    s.add(MOE_UP_GEMM, {"x": x, "weights": picked["weights"], **given, **up}, into={"mid": mid})
    s.add(MOE_DOWN_GEMM, {"mid": mid, **given, **down}, into={"parts": parts})
    return s.add(MOE_COMBINE, {"parts": parts, "count": s.count})["y"]


def gemm(
    x: Tensor, weights: list[Planes], s: PassBuilder, *out: str, into: dict[str, Tensor] | None = None
) -> list[Tensor]:
    """Launches of products that share ``x``; ``out``: dtypes of the results, or one for all of them."""
    dtypes = out if len(out) > 1 else out * len(weights)
    made = s.add(GEMM, {"x": x, "count": s.count, "out": dtypes, **segment_inputs(weights)}, into)
    return [made[f"y{i}"] for i in range(len(weights))]
