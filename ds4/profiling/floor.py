"""The floor of a step's weight traffic: the bytes that the checkpoint stores for the same weights.

Source:  spec kernels.md a.2, weights.md 6; summed over everything, one token, it is the total of ``ds4 inspect``.
"""

from __future__ import annotations

import re
from collections import defaultdict

from ds4.profiling.traffic import expected_distinct
from ds4.weights.checkpoint import Checkpoint

Place = tuple[str, int | None]  # (operation, layer)

# Canonical names without "layers.N." -> the operation that reads them; the first match wins.
_READERS = tuple(
    (re.compile(pattern), operation)
    for pattern, operation in (
        (r"attn\.(wq_a|wkv|compressor\.(wkv|wgate))\.weight", "proj_in"),
        (r"attn\.indexer\.(weights_proj|compressor\.(wkv|wgate))\.weight", "proj_in"),
        (r"attn\.(indexer\.)?wq_b\.weight", "proj_q"),
        (r"attn\.wo_a\.weight", "proj_oa"),
        (r"attn\.wo_b\.weight", "proj_ob"),
        (r"attn\.attn_sink", "attn_decode"),
        (r"attn\.(q_norm|kv_norm|(indexer\.)?compressor\.norm)\.weight", "kv_publish"),
        (r"attn\.(indexer\.)?compressor\.ape", "kv_publish"),
        (r"hc_(attn|ffn)_(fn|base|scale)|(attn|ffn)_norm\.weight", "mhc_boundary"),
        (r"ffn\.gate\.(weight|bias|tid2eid)", "route"),
        (r"ffn\.(experts\.\*|experts\.\d+|shared_experts)\.w[13]\.weight", "moe_up"),
        (r"ffn\.(experts\.\*|experts\.\d+|shared_experts)\.w2\.weight", "moe_down"),
        (r"hc_head_(fn|base|scale)|norm\.weight", "hc_head"),
        (r"head\.weight", "lm_head"),
        (r"embed\.weight", "embed"),
    )
)
_LAYER = re.compile(r"layers\.(\d+)\.(.*)")


def stored_bytes(checkpoint: Checkpoint, n_tok: int) -> dict[Place, float]:
    """Bytes as stored of the weights that each operation reads in a step of ``n_tok`` tokens, the trunk's only.

    Every weight counts once; routed experts as many as ``expected_distinct`` says; one row a token of what is looked up
    by token. The three forms of ``kv_publish`` are one here.
    """
    config = checkpoint.config
    found: dict[Place, float] = defaultdict(float)
    shares: dict[str, float] = {}
    for name, _format, shape, n_bytes in checkpoint.stored_groups():
        if name.startswith("mtp."):
            continue
        match = _LAYER.fullmatch(name)
        layer, rest = (int(match[1]), match[2]) if match else (None, name)
        operation = next(operation for pattern, operation in _READERS if pattern.fullmatch(rest))
        share = 1.0
        if ".experts." in name:
            prefix = name.partition(".ffn.")[0]
            if prefix not in shares:
                n_experts = checkpoint.n_experts(prefix)
                shares[prefix] = expected_distinct(n_experts, config.num_experts_per_tok, n_tok) / n_experts
            share = shares[prefix]
        elif operation == "embed" or rest.endswith(".tid2eid"):
            share = min(1.0, n_tok / shape[0])
        found[operation, layer] += n_bytes * share
    return dict(found)
