"""Reading ModelConfig fields out of an official config.json or GGUF metadata; ``ModelConfig`` then validates them.

Source:  spec model.md 1.1 and weights.md 3.1.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, NoReturn

from ds4.errors import Ds4Error

_NUMBERS = (
    "compress_rope_theta",
    "rope_theta",
    "routed_scaling_factor",
    "swiglu_limit",
    "hc_eps",
    "rms_norm_eps",
)
_INTEGERS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "qk_rope_head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "sliding_window",
    "max_position_embeddings",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
    "num_hash_layers",
    "hc_mult",
    "hc_sinkhorn_iters",
    "bos_token_id",
    "eos_token_id",
)
_FIXED = {
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
}
_FIXED_GGUF = {
    "attention.head_count_kv": 1,
    "expert_shared_count": 1,
    "expert_weights_norm": True,
    "expert_gating_func": 4,
    "expert_group_count": 0,
    "leading_dense_block_count": 0,
}
GGUF_KEYS = {
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "head_dim": "attention.key_length",
    "qk_rope_head_dim": "rope.dimension_count",
    "q_lora_rank": "attention.q_lora_rank",
    "o_groups": "attention.output_group_count",
    "o_lora_rank": "attention.output_lora_rank",
    "sliding_window": "attention.sliding_window",
    "rope_theta": "rope.freq_base",
    "index_n_heads": "attention.indexer.head_count",
    "index_head_dim": "attention.indexer.key_length",
    "index_topk": "attention.indexer.top_k",
    "moe_intermediate_size": "expert_feed_forward_length",
    "n_routed_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "routed_scaling_factor": "expert_weights_scale",
    "num_hash_layers": "hash_layer_count",
    "hc_mult": "hyper_connection.count",
    "hc_sinkhorn_iters": "hyper_connection.sinkhorn_iterations",
    "hc_eps": "hyper_connection.epsilon",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}


def json_fields(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """ModelConfig arguments from a parsed config.json; Ds4Error naming the field for a missing or mistyped one."""
    if not isinstance(config, Mapping):
        raise Ds4Error(f"{source}: the configuration is not a JSON object")
    get = _Reader(config, source)
    if config.get("model_type") != "deepseek_v4":
        get.fail("model_type", f"must be 'deepseek_v4', not {shown(config.get('model_type'))}")
    architectures = config.get("architectures")
    if architectures not in (None, ["DeepseekV4ForCausalLM"]):
        get.fail("architectures", f"must be ['DeepseekV4ForCausalLM'], not {shown(architectures)}")
    _refuse_pro(config.get("hidden_size"), config.get("num_hidden_layers"), source)
    for name, wanted in _FIXED.items():
        if name in config and (config[name] != wanted or type(config[name]) is not type(wanted)):
            get.fail(name, f"must be {wanted!r}, not {shown(config[name])}")
    values: dict[str, Any] = {}
    for name in _INTEGERS:
        values[name] = get.integer(name)
    for name in _NUMBERS:
        values[name] = get.number(name)
    values |= _rope_scaling(config, source)
    values["compress_ratios"] = get.integers("compress_ratios")
    values["n_mtp_layers"] = get.integer("num_nextn_predict_layers") if "num_nextn_predict_layers" in config else 0
    for name in ("dspark_block_size", "dspark_noise_token_id", "dspark_markov_rank"):
        values[name] = None if config.get(name) is None else get.integer(name)
    if config.get("dspark_target_layer_ids") is not None:
        values["dspark_target_layer_ids"] = get.integers("dspark_target_layer_ids")
    return values


def gguf_fields(metadata: Mapping[str, Any], source: str, n_nextn_blocks: int) -> dict[str, Any]:
    """ModelConfig arguments, but for n_mtp_layers, from GGUF metadata; Ds4Error naming the key that is wrong."""
    architecture = metadata.get("general.architecture")
    if architecture != "deepseek4":
        raise Ds4Error(f"{source}: general.architecture must be 'deepseek4', not {shown(architecture)}")
    get = _Reader(metadata, source, prefix="deepseek4.")
    _refuse_pro(metadata.get("deepseek4.embedding_length"), metadata.get("deepseek4.block_count"), source)
    values: dict[str, Any] = {}
    for name, key in GGUF_KEYS.items():
        values[name] = get.number(key) if name in _NUMBERS else get.integer(key)
    values["num_hidden_layers"] = get.integer("block_count") - n_nextn_blocks
    values["compress_ratios"] = get.integers("attention.compress_ratios")
    old_theta = "rope.freq_base_swa" if "deepseek4.attention.compress_rope_freq_base" not in metadata else None
    values["compress_rope_theta"] = get.number(old_theta or "attention.compress_rope_freq_base")
    values["swiglu_limit"] = _gguf_swiglu_limit(get)
    values["vocab_size"] = _gguf_vocab_size(get)
    for name, wanted in _FIXED_GGUF.items():
        found = metadata.get("deepseek4." + name, wanted)
        if found != wanted:
            get.fail(name, f"must be {wanted!r}, not {shown(found)}")
    if get.integer("attention.value_length") != values["head_dim"]:
        get.fail("attention.value_length", "differs from attention.key_length; keys and values are one vector")
    values |= _gguf_rope_scaling(get)
    if "deepseek4.context_length" in metadata:
        values["max_position_embeddings"] = get.integer("context_length")
    else:
        values["max_position_embeddings"] = int(values["rope_original_max_position"] * values["rope_factor"])
    tokens = _Reader(metadata, source, prefix="tokenizer.ggml.")
    values["bos_token_id"] = tokens.integer("bos_token_id")
    values["eos_token_id"] = tokens.integer("eos_token_id")
    return values


def _refuse_pro(hidden: Any, layers: Any, source: str) -> None:
    """DeepSeek-V4-Pro has the same architecture; a GGUF may count its draft block as a 62nd layer."""
    if hidden == 7168 and layers in (61, 62):
        raise Ds4Error(f"{source}: is DeepSeek-V4-Pro (61 layers, hidden size 7168); ds4 runs DeepSeek-V4-Flash only")


class _Reader:
    """Typed access to a mapping; every failure is a Ds4Error naming the key and the source."""

    def __init__(self, values: Mapping[str, Any], source: str, prefix: str = "") -> None:
        self.values, self.source, self.prefix = values, source, prefix

    def fail(self, name: str, problem: str) -> NoReturn:
        raise Ds4Error(f"{self.source}: {self.prefix}{name} {problem}")

    def _value(self, name: str) -> Any:
        if self.values.get(self.prefix + name) is None:
            self.fail(name, "is missing")
        return self.values[self.prefix + name]

    def integer(self, name: str) -> int:
        value = self._value(name)
        if type(value) is not int:
            self.fail(name, f"must be an integer, not {shown(value)}")
        return value

    def number(self, name: str) -> float:
        value = self._value(name)
        if type(value) not in (int, float) or not abs(value) <= 1e30:
            self.fail(name, f"must be a finite number, not {shown(value)}")
        return _shortest(float(value)) if self.prefix else float(value)

    def integers(self, name: str) -> tuple[int, ...]:
        value = self._value(name)
        if not isinstance(value, list | tuple) or any(type(v) is not int for v in value):
            self.fail(name, f"must be a list of integers, not {shown(value)}")
        return tuple(value)


def shown(value: Any) -> str:
    """A value from a file, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: GGUF stores 1e-6 as 9.999999974752427e-07; this undoes it."""
    for digits in range(1, 9):
        short = float(f"{value:.{digits}g}")
        if struct.unpack("<f", struct.pack("<f", short))[0] == value:
            return short
    return value


def _rope_scaling(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The YaRN fields of config.json: its rope_scaling object, or null for no scaling."""
    scaling = config.get("rope_scaling")
    if scaling is None:
        return {"rope_factor": 1.0, "rope_original_max_position": 0, "rope_beta_fast": 32.0, "rope_beta_slow": 1.0}
    if not isinstance(scaling, Mapping):
        raise Ds4Error(f"{source}: rope_scaling must be an object or null, not {shown(scaling)}")
    get = _Reader({f"rope_scaling.{key}": value for key, value in scaling.items()}, source)
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind != "yarn":
        get.fail("rope_scaling.type", f"must be 'yarn', not {shown(kind)}")
    return {
        "rope_factor": get.number("rope_scaling.factor"),
        "rope_original_max_position": get.integer("rope_scaling.original_max_position_embeddings"),
        "rope_beta_fast": get.number("rope_scaling.beta_fast"),
        "rope_beta_slow": get.number("rope_scaling.beta_slow"),
    }


