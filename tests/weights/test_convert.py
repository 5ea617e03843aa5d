"""Converting checkpoints: what is lossless is bit for bit, as other decoders than ds4's see it; the rest is said."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from weights.builders import random_tensors, small_config
from weights.converting import (
    all_exact,
    assert_equal,
    decode_gguf,
    decode_safetensors,
    e4m3,
    raw,
    run,
    save_small,
)

from ds4.weights import open_checkpoint
from ds4.weights.names import EXPERTS, expert_of

DEMO = Path(__file__).resolve().parents[2] / "ds4" / "demo" / "demo.gguf"


# Lossless, as others see it.  golden/tiny holds as BF16 the values of golden/tiny_native (FP8 and FP4 blocks).


@pytest.mark.parametrize("experts", ["keep", "nvfp4"])
def test_official_formats_become_a_gguf_bit_for_bit(golden: Path, tmp_path: Path, experts: str) -> None:
    out = tmp_path / "out.gguf"
    report = run(golden / "tiny_native", out, experts)
    assert all_exact(report)
    plain = load_file(golden / "tiny" / "model.safetensors")
    assert_equal(decode_gguf(out, list(plain)), dict(plain))
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(out).tensors}
    assert types["blk.0.ffn_up_exps.weight"] == ("MXFP4" if experts == "keep" else "NVFP4")
    assert types["blk.0.attn_kv.weight"] == types["token_embd.weight"] == "BF16"
    assert types["blk.0.attn_norm.weight"] == types["blk.2.attn_compressor_ape.weight"] == "F32"
    assert types["blk.0.ffn_gate_tid2eid.weight"] == "I32"


@pytest.mark.parametrize("experts", ["mxfp4", "nvfp4"])
def test_llama_cpps_gguf_becomes_safetensors_bit_for_bit(golden: Path, tmp_path: Path, experts: str) -> None:
    """Its experts are lossless copies of the tiny model's; its Q8_0 matrices become what the gguf package decodes."""
    report = run(golden / "tiny_native" / "tiny.gguf", tmp_path / "out", experts)
    assert all_exact(report)
    plain = load_file(golden / "tiny" / "model.safetensors")
    expected = decode_gguf(golden / "tiny_native" / "tiny.gguf", list(plain))
    assert all(np.array_equal(expected[name], plain[name].float()) for name in plain if expert_of(name))
    assert_equal(decode_safetensors(tmp_path / "out"), dict(expected))


