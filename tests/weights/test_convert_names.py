"""What comes along with the weights when a checkpoint is converted: names, draft heads, configuration, metadata."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from weights.builders import random_tensors, small_config, small_json
from weights.converting import assert_equal, decode_gguf, decode_safetensors, run, save_small, tensor_types

from ds4.weights import open_checkpoint

TOKENIZER_KEYS = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [f"t{n}" for n in range(32)]}


def test_draft_head_with_its_own_collapse_stays_mtp(golden: Path, tmp_path: Path) -> None:
    report = run(golden / "mtp", tmp_path / "out.gguf")
    assert any("llama.cpp does not load" in note for note in report.notes)
    plain = load_file(golden / "mtp" / "model.safetensors")
    assert_equal(decode_gguf(tmp_path / "out.gguf", list(plain)), dict(plain))
    assert open_checkpoint(tmp_path / "out.gguf").config == open_checkpoint(golden / "mtp").config


def test_draft_head_that_shares_the_collapse_becomes_llama_cpps(tmp_path: Path) -> None:
    values = random_tensors(small_config())
    shared = {f"mtp.0.{part}": values[part] for part in ("hc_head_fn", "hc_head_base", "hc_head_scale")}
    report = run(save_small(tmp_path / "in", **shared), tmp_path / "out.gguf", "nvfp4", "q8_0")
    types = tensor_types(tmp_path / "out.gguf")
    assert types["blk.3.nextn.eh_proj.weight"] == "Q8_0"
    assert types["blk.3.ffn_up_exps.weight"] == types["blk.2.ffn_up_exps.weight"] == "NVFP4"
    assert "blk.2.ffn_up_exps.scale" in types
    assert "blk.3.ffn_up_exps.scale" not in types  # llama.cpp would refuse the file
    assert not any(name.startswith("mtp.") for name in types)
    assert any("ignores the multipliers" in note for note in report.notes)
    got = open_checkpoint(tmp_path / "out.gguf")
    for half in ("e_proj", "h_proj"):
        wanted = gguf.quants.quantize(values[f"mtp.0.{half}.weight"].numpy(), gguf.GGMLQuantizationType.Q8_0)
        assert np.array_equal(got.tensor(f"mtp.0.{half}.weight").data, wanted)


def test_dspark_stages_come_along(golden: Path, tmp_path: Path) -> None:
    plain = load_file(golden / "dspark" / "model.safetensors")
    run(golden / "dspark", tmp_path / "out.gguf")
    got = open_checkpoint(tmp_path / "out.gguf")
    assert got.config == open_checkpoint(golden / "dspark").config
    assert set(got.names()) == set(plain)
    assert all(torch.equal(got.tensor(n).dequantize(), plain[n].float()) for n in plain if n.startswith("mtp."))
    run(tmp_path / "out.gguf", tmp_path / "back")
    assert_equal(decode_safetensors(tmp_path / "back"), dict(plain))


def test_config_and_names_survive(tmp_path: Path) -> None:
    source = save_small(tmp_path / "in", small_json(_name_or_path="org/Small-0731", note="kept"))
    run(source, tmp_path / "a.gguf", tokenizer=TOKENIZER_KEYS)
    first = open_checkpoint(tmp_path / "a.gguf")
    assert first.metadata["general.name"] == "org/Small-0731"
    assert first.metadata["tokenizer.ggml.tokens"] == TOKENIZER_KEYS["tokenizer.ggml.tokens"]
    run(tmp_path / "a.gguf", tmp_path / "b.gguf", "q8_0")
    assert open_checkpoint(tmp_path / "b.gguf").metadata["tokenizer.ggml.model"] == "gpt2"
    run(tmp_path / "b.gguf", tmp_path / "out", tokenizer={"tokenizer.json": b"{}"})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["_name_or_path"] == "org/Small-0731"
    assert "quantization_config" not in config
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"{}"
    assert open_checkpoint(tmp_path / "out").config == open_checkpoint(source).config
    run(source, tmp_path / "same")
    assert json.loads((tmp_path / "same" / "config.json").read_text())["note"] == "kept"


def test_modelopt_config_and_activation_scales(tmp_path: Path) -> None:
    run(save_small(tmp_path / "in"), tmp_path / "nv", "nvfp4", "fp8")
    config = json.loads((tmp_path / "nv" / "config.json").read_text())
    assert (config["expert_dtype"], config["quantization_config"]["moe_quant_algo"]) == ("fp4", "NVFP4")
    file = tmp_path / "nv" / "model.safetensors"
    name = "layers.0.ffn.experts.1.w3"
    tensors = load_file(file) | {f"{name}.input_scale": torch.tensor(0.125)}
    save_file(tensors, file)
    report = run(tmp_path / "nv", tmp_path / "copy")
    assert not report.left_out
    assert load_file(tmp_path / "copy" / "model.safetensors")[f"{name}.input_scale"] == 0.125
    run(tmp_path / "nv", tmp_path / "mx", "mxfp4")
    assert f"{name}.input_scale" not in load_file(tmp_path / "mx" / "model.safetensors")


def test_unknown_tensors_are_left_out_of_a_gguf_and_said_so(tmp_path: Path) -> None:
    source = save_small(tmp_path / "in", **{"layers.0.extra.weight": torch.ones(2, 2)})
    report = run(source, tmp_path / "out.gguf")
    assert report.left_out == ("layers.0.extra.weight",)
    assert run(source, tmp_path / "out").left_out == ()
    assert "layers.0.extra.weight" in load_file(tmp_path / "out" / "model.safetensors")
