"""Reading safetensors checkpoints: golden data against the safetensors library, shards, and damaged files."""

from __future__ import annotations

import gc
import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from weights.builders import random_tensors, shapes, small_config, small_json, write

from ds4.errors import Ds4Error
from ds4.weights import open_checkpoint

INDEX = "model.safetensors.index.json"


def refused(path: Path) -> str:
    with pytest.raises(Ds4Error) as error:
        open_checkpoint(path)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 500 + len(str(path))
    return message


def file_bytes(header: Any, data: bytes = bytes(64)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: Any = "F32", shape: Any = (4,), begin: Any = 0, end: Any = 16) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


@pytest.fixture
def config_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(small_json()))
    return tmp_path


@pytest.fixture
def sharded(config_dir: Path) -> Path:
    """A whole small checkpoint in two shards with an index."""
    tensors = random_tensors(small_config())
    weight_map: dict[str, str] = {}
    for part in range(2):
        shard = f"model-0000{part + 1}-of-00002.safetensors"
        names = sorted(tensors)[part::2]
        save_file({n: tensors[n] for n in names}, config_dir / shard)
        weight_map |= dict.fromkeys(names, shard)
    (config_dir / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return config_dir


@pytest.mark.parametrize(("name", "stages"), [("tiny", 0), ("mtp", 1), ("dspark", 3)])
def test_golden_equals_the_library(golden: Path, name: str, stages: int) -> None:
    ckpt = open_checkpoint(golden / name)
    expected = load_file(golden / name / "model.safetensors")
    assert set(ckpt.names()) == set(expected)
    assert len(ckpt) == len(expected)
    assert ckpt.config.n_mtp_layers == stages
    assert ckpt.container == "safetensors"
    assert ckpt.tokenizer_files == golden / name
    assert ckpt.n_experts("layers.0") == ckpt.config.n_routed_experts
    for key, value in expected.items():
        tensor = ckpt.expect(key, tuple(value.shape))
        assert torch.equal(tensor.dequantize(), value.float() if value.is_floating_point() else value)
        assert tensor.nbytes == value.numel() * value.element_size() == ckpt.stored_as(key)[2]
    assert ckpt.total_bytes == sum(v.numel() * v.element_size() for v in expected.values())


def test_builders_name_what_the_golden_checkpoint_has(golden: Path) -> None:
    ckpt = open_checkpoint(golden / "mtp")
    assert {name: ckpt.tensor(name).shape for name in ckpt.names()} == shapes(ckpt.config)


@pytest.mark.parametrize("opened", [".", INDEX, "model-00002-of-00002.safetensors"])
def test_sharded(sharded: Path, opened: str) -> None:
    ckpt = open_checkpoint(sharded / opened)
    expected = random_tensors(small_config())
    assert set(ckpt.names()) == set(expected)
    assert ckpt.config == small_config()
    for name, value in expected.items():
        assert torch.equal(ckpt.tensor(name).dequantize(), value)


def test_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert "shard model-00002-of-00002.safetensors of 2 is missing" in refused(sharded)


def test_index_lists_a_tensor_its_shard_lacks(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["norm.weight"] = next(
        s for s in sorted(set(index["weight_map"].values())) if s != index["weight_map"]["norm.weight"]
    )
    (sharded / INDEX).write_text(json.dumps(index))
    assert "tensor 'norm.weight' is missing, though the index lists it" in refused(sharded)


def test_files_beside_the_shards(sharded: Path) -> None:
    """What the index does not name is not opened, unless the user does; what ds4 ignores may be missing."""
    save_file({"norm.weight": torch.full((64,), 7.0)}, sharded / "extra.safetensors")
    write(sharded / "broken.safetensors", b"abc")
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["vision.patch.weight"] = "model-00001-of-00002.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    assert torch.equal(
        open_checkpoint(sharded).tensor("norm.weight").dequantize(), random_tensors(small_config())["norm.weight"]
    )
    ckpt = open_checkpoint(sharded / "extra.safetensors")
    assert ckpt.names() == ["norm.weight"]
    assert ckpt.tensor("norm.weight").dequantize()[0] == 7


def test_the_garbage_collector_is_left_as_it_was(sharded: Path) -> None:
    open_checkpoint(sharded)
    assert gc.isenabled()
    (sharded / "model-00002-of-00002.safetensors").write_bytes(b"abc")
    refused(sharded)
    assert gc.isenabled()
    gc.disable()
    try:
        refused(sharded)
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        "{}",
        "not json",
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../../etc/passwd"}}',
        '{"weight_map": {"a": ".."}}',
        '{"weight_map": {"a": "b\\u0000"}}',
        '{"weight_map": {"a": ""}}',
    ],
)
def test_bad_index(sharded: Path, index: str) -> None:
    (sharded / INDEX).write_text(index)
    assert INDEX in refused(sharded)


