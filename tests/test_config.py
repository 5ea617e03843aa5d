"""ModelConfig: official and GGUF spellings give the same config; every inconsistency names its field."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from weights.builders import small_config, small_json, small_keys

from ds4.config import ModelConfig
from ds4.errors import Ds4Error


def one_line(error: pytest.ExceptionInfo[Ds4Error]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def test_json_fields() -> None:
    config = small_config()
    assert config.compress_ratios == (0, 4, 8)
    assert [config.layer_kind(n) for n in range(3)] == ["swa", "csa", "hca"]
    assert (config.rope_factor, config.rope_original_max_position) == (16, 65536)
    assert (config.rope_beta_fast, config.rope_beta_slow, config.rope_theta) == (32, 1, 10000)
    assert config.n_mtp_layers == 1
    assert ModelConfig.from_json(small_json(), source="x", n_mtp_layers=3).n_mtp_layers == 3
    config.validate("x")


def test_json_without_scaling_switches_yarn_off() -> None:
    config = small_config(rope_scaling=None)
    assert (config.rope_original_max_position, config.rope_factor) == (0, 1)


def test_json_dspark() -> None:
    config = small_config(
        dspark_block_size=5, dspark_noise_token_id=31, dspark_target_layer_ids=[0, 2], dspark_markov_rank=8
    )
    assert (config.dspark_block_size, config.dspark_noise_token_id, config.dspark_markov_rank) == (5, 31, 8)
    assert config.dspark_target_layer_ids == (0, 2)


def test_gguf_equals_json() -> None:
    from_gguf = ModelConfig.from_gguf(small_keys(), source="x", n_mtp_layers=1)
    assert from_gguf == small_config()
    # float32 values come back as the decimals that were meant
    stored = small_keys() | {"deepseek4.hyper_connection.epsilon": 9.999999974752427e-07}
    assert ModelConfig.from_gguf(stored, source="x").hc_eps == 1e-6


def test_gguf_variants() -> None:
    keys = small_keys()
    del keys["deepseek4.vocab_size"]
    keys["tokenizer.ggml.tokens"] = [str(n) for n in range(32)]
    assert ModelConfig.from_gguf(keys, source="x", n_mtp_layers=1) == small_config()
    keys = small_keys() | {"deepseek4.block_count": 4}
    assert ModelConfig.from_gguf(keys, source="x", n_mtp_layers=1, n_nextn_blocks=1) == small_config()
    off = ModelConfig.from_gguf(small_keys() | {"deepseek4.rope.scaling.type": "none"}, source="x", n_mtp_layers=1)
    assert off == small_config(rope_scaling=None)


def test_gguf_of_early_forks() -> None:
    """Spellings of converters before llama.cpp's own, and keys that say the default (spec weights.md 3.1)."""
    keys = small_keys()
    del keys["deepseek4.expert_gating_func"], keys["deepseek4.context_length"], keys["deepseek4.rope.scaling.type"]
    keys["deepseek4.rope.freq_base_swa"] = int(keys.pop("deepseek4.attention.compress_rope_freq_base"))
    keys |= {
        "deepseek4.leading_dense_block_count": 0,
        "deepseek4.expert_group_count": 0,
        "deepseek4.expert_group_used_count": 0,
        "deepseek4.swiglu_clamp_exp": 10.0,
        "deepseek4.swiglu_clamp_shexp": [10.0] * 4,
        "deepseek4.rope.scaling.yarn_beta_fast": 32,
        "deepseek4.nextn_predict_layers": 1,
        "deepseek4.embedding_length_out": 256,
    }
    config = ModelConfig.from_gguf(keys, source="x", n_mtp_layers=1)
    assert config == small_config()
    assert config.compress_rope_theta == 160000
    # Where a file has both spellings, the later one counts.
    keys["deepseek4.attention.compress_rope_freq_base"] = 50000.0
    assert ModelConfig.from_gguf(keys, source="x").compress_rope_theta == 50000


@pytest.mark.parametrize("n_extra", [0, 1, 3])
def test_compress_ratios_of_draft_blocks(n_extra: int) -> None:
    """43 entries, or one more for every draft stage that the model was published with."""
    ratios = [0, 0] + [4, 128] * 20 + [4]
    changes = {"block_count": 43, "attention.compress_ratios": ratios + [0] * n_extra, "swiglu_clamp_exp": [10.0] * 43}
    keys = small_keys() | {f"deepseek4.{key}": value for key, value in changes.items()}
    config = ModelConfig.from_gguf(keys, source="x")
    assert config.compress_ratios == tuple(ratios)
    assert config == ModelConfig.from_json(
        small_json(num_hidden_layers=43, compress_ratios=ratios + [0] * n_extra), source="x", n_mtp_layers=0
    )


