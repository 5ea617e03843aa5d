"""Writing GGUF: what is written opens again as the same model, here and with the gguf package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from weights.builders import random_tensors, small_config

from ds4.errors import Ds4Error
from ds4.weights import open_checkpoint
from ds4.weights.formats import FORMATS
from ds4.weights.gguf_write import write_gguf

TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": [f"t{n}" for n in range(32)],
    "tokenizer.ggml.token_type": [1] * 32,
    "tokenizer.ggml.add_bos_token": False,
}
CONFIG = small_config()
TENSORS = random_tensors(CONFIG)


def save(path: Path, fmt: str = "f32", config: Any = CONFIG, tensors: Any = None, **options: Any) -> Path:
    def pick(name: str, values: torch.Tensor) -> str:
        if not values.is_floating_point():
            return "i32"
        return fmt if values.dim() == 2 and values.shape[-1] % FORMATS[fmt].block == 0 else "f32"

    entries = tensors or [(name, values, pick(name, values)) for name, values in TENSORS.items()]
    return write_gguf(path, config, entries, tokenizer_metadata=TOKENIZER, name="small", **options)


@pytest.mark.parametrize(("fmt", "error"), [("f32", 0), ("f16", 5e-4), ("bf16", 4e-3), ("q8_0", 0.01), ("nvfp4", 0.12)])
def test_round_trip(tmp_path: Path, fmt: str, error: float) -> None:
    path = save(tmp_path / "a.gguf", fmt)
    ckpt = open_checkpoint(path)
    assert ckpt.config == CONFIG
    assert set(ckpt.names()) == set(TENSORS)
    assert ckpt.metadata["general.name"] == "small"
    assert ckpt.metadata["tokenizer.ggml.tokens"] == TOKENIZER["tokenizer.ggml.tokens"]
    assert ckpt.metadata["tokenizer.ggml.add_bos_token"] is False
    formats = set()
    for name, values in TENSORS.items():
        tensor = ckpt.expect(name, tuple(values.shape))
        formats.add(tensor.format)
        got = tensor.dequantize()
        if not values.is_floating_point():
            assert got.dtype == torch.int32
            assert torch.equal(got.long(), values)
        elif tensor.format == fmt == "f32":
            assert torch.equal(got, values)
        else:
            assert float((got - values).norm() / values.norm()) <= error
            if tensor.format == fmt != "nvfp4":
                packed = FORMATS[fmt].quantize(values)  # type: ignore[misc]
                assert torch.equal(tensor.data, packed)
    assert formats == {fmt, "f32", "i32"}


def test_gguf_package_reads_it(tmp_path: Path) -> None:
    path = save(tmp_path / "a.gguf", "nvfp4", extra={"ds4.note": "x", "ds4.steps": 7, "ds4.negative": -1})
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "deepseek4"
    assert fields["deepseek4.block_count"] == 3
    assert fields["deepseek4.expert_gating_func"] == 4
    assert fields["deepseek4.attention.compress_ratios"] == [0, 4, 8]
    assert fields["general.file_type"] == 39
    assert (fields["ds4.note"], fields["ds4.steps"], fields["ds4.negative"]) == ("x", 7, -1)
    assert "deepseek4.nextn_predict_layers" not in fields  # the trunk's block_count has no draft block in it
    stored = {t.name: t for t in reader.tensors}
    stack, scales = stored["blk.1.ffn_gate_exps.weight"], stored["blk.1.ffn_gate_exps.scale"]
    assert [int(n) for n in stack.shape] == [64, 64, 3]
    ckpt = open_checkpoint(path)
    values = torch.from_numpy(gguf.dequantize(stack.data, stack.tensor_type))
    for e in range(3):
        one = ckpt.tensor(f"layers.1.ffn.experts.{e}.w1.weight")
        assert one.scale == scales.data[e]
        assert torch.equal(one.dequantize(), values[e] * one.scale)
    assert {"mtp.0.hc_head_fn.weight", "mtp.0.e_proj.weight", "mtp.0.ffn_down_exps.weight"} <= set(stored)
    assert {"output_hc_fn.weight", "blk.0.ffn_gate_tid2eid.weight", "blk.1.indexer.proj.weight"} <= set(stored)


def test_without_yarn_and_without_drafts(tmp_path: Path) -> None:
    config = small_config(rope_scaling=None, num_nextn_predict_layers=0)
    trunk = [(n, v, "f32" if v.is_floating_point() else "i32") for n, v in TENSORS.items() if not n.startswith("mtp")]
    assert open_checkpoint(save(tmp_path / "a.gguf", config=config, tensors=trunk)).config == config


def test_draft_block_without_its_own_collapse_becomes_a_llama_cpp_block(tmp_path: Path) -> None:
    shared = [
        (n, v, "f32" if v.is_floating_point() else "i32")
        for n, v in TENSORS.items()
        if not n.startswith("mtp.0.hc_head")
    ]
    path = save(tmp_path / "a.gguf", tensors=shared)
    fields = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
    assert fields["deepseek4.block_count"] == 4
    assert fields["deepseek4.nextn_predict_layers"] == 1
    assert fields["deepseek4.attention.compress_ratios"] == [0, 4, 8, 0]
    ckpt = open_checkpoint(path)
    assert not any(t.name.startswith("mtp.") for t in ckpt.tensors())
    for name, values, _ in shared:
        assert torch.equal(ckpt.tensor(name).dequantize().to(values.dtype), values), name
    for part in ("hc_head_fn", "hc_head_scale", "hc_head_base"):
        assert torch.equal(ckpt.tensor(f"mtp.0.{part}").dequantize(), TENSORS[part])


X = torch.ones(2, 64)


@pytest.mark.parametrize(
    ("problem", "tensors"),
    [
        ("no GGUF name is known", [("nonsense.weight", X, "f32")]),
        ("cannot write format 'q4_k'", [("embed.weight", X, "q4_k")]),
        ("does not fit q8_0", [("embed.weight", X[:, :33], "q8_0")]),
        ("does not fit f32", [("embed.weight", X[0, 0], "f32")]),
        ("cannot be stored as f32", [("embed.weight", X.int(), "f32")]),
        ("cannot be stored as i32", [("embed.weight", X, "i32")]),
        ("not-a-numbers", [("embed.weight", X / 0, "f32")]),
        ("given twice", [("embed.weight", X, "f32")] * 2),
        ("without gaps", [("layers.0.ffn.experts.1.w1.weight", X, "f32")]),
        (
            "differ in format or shape",
            [("layers.0.ffn.experts.0.w1.weight", X, "f32"), ("layers.0.ffn.experts.1.w1.weight", X, "f16")],
        ),
    ],
)
def test_refuses_what_it_cannot_write(tmp_path: Path, problem: str, tensors: Any) -> None:
    with pytest.raises(ValueError, match=problem):
        save(tmp_path / "a.gguf", tensors=tensors)
    assert os.listdir(tmp_path) == []


def test_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"old")
    trunk = [(n, v, "f32" if v.is_floating_point() else "i32") for n, v in TENSORS.items() if not n.startswith("mtp")]
    with pytest.raises(Ds4Error, match="would not hold the same n_mtp_layers"):
        save(path, tensors=trunk)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.gguf"]
    save(path)
    assert open_checkpoint(path).config == CONFIG
    assert path.stat().st_mode & 0o044 == 0o044 & ~_umask()
    with pytest.raises(Ds4Error, match="cannot be written"):
        save(tmp_path / "absent" / "a.gguf")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
