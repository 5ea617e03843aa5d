"""Full-size checkpoints without the weights: real headers of V4-Flash over sparse files, to try a loader with.

    python scripts/fabricate.py q2 q2.gguf && ds4 inspect q2.gguf

A file has the size, names, types and dimensions of the public one (spec weights.md 1, 2, 3.2 and 5); its weights are
holes, which read as zeros and take no room on disk. Tests and ``scripts/inspect_recipes.py`` use the same functions.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HIDDEN, VOCAB, LAYERS, HASH_LAYERS = 4096, 129280, 43, 3
HEADS, HEAD_DIM, Q_LORA, GROUPS, O_LORA, INTER = 64, 512, 1024, 8, 1024, 2048
STREAMS, MIX = 4 * HIDDEN, 24
RATIOS = [0, 0] + [4 if layer % 2 == 0 else 128 for layer in range(2, LAYERS)]

# ggml type -> (id, weights a block, bytes a block)
GGML = {
    **{"F32": (0, 1, 4), "F16": (1, 1, 2), "BF16": (30, 1, 2), "I32": (26, 1, 4), "Q8_0": (8, 32, 34)},
    **{"Q2_K": (10, 256, 84), "Q4_K": (12, 256, 144), "IQ2_XXS": (16, 256, 66), "MXFP4": (39, 32, 17)},
    "NVFP4": (40, 256, 144),  # the sleepy form: super-blocks, chosen by the tensor's name
}


def block_shapes(layer: int, n_experts: int, *, draft: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(suffix, shape) of one block in official naming; the experts of one matrix as ``ffn.experts.wX.weight``."""
    for site in ("attn", "ffn"):
        yield f"hc_{site}_fn", (MIX, STREAMS)
        yield f"hc_{site}_base", (MIX,)
        yield f"hc_{site}_scale", (3,)
        yield f"{site}_norm.weight", (HIDDEN,)
    yield "attn.wq_a.weight", (Q_LORA, HIDDEN)
    yield "attn.q_norm.weight", (Q_LORA,)
    yield "attn.wq_b.weight", (HEADS * HEAD_DIM, Q_LORA)
    yield "attn.wkv.weight", (HEAD_DIM, HIDDEN)
    yield "attn.kv_norm.weight", (HEAD_DIM,)
    yield "attn.attn_sink", (HEADS,)
    yield "attn.wo_a.weight", (GROUPS * O_LORA, HEADS * HEAD_DIM // GROUPS)
    yield "attn.wo_b.weight", (HIDDEN, GROUPS * O_LORA)
    ratio = 0 if draft else RATIOS[layer]
    for prefix, width in (("attn.", HEAD_DIM), ("attn.indexer.", 128)):
        if ratio == 4 or (ratio and prefix == "attn."):
            wide = width * (2 if ratio == 4 else 1)
            yield f"{prefix}compressor.wkv.weight", (wide, HIDDEN)
            yield f"{prefix}compressor.wgate.weight", (wide, HIDDEN)
            yield f"{prefix}compressor.ape", (ratio, wide)
            yield f"{prefix}compressor.norm.weight", (width,)
    if ratio == 4:
        yield "attn.indexer.wq_b.weight", (64 * 128, Q_LORA)
        yield "attn.indexer.weights_proj.weight", (64, HIDDEN)
    yield "ffn.gate.weight", (n_experts, HIDDEN)
    if not draft and layer < HASH_LAYERS:
        yield "ffn.gate.tid2eid", (VOCAB, 6)
    else:
        yield "ffn.gate.bias", (n_experts,)
    for matrix, shape in (("w1", (INTER, HIDDEN)), ("w2", (HIDDEN, INTER)), ("w3", (INTER, HIDDEN))):
        yield f"ffn.experts.{matrix}.weight", (n_experts, *shape)
        yield f"ffn.shared_experts.{matrix}.weight", shape


def globals_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of everything outside the blocks."""
    yield "embed.weight", (VOCAB, HIDDEN)
    yield "head.weight", (VOCAB, HIDDEN)
    yield "norm.weight", (HIDDEN,)
    yield "hc_head_fn", (4, STREAMS)
    yield "hc_head_base", (4,)
    yield "hc_head_scale", (1,)


# GGUF


def az_type(suffix: str, shape: tuple[int, ...]) -> str:
    """What antirez/ds4 stores everything but the experts as (weights.md 3.2)."""
    if "tid2eid" in suffix:
        return "I32"
    if suffix in ("hc_attn_fn", "hc_ffn_fn", "hc_head_fn", "embed.weight", "ffn.gate.weight"):
        return "F16"
    if "compressor.w" in suffix or suffix.endswith(".ape") or "indexer.w" in suffix:
        return "F16"
    return "Q8_0" if len(shape) > 1 else "F32"


def lc_type(suffix: str, shape: tuple[int, ...]) -> str:
    """What llama.cpp's converter stores it as (weights.md 3.2)."""
    if "tid2eid" in suffix:
        return "I32"
    if suffix.startswith("hc_") or suffix.endswith(".ape") or len(shape) == 1:
        return "F32"
    if suffix in ("embed.weight", "head.weight", "ffn.gate.weight") or "compressor.w" in suffix:
        return "BF16"
    return "BF16" if "weights_proj" in suffix else "Q8_0"


@dataclass(frozen=True)
class GgufRecipe:
    """A public GGUF: types of the experts' three matrices by layer, of the rest, kept experts where it was pruned."""

    experts: Callable[[int], tuple[str, str, str]]
    dense: Callable[[str, tuple[int, ...]], str]
    kept: int | None = None
    name: str = "DeepSeek V4 Flash"


def _sleepy(kept: int) -> GgufRecipe:
    return GgufRecipe(lambda _: ("NVFP4", "Q2_K", "NVFP4"), az_type, kept)


_Q2, _Q4 = ("IQ2_XXS", "Q2_K", "IQ2_XXS"), ("Q4_K", "Q4_K", "Q4_K")
GGUF_RECIPES = {
    "q2": GgufRecipe(lambda _: _Q2, az_type),
    "q4": GgufRecipe(lambda _: _Q4, az_type),
    "q2-37-42-q4": GgufRecipe(lambda layer: _Q4 if layer >= 37 else _Q2, az_type),
    "mxfp4-moe": GgufRecipe(lambda _: ("MXFP4", "MXFP4", "MXFP4"), lc_type),
    "k128": _sleepy(128),
    "k150": _sleepy(150),
    "k180": _sleepy(180),
}


def gguf_tensors(recipe: GgufRecipe) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(GGUF name, ggml type, row-major shape) in file order."""
    from ds4.weights import names

    for name, shape in globals_shapes():
        place = names.to_gguf(name)
        assert place is not None
        yield place[0], recipe.dense(name, shape), shape
    stacks = {matrix: stem for stem, matrix in names.EXPERTS.items()}
    for layer in range(LAYERS):
        n_experts = 256 if recipe.kept is None or layer < HASH_LAYERS else recipe.kept
        types = dict(zip(("w1", "w2", "w3"), recipe.experts(layer), strict=True))
        for suffix, shape in block_shapes(layer, n_experts):
            if suffix.startswith("ffn.experts."):
                matrix = suffix.split(".")[2]
                stem = f"blk.{layer}.{stacks[matrix]}"
                if types[matrix] == "NVFP4":
                    stem = stem.removesuffix(".weight")
                    yield f"{stem}.nvfp4_weight", "NVFP4", shape
                    yield f"{stem}.nvfp4_scale_2", "F32", (n_experts,)
                else:
                    yield stem, types[matrix], shape
                continue
            place = names.to_gguf(f"layers.{layer}.{suffix}")
            assert place is not None
            yield place[0], recipe.dense(suffix, shape), shape


def gguf_metadata(recipe: GgufRecipe) -> dict[str, Any]:
    """The keys of weights.md 3.1, with a vocabulary of the real size: most of a header is its tokenizer."""
    keys: dict[str, Any] = {"general.architecture": "deepseek4", "general.name": recipe.name}
    keys |= {
        f"deepseek4.{key}": value
        for key, value in {
            **{"block_count": LAYERS, "context_length": 1 << 20, "vocab_size": VOCAB, "embedding_length": HIDDEN},
            **{"attention.head_count": HEADS, "attention.head_count_kv": 1, "attention.key_length": HEAD_DIM},
            **{"attention.value_length": HEAD_DIM, "attention.layer_norm_rms_epsilon": 1e-6},
            **{"attention.q_lora_rank": Q_LORA, "attention.output_lora_rank": O_LORA},
            **{"attention.output_group_count": GROUPS, "attention.sliding_window": 128},
            **{"attention.indexer.head_count": 64, "attention.indexer.key_length": 128, "attention.indexer.top_k": 512},
            **{"attention.compress_ratios": [*RATIOS, 0], "attention.compress_rope_freq_base": 160000.0},
            **{"rope.dimension_count": 64, "rope.freq_base": 10000.0, "rope.scaling.type": "yarn"},
            **{"rope.scaling.factor": 16.0, "rope.scaling.original_context_length": 65536},
            **{"rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0},
            **{"expert_count": 256, "expert_used_count": 6, "expert_shared_count": 1},
            **{"expert_feed_forward_length": INTER, "expert_weights_scale": 1.5, "expert_weights_norm": True},
            **{"expert_gating_func": 4, "hash_layer_count": HASH_LAYERS, "swiglu_clamp_exp": [10.0] * LAYERS},
            **{"hyper_connection.count": 4, "hyper_connection.sinkhorn_iterations": 20},
            **{"hyper_connection.epsilon": 1e-6, "nextn_predict_layers": 1},
        }.items()
    }
    if recipe.kept is not None:
        kept = [256 if layer < HASH_LAYERS else recipe.kept for layer in range(LAYERS)]
        keys |= {"reap.enabled": True, "reap.layout": "ds4-compact-v1", "reap.layer.keep_count": kept}
        keys["reap.layer.policy"] = [1 if layer < HASH_LAYERS else 2 for layer in range(LAYERS)]
        keys["reap.layer.expert_count"] = [256] * LAYERS
    keys |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "deepseek-v3"}
    keys["tokenizer.ggml.tokens"] = [f"token{index}" for index in range(VOCAB)]
    keys["tokenizer.ggml.token_type"] = [1] * VOCAB
    keys["tokenizer.ggml.merges"] = [f"to ken{index}" for index in range(127741)]
    keys |= {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1}
    return keys


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _scalar(value: Any) -> tuple[int, bytes]:
    """GGUF type id and bytes of one value."""
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    return (6, struct.pack("<f", value)) if isinstance(value, float) else (8, _text(value))


def _key_value(key: str, value: Any) -> bytes:
    if not isinstance(value, list):
        kind, data = _scalar(value)
        return _text(key) + struct.pack("<I", kind) + data
    items = [_scalar(item) for item in value]
    return _text(key) + struct.pack("<IIQ", 9, items[0][0], len(items)) + b"".join(data for _, data in items)


def write_gguf(path: Path, recipe: GgufRecipe) -> Path:
    """Write the header and stretch the file to its full size."""
    entries, offset = [], 0
    for name, kind, shape in gguf_tensors(recipe):
        type_id, block, block_bytes = GGML[kind]
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        entries.append(_text(name) + dims + struct.pack("<IQ", type_id, offset))
        n_values = 1
        for size in shape:
            n_values *= size
        offset += -(-n_values // block * block_bytes // 32) * 32
    keys = [_key_value(key, value) for key, value in gguf_metadata(recipe).items()]
    header = b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(keys)) + b"".join(keys) + b"".join(entries)
    return _sparse(path, header + b"\0" * (-len(header) % 32), offset)


def _sparse(path: Path, header: bytes, n_bytes: int) -> Path:
    with open(path, "wb") as file:
        file.write(header)
        os.truncate(file.fileno(), len(header) + n_bytes)
    return path


# Safetensors


@dataclass(frozen=True)
class SafetensorsRecipe:
    """A public safetensors release: format of the trunk's experts, their number, and the draft stages."""

    experts: str = "mxfp4"
    n_experts: int = 256
    dspark: bool = True


SAFETENSORS_RECIPES = {
    "official-0731": SafetensorsRecipe(),
    "official-preview": SafetensorsRecipe(dspark=False),
    "modelopt-nvfp4-0731": SafetensorsRecipe("nvfp4"),
    "0731-reap-k160": SafetensorsRecipe(n_experts=160),
}
_ITEM = {"F32": 4, "BF16": 2, "I64": 8, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E8M0": 1}


def _official(name: str, shape: tuple[int, ...], experts: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of a weight and its companions (weights.md 1 and 2.1)."""
    base = name.removesuffix("weight")
    if "hc_" in name or name.endswith((".ape", ".bias", ".attn_sink")):
        yield name, "F32", shape
    elif name.endswith("tid2eid"):
        yield name, "I64", shape
    elif ".experts." in name and experts == "nvfp4" and not name.startswith("mtp."):
        yield name, "U8", (shape[0], shape[1] // 2)
        yield base + "weight_scale", "F8_E4M3", (shape[0], shape[1] // 16)
        yield base + "weight_scale_2", "F32", ()
        yield base + "input_scale", "F32", ()
    elif ".experts." in name:
        yield name, "I8", (shape[0], shape[1] // 2)
        yield base + "scale", "F8_E8M0", (shape[0], shape[1] // 32)
    elif ".attn.w" in name or ".indexer.wq_b" in name or ".shared_experts." in name or "main_proj" in name:
        yield name, "F8_E4M3", shape
        yield base + "scale", "F8_E8M0", (-(-shape[0] // 128), -(-shape[1] // 128))
    elif name.endswith(("e_proj.weight", "h_proj.weight")):
        yield name, "F8_E4M3", shape
        yield base + "scale", "F8_E8M0", (shape[0] // 128, shape[1] // 128)
    else:
        yield name, "BF16", shape


def safetensors_names(recipe: SafetensorsRecipe) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(canonical name, shape) of every weight, experts one by one."""
    yield from globals_shapes()
    stages = 3 if recipe.dspark else 1
    blocks = [(f"layers.{n}.", n, False) for n in range(LAYERS)] + [(f"mtp.{n}.", n, True) for n in range(stages)]
    for prefix, layer, draft in blocks:
        for suffix, shape in block_shapes(layer, recipe.n_experts, draft=draft):
            if suffix.startswith("ffn.experts."):
                matrix = suffix.split(".")[2]
                for expert in range(shape[0]):
                    yield f"{prefix}ffn.experts.{expert}.{matrix}.weight", shape[1:]
            else:
                yield prefix + suffix, shape
    last = stages - 1
    for name in ("hc_head_fn", "hc_head_base", "hc_head_scale"):
        yield f"mtp.{last}.{name}", dict(globals_shapes())[name]
    yield f"mtp.{last}.norm.weight", (HIDDEN,)
    if recipe.dspark:
        yield "mtp.0.main_proj.weight", (HIDDEN, 3 * HIDDEN)
        yield "mtp.0.main_norm.weight", (HIDDEN,)
        yield "mtp.2.markov_head.markov_w1.weight", (VOCAB, 256)
        yield "mtp.2.markov_head.markov_w2.weight", (VOCAB, 256)
        yield "mtp.2.confidence_head.proj.weight", (1, HIDDEN + 256)
        return
    for name in ("e_proj", "h_proj"):
        yield f"mtp.0.{name}.weight", (HIDDEN, HIDDEN)
    for name in ("enorm", "hnorm"):
        yield f"mtp.0.{name}.weight", (HIDDEN,)


def config_json(recipe: SafetensorsRecipe) -> dict[str, Any]:
    """config.json of the release, as far as the text model reads it."""
    return {
        **{"model_type": "deepseek_v4", "architectures": ["DeepseekV4ForCausalLM"], "vocab_size": VOCAB},
        **{"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": 1},
        **{"head_dim": HEAD_DIM, "qk_rope_head_dim": 64, "q_lora_rank": Q_LORA, "o_groups": GROUPS},
        **{"o_lora_rank": O_LORA, "sliding_window": 128, "compress_rope_theta": 160000, "rope_theta": 10000},
        "compress_ratios": [*RATIOS, *[0] * (3 if recipe.dspark else 1)],
        "rope_scaling": {
            **{"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536},
            **{"beta_fast": 32, "beta_slow": 1},
        },
        **{"max_position_embeddings": 1 << 20, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 512},
        **{"moe_intermediate_size": INTER, "n_routed_experts": recipe.n_experts, "num_experts_per_tok": 6},
        **{"n_shared_experts": 1, "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc", "norm_topk_prob": True},
        **{"routed_scaling_factor": 1.5, "num_hash_layers": HASH_LAYERS, "swiglu_limit": 10.0, "hidden_act": "silu"},
        **{"hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6},
        **{"num_nextn_predict_layers": 1, "attention_bias": False, "tie_word_embeddings": False},
        **{"bos_token_id": 0, "eos_token_id": 1, "expert_dtype": "fp4"},
    } | ({"dspark_block_size": 5, "dspark_target_layer_ids": [40, 41, 42]} if recipe.dspark else {})


def write_safetensors(directory: Path, recipe: SafetensorsRecipe, shard_bytes: int = 3_500_000_000) -> Path:
    """Write shards, index and config.json of a release into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Any]] = [{}]
    filled = 0
    for name, shape in safetensors_names(recipe):
        for stored, dtype, dims in _official(name, shape, recipe.experts):
            n_bytes = _ITEM[dtype]
            for size in dims:
                n_bytes *= size
            if filled + n_bytes > shard_bytes and filled:
                shards.append({})
                filled = 0
            shards[-1][stored] = {"dtype": dtype, "shape": dims, "data_offsets": [filled, filled + n_bytes]}
            filled += n_bytes
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        shard = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header = json.dumps(tensors).encode()
        header += b" " * (-len(header) % 8)
        size = max(entry["data_offsets"][1] for entry in tensors.values())
        _sparse(directory / shard, struct.pack("<Q", len(header)) + header, size)
        weight_map |= dict.fromkeys(tensors, shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config_json(recipe)))
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", choices=[*GGUF_RECIPES, *SAFETENSORS_RECIPES])
    parser.add_argument("path", type=Path, help="the file, or for a safetensors recipe the directory, to make")
    args = parser.parse_args()
    if args.recipe in GGUF_RECIPES:
        print(write_gguf(args.path, GGUF_RECIPES[args.recipe]))
    else:
        print(write_safetensors(args.path, SAFETENSORS_RECIPES[args.recipe]))


if __name__ == "__main__":
    main()
