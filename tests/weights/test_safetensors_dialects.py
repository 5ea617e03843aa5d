"""Whole small checkpoints as the releases store theirs, against what their raw bytes mean, computed here in numpy."""

from __future__ import annotations

import json
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from weights.builders import shapes, small_config, small_json
from weights.test_safetensors_names import other_spelling

from ds4.errors import Ds4Error
from ds4.weights import open_checkpoint
from ds4.weights.describe import describe

Array = NDArray[np.generic]
INDEX = "model.safetensors.index.json"
CONFIG = small_config()
FP8_DENSE = (".wq_a.", ".wq_b.", ".attn.wkv.", ".wo_a.", ".wo_b.", ".e_proj.", ".h_proj.")
DTYPES = {"e4m3": torch.float8_e4m3fn, "e8m0": torch.float8_e8m0fnu, "i8": torch.int8, "u8": torch.uint8}


def e4m3(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    exponent, mantissa = (raw >> 3) & 15, (raw & 7).astype(np.float32)
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * np.exp2(exponent.astype(np.float32) - 10))
    return np.where(raw >> 7, -value, value).astype(np.float32)


def e2m1(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    codes = np.stack((raw & 15, raw >> 4), axis=-1).reshape(raw.shape[0], -1)
    value = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)[codes & 7]
    return np.where(codes >> 3, -value, value)