@pytest.mark.parametrize("layers", [61, 62])
def test_pro_is_refused(layers: int) -> None:
    """By its dimensions, before anything else in which it differs; a GGUF may count its draft block."""
    expected = "^x: is DeepSeek-V4-Pro .*; ds4 runs DeepSeek-V4-Flash only$"
    with pytest.raises(Ds4Error, match=expected):
        ModelConfig.from_json({"model_type": "deepseek_v4", "hidden_size": 7168, "num_hidden_layers": 61}, source="x")
    keys = {"general.architecture": "deepseek4", "deepseek4.embedding_length": 7168, "deepseek4.block_count": layers}
    with pytest.raises(Ds4Error, match=expected):
        ModelConfig.from_gguf(keys, source="x")
    with pytest.raises(Ds4Error, match="is missing"):
        ModelConfig.from_gguf(keys | {"deepseek4.block_count": 60}, source="x")


JSON_ERRORS = [
    ("model_type", {"model_type": "llama"}),
    ("model_type", {"model_type": None}),
    ("architectures", {"architectures": ["LlamaForCausalLM"]}),
    ("scoring_func", {"scoring_func": "softmax"}),
    ("topk_method", {"topk_method": "greedy"}),
    ("norm_topk_prob", {"norm_topk_prob": False}),
    ("num_key_value_heads", {"num_key_value_heads": 4}),
    ("n_shared_experts", {"n_shared_experts": 2}),
    ("hidden_act", {"hidden_act": "gelu"}),
    ("attention_bias", {"attention_bias": True}),
    ("tie_word_embeddings", {"tie_word_embeddings": True}),
    ("vocab_size", {"vocab_size": 0}),
    ("vocab_size", {"vocab_size": 1 << 60}),
    ("vocab_size", {"vocab_size": "32"}),
    ("vocab_size", {"vocab_size": True}),
    ("vocab_size", {"vocab_size": 32.0}),
    ("vocab_size", {"vocab_size": None}),
    ("vocab_size", {"vocab_size": [32]}),
    ("hidden_size", {"hidden_size": -64}),
    ("num_hidden_layers", {"num_hidden_layers": 0}),
    ("num_hidden_layers", {"num_hidden_layers": 10**100}),
    ("num_attention_heads", {"num_attention_heads": 0}),
    ("head_dim", {"head_dim": 120}),
    ("qk_rope_head_dim", {"qk_rope_head_dim": 63}),
    ("qk_rope_head_dim", {"qk_rope_head_dim": 128}),
    ("head_dim", {"qk_rope_head_dim": 32}),
    ("q_lora_rank", {"q_lora_rank": 0}),
    ("o_groups", {"o_groups": 3}),
    ("o_groups", {"o_groups": 0}),
    ("o_lora_rank", {"o_lora_rank": -1}),
    ("sliding_window", {"sliding_window": 0}),
    ("compress_ratios", {"compress_ratios": None}),
    ("compress_ratios", {"compress_ratios": [0, 4]}),
    ("compress_ratios", {"compress_ratios": [0, 4, -8]}),
    ("compress_ratios", {"compress_ratios": [0, 4, 1]}),
    ("compress_ratios", {"compress_ratios": [0, 4, 8.0]}),
    ("compress_ratios", {"compress_ratios": [0, 4, True]}),
    ("compress_ratios", {"compress_ratios": "0,4,8"}),
    ("compress_ratios", {"compress_ratios": [0] * 100_000 + [-1]}),
    ("compress_rope_theta", {"compress_rope_theta": 0}),
    ("rope_theta", {"rope_theta": 1}),
    ("rope_theta", {"rope_theta": math.nan}),
    ("rope_theta", {"rope_theta": math.inf}),
    ("rope_theta", {"rope_theta": 10**400}),
    ("rope_scaling", {"rope_scaling": 16}),
    ("rope_scaling.type", {"rope_scaling": {"type": "linear"}}),
    ("rope_scaling.factor", {"rope_scaling": {"type": "yarn"}}),
    ("rope_factor", {"rope_scaling": small_json()["rope_scaling"] | {"factor": 0.5}}),
    ("rope_beta_fast", {"rope_scaling": small_json()["rope_scaling"] | {"beta_fast": 0.5}}),
    (
        "rope_original_max_position",
        {"rope_scaling": small_json()["rope_scaling"] | {"original_max_position_embeddings": -1}},
    ),
    ("max_position_embeddings", {"max_position_embeddings": 0}),
    ("index_n_heads", {"index_n_heads": 0}),
    ("index_head_dim", {"index_head_dim": 96}),
    ("index_head_dim", {"index_head_dim": 16}),
    ("index_head_dim", {"index_head_dim": 64}),
    ("index_topk", {"index_topk": 0}),
    ("moe_intermediate_size", {"moe_intermediate_size": 0}),
    ("n_routed_experts", {"n_routed_experts": 0}),
    ("num_experts_per_tok", {"num_experts_per_tok": 4}),
    ("routed_scaling_factor", {"routed_scaling_factor": "1.5"}),
    ("routed_scaling_factor", {"routed_scaling_factor": 0}),
    ("num_hash_layers", {"num_hash_layers": 4}),
    ("num_hash_layers", {"num_hash_layers": -1}),
    ("swiglu_limit", {"swiglu_limit": 0.0}),
    ("hc_mult", {"hc_mult": 0}),
    ("hc_sinkhorn_iters", {"hc_sinkhorn_iters": 0}),
    ("hc_eps", {"hc_eps": -1e-6}),
    ("rms_norm_eps", {"rms_norm_eps": False}),
    ("num_nextn_predict_layers", {"num_nextn_predict_layers": "1"}),
    ("n_mtp_layers", {"num_nextn_predict_layers": -1}),
    ("bos_token_id", {"bos_token_id": 32}),
    ("eos_token_id", {"eos_token_id": [1]}),
    ("dspark_block_size", {"dspark_block_size": 0}),
    ("dspark_noise_token_id", {"dspark_noise_token_id": 32}),
    ("dspark_target_layer_ids", {"dspark_target_layer_ids": [3]}),
    ("dspark_markov_rank", {"dspark_markov_rank": 2.5}),
]