def test_fp8_and_mxfp4_made_from_bf16(golden: Path, tmp_path: Path) -> None:
    """The tiny model's values fit these formats, so that quantising finds them again."""
    report = run(golden / "tiny", tmp_path / "out", "mxfp4", "fp8")
    assert all_exact(report)
    plain = load_file(golden / "tiny" / "model.safetensors")
    assert_equal(decode_safetensors(tmp_path / "out"), dict(plain))
    native = load_file(golden / "tiny_native" / "model.safetensors")
    mine = load_file(tmp_path / "out" / "model.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in mine.items()} == {n: (t.dtype, t.shape) for n, t in native.items()}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((golden / "tiny_native" / "config.json").read_text())


@pytest.mark.parametrize("out", ["out", "out.gguf"])
def test_nvfp4_made_from_bf16(golden: Path, tmp_path: Path, out: str) -> None:
    """A power of two for 32 weights is one for 16 too."""
    assert all_exact(run(golden / "tiny", tmp_path / out, "nvfp4"))
    plain = load_file(golden / "tiny" / "model.safetensors")
    decode = decode_gguf(tmp_path / out, list(plain)) if out.endswith("gguf") else decode_safetensors(tmp_path / out)
    assert_equal(decode, dict(plain))


def test_modelopt_there_and_back(golden: Path, tmp_path: Path) -> None:
    """MXFP4 to NVFP4 and folded back: the same bytes again, but for blocks of zeros, whose exponent means nothing."""
    assert all_exact(run(golden / "tiny_native", tmp_path / "nv", "nvfp4"))
    plain = load_file(golden / "tiny" / "model.safetensors")
    assert_equal(decode_safetensors(tmp_path / "nv"), dict(plain))
    assert all_exact(run(tmp_path / "nv", tmp_path / "mx", "mxfp4"))
    before, after = (load_file(d / "model.safetensors") for d in (golden / "tiny_native", tmp_path / "mx"))
    assert set(before) == set(after)
    for name, tensor in before.items():
        if not (name.endswith(".scale") and ".experts." in name):
            assert np.array_equal(raw(tensor), raw(after[name])), name
    assert_equal(decode_safetensors(tmp_path / "mx"), dict(plain))


def test_bundled_model_there_and_back(tmp_path: Path) -> None:
    """As safetensors its weights are what the gguf package decodes, and the GGUF made of those has the same experts."""
    assert all_exact(run(DEMO, tmp_path / "st"))
    assert all_exact(run(tmp_path / "st", tmp_path / "back.gguf"))
    demo, back = (gguf.GGUFReader(p) for p in (DEMO, tmp_path / "back.gguf"))
    stored = {t.name: t for t in demo.tensors}
    assert {t.name for t in back.tensors} == set(stored)  # the draft head is llama.cpp's kind again, without scales
    st = decode_safetensors(tmp_path / "st")
    for tensor in back.tensors:
        old = stored[tensor.name]
        if tensor.tensor_type == old.tensor_type:
            assert np.array_equal(tensor.data, old.data), tensor.name
        else:
            assert np.array_equal(tensor.data, gguf.dequantize(old.data, old.tensor_type)), tensor.name
        for suffix, matrix in EXPERTS.items():
            if tensor.name == f"blk.1.{suffix}":
                values = gguf.dequantize(tensor.data, tensor.tensor_type)
                for expert in range(16):
                    assert np.array_equal(st[f"layers.1.ffn.experts.{expert}.{matrix}.weight"], values[expert])


def test_keep_to_the_same_container_copies_every_byte(golden: Path, tmp_path: Path) -> None:
    run(golden / "tiny_native", tmp_path / "nv", "nvfp4")
    for source in (golden / "tiny_native", tmp_path / "nv"):
        run(source, tmp_path / "out", force=True)
        before, after = (load_file(d / "model.safetensors") for d in (source, tmp_path / "out"))
        assert set(before) == set(after)
        assert all(np.array_equal(raw(before[name].flatten()), raw(after[name].flatten())) for name in before)
    run(tmp_path / "nv", tmp_path / "nv.gguf")
    for source in (DEMO, tmp_path / "nv.gguf"):  # with and without multipliers
        run(source, tmp_path / "out.gguf", force=True)
        old, new = ({t.name: t for t in gguf.GGUFReader(p).tensors} for p in (source, tmp_path / "out.gguf"))
        assert set(old) == set(new)
        assert all(np.array_equal(old[name].data, new[name].data) for name in old)
        assert open_checkpoint(source).metadata == open_checkpoint(tmp_path / "out.gguf").metadata
    assert "blk.1.ffn_up_exps.scale" in new


# What is rounded is said.


def test_report_of_what_was_rounded(tmp_path: Path) -> None:
    report = run(save_small(tmp_path / "in"), tmp_path / "out.gguf", "q8_0", "bf16")
    lines = {(line.group, line.source, line.target): line for line in report.lines}
    experts = lines["experts", "f32", "q8_0"]
    assert len(experts.inexact) == experts.tensors == 4 * 3 * 3
    assert 1e-3 < experts.max_relative_error < 1e-2
    values = random_tensors(small_config())
    written = open_checkpoint(tmp_path / "out.gguf")
    for name, error in experts.inexact.items():
        x = values[name]
        assert error == pytest.approx(float((written.tensor(name).dequantize() - x).norm() / x.norm()), rel=1e-4)
    assert experts.target_bytes * 32 * 4 == experts.source_bytes * 34
    assert not lines["other", "f32", "f32"].inexact
    assert not lines["other", "i64", "i32"].inexact
    assert 1e-4 < lines["dense", "f32", "bf16"].max_relative_error < 3e-3
    assert ("LM head", "f32", "bf16") in lines
    record = json.loads(json.dumps(report.to_dict()))
    assert record["path"] == str(tmp_path / "out.gguf")
    assert record["lines"][0]["max_relative_error"] == experts.max_relative_error


def test_a_cast_names_the_tensors_that_it_rounded(tmp_path: Path) -> None:
    """Blocks of which one is 18 octaves below the largest: one more than NVFP4's scales reach."""
    run(save_small(tmp_path / "in"), tmp_path / "mx", "mxfp4")
    file = tmp_path / "mx" / "model.safetensors"
    tensors = load_file(file)
    far, near = "layers.1.ffn.experts.2.w2", "layers.1.ffn.experts.1.w2"
    for name, octaves in ((far, 18), (near, 17)):
        scale = raw(tensors[f"{name}.scale"])
        scale[:] = 120
        scale[3, 1] -= octaves
        raw(tensors[f"{name}.weight"])[3] = 0x11  # 1/2, so that nothing is left of 18 octaves less
    save_file(tensors, file)
    report = run(tmp_path / "mx", tmp_path / "nv.gguf", "nvfp4")
    (line,) = (line for line in report.lines if line.group == "experts")
    assert list(line.inexact) == [f"{far}.weight"]
    assert 0 < line.max_relative_error < 1e-4
    got = open_checkpoint(tmp_path / "nv.gguf")
    wanted = decode_safetensors(tmp_path / "mx")
    assert np.array_equal(got.tensor(f"{near}.weight").dequantize(), wanted[f"{near}.weight"])
    different = got.tensor(f"{far}.weight").dequantize().numpy() != wanted[f"{far}.weight"]
    assert different[3, 32:].all()
    assert different.sum() == 32


def test_lossless_only_where_it_is(tmp_path: Path) -> None:
    """A BF16 cannot hold what FP8 with F32 scales means, so keep makes it F32."""
    tensors = random_tensors(small_config())
    name = "layers.0.ffn.experts.0.w1"
    codes = torch.arange(64 * 64, dtype=torch.int64).remainder(0x7F).to(torch.uint8).view(64, 64)
    changes = {f"{name}.weight": codes.view(torch.float8_e4m3fn), f"{name}.scale": torch.tensor([[0.3]])}
    for expert in range(3):
        changes |= {n.replace("experts.0", f"experts.{expert}"): t.clone() for n, t in changes.items()}
    source = save_small(tmp_path / "in", **changes)
    assert set(tensors) < set(load_file(source / "model.safetensors"))
    assert all_exact(run(source, tmp_path / "out.gguf"))
    got = open_checkpoint(tmp_path / "out.gguf").tensor(f"{name}.weight")
    assert got.format == "f32"
    assert np.array_equal(got.dequantize(), e4m3(codes.numpy()) * np.float32(0.3))
    report = run(source, tmp_path / "copy")
    assert all_exact(report)
    assert load_file(tmp_path / "copy" / "model.safetensors")[f"{name}.scale"].dtype == torch.float32