def _gguf_rope_scaling(get: _Reader) -> dict[str, Any]:
    """The YaRN fields of a GGUF; rope.scaling.type is absent from antirez files, which all mean yarn."""
    kind = get.values.get("deepseek4.rope.scaling.type", "yarn")
    if kind == "none":
        return {"rope_factor": 1.0, "rope_original_max_position": 0, "rope_beta_fast": 32.0, "rope_beta_slow": 1.0}
    if kind != "yarn":
        get.fail("rope.scaling.type", f"must be 'yarn' or 'none', not {shown(kind)}")
    return {
        "rope_factor": get.number("rope.scaling.factor"),
        "rope_original_max_position": get.integer("rope.scaling.original_context_length"),
        "rope_beta_fast": get.number("rope.scaling.yarn_beta_fast"),
        "rope_beta_slow": get.number("rope.scaling.yarn_beta_slow"),
    }


def _gguf_swiglu_limit(get: _Reader) -> float:
    """swiglu_clamp_exp is a number or one number a layer; all must agree, with swiglu_clamp_shexp too."""
    limits: list[Any] = []
    for name in ("swiglu_clamp_exp", "swiglu_clamp_shexp"):
        value = get.values.get("deepseek4." + name)
        limits += value if isinstance(value, list) else [] if value is None else [value]
    if not limits or "deepseek4.swiglu_clamp_exp" not in get.values:
        get.fail("swiglu_clamp_exp", "is missing")
    if any(limit != limits[0] for limit in limits):
        get.fail("swiglu_clamp_exp", f"differs between layers: {shown(limits)}; ds4 has one clamp for all")
    return _Reader({"deepseek4.swiglu_clamp_exp": limits[0]}, get.source, "deepseek4.").number("swiglu_clamp_exp")


def _gguf_vocab_size(get: _Reader) -> int:
    """deepseek4.vocab_size, which llama.cpp may leave out, or else the number of tokens."""
    tokens = get.values.get("tokenizer.ggml.tokens")
    if "deepseek4.vocab_size" in get.values or not isinstance(tokens, list):
        return get.integer("vocab_size")
    return len(tokens)
