"""The two spellings of tensor names, and which tensors belong to the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from weights.builders import random_tensors, shapes, small_config, small_json

from ds4.errors import Ds4Error
from ds4.weights import open_checkpoint
from ds4.weights.safetensors_open import official_name

# Official -> transformers, from the side of the official names: the reverse of what ds4 does, in the order of
# transformers' own table.
OTHER = (
    (".attn.indexer.compressor.norm.", ".self_attn.compressor.indexer.kv_norm."),
    (".attn.indexer.compressor.ape", ".self_attn.compressor.indexer.position_bias"),
    (".attn.indexer.compressor.wkv.", ".self_attn.compressor.indexer.kv_proj."),
    (".attn.indexer.compressor.wgate.", ".self_attn.compressor.indexer.gate_proj."),
    (".attn.indexer.wq_b.", ".self_attn.compressor.indexer.q_b_proj."),
    (".attn.indexer.weights_proj.", ".self_attn.compressor.indexer.scorer.weights_proj."),
    (".attn.compressor.norm.", ".self_attn.compressor.kv_norm."),
    (".attn.compressor.ape", ".self_attn.compressor.position_bias"),
    (".attn.compressor.wkv.", ".self_attn.compressor.kv_proj."),
    (".attn.compressor.wgate.", ".self_attn.compressor.gate_proj."),
    (".attn.wq_a.", ".self_attn.q_a_proj."),
    (".attn.wq_b.", ".self_attn.q_b_proj."),
    (".attn.wkv.", ".self_attn.kv_proj."),
    (".attn.wo_a.", ".self_attn.o_a_proj."),
    (".attn.wo_b.", ".self_attn.o_b_proj."),
    (".attn.q_norm.", ".self_attn.q_a_norm."),
    (".attn.attn_sink", ".self_attn.sinks"),
    (".attn.", ".self_attn."),
    (".ffn.gate.bias", ".mlp.gate.e_score_correction_bias"),
    (".ffn.", ".mlp."),
    (".w1.", ".gate_proj."),
    (".w2.", ".down_proj."),
    (".w3.", ".up_proj."),
    (".attn_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
    (".hc_attn_", ".attn_hc."),
    (".hc_ffn_", ".ffn_hc."),
    ("hc_head_", "hc_head.hc_"),
)


def other_spelling(name: str) -> str:
    """What transformers calls a tensor with this official name."""
    if name == "head.weight":
        return "lm_head.weight"
    if name == "embed.weight":
        return "model.embed_tokens.weight"
    for official, other in OTHER:
        name = name.replace(official, other)
    return "model." + name


NAMES = sorted(shapes(small_config()))


@given(st.sampled_from(NAMES))
def test_both_spellings(name: str) -> None:
    assert official_name(name) is name
    assert official_name(other_spelling(name)) == name
    assert official_name("model." + name) == name
    assert official_name(other_spelling(name).removeprefix("model.")) == name


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("model.layers.3.mlp.experts.21.up_proj.weight_packed", "layers.3.ffn.experts.21.w3.weight_packed"),
        ("layers.3.mlp.experts.21.w2.weight_global_scale", "layers.3.ffn.experts.21.w2.weight_global_scale"),
        ("model.layers.42.self_attn.o_a_proj.weight_scale_inv", "layers.42.attn.wo_a.weight_scale_inv"),
        ("layers.2.attn.compressor.indexer.wq_b.weight_scale", "layers.2.attn.indexer.wq_b.weight_scale"),
        ("layers.2.attn.compressor.indexer.weights_proj.weight", "layers.2.attn.indexer.weights_proj.weight"),
        ("layers.2.attn.compressor.indexer.kv_norm.weight", "layers.2.attn.indexer.compressor.norm.weight"),
        ("layers.2.attn.compressor.position_bias", "layers.2.attn.compressor.ape"),
        ("model.layers.2.self_attn.kv_norm.weight", "layers.2.attn.kv_norm.weight"),
        ("model.mtp.0.mlp.gate.weight", "mtp.0.ffn.gate.weight"),
        ("mtp.0.emb.tok_emb.weight", "mtp.0.emb.tok_emb.weight"),
        ("mtp.2.markov_head.markov_w1.weight", "mtp.2.markov_head.markov_w1.weight"),
        ("mtp.2.confidence_head.proj.weight", "mtp.2.confidence_head.proj.weight"),
        ("mtp.0.main_proj.scale", "mtp.0.main_proj.scale"),
        ("head.scale", "head.scale"),
    ],
)
def test_names_in_files(name: str, official: str) -> None:
    """Companions, names that are half translated (canada-quant's W4A16), and draft blocks."""
    assert official_name(name) == official


@pytest.mark.parametrize(
    "name",
    [
        "vision.blocks.0.attn.wqkv.weight",
        "aligner.w1.weight",
        "image_newline",
        "layers.3.ffn.gate.bias_vl",
        "model.layers.3.mlp.gate.bias_vl",
        "model.vision.layers.0.weight",
        "layers.x.attn.wkv.weight",
        "base_model.model.layers.0.lora_A",
        "headless",
        "calibration.layers.0.amax",
        "",
        "model.",
    ],
)
def test_not_of_the_model(name: str) -> None:
    assert official_name(name) is None


def test_what_is_not_of_the_model_may_be_anything(tmp_path: Path) -> None:
    extra = {
        "vision.patch.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn),
        "calibration.amax": torch.zeros(3, dtype=torch.float64),
        "layers.0.ffn.gate.bias_vl": torch.zeros(3, dtype=torch.int8),
        "image_newline": torch.zeros(0),
    }
    save_file({"norm.weight": torch.ones(64)} | extra, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(small_json()))
    ckpt = open_checkpoint(tmp_path)
    assert ckpt.names() == ["norm.weight"]
    assert ckpt.total_bytes == 256


def refused(directory: Path, tensors: dict[str, torch.Tensor]) -> str:
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(small_json()))
    with pytest.raises(Ds4Error) as error:
        open_checkpoint(directory)
    assert str(directory / "model.safetensors") in str(error.value)
    return str(error.value)


