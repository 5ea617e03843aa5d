"""Small checkpoints for the tests: a configuration, its tensor shapes, and hand-made GGUF headers."""

from __future__ import annotations

import copy
import struct
from pathlib import Path
from typing import Any

import torch

from ds4.config import ModelConfig
from ds4.weights.names import to_gguf

SMALL = {
    "model_type": "deepseek_v4",
    "architectures": ["DeepseekV4ForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 64,
    "o_groups": 2,
    "o_lora_rank": 32,
    "sliding_window": 16,
    "compress_ratios": [0, 4, 8, 0],
    "compress_rope_theta": 160000,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "max_position_embeddings": 1048576,
    "index_n_heads": 2,
    "index_head_dim": 128,
    "index_topk": 4,
    "moe_intermediate_size": 64,
    "n_routed_experts": 3,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "num_hash_layers": 1,
    "swiglu_limit": 10.0,
    "hidden_act": "silu",
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "num_nextn_predict_layers": 1,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def small_json(**changes: Any) -> dict[str, Any]:
    """A valid config.json of a model small enough to write in milliseconds, with some fields changed."""
    return copy.deepcopy(SMALL) | changes


def small_config(**changes: Any) -> ModelConfig:
    return ModelConfig.from_json(small_json(**changes), source="small")


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a checkpoint in official naming (spec weights.md 1)."""
    hidden, streams = config.hidden_size, config.hc_mult * config.hidden_size
    mix = (2 + config.hc_mult) * config.hc_mult
    out = {
        "embed.weight": (config.vocab_size, hidden),
        "head.weight": (config.vocab_size, hidden),
        "norm.weight": (hidden,),
        "hc_head_fn": (config.hc_mult, streams),
        "hc_head_base": (config.hc_mult,),
        "hc_head_scale": (1,),
    }
    blocks = [f"layers.{n}." for n in range(config.num_hidden_layers)]
    blocks += [f"mtp.{n}." for n in range(config.n_mtp_layers)]
    for index, p in enumerate(blocks):
        draft = p.startswith("mtp")
        out |= {p + "attn_norm.weight": (hidden,), p + "ffn_norm.weight": (hidden,)}
        for part in ("attn", "ffn"):
            out |= {f"{p}hc_{part}_fn": (mix, streams), f"{p}hc_{part}_base": (mix,), f"{p}hc_{part}_scale": (3,)}
        heads = config.num_attention_heads * config.head_dim
        out |= {
            p + "attn.wq_a.weight": (config.q_lora_rank, hidden),
            p + "attn.q_norm.weight": (config.q_lora_rank,),
            p + "attn.wq_b.weight": (heads, config.q_lora_rank),
            p + "attn.wkv.weight": (config.head_dim, hidden),
            p + "attn.kv_norm.weight": (config.head_dim,),
            p + "attn.attn_sink": (config.num_attention_heads,),
            p + "attn.wo_a.weight": (config.o_groups * config.o_lora_rank, heads // config.o_groups),
            p + "attn.wo_b.weight": (hidden, config.o_groups * config.o_lora_rank),
            p + "ffn.gate.weight": (config.n_routed_experts, hidden),
        }
        ratio = 0 if draft else config.compress_ratios[index]
        widths = {"attn.": config.head_dim} | ({"attn.indexer.": config.index_head_dim} if ratio == 4 else {})
        for part, width in widths.items() if ratio else ():
            wide = width * (2 if ratio == 4 else 1)
            out |= {p + part + "compressor.wkv.weight": (wide, hidden), p + part + "compressor.ape": (ratio, wide)}
            out |= {p + part + "compressor.wgate.weight": (wide, hidden), p + part + "compressor.norm.weight": (width,)}
        if ratio == 4:
            out[p + "attn.indexer.wq_b.weight"] = (config.index_n_heads * config.index_head_dim, config.q_lora_rank)
            out[p + "attn.indexer.weights_proj.weight"] = (config.index_n_heads, hidden)
        if not draft and index < config.num_hash_layers:
            out[p + "ffn.gate.tid2eid"] = (config.vocab_size, config.num_experts_per_tok)
        else:
            out[p + "ffn.gate.bias"] = (config.n_routed_experts,)
        experts = [f"experts.{e}" for e in range(config.n_routed_experts)]
        for expert in [*experts, "shared_experts"]:
            out |= {f"{p}ffn.{expert}.{w}.weight": (config.moe_intermediate_size, hidden) for w in ("w1", "w3")}
            out[f"{p}ffn.{expert}.w2.weight"] = (hidden, config.moe_intermediate_size)
        if draft:
            out |= {p + name + ".weight": (hidden, hidden) for name in ("e_proj", "h_proj")}
            out |= {p + name + ".weight": (hidden,) for name in ("enorm", "hnorm", "norm")}
            out |= {p + "hc_head_fn": (config.hc_mult, streams), p + "hc_head_base": (config.hc_mult,)}
            out[p + "hc_head_scale"] = (1,)
    return out


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Seeded f32 values (i64 for tid2eid) of every tensor in ``shapes``."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(shape[0], config.n_routed_experts, generator=generator)
        .argsort(dim=1)[:, : shape[1]]
        .contiguous()
        if name.endswith("tid2eid")
        else torch.randn(shape, generator=generator) * 0.05
        for name, shape in shapes(config).items()
    }


def small_keys() -> dict[str, Any]:
    """GGUF metadata of SMALL, as llama.cpp's converter would write it."""
    model = {
        "block_count": 3,
        "context_length": 1048576,
        "vocab_size": 32,
        "embedding_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 1,
        "attention.key_length": 128,
        "attention.value_length": 128,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.q_lora_rank": 64,
        "attention.output_lora_rank": 32,
        "attention.output_group_count": 2,
        "attention.sliding_window": 16,
        "attention.indexer.head_count": 2,
        "attention.indexer.key_length": 128,
        "attention.indexer.top_k": 4,
        "attention.compress_ratios": [0, 4, 8, 0],
        "attention.compress_rope_freq_base": 160000.0,
        "rope.dimension_count": 64,
        "rope.freq_base": 10000.0,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 16.0,
        "rope.scaling.original_context_length": 65536,
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
        "expert_count": 3,
        "expert_used_count": 2,
        "expert_shared_count": 1,
        "expert_feed_forward_length": 64,
        "expert_weights_scale": 1.5,
        "expert_weights_norm": True,
        "expert_gating_func": 4,
        "hash_layer_count": 1,
        "swiglu_clamp_exp": [10.0, 10.0, 10.0],
        "hyper_connection.count": 4,
        "hyper_connection.sinkhorn_iterations": 20,
        "hyper_connection.epsilon": 1e-6,
    }
    keys: dict[str, Any] = {"general.architecture": "deepseek4"}
    keys |= {f"deepseek4.{key}": value for key, value in model.items()}
    return keys | {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1}


def _string(text: str | bytes) -> bytes:
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def _kind(value: Any) -> int:
    return {bool: 7, int: 5, float: 6, str: 8, bytes: 8, list: 9}[type(value)]


def _payload(value: Any) -> bytes:
    if isinstance(value, list):
        kind = _kind(value[0]) if value else 5
        return struct.pack("<IQ", kind, len(value)) + b"".join(_payload(item) for item in value)
    if isinstance(value, str | bytes):
        return _string(value)
    return struct.pack({bool: "<?", int: "<i", float: "<f"}[type(value)], value)


def gguf_bytes(
    keys: dict[str, Any],
    tensors: list[tuple[str, tuple[int, ...], int, int]],
    data_size: int,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A GGUF file made byte by byte: tensors are (name, dimensions in GGUF order, type id, offset); data is a ramp."""
    out = magic + struct.pack("<IQQ", version, len(tensors), len(keys))
    for key, value in keys.items():
        out += _string(key) + struct.pack("<I", _kind(value)) + _payload(value)
    for name, dims, kind, offset in tensors:
        out += _string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    out += bytes(-len(out) % alignment)
    return out + bytes(i % 251 for i in range(data_size))


def gguf_with(keys: dict[str, Any], tensors: dict[str, tuple[int, tuple[int, ...], bytes]]) -> bytes:
    """A whole GGUF file: tensors are name -> (type id, row-major shape, packed bytes)."""
    entries, data = [], b""
    for name, (kind, shape, packed) in tensors.items():
        entries.append((name, shape[::-1], kind, len(data)))
        data += packed + bytes(-len(packed) % 32)
    return gguf_bytes(keys, entries, 0) + data


def gguf_model(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, tuple[int, ...], bytes]]:
    """Tensors by canonical name as ``gguf_with`` takes them: F32, I32 for tables, experts of a layer in stacks."""
    stacks: dict[str, list[torch.Tensor]] = {}
    out = {}
    for name, values in tensors.items():
        place = to_gguf(name)
        assert place is not None, name
        if place[1] is None:
            values = values.to(torch.float32 if values.is_floating_point() else torch.int32)
            out[place[0]] = (0 if values.is_floating_point() else 26, tuple(values.shape), values.numpy().tobytes())
        else:
            stacks.setdefault(place[0], []).append(values)
            assert len(stacks[place[0]]) == place[1] + 1, name
    for name, experts in stacks.items():
        stack = torch.stack(experts)
        out[name] = (0, tuple(stack.shape), stack.numpy().tobytes())
    return out


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
