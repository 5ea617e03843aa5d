"""``verify``: every kind of scale that is not finite is found, and so are hash tables that name no expert."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from weights.builders import gguf_with, random_tensors, small_config, small_json, small_keys

from ds4.weights import open_checkpoint
from ds4.weights.check import verify

NAN16, NAN_BF16, NAN32 = b"\x00\x7e", b"\xc0\x7f", b"\x00\x00\xc0\x7f"
# (type id, weights a block, bytes a block, where a scale is, what makes it not finite)
BLOCKS = [
    (0, 1, 4, 0, NAN32),
    (1, 1, 2, 0, NAN16),
    (30, 1, 2, 0, NAN_BF16),
    (8, 32, 34, 0, NAN16),
    (10, 256, 84, 80, NAN16),
    (10, 256, 84, 82, NAN16),
    (12, 256, 144, 0, NAN16),
    (12, 256, 144, 2, NAN16),
    (14, 256, 210, 208, NAN16),
    (16, 256, 66, 0, NAN16),
    (39, 32, 17, 0, b"\xff"),
]


def gguf_of(tmp_path, kind: int, data: bytes, shape: tuple[int, int], name: str = "blk.0.ffn_gate_shexp.weight"):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_with(small_keys(), {name: (kind, shape, data)}))
    return open_checkpoint(path)


@pytest.mark.parametrize(("kind", "block", "size", "offset", "bad"), BLOCKS)
def test_every_scale_of_a_gguf_block(tmp_path, kind, block, size, offset, bad):
    """One bad scale in the middle of the rows is found; the same bits anywhere else in a block are codes."""
    rows, blocks = 4, 64
    data = bytearray(rows * blocks * size)
    assert verify(gguf_of(tmp_path, kind, bytes(data), (rows, blocks * block))).defects == ()
    at = 137 * size + offset
    data[at : at + len(bad)] = bad
    report = verify(gguf_of(tmp_path, kind, bytes(data), (rows, blocks * block)))
    assert len(report.defects) == 1
    assert report.defects[0].startswith("blk.0.ffn_gate_shexp.weight: 1 of ")
    assert report.n_tensors == 1


@pytest.mark.parametrize("kind", [8, 12, 39])
def test_codes_may_have_any_bits(tmp_path, kind):
    _, block, size, _, _ = next(row for row in BLOCKS if row[0] == kind)
    scale_bytes = {8: 2, 12: 4, 39: 1}[kind]
    one = bytes(scale_bytes) + b"\xff" * (size - scale_bytes)
    assert verify(gguf_of(tmp_path, kind, one * 8, (1, 8 * block))).defects == ()


def test_sleepy_scales(tmp_path):
    block = bytearray(144)
    name = "blk.1.ffn_gate_exps.nvfp4_weight"

    def opened():
        tensors = {
            name: (40, (3, 64, 256), bytes(block) * 192),
            "blk.1.ffn_gate_exps.nvfp4_scale_2": (0, (3,), bytes(12)),
            "blk.1.ffn_gate_inp.weight": (0, (3, 64), bytes(3 * 64 * 4)),
        }
        path = tmp_path / "model.gguf"
        path.write_bytes(gguf_with(small_keys() | {"deepseek4.embedding_length": 256}, tensors))
        return open_checkpoint(path)

    block[:128] = b"\xff" * 128
    assert verify(opened()).defects == ()
    block[130] = 0xFF  # e4m3 has not-a-number with either sign
    assert verify(opened()).defects == (f"{name}: 192 of 3072 scales are not finite",)


def write(tmp_path, tensors, **config):
    (tmp_path / "config.json").write_text(json.dumps(small_json(**config)))
    save_file(tensors, tmp_path / "model.safetensors")
    return open_checkpoint(tmp_path)


def test_companion_scales(tmp_path):
    """FP8 codes, E8M0 and E4M3 block scales, and a multiplier, each in a tensor of its own."""
    tensors = random_tensors(small_config())
    for name in ("layers.0.attn.wkv", "layers.1.attn.wkv"):
        tensors[name + ".weight"] = torch.zeros(128, 64, dtype=torch.float8_e4m3fn)
        tensors[name + ".scale"] = torch.full((1, 1), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    for expert in (0, 1):
        base = f"layers.1.ffn.experts.{expert}.w1."
        tensors[base + "weight"] = torch.full((64, 32), 255, dtype=torch.uint8)
        tensors[base + "weight_scale"] = torch.zeros(64, 4, dtype=torch.float8_e4m3fn)
        tensors[base + "weight_scale_2"] = torch.tensor(1.0)
    assert verify(write(tmp_path, tensors)).defects == ()
    tensors["layers.0.attn.wkv.weight"].view(torch.uint8)[3, 5] = 0xFF
    tensors["layers.1.attn.wkv.scale"].view(torch.uint8)[0, 0] = 0xFF
    tensors["layers.1.ffn.experts.0.w1.weight_scale"].view(torch.uint8)[9, 2] = 0x7F
    tensors["layers.1.ffn.experts.1.w1.weight_scale_2"].fill_(float("inf"))
    tensors["layers.2.attn_norm.weight"][7] = float("nan")
    defects = verify(write(tmp_path, tensors)).defects
    assert sorted(defect.partition(":")[0] for defect in defects) == [
        "layers.0.attn.wkv.weight",
        "layers.1.attn.wkv.scale",
        "layers.1.ffn.experts.0.w1.weight_scale",
        "layers.1.ffn.experts.1.w1.weight_scale_2",
        "layers.2.attn_norm.weight",
    ]


@pytest.mark.parametrize(("expert", "problem"), [(3, "are not in 0 to 2"), (-1, "are not in 0 to 2")])
def test_hash_tables(tmp_path, expert, problem):
    tensors = random_tensors(small_config())
    report = verify(write(tmp_path, tensors))
    assert (report.defects, report.n_tables) == ((), 1)
    tensors["layers.0.ffn.gate.tid2eid"][5, 0] = expert
    (defect,) = verify(write(tmp_path, tensors)).defects
    assert defect.startswith("layers.0.ffn.gate.tid2eid: 1 of 64 expert ids")
    assert problem in defect


def test_hash_table_naming_an_expert_twice(tmp_path):
    tensors = random_tensors(small_config())
    table = tensors["layers.0.ffn.gate.tid2eid"]
    table[5, 0] = table[5, 1]
    report = verify(write(tmp_path, tensors))
    assert report.defects == ("layers.0.ffn.gate.tid2eid: 1 of 32 tokens name an expert twice",)


def test_progress_reaches_the_end(tmp_path):
    seen = []
    ckpt = write(tmp_path, random_tensors(small_config()))
    verify(ckpt, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (ckpt.total_bytes, ckpt.total_bytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
