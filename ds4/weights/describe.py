"""What a checkpoint holds, as a JSON-able dictionary; the contents of ``ds4 inspect``.

Source:  spec weights.md 5 (recipes, detection) and 6 (bytes per token).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import Any

from ds4.weights.checkpoint import Checkpoint
from ds4.weights.formats import INTEGER_FORMATS
from ds4.weights.generation import identify

# Component of a decoded token's weight traffic -> what its canonical names contain; the first match wins.
_COMPONENTS = (
    ("indexer", (".attn.indexer.wq_b.", ".attn.indexer.weights_proj.", ".indexer.compressor.w")),
    ("compressors", (".attn.compressor.wkv.", ".attn.compressor.wgate.")),
    ("attention projections", (".attn.wq_a.", ".attn.wq_b.", ".attn.wkv.", ".attn.wo_a.", ".attn.wo_b.")),
    ("shared expert", (".ffn.shared_experts.",)),
    ("hyper-connections", ("hc_attn_fn", "hc_ffn_fn", "hc_head_fn")),
    ("router", (".ffn.gate.weight",)),
    ("LM head", ("head.weight",)),
    ("embedding row", ("embed.weight",)),
)
_ORDER = (
    "attention projections",
    "shared expert",
    "routed gate+up",
    "routed down",
    "compressors",
    "indexer",
    "hyper-connections",
    "router",
    "LM head",
    "embedding row",
    "norms, tables and biases",
)
_EXPERTS = ".ffn.experts."
# Group of the recipe line -> components that belong to it.
_RECIPE = {
    "experts": ("routed gate+up", "routed down"),
    "attention": ("attention projections",),
    "shared": ("shared expert",),
    "embeddings": ("embedding row", "LM head"),
}


def describe(ckpt: Checkpoint, *, tensors: bool = True) -> dict[str, Any]:
    """Describe a checkpoint from its headers alone.

    returns  path, container, name, architecture, generation and the evidence for it, warnings, recipe (formats by
             group, most bytes first), layers (count by kind), experts, context_length, parameters (total, active,
             draft), types (count, parameters and bytes by format), total_bytes, draft (the draft head or None),
             bytes_per_token (by component, trunk only, one token, no draft), and with ``tensors`` the tensors as stored
    Source:  bytes_per_token counts what spec weights.md 6 counts, from the packed sizes: each weight once, routed
             experts num_experts_per_tok times the mean expert of their layer, one row of the embedding.
    """
    config, generation = ckpt.config, identify(ckpt)
    traffic: dict[str, float] = defaultdict(float)
    active = 0.0
    parameters = {"trunk": 0, "draft": 0}
    draft_bytes = 0
    by_group: dict[str, Counter[str]] = {group: Counter() for group in _RECIPE}
    counts: dict[str, int] = {}
    for name, fmt, shape, n_bytes in ckpt.stored_groups():
        n_parameters = 0 if fmt in INTEGER_FORMATS else math.prod(shape)
        if name.startswith("mtp."):
            parameters["draft"] += n_parameters
            draft_bytes += n_bytes
            continue
        parameters["trunk"] += n_parameters
        component = _component(name)
        for group, members in _RECIPE.items():
            if component in members:
                by_group[group][fmt] += n_bytes
        share = 1.0
        if _EXPERTS in name:
            prefix = name.partition(_EXPERTS)[0]
            if prefix not in counts:
                counts[prefix] = ckpt.n_experts(prefix)
            share = config.num_experts_per_tok / counts[prefix]
        elif component == "embedding row" or name.endswith(".tid2eid"):
            share = 1 / shape[0]
        traffic[component] += n_bytes * share
        active += n_parameters * share
    bytes_per_token = {component: round(traffic[component]) for component in _ORDER}
    bytes_per_token["total"] = sum(bytes_per_token.values())
    record: dict[str, Any] = {
        "path": str(ckpt.path),
        "container": ckpt.container,
        "name": _name(ckpt),
        "architecture": str(ckpt.metadata.get("general.architecture") or ckpt.metadata.get("model_type")),
        "generation": generation.name,
        "evidence": list(generation.evidence),
        "warnings": list(ckpt.warnings),
        "recipe": {group: [fmt for fmt, _ in by_group[group].most_common()] for group in _RECIPE},
        "layers": _layers(ckpt),
        "experts": {
            "routed": sorted(set(counts.values())) or [config.n_routed_experts],
            "per_token": config.num_experts_per_tok,
            "shared": 1,
            "pruned": ckpt.reap.name if ckpt.reap else None,
        },
        "context_length": config.max_position_embeddings,
        "parameters": {
            "total": parameters["trunk"] + parameters["draft"],
            "active": round(active),
            "draft": parameters["draft"],
        },
        "types": _types(ckpt),
        "total_bytes": ckpt.total_bytes,
        "draft": _draft(ckpt, parameters["draft"], draft_bytes),
        "bytes_per_token": bytes_per_token,
    }
    if tensors:
        record["tensors"] = [
            {"name": t.name, "shape": list(t.shape), "format": t.format, "bytes": t.nbytes} for t in ckpt.tensors()
        ]
    return record


def _component(name: str) -> str:
    """The component of spec weights.md 6 that a canonical trunk tensor belongs to."""
    if _EXPERTS in name:
        return "routed down" if name.endswith(".w2.weight") else "routed gate+up"
    for component, marks in _COMPONENTS:
        if any(mark in name for mark in marks):
            return component
    return "norms, tables and biases"


def _name(ckpt: Checkpoint) -> str:
    """What the file calls itself, or else what it is called."""
    stem = ckpt.path.name if ckpt.path.is_dir() else ckpt.path.stem
    return str(ckpt.metadata.get("general.name") or ckpt.metadata.get("_name_or_path") or stem)


def _draft_kind(ckpt: Checkpoint) -> str | None:
    """ "dspark" or "mtp" by the tensors there are (spec weights.md 1.1), None without a draft head."""
    if "mtp.0.main_proj.weight" in ckpt:
        return "dspark"
    return "mtp" if "mtp.0.e_proj.weight" in ckpt else None


def _draft(ckpt: Checkpoint, parameters: int, n_bytes: int) -> dict[str, Any] | None:
    kind = _draft_kind(ckpt)
    if kind is None:
        return None
    draft = {"kind": kind, "stages": ckpt.config.n_mtp_layers, "parameters": parameters, "bytes": n_bytes}
    return draft | {"path": str(ckpt.draft_path) if ckpt.draft_path else None}


def _layers(ckpt: Checkpoint) -> dict[str, int]:
    config = ckpt.config
    kinds = Counter(config.layer_kind(layer) for layer in range(config.num_hidden_layers))
    layers: dict[str, int] = {"total": config.num_hidden_layers}
    return layers | {kind: kinds[kind] for kind in ("swa", "csa", "hca")} | {"hash_routed": config.num_hash_layers}


def _types(ckpt: Checkpoint) -> list[dict[str, Any]]:
    """Stored tensors by format, most bytes first; block scales count as bytes of the weights they belong to."""
    rows: dict[str, dict[str, Any]] = {}
    for tensor in ckpt.tensors():
        fmt, _, role = tensor.format.partition(".")
        row = rows.setdefault(fmt, {"format": fmt, "count": 0, "parameters": 0, "bytes": 0})
        if not role:
            row["count"] += 1
            row["parameters"] += math.prod(tensor.shape)
        row["bytes"] += tensor.nbytes
    return sorted(rows.values(), key=lambda row: -row["bytes"])
