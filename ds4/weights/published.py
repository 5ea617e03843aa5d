"""The public checkpoints of V4-Flash as tables: dimensions, and name, format and shape of every weight.

What a loader, a planner or a benchmark sees of one that is not there. scripts/fabricate.py writes their headers;
ds4.bench makes models of random weights of them.
Source:  spec weights.md 1, 2, 3.2 and 5; model.md 1.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from ds4.config import ModelConfig
from ds4.errors import Ds4Error
from ds4.weights.checkpoint import Checkpoint, View
from ds4.weights.formats import FORMATS
from ds4.weights.storage import StoredTensor

FLASH = ModelConfig(
    vocab_size=129280,
    hidden_size=4096,
    num_hidden_layers=43,
    num_attention_heads=64,
    head_dim=512,
    qk_rope_head_dim=64,
    q_lora_rank=1024,
    o_groups=8,
    o_lora_rank=1024,
    sliding_window=128,
    compress_ratios=(0, 0, *(4 if layer % 2 == 0 else 128 for layer in range(2, 43))),
    compress_rope_theta=160000.0,
    rope_theta=10000.0,
    rope_factor=16.0,
    rope_original_max_position=65536,
    rope_beta_fast=32.0,
    rope_beta_slow=1.0,
    max_position_embeddings=1 << 20,
    index_n_heads=64,
    index_head_dim=128,
    index_topk=512,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    num_experts_per_tok=6,
    routed_scaling_factor=1.5,
    num_hash_layers=3,
    swiglu_limit=10.0,
    hc_mult=4,
    hc_sinkhorn_iters=20,
    hc_eps=1e-6,
    rms_norm_eps=1e-6,
    n_mtp_layers=0,
    bos_token_id=0,
    eos_token_id=1,
)

_SCALED = {"fp8_block": 128, "mxfp4_official": 32, "nvfp4_modelopt": 16}  # weights of a row that share a scale
Weight = tuple[str, tuple[int, ...]]  # canonical name, shape


def block_weights(c: ModelConfig, layer: int, n_experts: int, *, draft: bool = False) -> Iterator[Weight]:
    """(suffix, shape) of one block; the experts of a matrix as ``ffn.experts.*.wX.weight`` [n_experts, out, in]."""
    m, d, heads = c.hc_mult, c.hidden_size, c.num_attention_heads
    for site in ("attn", "ffn"):
        yield f"hc_{site}_fn", ((2 + m) * m, m * d)
        yield f"hc_{site}_base", ((2 + m) * m,)
        yield f"hc_{site}_scale", (3,)
        yield f"{site}_norm.weight", (d,)
    yield "attn.wq_a.weight", (c.q_lora_rank, d)
    yield "attn.q_norm.weight", (c.q_lora_rank,)
    yield "attn.wq_b.weight", (heads * c.head_dim, c.q_lora_rank)
    yield "attn.wkv.weight", (c.head_dim, d)
    yield "attn.kv_norm.weight", (c.head_dim,)
    yield "attn.attn_sink", (heads,)
    yield "attn.wo_a.weight", (c.o_groups * c.o_lora_rank, heads * c.head_dim // c.o_groups)
    yield "attn.wo_b.weight", (d, c.o_groups * c.o_lora_rank)
    ratio = 0 if draft else c.compress_ratios[layer]
    for prefix, width in (("attn.", c.head_dim), ("attn.indexer.", c.index_head_dim)):
        if ratio == 4 or (ratio and prefix == "attn."):
            wide = width * (2 if ratio == 4 else 1)
            yield f"{prefix}compressor.wkv.weight", (wide, d)
            yield f"{prefix}compressor.wgate.weight", (wide, d)
            yield f"{prefix}compressor.ape", (ratio, wide)
            yield f"{prefix}compressor.norm.weight", (width,)
    if ratio == 4:
        yield "attn.indexer.wq_b.weight", (c.index_n_heads * c.index_head_dim, c.q_lora_rank)
        yield "attn.indexer.weights_proj.weight", (c.index_n_heads, d)
    yield "ffn.gate.weight", (n_experts, d)
    if not draft and layer < c.num_hash_layers:
        yield "ffn.gate.tid2eid", (c.vocab_size, c.num_experts_per_tok)
    else:
        yield "ffn.gate.bias", (n_experts,)
    inter = c.moe_intermediate_size
    for matrix, shape in (("w1", (inter, d)), ("w2", (d, inter)), ("w3", (inter, d))):
        yield f"ffn.experts.*.{matrix}.weight", (n_experts, *shape)
        yield f"ffn.shared_experts.{matrix}.weight", shape


def outer_weights(c: ModelConfig) -> Iterator[Weight]:
    """(name, shape) of everything outside the blocks."""
    yield "embed.weight", (c.vocab_size, c.hidden_size)
    yield "head.weight", (c.vocab_size, c.hidden_size)
    yield "norm.weight", (c.hidden_size,)
    yield "hc_head_fn", (c.hc_mult, c.hc_mult * c.hidden_size)
    yield "hc_head_base", (c.hc_mult,)
    yield "hc_head_scale", (1,)


class Recipe(Protocol):
    """Which format each weight of a checkpoint has, and how many experts a layer kept."""

    def format(self, name: str, layer: int | None, shape: tuple[int, ...]) -> str:
        """A key of ``ds4.weights.formats.FORMATS``; ``name`` without the block's prefix, ``layer`` None outside."""

    def n_experts(self, layer: int, c: ModelConfig) -> int: ...


