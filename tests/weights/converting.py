"""What the tests of ``ds4 convert`` share: decoders that have nothing of ds4's, and small checkpoints to convert.

The decoders are those of the gguf package, and ones of a few lines on the tensors that the safetensors library reads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from weights.builders import random_tensors, small_config, small_json

from ds4.weights import Checkpoint, open_checkpoint
from ds4.weights.convert import convert
from ds4.weights.convert_report import Report
from ds4.weights.names import to_gguf
from ds4.weights.recipes import Recipe


def run(source: Path | Checkpoint, out: Path, experts: str = "keep", dense: str = "keep", **options: Any) -> Report:
    ckpt = open_checkpoint(source) if isinstance(source, Path) else source
    return convert(ckpt, out, Recipe(experts, dense), **{"tokenizer": {}, **options})


def save_small(directory: Path, config: dict[str, Any] | None = None, **changes: torch.Tensor | None) -> Path:
    """A small checkpoint in official naming, all F32, with some tensors replaced or left out."""
    directory.mkdir(exist_ok=True)
    tensors = random_tensors(small_config()) | {n: t for n, t in changes.items() if t is not None}
    tensors = {n: t for n, t in tensors.items() if changes.get(n, t) is not None}
    (directory / "config.json").write_text(json.dumps(config or small_json()))
    save_file(tensors, directory / "model.safetensors")
    return directory


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)


def e4m3(codes: np.ndarray) -> np.ndarray:
    sign, exponent, mantissa = np.where(codes >> 7, -1.0, 1.0), (codes >> 3) & 15, codes & 7
    normal = np.ldexp(1 + mantissa / 8, exponent.astype(int) - 7)
    return (sign * np.where(exponent == 0, mantissa * 2.0**-9, normal)).astype(np.float32)


def e8m0(codes: np.ndarray) -> np.ndarray:
    return np.ldexp(1.0, codes.astype(int) - 127).astype(np.float32)


def pairs(packed: np.ndarray) -> np.ndarray:
    """Two codes a byte, the even one in the low nibble."""
    return E2M1[np.stack((packed & 15, packed >> 4), axis=-1).reshape(packed.shape[0], -1)]


def raw(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.uint8).numpy()


def decode_safetensors(directory: Path) -> dict[str, np.ndarray]:
    """Weights of a checkpoint in official naming, by the dtypes that the safetensors library sees."""
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        stored |= load_file(file)
    out = {}
    for name, tensor in stored.items():
        base = name.removesuffix("weight")
        if name.endswith(("scale", "_scale_2")) and not name.endswith(("attn_scale", "ffn_scale", "head_scale")):
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            scale = e8m0(raw(stored[base + "scale"])).repeat(128, axis=0).repeat(128, axis=1)
            out[name] = e4m3(raw(tensor)) * scale[: tensor.shape[0], : tensor.shape[1]]
        elif tensor.dtype == torch.int8:
            out[name] = pairs(raw(tensor)) * e8m0(raw(stored[base + "scale"])).repeat(32, axis=1)
        elif tensor.dtype == torch.uint8:
            scale = e4m3(raw(stored[base + "weight_scale"])).repeat(16, axis=1)
            assert stored[base + "weight_scale_2"].shape == ()
            out[name] = pairs(tensor.numpy()) * scale * stored[base + "weight_scale_2"].numpy()
        else:
            out[name] = tensor.numpy() if tensor.dtype == torch.int64 else tensor.float().numpy()
    return out


def decode_gguf(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Weights of a GGUF without draft head by the gguf package, under their canonical names."""
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    values = {
        name: gguf.dequantize(t.data, t.tensor_type) if t.tensor_type.name != "I32" else t.data
        for name, t in stored.items()
    }
    for name in [name for name in stored if name.endswith("exps.scale")]:
        values[name.removesuffix("scale") + "weight"] *= values.pop(name)[:, None, None]
    out = {}
    for name in names:
        place = to_gguf(name)
        assert place is not None
        out[name] = values[place[0]] if place[1] is None else values[place[0]][place[1]]
    return out


def assert_equal(got: dict[str, np.ndarray], expected: dict[str, torch.Tensor | np.ndarray]) -> None:
    """Same names and numbers (code 8, -0, is +0 in ggml)."""
    assert set(got) == set(expected)
    for name, values in expected.items():
        wanted = values.float().numpy() if isinstance(values, torch.Tensor) else values
        assert got[name].shape == tuple(wanted.shape), name
        assert np.array_equal(got[name], wanted), name


def all_exact(report: Report) -> bool:
    return not any(line.inexact for line in report.lines)


def tensor_types(path: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
