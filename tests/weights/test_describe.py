"""describe(): counts of the golden checkpoints, and the published traffic numbers at the real dimensions."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from weights.builders import gguf_bytes, shapes, small_keys

from ds4.config import ModelConfig
from ds4.weights import open_checkpoint
from ds4.weights.describe import describe
from ds4.weights.formats import FORMATS
from ds4.weights.names import expert_of, to_gguf

FLASH = {
    "block_count": 43,
    "vocab_size": 129280,
    "embedding_length": 4096,
    "attention.head_count": 64,
    "attention.key_length": 512,
    "attention.value_length": 512,
    "attention.q_lora_rank": 1024,
    "attention.output_lora_rank": 1024,
    "attention.output_group_count": 8,
    "attention.sliding_window": 128,
    "attention.indexer.head_count": 64,
    "attention.indexer.top_k": 512,
    "attention.compress_ratios": [0, 0] + [4, 128] * 20 + [4],
    "expert_count": 256,
    "expert_used_count": 6,
    "expert_feed_forward_length": 2048,
    "hash_layer_count": 3,
    "swiglu_clamp_exp": [10.0] * 43,
}


def flash_file(path: Path, experts: str) -> Path:
    """A sparse GGUF with the dimensions of V4-Flash: a true header, and holes where 160 GB of weights would be."""
    keys: dict[str, Any] = small_keys() | {"deepseek4." + key: value for key, value in FLASH.items()}
    config = ModelConfig.from_gguf(keys, source="flash")
    tensors: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    offset = 0
    for name, shape in shapes(config).items():
        place = to_gguf(name)
        assert place is not None
        expert = expert_of(name)
        if place[0] in tensors:
            continue
        if expert:
            fmt, shape = experts, (config.n_routed_experts, *shape)
        elif name.endswith("tid2eid"):
            fmt = "i32"
        elif ".attn.w" in name or "shared_experts" in name or name.endswith("indexer.wq_b.weight"):
            fmt = "q8_0"
        elif len(shape) == 2 and not name.endswith((".ape", "_fn")):
            fmt = "bf16"
        else:
            fmt = "f32"
        form = FORMATS[fmt]
        tensors[place[0]] = (place[0], shape[::-1], form.ggml_type or 0, offset)
        offset += -(-math.prod(shape[:-1]) * form.row_bytes(shape[-1]) // 32) * 32
    header = gguf_bytes(keys, list(tensors.values()), 0)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + offset)
    return path


@pytest.mark.parametrize(
    ("experts", "gate_up", "down"), [("nvfp4", 2434.8, 1217.4), ("mxfp4", 2299.5, 1149.8), ("q4_k", 2434.8, 1217.4)]
)
def test_real_dimensions(tmp_path: Path, experts: str, gate_up: float, down: float) -> None:
    path = flash_file(tmp_path / "flash.gguf", experts)
    start = time.perf_counter()
    ckpt = open_checkpoint(path)
    assert time.perf_counter() - start < 3
    assert len(ckpt) == 33024 + 1199  # 43 * 256 * 3 experts, and everything else
    last = ckpt.tensor("layers.42.ffn.experts.255.w2.weight")
    assert (last.shape, last.nbytes) == ((4096, 2048), 4096 * FORMATS[experts].row_bytes(2048))
    report = describe(ckpt)
    # spec weights.md 6, in units of 10^6 bytes
    published = {
        "attention projections": 4886.5,
        "shared expert": 1149.8,
        "routed gate+up": gate_up,
        "routed down": down,
        "compressors": 520.1,
        "indexer": 286.3,
        "hyper-connections": 135.5,
        "router": 90.2,
        "LM head": 1059.1,
    }
    measured = report["bytes_per_token"]
    assert {key: round(measured[key] / 1e6, 1) for key in published} == published
    assert measured["embedding row"] == 4096 * 2
    assert measured["norms, tables and biases"] < 10e6
    assert measured["total"] == sum(value for key, value in measured.items() if key != "total")
    assert report["parameters"]["total"] == pytest.approx(284e9, rel=0.01)
    assert report["parameters"]["active"] == pytest.approx(13.3e9, rel=0.01)
    assert report["layers"] == {"total": 43, "swa": 2, "csa": 21, "hca": 20, "hash_routed": 3}
    assert report["experts"] == {"routed": [256], "per_token": 6, "shared": 1, "pruned": None}
    assert report["recipe"] == {"experts": [experts], "attention": ["q8_0"], "shared": ["q8_0"], "embeddings": ["bf16"]}
    assert report["draft"] is None
    assert report["generation"].startswith("V4-Flash")
    assert sum(row["bytes"] for row in report["types"]) == report["total_bytes"] == ckpt.total_bytes
    json.dumps(report)


def test_golden_reports(golden: Path) -> None:
    reports = {name: describe(open_checkpoint(golden / name)) for name in ("tiny", "mtp", "dspark")}
    assert [reports[n]["draft"] and reports[n]["draft"]["kind"] for n in reports] == [None, "mtp", "dspark"]
    assert reports["dspark"]["draft"]["stages"] == 3
    assert reports["mtp"]["parameters"]["draft"] > 2e6
    tiny = reports["tiny"]
    assert tiny["name"] == "tiny"
    assert tiny["architecture"] == "deepseek_v4"
    assert tiny["generation"].startswith("demo")
    assert len(tiny["tensors"]) == 375
    assert tiny["tensors"][0].keys() == {"name", "shape", "format", "bytes"}
    assert [row["format"] for row in tiny["types"]] == ["bf16", "f32", "i64"]
    json.dumps(reports)


def test_import_is_light() -> None:
    code = (
        "import sys, ds4.weights, ds4.weights.describe; print([m for m in ('gguf', 'safetensors') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