def antirez_format(name: str, shape: tuple[int, ...]) -> str:
    """What antirez/ds4 stores everything but the experts as (weights.md 3.2)."""
    if "tid2eid" in name:
        return "i32"
    if name in ("hc_attn_fn", "hc_ffn_fn", "hc_head_fn", "embed.weight", "ffn.gate.weight"):
        return "f16"
    if "compressor.w" in name or name.endswith(".ape") or "indexer.w" in name:
        return "f16"
    return "q8_0" if len(shape) > 1 else "f32"


def llama_cpp_format(name: str, shape: tuple[int, ...]) -> str:
    """What llama.cpp's converter stores it as (weights.md 3.2)."""
    if "tid2eid" in name:
        return "i32"
    if name.startswith("hc_") or name.endswith(".ape") or len(shape) == 1:
        return "f32"
    if name in ("embed.weight", "head.weight", "ffn.gate.weight") or "compressor.w" in name:
        return "bf16"
    return "bf16" if "weights_proj" in name else "q8_0"


@dataclass(frozen=True)
class GgufRecipe:
    """A public GGUF: formats of the experts' w1, w2, w3 by layer, of the rest; experts that pruning kept."""

    experts: Callable[[int], tuple[str, str, str]]
    dense: Callable[[str, tuple[int, ...]], str]
    kept: int | None = None

    def format(self, name: str, layer: int | None, shape: tuple[int, ...]) -> str:
        if layer is not None and name.startswith("ffn.experts."):
            return self.experts(layer)[("w1", "w2", "w3").index(name.split(".")[3])]
        return self.dense(name, shape)

    def n_experts(self, layer: int, c: ModelConfig) -> int:
        kept = c.n_routed_experts if self.kept is None or layer < c.num_hash_layers else self.kept
        return min(kept, c.n_routed_experts)


@dataclass(frozen=True)
class SafetensorsRecipe:
    """A public safetensors release: format of the trunk's experts, their number, and the draft stages."""

    experts: str = "mxfp4_official"
    experts_in_all: int = 256
    dspark: bool = True

    def format(self, name: str, layer: int | None, shape: tuple[int, ...]) -> str:
        """As released; draft blocks (``layer`` None) keep MXFP4 experts."""
        if name.startswith("hc_") or name.endswith((".ape", ".bias", ".attn_sink")):
            return "f32"
        if name.endswith("tid2eid"):
            return "i64"
        if name.startswith("ffn.experts."):
            return "mxfp4_official" if layer is None else self.experts
        if name.startswith(("attn.w", "attn.indexer.wq_b", "ffn.shared_experts.", "main_proj", "e_proj", "h_proj")):
            return "fp8_block"
        return "bf16"

    def n_experts(self, layer: int, c: ModelConfig) -> int:
        return min(self.experts_in_all, c.n_routed_experts)


def _sleepy(kept: int) -> GgufRecipe:
    return GgufRecipe(lambda _: ("nvfp4_sleepy", "q2_k", "nvfp4_sleepy"), antirez_format, kept)


