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
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds4.weights import names
from ds4.weights.published import (
    FLASH,
    GGUF_RECIPES,
    SAFETENSORS_RECIPES,
    GgufRecipe,
    SafetensorsRecipe,
    block_weights,
    outer_weights,
    trunk_weights,
)

HIDDEN, VOCAB, LAYERS = FLASH.hidden_size, FLASH.vocab_size, FLASH.num_hidden_layers
RATIOS = list(FLASH.compress_ratios)
# Format -> (ggml type id, weights a block, bytes a block). NVFP4 is in the sleepy form: super-blocks, chosen by the
# tensor's name.
GGML = {
    **{"f32": (0, 1, 4), "f16": (1, 1, 2), "bf16": (30, 1, 2), "i32": (26, 1, 4), "q8_0": (8, 32, 34)},
    **{"q2_k": (10, 256, 84), "q4_k": (12, 256, 144), "iq2_xxs": (16, 256, 66), "mxfp4": (39, 32, 17)},
    "nvfp4_sleepy": (40, 256, 144),
}


# GGUF


def gguf_tensors(recipe: GgufRecipe) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(GGUF name, format, row-major shape) in file order."""
    stacks = {matrix: stem for stem, matrix in names.EXPERTS.items()}
    for name, fmt, shape in trunk_weights(FLASH, recipe):
        if ".experts." not in name:
            place = names.to_gguf(name)
            assert place is not None
            yield place[0], fmt, shape
            continue
        _, layer, _, _, _, matrix, _ = name.split(".")
        stem = f"blk.{layer}.{stacks[matrix]}"
        if fmt == "nvfp4_sleepy":
            stem = stem.removesuffix(".weight")
            yield f"{stem}{names.SLEEPY}", fmt, shape
            yield f"{stem}{names.SLEEPY_SCALE}", "f32", shape[:1]
        else:
            yield stem, fmt, shape


def gguf_metadata(recipe: GgufRecipe) -> dict[str, Any]:
    """The keys of weights.md 3.1, with a vocabulary of the real size: most of a header is its tokenizer."""
    c = FLASH
    keys: dict[str, Any] = {"general.architecture": "deepseek4", "general.name": "DeepSeek V4 Flash"}
    keys |= {
        f"deepseek4.{key}": value
        for key, value in {
            **{"block_count": LAYERS, "context_length": 1 << 20, "vocab_size": VOCAB, "embedding_length": HIDDEN},
            **{
                "attention.head_count": c.num_attention_heads,
                "attention.head_count_kv": 1,
                "attention.key_length": c.head_dim,
            },
            **{"attention.value_length": c.head_dim, "attention.layer_norm_rms_epsilon": 1e-6},
            **{"attention.q_lora_rank": c.q_lora_rank, "attention.output_lora_rank": c.o_lora_rank},
            **{"attention.output_group_count": c.o_groups, "attention.sliding_window": 128},
            **{"attention.indexer.head_count": 64, "attention.indexer.key_length": 128, "attention.indexer.top_k": 512},
            **{"attention.compress_ratios": [*RATIOS, 0], "attention.compress_rope_freq_base": 160000.0},
            **{"rope.dimension_count": 64, "rope.freq_base": 10000.0, "rope.scaling.type": "yarn"},
            **{"rope.scaling.factor": 16.0, "rope.scaling.original_context_length": 65536},
            **{"rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0},
            **{"expert_count": 256, "expert_used_count": 6, "expert_shared_count": 1},
            **{
                "expert_feed_forward_length": c.moe_intermediate_size,
                "expert_weights_scale": 1.5,
                "expert_weights_norm": True,
            },
            **{"expert_gating_func": 4, "hash_layer_count": c.num_hash_layers, "swiglu_clamp_exp": [10.0] * LAYERS},
            **{"hyper_connection.count": 4, "hyper_connection.sinkhorn_iterations": 20},
            **{"hyper_connection.epsilon": 1e-6, "nextn_predict_layers": 1},
        }.items()
    }
    if recipe.kept is not None:
        kept = [recipe.n_experts(layer, FLASH) for layer in range(LAYERS)]
        keys |= {"reap.enabled": True, "reap.layout": "ds4-compact-v1", "reap.layer.keep_count": kept}
        keys["reap.layer.policy"] = [1 if layer < FLASH.num_hash_layers else 2 for layer in range(LAYERS)]
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


_ITEM = {"F32": 4, "BF16": 2, "I64": 8, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E8M0": 1}


def _stored(name: str, fmt: str, shape: tuple[int, ...]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of a weight and its companions (weights.md 1 and 2.1)."""
    base = name.removesuffix("weight")
    if fmt == "nvfp4_modelopt":
        yield name, "U8", (shape[0], shape[1] // 2)
        yield base + "weight_scale", "F8_E4M3", (shape[0], shape[1] // 16)
        yield base + "weight_scale_2", "F32", ()
        yield base + "input_scale", "F32", ()
    elif fmt == "mxfp4_official":
        yield name, "I8", (shape[0], shape[1] // 2)
        yield base + "scale", "F8_E8M0", (shape[0], shape[1] // 32)
    elif fmt == "fp8_block":
        yield name, "F8_E4M3", shape
        yield base + "scale", "F8_E8M0", (-(-shape[0] // 128), -(-shape[1] // 128))
    else:
        yield name, fmt.upper(), shape


def safetensors_weights(recipe: SafetensorsRecipe) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(canonical name, format, shape) of every weight, experts one by one, draft stages behind the trunk."""

    def single(name: str, fmt: str, shape: tuple[int, ...]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        if "*" not in name:
            yield name, fmt, shape
        else:
            for expert in range(shape[0]):
                yield name.replace("*", str(expert)), fmt, shape[1:]

    for name, fmt, shape in trunk_weights(FLASH, recipe):
        yield from single(name, fmt, shape)
    stages = 3 if recipe.dspark else 1
    for stage in range(stages):
        for suffix, shape in block_weights(FLASH, 0, recipe.n_experts(stage, FLASH), draft=True):
            yield from single(f"mtp.{stage}.{suffix}", recipe.format(suffix, None, shape), shape)
    last = stages - 1
    outer = dict(outer_weights(FLASH))
    extra = {f"{last}.{name}": outer[name] for name in ("hc_head_fn", "hc_head_base", "hc_head_scale")}
    extra[f"{last}.norm.weight"] = (HIDDEN,)
    if recipe.dspark:
        extra |= {"0.main_proj.weight": (HIDDEN, 3 * HIDDEN), "0.main_norm.weight": (HIDDEN,)}
        extra |= {f"2.markov_head.markov_{name}.weight": (VOCAB, 256) for name in ("w1", "w2")}
        extra["2.confidence_head.proj.weight"] = (1, HIDDEN + 256)
    else:
        extra |= {f"0.{name}.weight": (HIDDEN, HIDDEN) for name in ("e_proj", "h_proj")}
        extra |= {f"0.{name}.weight": (HIDDEN,) for name in ("enorm", "hnorm")}
    for name, shape in extra.items():
        yield f"mtp.{name}", recipe.format(name.partition(".")[2], None, shape), shape


def config_json(recipe: SafetensorsRecipe) -> dict[str, Any]:
    """config.json of the release, as far as the text model reads it."""
    c = FLASH
    return {
        **{"model_type": "deepseek_v4", "architectures": ["DeepseekV4ForCausalLM"], "vocab_size": VOCAB},
        **{
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": c.num_attention_heads,
            "num_key_value_heads": 1,
        },
        **{
            "head_dim": c.head_dim,
            "qk_rope_head_dim": 64,
            "q_lora_rank": c.q_lora_rank,
            "o_groups": c.o_groups,
        },
        **{"o_lora_rank": c.o_lora_rank, "sliding_window": 128, "compress_rope_theta": 160000, "rope_theta": 10000},
        "compress_ratios": [*RATIOS, *[0] * (3 if recipe.dspark else 1)],
        "rope_scaling": {
            **{"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536},
            **{"beta_fast": 32, "beta_slow": 1},
        },
        **{"max_position_embeddings": 1 << 20, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 512},
        **{
            "moe_intermediate_size": c.moe_intermediate_size,
            "n_routed_experts": recipe.experts_in_all,
            "num_experts_per_tok": 6,
        },
        **{"n_shared_experts": 1, "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc", "norm_topk_prob": True},
        **{
            "routed_scaling_factor": 1.5,
            "num_hash_layers": c.num_hash_layers,
            "swiglu_limit": 10.0,
            "hidden_act": "silu",
        },
        **{"hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6},
        **{"num_nextn_predict_layers": 1, "attention_bias": False, "tie_word_embeddings": False},
        **{"bos_token_id": 0, "eos_token_id": 1, "expert_dtype": "fp4"},
    } | ({"dspark_block_size": 5, "dspark_target_layer_ids": [40, 41, 42]} if recipe.dspark else {})


def write_safetensors(directory: Path, recipe: SafetensorsRecipe, shard_bytes: int = 3_500_000_000) -> Path:
    """Write shards, index and config.json of a release into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Any]] = [{}]
    filled = 0
    for name, fmt, shape in safetensors_weights(recipe):
        for stored, dtype, dims in _stored(name, fmt, shape):
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