def test_unused_tensors_of_the_model(tmp_path: Path) -> None:
    """Beside the weights, an extra tensor is no error, but elements that only a companion explains are."""
    tensors = {"layers.0.ffn.experts.0.w1.act_amax": torch.ones(3), "mtp.0.head.weight": torch.ones(2, 2)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(small_json()))
    assert set(open_checkpoint(tmp_path).names()) == set(tensors)
    name = "layers.0.attn.kv.k_codes"
    assert f"tensor {name!r} has dtype U8, but belongs to no weight" in refused(
        tmp_path, {name: torch.zeros(3, dtype=torch.uint8)}
    )
    assert "tensor 'norm.weight' has dtype F64, which ds4 cannot read; it reads F32, F16," in refused(
        tmp_path, {"norm.weight": torch.ones(3, dtype=torch.float64)}
    )


def test_two_spellings_of_one_weight(tmp_path: Path) -> None:
    one, other = "layers.0.attn.attn_sink", "model.layers.0.self_attn.sinks"
    message = refused(tmp_path, {one: torch.ones(4), other: torch.ones(4)})
    assert "is the same weight as" in message
    assert repr(one) in message
    assert repr(other) in message


def test_another_model(tmp_path: Path) -> None:
    message = refused(tmp_path, {"transformer.h.0.attn.weight": torch.ones(4)})
    assert "holds no tensor of a DeepSeek-V4 model" in message


def test_a_whole_checkpoint_in_the_other_spelling(tmp_path: Path) -> None:
    tensors = random_tensors(small_config())
    save_file({other_spelling(name): value for name, value in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(small_json()))
    ckpt = open_checkpoint(tmp_path)
    assert set(ckpt.names()) == set(tensors)
    assert ckpt.config.n_mtp_layers == 1
    for name, value in tensors.items():
        assert torch.equal(ckpt.tensor(name).dequantize(), value)
    assert {t.name for t in ckpt.tensors()} == {other_spelling(name) for name in tensors}