_Q2, _Q4 = ("iq2_xxs", "q2_k", "iq2_xxs"), ("q4_k", "q4_k", "q4_k")
GGUF_RECIPES = {
    "q2": GgufRecipe(lambda _: _Q2, antirez_format),
    "q4": GgufRecipe(lambda _: _Q4, antirez_format),
    "q2-37-42-q4": GgufRecipe(lambda layer: _Q4 if layer >= 37 else _Q2, antirez_format),
    "mxfp4-moe": GgufRecipe(lambda _: ("mxfp4", "mxfp4", "mxfp4"), llama_cpp_format),
    "k128": _sleepy(128),
    "k150": _sleepy(150),
    "k180": _sleepy(180),
}
SAFETENSORS_RECIPES = {
    "official-0731": SafetensorsRecipe(),
    "official-preview": SafetensorsRecipe(dspark=False),
    "modelopt-nvfp4-0731": SafetensorsRecipe("nvfp4_modelopt"),
    "0731-reap-k160": SafetensorsRecipe(experts_in_all=160),
}
RECIPES: dict[str, Recipe] = {**GGUF_RECIPES, **SAFETENSORS_RECIPES}


def recipe(name: str) -> Recipe:
    """The recipe of this name. Raises Ds4Error that lists them for another."""
    if name not in RECIPES:
        raise Ds4Error(f"--synthetic {name}: no such recipe; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def trunk_weights(c: ModelConfig, made: Recipe) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(canonical name, format, shape) of every weight of the trunk; experts as stacks with ``*`` in the name."""
    for name, shape in outer_weights(c):
        yield name, made.format(name, None, shape), shape
    for layer in range(c.num_hidden_layers):
        for suffix, shape in block_weights(c, layer, made.n_experts(layer, c)):
            yield f"layers.{layer}.{suffix}", made.format(suffix, layer, shape), shape


def shrunk(c: ModelConfig, layers: int, experts: int, by: int) -> ModelConfig:
    """The first ``layers`` layers of a model with ``experts`` experts a layer, its widths divided by ``by``.

    Head dimensions, window and the ratios of the layers stay. Raises Ds4Error for sizes that make no model.
    """
    if not 1 <= layers <= c.num_hidden_layers:
        raise Ds4Error(f"--layers {layers} is outside 1 to {c.num_hidden_layers}")
    if not c.num_experts_per_tok <= experts <= c.n_routed_experts:
        raise Ds4Error(f"--experts {experts} is outside {c.num_experts_per_tok} to {c.n_routed_experts}")
    names = ("vocab_size", "hidden_size", "num_attention_heads", "q_lora_rank", "o_groups", "o_lora_rank")
    sizes = {name: getattr(c, name) // by for name in (*names, "index_n_heads", "moe_intermediate_size")}
    made = replace(
        c,
        **sizes,
        num_hidden_layers=layers,
        compress_ratios=c.compress_ratios[:layers],
        n_routed_experts=experts,
        num_hash_layers=min(c.num_hash_layers, layers),
    )
    made.validate("--synthetic")
    return made


@dataclass(frozen=True)
class _NoFile:
    """Stands for the file of a checkpoint that is none."""

    path: Path
    bytes: torch.Tensor


def without_file(c: ModelConfig, made: Recipe, title: str) -> Checkpoint:
    """A checkpoint of these dimensions and formats of which only names, formats, shapes and sizes exist.

    Its tensors are on torch's meta device, but for multipliers, which are 0.5. A draft head is not among them.
    """
    plan, total = [], 0
    for name, fmt, shape in trunk_weights(c, made):
        pieces = [(fmt, shape, math.prod(shape[:-1]) * FORMATS[fmt].row_bytes(shape[-1]))]
        if FORMATS[fmt].parts:
            rows, cols = -(-shape[-2] // FORMATS[fmt].row_block), -(-shape[-1] // _SCALED[fmt])
            scales = (*shape[:-2], rows, cols)
            pieces.append((f"{fmt}.scale", scales, math.prod(scales)))
        plan.append((name, shape, pieces))
        total += sum(n_bytes for _, _, n_bytes in pieces)
    file = _NoFile(Path(title), torch.empty(total, dtype=torch.uint8, device="meta"))
    stored, views, offset = [], {}, 0
    for name, shape, pieces in plan:
        tensors = []
        for fmt, dims, n_bytes in pieces:
            tensors.append(StoredTensor(name, fmt, dims, file, offset, n_bytes))  # type: ignore[arg-type]
            offset += n_bytes
        scale = None
        if pieces[0][0].startswith("nvfp4"):
            halves = _NoFile(file.path, torch.full(shape[:1], 0.5).view(torch.uint8))
            scale = StoredTensor(name, "f32", shape[:1], halves, 0, 4 * shape[0])  # type: ignore[arg-type]
        stored += [*tensors, *([scale] if scale else [])]
        parts = dict(zip(("scale",), tensors[1:], strict=False))
        views[name] = View(tensors[0], shape, stack="*" in name, scale=scale, parts=parts)
    return Checkpoint(file.path, "none", c, {}, stored, views, None)