@pytest.mark.parametrize(("field", "changes"), JSON_ERRORS, ids=[f"{n}-{e[0]}" for n, e in enumerate(JSON_ERRORS)])
def test_json_errors_name_the_field(field: str, changes: dict) -> None:
    with pytest.raises(Ds4Error) as error:
        ModelConfig.from_json(small_json(**changes), source="a/config.json")
    message = one_line(error)
    assert message.startswith("a/config.json: ")
    assert field in message


@pytest.mark.parametrize(
    "field", [f.name for f in dataclasses.fields(ModelConfig) if f.name in small_json() and f.name != "compress_ratios"]
)
def test_json_missing_field(field: str) -> None:
    config = small_json()
    del config[field]
    with pytest.raises(Ds4Error, match=f"^x: {field} is missing$"):
        ModelConfig.from_json(config, source="x")


@pytest.mark.parametrize("config", [None, [], "deepseek_v4", 3])
def test_json_of_another_kind(config: object) -> None:
    with pytest.raises(Ds4Error, match="not a JSON object"):
        ModelConfig.from_json(config, source="x")  # type: ignore[arg-type]


GGUF_ERRORS = [
    ("general.architecture", {"general.architecture": "llama"}),
    ("general.architecture", {"general.architecture": None}),
    ("num_hidden_layers", {"deepseek4.block_count": -1}),
    ("block_count", {"deepseek4.block_count": "3"}),
    ("attention.compress_ratios", {"deepseek4.attention.compress_ratios": 4}),
    ("compress_ratios", {"deepseek4.attention.compress_ratios": [0]}),
    ("attention.value_length", {"deepseek4.attention.value_length": 64}),
    ("attention.head_count_kv", {"deepseek4.attention.head_count_kv": 4}),
    ("expert_gating_func", {"deepseek4.expert_gating_func": 1}),
    ("expert_weights_norm", {"deepseek4.expert_weights_norm": False}),
    ("expert_group_count", {"deepseek4.expert_group_count": 8}),
    ("leading_dense_block_count", {"deepseek4.leading_dense_block_count": 1}),
    ("rope.freq_base_swa", {"deepseek4.attention.compress_rope_freq_base": None, "deepseek4.rope.freq_base_swa": "x"}),
    ("expert_count", {"deepseek4.expert_count": [3]}),
    ("rope.freq_base", {"deepseek4.rope.freq_base": math.nan}),
    ("rope.scaling.type", {"deepseek4.rope.scaling.type": "linear"}),
    ("rope.scaling.factor", {"deepseek4.rope.scaling.factor": None}),
    ("swiglu_clamp_exp", {"deepseek4.swiglu_clamp_exp": None}),
    ("swiglu_clamp_exp", {"deepseek4.swiglu_clamp_exp": []}),
    ("swiglu_clamp_exp", {"deepseek4.swiglu_clamp_exp": [10.0, 10.0, 7.0]}),
    ("swiglu_clamp_exp", {"deepseek4.swiglu_clamp_exp": ["a", "a", "a"]}),
    ("vocab_size", {"deepseek4.vocab_size": None}),
    ("tokenizer.ggml.bos_token_id", {"tokenizer.ggml.bos_token_id": None}),
    ("eos_token_id", {"tokenizer.ggml.eos_token_id": 40}),
]


@pytest.mark.parametrize(("field", "changes"), GGUF_ERRORS, ids=[f"{n}-{e[0]}" for n, e in enumerate(GGUF_ERRORS)])
def test_gguf_errors_name_the_key(field: str, changes: dict) -> None:
    keys = {key: value for key, value in (small_keys() | changes).items() if value is not None}
    with pytest.raises(Ds4Error) as error:
        ModelConfig.from_gguf(keys, source="a.gguf")
    message = one_line(error)
    assert message.startswith("a.gguf: ")
    assert field in message


def test_golden_configs(golden: Path) -> None:
    read = {
        name: ModelConfig.from_json(json.loads((golden / name / "config.json").read_text()), source=name)
        for name in ("tiny", "mtp", "dspark")
    }
    assert [read[name].n_mtp_layers for name in ("tiny", "mtp", "dspark")] == [0, 1, 3]
    assert read["tiny"].compress_ratios == (0, 0, 4, 128, 4)
    assert read["dspark"].dspark_target_layer_ids == (2, 3, 4)
