"""NVFP4 and FP8 as compressed-tensors names them: a packed weight, and a global scale that divides."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from weights.builders import small_json

from ds4.errors import Ds4Error
from ds4.weights import Checkpoint, open_checkpoint
from ds4.weights.tensor import PackedTensor

BASE = "layers.0.ffn.experts.0.w1."
RNG = np.random.default_rng(3)
CODES = RNG.integers(0, 256, (8, 32), dtype=np.uint8)
SCALES = RNG.integers(0, 0x7F, (8, 4), dtype=np.uint8)


def checkpoint(directory: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    (directory / "config.json").write_text(json.dumps(small_json()))
    save_file(tensors, directory / "model.safetensors")
    return open_checkpoint(directory)


def packed(global_scale: Tensor) -> dict[str, Tensor]:
    return {
        BASE + "weight_packed": torch.from_numpy(CODES),
        BASE + "weight_scale": torch.from_numpy(SCALES).view(torch.float8_e4m3fn),
        BASE + "weight_global_scale": global_scale,
        BASE + "input_global_scale": torch.tensor(float("nan")),  # never used
    }


def code_times_scale() -> NDArray[np.float32]:
    """f32 [8, 64], exact: what the global scale divides."""
    codes = np.stack((CODES & 15, CODES >> 4), axis=-1).reshape(8, 64)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])[codes]
    exponent, mantissa = SCALES.astype(int) >> 3, SCALES & 7
    scales = np.where(exponent == 0, mantissa / 512, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return (values * scales.repeat(16, axis=1)).astype(np.float32)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_the_global_scale_divides(tmp_path: Path, shape: tuple[int, ...]) -> None:
    whole = np.float32(2687.3)
    ckpt = checkpoint(tmp_path, packed(torch.full(shape, float(whole))))
    assert ckpt.names() == [BASE + "weight"]
    tensor = ckpt.tensor(BASE + "weight")
    assert (tensor.format, tensor.shape) == ("nvfp4_modelopt", (8, 64))
    values, expected = tensor.dequantize().numpy(), code_times_scale() / whole
    assert np.array_equal(values.view(np.int32), expected.view(np.int32))
    assert np.array_equal(tensor.dequantize(rows=slice(2, 5)).numpy(), expected[2:5])
    # A float32 reciprocal would not do: it is off by an ulp in a part of the values.
    rounded = code_times_scale() * (np.float32(1) / whole)
    assert not np.array_equal(rounded, expected)
    assert tensor.nbytes == ckpt.stored_as(BASE + "weight")[2] == CODES.size + SCALES.size
    formats = {t.name.rpartition(".")[2]: t.format for t in ckpt.tensors()}
    assert formats == {
        "weight_packed": "nvfp4_modelopt",
        "weight_scale": "nvfp4_modelopt.scale",
        "weight_global_scale": "nvfp4_modelopt.divisor",
        "input_global_scale": "nvfp4_modelopt.unused",
    }


@settings(max_examples=200)
@given(st.floats(2.0**-20, 2.0**20, width=32))
@example(1 + 2.0**-23)
@example(2.0**24 - 1)
@example(1.0)
@example(2.0**-9)
def test_quotients_are_rounded_once(whole: float) -> None:
    """For every divisor, the float32 nearest to code * scale / divisor, which is what numpy's division gives."""
    tensor = PackedTensor(
        "w", "nvfp4_modelopt", (8, 64), torch.from_numpy(CODES), 1 / whole, {"scale": torch.from_numpy(SCALES)}
    )
    expected = code_times_scale() / np.float32(whole)
    assert np.array_equal(tensor.dequantize().numpy().view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv", "scale"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_scales_of_other_names_and_dtypes(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    """``weight_scale_inv`` multiplies too; a grid in bf16 means what it means in f32."""
    name = "layers.0.attn.wo_b."
    weight = torch.from_numpy(RNG.normal(size=(130, 200)).astype(np.float32) * 50).to(torch.float8_e4m3fn)
    grid = torch.from_numpy(RNG.random((2, 2), np.float32) + 0.01).to(dtype)
    ckpt = checkpoint(tmp_path, {name + "weight": weight, name + suffix: grid})
    assert ckpt.names() == [name + "weight"]
    tensor = ckpt.tensor(name + "weight")
    scale = grid.float().numpy().repeat(128, 0).repeat(128, 1)[:130, :200]
    expected = weight.float().numpy() * scale
    assert tensor.format == "fp8_block"
    assert tensor.parts["scale"].dtype == torch.float32
    assert np.array_equal(tensor.dequantize().numpy(), expected)
    assert np.array_equal(tensor.dequantize(rows=slice(120, 130)).numpy(), expected[120:])
    assert ckpt.stored_as(name + "weight")[2] == 130 * 200 + 4 * dtype.itemsize


W = BASE + "weight_packed"
GOOD = packed(torch.tensor(3.0))
BAD = [
    ("weight_packed' has dtype U8 and needs 'weight_scale', which is missing", {W: GOOD[W]}),
    (
        "needs 'weight_global_scale', which is missing",
        {k: v for k, v in GOOD.items() if not k.endswith("weight_global_scale")},
    ),
    ("weight_global_scale' has shape [2]", GOOD | {BASE + "weight_global_scale": torch.ones(2)}),
    ("weight_global_scale' must be F32, not F16", GOOD | {BASE + "weight_global_scale": torch.ones(1).half()}),
    ("weight_scale' must be F8_E4M3, not BF16", GOOD | {BASE + "weight_scale": torch.ones(8, 4).bfloat16()}),
    ("weight_scale' has shape [8, 2]", GOOD | {BASE + "weight_scale": torch.ones(8, 2).to(torch.float8_e4m3fn)}),
    ("weight_packed' must be U8, not I8", GOOD | {W: torch.zeros(8, 32, dtype=torch.int8)}),
    ("must be a matrix, not [32]", GOOD | {W: torch.zeros(32, dtype=torch.uint8)}),
    ("rows of 60, not a multiple of the nvfp4_modelopt block 16", GOOD | {W: torch.zeros(8, 30, dtype=torch.uint8)}),
    ("weight_packed' is a second form of 'layers.0.ffn", GOOD | {BASE + "weight": torch.ones(8, 64)}),
    ("is a second form of", GOOD | {"model.layers.0.mlp.experts.0.gate_proj.weight": torch.ones(8, 64)}),
    ("weight_packed' holds INT4 weights (W4A16)", GOOD | {W: torch.zeros(8, 8, dtype=torch.int32)}),
]


@pytest.mark.parametrize(("problem", "tensors"), BAD, ids=[f"{n}" for n in range(len(BAD))])
def test_bad_packed_weights(tmp_path: Path, problem: str, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(Ds4Error) as error:
        checkpoint(tmp_path, tensors)
    assert problem in str(error.value)
    assert str(tmp_path / "model.safetensors") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "problem"), [(0.0, "is 0, and its weight is divided by it"), (np.inf, "not a finite")]
)
def test_global_scales_that_divide_nothing(tmp_path: Path, value: float, problem: str) -> None:
    ckpt = checkpoint(tmp_path, packed(torch.tensor([value])))
    with pytest.raises(Ds4Error, match=f"w1.weight_global_scale' {problem}|w1.weight_global_scale' is {problem}"):
        ckpt.tensor(BASE + "weight")