def e8m0(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.exp2(raw.astype(np.float32) - 127)


def spread(grid: NDArray[np.float32], rows: int, cols: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Block scales repeated over their blocks of rows x cols."""
    return grid.repeat(rows, 0).repeat(cols, 1)[: shape[0], : shape[1]]


class Writer:
    """Random tensors of one checkpoint as files store them, and what they mean."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(7)
        self.stored: dict[str, torch.Tensor] = {}
        self.expected: dict[str, Array] = {}

    def raw(self, name: str, dtype: str, shape: tuple[int, ...], low: int = 0, high: int = 256) -> NDArray[np.uint8]:
        data = self.rng.integers(low, high, shape, dtype=np.uint8)
        self.stored[name] = torch.from_numpy(data).view(DTYPES[dtype])
        return data

    def f32(self, name: str, value: NDArray[np.float32]) -> NDArray[np.float32]:
        self.stored[name] = torch.from_numpy(value)
        return value

    def bf16(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        bits = (self.rng.normal(size=shape) * 0.05).astype(np.float32).view(np.int32) >> 16
        self.stored[name] = torch.from_numpy(bits.astype(np.int16)).view(torch.bfloat16)
        return (bits << 16).view(np.float32)

    def fp8(self, base: str, shape: tuple[int, ...], companion: str, dtype: str) -> None:
        """FP8 in blocks of 128 x 128; the scales multiply, whatever they are called."""
        raw = self.raw(base + "weight", "e4m3", shape, high=0x7F)
        raw |= self.rng.integers(0, 2, shape, dtype=np.uint8) << 7
        grid = tuple(-(-n // 128) for n in shape)
        if dtype == "e8m0":
            scale = e8m0(self.raw(base + companion, "e8m0", grid, 110, 130))
        elif dtype == "f32":
            scale = self.f32(base + companion, self.rng.random(grid, np.float32))
        else:
            scale = self.bf16(base + companion, grid)
        self.expected[base + "weight"] = e4m3(raw) * spread(scale, 128, 128, shape)

    def mxfp4(self, base: str, shape: tuple[int, ...]) -> None:
        raw = self.raw(base + "weight", "i8", (shape[0], shape[1] // 2))
        scale = e8m0(self.raw(base + "scale", "e8m0", (shape[0], shape[1] // 32), 110, 130))
        self.expected[base + "weight"] = e2m1(raw) * spread(scale, 1, 32, shape)

    def nvfp4(self, base: str, shape: tuple[int, ...], compressed: bool) -> None:
        raw = self.raw(base + ("weight_packed" if compressed else "weight"), "u8", (shape[0], shape[1] // 2))
        scale = e4m3(self.raw(base + "weight_scale", "e4m3", (shape[0], shape[1] // 16), high=0x7F))
        values = e2m1(raw) * spread(scale, 1, 16, shape)
        if compressed:
            whole = self.f32(base + "weight_global_scale", self.rng.random(1, np.float32) * np.float32(5000))
            self.f32(base + "input_global_scale", np.array([np.nan], np.float32))
            self.expected[base + "weight"] = values / whole
        else:
            multiplier = self.f32(base + "weight_scale_2", np.array(self.rng.random(), np.float32))
            self.f32(base + "input_scale", np.array(np.nan, np.float32))
            self.expected[base + "weight"] = values * multiplier


# dialect -> what its FP8 scales are called and made of (None: BF16 weights); experts of the trunk, and of the draft
# block (None: the release has none); whether it has transformers' names
DIALECTS = {
    "official": ("scale", "e8m0", "mxfp4", "mxfp4", False),
    "base": ("scale", "f32", "fp8", "fp8", False),
    "sgl-fp8": ("scale", "e8m0", "fp8", "fp8", False),
    "modelopt": ("scale", "e8m0", "nvfp4", "mxfp4", False),
    "modelopt-draft": ("scale", "e8m0", "nvfp4", "nvfp4", False),
    "redhat": ("weight_scale", "bf16", "packed", None, True),
    "canada-quant": ("weight_scale_inv", "f32", "packed", "bf16", False),
    "bf16": (None, "", "bf16", "bf16", False),
    "bf16-transformers": (None, "", "bf16", "bf16", True),
}


def written(dialect: str) -> Writer:
    companion, dtype, trunk, draft, _ = DIALECTS[dialect]
    out = Writer()
    for name, shape in shapes(CONFIG).items():
        in_draft = name.startswith("mtp.")
        if in_draft and draft is None:
            continue
        base = name.removesuffix("weight")
        expert = ".ffn.experts." in name
        kind = (draft if in_draft else trunk) if expert else "bf16"
        dense = any(mark in name for mark in FP8_DENSE) or (".shared_experts." in name and trunk != "packed")
        if dense and companion and not (in_draft and draft == "bf16"):
            kind = "fp8"
        if name.endswith("tid2eid"):
            ids = np.stack([out.rng.permutation(CONFIG.n_routed_experts)[: shape[1]] for _ in range(shape[0])])
            out.stored[name], out.expected[name] = torch.from_numpy(ids.astype(np.int64)), ids
        elif kind == "fp8":
            out.fp8(base, shape, companion or "scale", dtype)
        elif kind == "mxfp4":
            out.mxfp4(base, shape)
        elif kind in ("nvfp4", "packed"):
            out.nvfp4(base, shape, compressed=kind == "packed")
        elif len(shape) > 1 and name.endswith(".weight"):
            out.expected[name] = out.bf16(name, shape)
        else:
            out.expected[name] = out.f32(name, out.rng.normal(size=shape).astype(np.float32))
    return out


@pytest.fixture(params=DIALECTS)
def release(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Writer, str]:
    out = written(request.param)
    spell = other_spelling if DIALECTS[request.param][4] else str
    names = sorted(out.stored, key=lambda name: crc32(name.encode()))
    weight_map: dict[str, str] = {}
    for part in range(3):  # companions end up in other shards than their weights
        shard = f"model-{part + 1:05d}-of-00003.safetensors"
        save_file({spell(name): out.stored[name] for name in names[part::3]}, tmp_path / shard)
        weight_map |= {spell(name): shard for name in names[part::3]}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 12}, "weight_map": weight_map}))
    # What config.json says of formats is wrong in some releases; the tensors tell.
    (tmp_path / "config.json").write_text(json.dumps(small_json(expert_dtype="int3")))
    return tmp_path, out, request.param


def test_every_tensor_of_every_dialect(release: tuple[Path, Writer, str]) -> None:
    path, out, dialect = release
    ckpt = open_checkpoint(path)
    assert set(ckpt.names()) == set(out.expected)
    assert ckpt.config.n_mtp_layers == (DIALECTS[dialect][3] is not None)
    for name, expected in out.expected.items():
        tensor = ckpt.tensor(name)
        values = tensor.dequantize().numpy()
        assert tensor.shape == expected.shape == shapes(CONFIG)[name]
        assert np.array_equal(values, expected), name
        if expected.dtype == np.float32:
            assert np.array_equal(np.signbit(values), np.signbit(expected)), name
        if len(tensor.shape) == 2:
            assert np.array_equal(tensor.dequantize(rows=slice(1, 2)).numpy(), expected[1:2]), name


def test_description(release: tuple[Path, Writer, str]) -> None:
    path, out, dialect = release
    report = describe(open_checkpoint(path))
    _, _, trunk, _, _ = DIALECTS[dialect]
    formats = {"mxfp4": "mxfp4_official", "fp8": "fp8_block", "nvfp4": "nvfp4_modelopt", "packed": "nvfp4_modelopt"}
    assert report["recipe"]["experts"] == [formats.get(trunk, trunk)]
    assert report["parameters"]["total"] == sum(v.size for k, v in out.expected.items() if "tid2eid" not in k)
    assert report["total_bytes"] == sum(t.numel() * t.element_size() for t in out.stored.values())
    assert sum(row["count"] for row in report["types"]) == len(out.expected)


def test_pruned_layers_have_their_own_number_of_experts(tmp_path: Path) -> None:
    out = written("official")
    kept = {name: tensor for name, tensor in out.stored.items() if not name.startswith("layers.1.ffn.experts.2.")}
    for name in ("layers.1.ffn.gate.weight", "layers.1.ffn.gate.bias"):
        kept[name] = kept[name][:2].clone()
    save_file(kept, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(small_json()))
    ckpt = open_checkpoint(tmp_path)
    assert [ckpt.n_experts(f"layers.{n}") for n in range(3)] == [3, 2, 3]
    assert np.array_equal(
        ckpt.tensor("layers.1.ffn.gate.weight").dequantize().numpy(), out.expected["layers.1.ffn.gate.weight"][:2]
    )
    assert "layers.1.ffn.experts.2.w1.weight" not in ckpt


def test_int4_is_refused_with_the_reason(tmp_path: Path) -> None:
    """W4A16: codes in 32-bit words, BF16 scales for groups of 128 (spec weights.md 5)."""
    base = "layers.0.ffn.experts.0.w1."
    tensors = {
        base + "weight_packed": torch.zeros(64, 8, dtype=torch.int32),
        base + "weight_scale": torch.ones(64, 1, dtype=torch.bfloat16),
        base + "weight_shape": torch.tensor([64, 64]),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(small_json()))
    with pytest.raises(Ds4Error, match=r"w1\.weight_packed' holds INT4 weights \(W4A16\), which ds4 does not read"):
        open_checkpoint(tmp_path)
