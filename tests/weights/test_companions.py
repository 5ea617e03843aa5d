"""Formats whose scales are tensors of their own: the released safetensors dialects, and what can be wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from weights.builders import small_json

from ds4.errors import Ds4Error
from ds4.weights import Checkpoint, open_checkpoint
from ds4.weights.describe import describe
from ds4.weights.formats.block_scale import E2M1_VALUES
from ds4.weights.tensor import PackedTensor

NAME = "layers.0.ffn.experts.0.w1.weight"
BASE = NAME.removesuffix("weight")


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def rand_bytes(*shape: int, low: int = 0, high: int = 256) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def e8m0(*shape: int) -> Tensor:
    return rand_bytes(*shape, low=110, high=140).view(torch.float8_e8m0fnu)


def fp8(*shape: int) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 50).to(torch.float8_e4m3fn)


def codes(packed: Tensor) -> Tensor:
    """f32 values of 4-bit codes in the official order, one by one."""
    table = torch.tensor(E2M1_VALUES)
    return torch.stack((table[(packed & 15).long()], table[(packed >> 4).long()]), dim=-1).flatten(-2)


def spread(scale: Tensor, rows: int, cols: int, shape: tuple[int, int]) -> Tensor:
    """Block scales repeated over their blocks of rows x cols."""
    return scale.float().repeat_interleave(rows, 0).repeat_interleave(cols, 1)[: shape[0], : shape[1]]


def checkpoint(directory: Path, tensors: dict[str, Tensor], **config: object) -> Checkpoint:
    (directory / "config.json").write_text(json.dumps(small_json(**config)))
    save_file(tensors, directory / "model.safetensors")
    return open_checkpoint(directory)


def test_golden_native_equals_the_bf16_file(golden: Path) -> None:
    native, plain = open_checkpoint(golden / "tiny_native"), open_checkpoint(golden / "tiny")
    assert set(native.names()) == set(plain.names())
    formats: dict[str, int] = {}
    for name in plain.names():
        tensor, expected = native.tensor(name), plain.tensor(name).dequantize()
        value = tensor.dequantize()
        formats[tensor.format] = formats.get(tensor.format, 0) + 1
        assert value.shape == expected.shape
        assert (
            torch.equal(value, expected) if not value.is_floating_point() else torch.equal(bits(value), bits(expected))
        )
        assert tensor.nbytes == native.stored_as(name)[2]
        if len(tensor.shape) == 2 and tensor.shape[0] > 3:
            assert torch.equal(tensor.dequantize(rows=slice(1, 3)), expected[1:3])
    assert formats == {"fp8_block": 42, "mxfp4_official": 240, "bf16": 45, "f32": 45, "i64": 3}


def test_golden_native_described(golden: Path) -> None:
    ckpt = open_checkpoint(golden / "tiny_native")
    report, plain = describe(ckpt), describe(open_checkpoint(golden / "tiny"))
    assert report["recipe"]["experts"] == ["mxfp4_official"]
    assert report["recipe"]["attention"] == report["recipe"]["shared"] == ["fp8_block"]
    assert report["parameters"] == plain["parameters"]
    assert len(report["tensors"]) == 657
    assert sum(row["count"] for row in report["types"]) == 375
    assert sum(row["bytes"] for row in report["types"]) == ckpt.total_bytes
    rows = {row["format"]: row for row in report["types"]}
    assert rows["mxfp4_official"]["bytes"] * 32 == rows["mxfp4_official"]["parameters"] * 17
    json.dumps(report)


@pytest.mark.parametrize("shape", [(256, 128), (130, 300), (1, 1), (64, 64)])
@pytest.mark.parametrize("kind", ["e8m0", "f32"])
def test_fp8_block(tmp_path: Path, kind: str, shape: tuple[int, int]) -> None:
    """Matrices that do not fill their last tiles, and the f32 scales of the Base release's experts."""
    grid = (-(-shape[0] // 128), -(-shape[1] // 128))
    scale = e8m0(*grid) if kind == "e8m0" else torch.rand(grid, generator=torch.Generator().manual_seed(2))
    weight = fp8(*shape)
    tensor = checkpoint(tmp_path, {NAME: weight, BASE + "scale": scale}).tensor(NAME)
    expected = weight.float() * spread(scale, 128, 128, shape)
    assert tensor.format == "fp8_block"
    assert torch.equal(bits(tensor.dequantize()), bits(expected))
    assert torch.equal(tensor.dequantize(rows=slice(shape[0] // 2, None)), expected[shape[0] // 2 :])
    assert tensor.nbytes == weight.numel() + scale.numel() * scale.element_size()


@pytest.mark.parametrize("container", [torch.int8, torch.uint8])
def test_mxfp4_official(tmp_path: Path, container: torch.dtype) -> None:
    packed, scale = rand_bytes(24, 48), e8m0(24, 3)
    tensor = checkpoint(tmp_path, {NAME: packed.view(container), BASE + "scale": scale}).tensor(NAME)
    expected = codes(packed) * spread(scale, 1, 32, (24, 96))
    assert (tensor.format, tensor.shape) == ("mxfp4_official", (24, 96))
    assert torch.equal(bits(tensor.dequantize()), bits(expected))
    assert torch.equal(tensor.dequantize(rows=slice(5, 9)), expected[5:9])


@pytest.mark.parametrize("multiplier", [torch.tensor(0.37), torch.tensor([2.0**-8])])
def test_nvfp4_modelopt_beside_mxfp4_and_fp8(tmp_path: Path, multiplier: Tensor) -> None:
    """Each weight by its own companions: one file with three kinds, in spite of what its config says."""
    packed, scale = rand_bytes(32, 32), fp8(32, 4)
    other, third = BASE.replace("w1", "w2"), "layers.0.attn.wq_a."
    ckpt = checkpoint(
        tmp_path,
        {
            NAME: packed,
            BASE + "weight_scale": scale,
            BASE + "weight_scale_2": multiplier,
            BASE + "input_scale": torch.tensor(float("nan")),  # never used
            other + "weight": packed.view(torch.int8).clone(),
            other + "scale": e8m0(32, 2),
            third + "weight": fp8(32, 64),
            third + "scale": e8m0(1, 1),
        },
        expert_dtype="fp8",
    )
    tensor = ckpt.tensor(NAME)
    assert (tensor.format, tensor.shape) == ("nvfp4_modelopt", (32, 64))
    expected = codes(packed) * spread(scale, 1, 16, (32, 64)) * multiplier
    assert torch.equal(bits(tensor.dequantize()), bits(expected))
    assert [ckpt.tensor(n + "weight").format for n in (other, third)] == ["mxfp4_official", "fp8_block"]
    assert len(ckpt) == 3
    assert {t.format for t in ckpt.tensors()} >= {"nvfp4_modelopt.unused", "nvfp4_modelopt.multiplier"}


def test_swapped_nibbles_are_seen() -> None:
    packed, scale = rand_bytes(4, 16, high=120), torch.full((4, 1), 127, dtype=torch.uint8)
    right = PackedTensor("x", "mxfp4_official", (4, 32), packed, parts={"scale": scale}).dequantize()
    swapped = PackedTensor("x", "mxfp4_official", (4, 32), packed << 4 | packed >> 4, parts={"scale": scale})
    ggml = PackedTensor("x", "mxfp4", (4, 32), torch.cat((scale, packed), dim=1)).dequantize()
    assert not torch.equal(swapped.dequantize(), right)
    assert not torch.equal(ggml, right)
    order = torch.stack((torch.arange(16), torch.arange(16) + 16), dim=1).flatten()
    assert torch.equal(ggml[:, order], right)  # the same codes, in the other order


def test_large_tensors_are_decoded_in_tiles() -> None:
    packed, scale = rand_bytes(2050, 512), rand_bytes(2050, 32, low=110, high=140)
    tensor = PackedTensor("x", "mxfp4_official", (2050, 1024), packed, parts={"scale": scale})
    expected = codes(packed) * spread(scale.view(torch.float8_e8m0fnu), 1, 32, (2050, 1024))
    assert len(list(tensor.tiles())) > 1
    assert torch.equal(bits(tensor.dequantize()), bits(expected))
    assert torch.equal(tensor.dequantize(torch.bfloat16), expected.bfloat16())
    assert torch.equal(tensor.dequantize(rows=slice(7, 2049)), expected[7:2049])
    with pytest.raises(ValueError, match="rows of scale"):
        PackedTensor("x", "mxfp4_official", (2050, 1024), packed, parts={"scale": scale[1:]}).dequantize()
    with pytest.raises(ValueError, match="in steps"):
        tensor.dequantize(rows=slice(0, 9, 2))


W4 = rand_bytes(32, 32)
NV = {NAME: W4, BASE + "weight_scale": fp8(32, 4), BASE + "weight_scale_2": torch.tensor(1.0)}
BAD = [
    ("has dtype F8_E4M3 and needs 'scale', which is missing", {NAME: fp8(8, 8)}),
    ("has dtype I8 and needs 'scale', which is missing", {NAME: W4.view(torch.int8)}),
    ("has dtype U8 and needs 'scale', which is missing", {NAME: W4}),
    ("needs 'weight_scale_2', which is missing", {n: t for n, t in NV.items() if not n.endswith("_2")}),
    (
        "scale' has shape [1, 2]; its weight of [130, 130] needs [2, 2]",
        {NAME: fp8(130, 130), BASE + "scale": e8m0(1, 2)},
    ),
    ("scale' has shape [2]; its weight of [32, 32] needs [32, 2]", {NAME: W4, BASE + "scale": e8m0(2)}),
    ("weight_scale' has shape [32, 2]; its weight", NV | {BASE + "weight_scale": fp8(32, 2)}),
    ("needs a single number", NV | {BASE + "weight_scale_2": torch.ones(2)}),
    ("weight_scale' must be F8_E4M3, not F32", NV | {BASE + "weight_scale": torch.ones(32, 4)}),
    ("scale' must be F8_E8M0 or F32 or BF16, not F16", {NAME: fp8(8, 8), BASE + "scale": torch.ones(1, 1).half()}),
    (
        "has both 'weight_scale' and 'weight_scale_inv'",
        {NAME: fp8(8, 8), BASE + "weight_scale": torch.ones(1, 1), BASE + "weight_scale_inv": torch.ones(1, 1)},
    ),
    ("scale' must be F8_E8M0, not F32", {NAME: W4, BASE + "scale": torch.ones(32, 2)}),
    ("must be a matrix, not [4]", {NAME: fp8(4), BASE + "scale": e8m0(1)}),
    (
        "rows of 60, not a multiple of the mxfp4_official block 32",
        {NAME: W4[:, :30].clone(), BASE + "scale": e8m0(32, 2)},
    ),
    ("belongs to no weight", {BASE + "scale": e8m0(1, 1)}),
    ("belongs to no weight", {"norm.weight": torch.ones(4), "norm.scale": e8m0(1, 1)}),
    ("is for scales and not for weights", {NAME: e8m0(2, 2)}),
]


@pytest.mark.parametrize(("problem", "tensors"), BAD, ids=[f"{n}" for n in range(len(BAD))])
def test_bad_companions(tmp_path: Path, problem: str, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(Ds4Error) as error:
        checkpoint(tmp_path, tensors)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "model.safetensors") in str(error.value)


def with_nan(scale: Tensor) -> Tensor:
    raw = scale.clone().view(torch.uint8)
    raw[0, 0] = 0xFF
    return raw.view(scale.dtype)


@pytest.mark.parametrize(
    "tensors",
    [
        {NAME: fp8(8, 8), BASE + "scale": with_nan(e8m0(1, 1))},
        {NAME: fp8(8, 8), BASE + "scale": torch.tensor([[torch.nan]])},
        {NAME: W4, BASE + "scale": with_nan(e8m0(32, 2))},
        NV | {BASE + "weight_scale": with_nan(fp8(32, 4))},
        NV | {BASE + "weight_scale_2": torch.tensor(torch.inf)},
    ],
)
def test_scales_that_are_not_numbers(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    ckpt = checkpoint(tmp_path, tensors)
    with pytest.raises(Ds4Error, match=r"layers\.0\.ffn\.experts\.0\.w1\..*not a finite number") as error:
        ckpt.tensor(NAME).dequantize()
    assert "\n" not in str(error.value)


def test_companions_in_another_shard_and_truncated(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(small_json()))
    save_file({NAME: W4}, tmp_path / "a.safetensors")
    save_file({BASE + "scale": e8m0(32, 2)}, tmp_path / "b.safetensors")
    index = {"weight_map": {NAME: "a.safetensors", BASE + "scale": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_checkpoint(tmp_path).tensor(NAME).format == "mxfp4_official"
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file({NAME: W4}, tmp_path / "model.safetensors")
    with pytest.raises(Ds4Error, match=r"needs 'scale', which is missing"):
        open_checkpoint(tmp_path)
    data = (tmp_path / "b.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(Ds4Error, match="truncated or damaged"):
        open_checkpoint(tmp_path)