def test_dtypes_and_ignored_tensors(config_dir: Path) -> None:
    save_file(
        {
            "norm.weight": torch.arange(4).half(),
            "layers.0.ffn.gate.tid2eid": torch.arange(4, dtype=torch.int32).view(2, 2),
            "hc_head_scale": torch.tensor(3.0),
            "vision.x": torch.zeros(3, dtype=torch.uint8),
            "layers.0.ffn.gate.bias_vl": torch.zeros(0),
        },
        config_dir / "model.safetensors",
    )
    ckpt = open_checkpoint(config_dir)
    assert sorted(ckpt.names()) == ["hc_head_scale", "layers.0.ffn.gate.tid2eid", "norm.weight"]
    assert torch.equal(ckpt.tensor("norm.weight").dequantize(), torch.arange(4.0))
    assert torch.equal(ckpt.tensor("layers.0.ffn.gate.tid2eid").dequantize().long(), torch.arange(4).view(2, 2))
    assert ckpt.tensor("hc_head_scale").dequantize() == 3.0
    assert ckpt.config.n_mtp_layers == 0  # counted, not believed


def test_data_at_an_odd_address(config_dir: Path) -> None:
    header = json.dumps({"norm.weight": entry()}).encode()
    header += b" " * (1 - len(header) % 8 % 2)
    header += b" " * (len(header) % 2 == 0)
    write(config_dir / "model.safetensors", file_bytes(header, struct.pack("<4f", 1, 2, 3, 4)))
    tensor = open_checkpoint(config_dir).tensor("norm.weight")
    assert tensor.data.storage_offset() % 4
    assert torch.equal(tensor.dequantize(), torch.tensor([1.0, 2, 3, 4]))


BAD_HEADERS = [
    ("not valid JSON", b"{"),
    ("not valid JSON", b"\xff"),
    ("not valid JSON", b"[" * 100_000),
    ("not valid JSON", b'{"a": ' + b"9" * 5000 + b"}"),
    ("a key occurs twice", b'{"a": 1, "a": 2}'),
    ("not a JSON object", b"[]"),
    ("has no description", {"norm.weight": 3}),
    ("unknown dtype 'F128'", {"norm.weight": entry(dtype="F128")}),
    ("unknown dtype", {"norm.weight": entry(dtype=["F32"])}),
    ("has dtype F64, which ds4 cannot read", {"norm.weight": entry(dtype="F64", end=32)}),
    ("malformed shape", {"norm.weight": entry(shape="4")}),
    ("malformed shape", {"norm.weight": entry(shape=[-4])}),
    ("malformed shape", {"norm.weight": entry(shape=[True, 4])}),
    ("malformed shape", {"norm.weight": entry(shape=[1] * 2000)}),
    ("malformed data_offsets", {"norm.weight": entry(begin="0")}),
    ("impossible data_offsets", {"norm.weight": entry(begin=16, end=0)}),
    ("impossible data_offsets", {"norm.weight": entry(begin=-16, end=0)}),
    ("has 15 bytes, but F32 [4] needs 16", {"norm.weight": entry(end=15)}),
    ("ends at byte", {"norm.weight": entry(begin=56, end=72)}),
    ("ends at byte", {"norm.weight": entry(shape=[1 << 60, 1 << 60], end=4 << 120)}),
    ("is empty", {"norm.weight": entry(shape=[0], end=0)}),
    ("overlap", {"norm.weight": entry(), "embed.weight": entry(begin=8, end=24)}),
]


@pytest.mark.parametrize(("problem", "header"), BAD_HEADERS, ids=[f"{n}" for n in range(len(BAD_HEADERS))])
def test_bad_headers(config_dir: Path, problem: str, header: Any) -> None:
    path = write(config_dir / "model.safetensors", file_bytes(header))
    for opened in (path, config_dir):
        message = refused(opened)
        assert problem in message
        assert str(path) in message


def test_truncated_and_flipped(config_dir: Path) -> None:
    path = config_dir / "model.safetensors"
    save_file({"norm.weight": torch.zeros(64), "embed.weight": torch.zeros(32, 64)}, path)
    good = path.read_bytes()
    for size in [*range(300), *range(300, len(good), 97), len(good) - 1]:
        refused(write(path, good[:size]))
    rng = random.Random(1)
    header = len(good) - 4 * 64 * 33
    for _ in range(500):
        data = bytearray(good)
        data[rng.randrange(header)] = rng.randrange(256)
        write(path, bytes(data))
        try:
            ckpt = open_checkpoint(path)
        except Ds4Error:
            continue
        for name in ckpt.names():
            ckpt.tensor(name).dequantize()


def test_nothing_to_open(tmp_path: Path) -> None:
    assert "holds no checkpoint" in refused(tmp_path)
    assert "no such file" in refused(tmp_path / "absent.gguf")
    assert "neither a GGUF nor" in refused(write(tmp_path / "model.bin", b"\x80\x02" * 40))
    assert "is too short" in refused_with_config(tmp_path, b"abc")
    assert "the file is empty" in refused_with_config(tmp_path, b"")
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "other.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "another.safetensors")
    assert "has 2 safetensors files" in refused(tmp_path)


def refused_with_config(directory: Path, data: bytes) -> str:
    (directory / "config.json").write_text(json.dumps(small_json()))
    write(directory / "model.safetensors", data)
    return refused(directory)


def test_config_missing_or_malformed(tmp_path: Path) -> None:
    save_file({"norm.weight": torch.zeros(64)}, tmp_path / "model.safetensors")
    assert "config.json is missing" in refused(tmp_path)
    for text, problem in (("{", "not valid JSON"), ("[]", "not a JSON object"), ("{}", "model_type")):
        (tmp_path / "config.json").write_text(text)
        message = refused(tmp_path)
        assert problem in message
        assert "config.json" in message
