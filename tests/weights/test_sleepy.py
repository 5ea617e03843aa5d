"""The sleepy dialect: experts in NVFP4 blocks of their own layout, told from ggml's by the name alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from weights.builders import gguf_model, gguf_with, random_tensors, small_config, small_keys, write

from ds4.errors import Ds4Error
from ds4.kernels.numerics import resolve
from ds4.model.params import TensorParams
from ds4.model.transformer import Transformer
from ds4.weights import open_checkpoint

F32, Q2_K, NVFP4 = 0, 10, 40
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
GATE, UP = "blk.1.ffn_gate_exps", "blk.1.ffn_up_exps"


def e4m3(codes: np.ndarray) -> np.ndarray:
    """Value of positive e4m3 bytes: four exponent bits of bias 7, three of mantissa; exponent 0 is denormal."""
    exponent, mantissa = codes >> 3, (codes & 7).astype(np.float32)
    return np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent.astype(np.float32) - 7))


def decoded(blocks: np.ndarray) -> np.ndarray:
    """f32 [..., 256] of u8 [..., 144], by spec weights.md 3.5: codes first, even weight low, one scale for 16."""
    codes = np.stack((blocks[..., :128] & 15, blocks[..., :128] >> 4), -1).reshape(*blocks.shape[:-1], 16, 16)
    values = E2M1[codes] * e4m3(blocks[..., 128:])[..., None]
    return values.reshape(*blocks.shape[:-1], 256).astype(np.float32)


def random_blocks(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """u8 [*shape, 144] with scales from 2^-6 to 16."""
    blocks = rng.integers(0, 256, (*shape, 144), np.uint8)
    blocks[..., 128:] = rng.integers(0x08, 0x58, (*shape, 16), np.uint8)
    return blocks


def stack(blocks: np.ndarray) -> tuple[int, tuple[int, ...], bytes]:
    """[n_experts, n_rows, n_blocks, 144] as a tensor of type number 40."""
    e, rows, n, _ = blocks.shape
    return NVFP4, (e, rows, n * 256), blocks.tobytes()


def scales(values: np.ndarray) -> tuple[int, tuple[int, ...], bytes]:
    return F32, values.shape, values.astype(np.float32).tobytes()


def test_chosen_by_name_and_not_by_type(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    blocks, scale_2 = random_blocks(rng, 3, 2, 2), np.array([0.5, 2.0**-8, 3.0], np.float32)
    tensors = {
        f"{GATE}.nvfp4_weight": stack(blocks),
        f"{GATE}.nvfp4_scale_2": scales(scale_2),
        f"{UP}.weight": stack(blocks),
    }
    ckpt = open_checkpoint(write(tmp_path / "a.gguf", gguf_with(small_keys(), tensors)))
    assert [(t.name, t.format) for t in ckpt.tensors()] == [
        (f"{GATE}.nvfp4_weight", "nvfp4_sleepy"),
        (f"{GATE}.nvfp4_scale_2", "f32"),
        (f"{UP}.weight", "nvfp4"),
    ]
    expected = decoded(blocks).reshape(3, 2, 512)
    ggml = gguf.dequantize(blocks.reshape(3, 2, -1), gguf.GGMLQuantizationType.NVFP4)
    for e in range(3):
        gate = ckpt.expect(f"layers.1.ffn.experts.{e}.w1.weight", (2, 512))
        up = ckpt.expect(f"layers.1.ffn.experts.{e}.w3.weight", (2, 512))
        assert (gate.format, gate.scale) == ("nvfp4_sleepy", float(scale_2[e]))
        assert ckpt.stored_as(gate.name) == ("nvfp4_sleepy", (2, 512), 2 * 288)
        assert torch.equal(gate.dequantize(), torch.from_numpy(expected[e] * scale_2[e]))
        assert (up.format, up.scale) == ("nvfp4", 1.0)
        assert torch.equal(up.dequantize(), torch.from_numpy(ggml[e]))
        # The trap: either layout reads the other's bytes without complaint.
        assert not torch.equal(up.dequantize(), torch.from_numpy(expected[e]))


def test_outside_of_stacks(tmp_path: Path) -> None:
    blocks = random_blocks(np.random.default_rng(1), 4, 1)
    tensors = {
        "blk.0.attn_kv.nvfp4_weight": (NVFP4, (4, 256), blocks.tobytes()),
        "blk.0.attn_kv.nvfp4_scale_2": scales(np.array([0.25])),
    }
    ckpt = open_checkpoint(write(tmp_path / "a.gguf", gguf_with(small_keys(), tensors)))
    values = ckpt.tensor("layers.0.attn.wkv.weight").dequantize()
    assert torch.equal(values, torch.from_numpy(decoded(blocks).reshape(4, 256) * np.float32(0.25)))


ONE = stack(np.zeros((3, 1, 1, 144), np.uint8))
ERRORS: list[tuple[str, dict[str, Any]]] = [
    (f"'{GATE}.nvfp4_weight' needs the multipliers '{GATE}.nvfp4_scale_2'", {f"{GATE}.nvfp4_weight": ONE}),
    (
        "3 experts but 2 scales",
        {f"{GATE}.nvfp4_weight": ONE, f"{GATE}.nvfp4_scale_2": scales(np.ones(2))},
    ),
    (
        "must be f32, not f16",
        {f"{GATE}.nvfp4_weight": ONE, f"{GATE}.nvfp4_scale_2": (1, (3,), bytes(6))},
    ),
    ("must have type number 40, not 8 (q8_0)", {f"{GATE}.nvfp4_weight": (8, (1, 1, 32), bytes(34))}),
    ("not a multiple of the nvfp4_sleepy block 256", {f"{GATE}.nvfp4_weight": (NVFP4, (1, 1, 64), bytes(36))}),
    (
        "both hold layers.1.ffn.experts.*.w1.weight",
        {f"{GATE}.nvfp4_weight": ONE, f"{GATE}.nvfp4_scale_2": scales(np.ones(3)), f"{GATE}.weight": ONE},
    ),
]


@pytest.mark.parametrize(("problem", "tensors"), ERRORS, ids=[problem for problem, _ in ERRORS])
def test_errors(tmp_path: Path, problem: str, tensors: dict) -> None:
    path = write(tmp_path / "a.gguf", gguf_with(small_keys(), tensors))
    with pytest.raises(Ds4Error) as error:
        open_checkpoint(path)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_scale_that_is_not_a_number(tmp_path: Path) -> None:
    tensors = {f"{GATE}.nvfp4_weight": ONE, f"{GATE}.nvfp4_scale_2": scales(np.array([1, np.nan, np.inf]))}
    ckpt = open_checkpoint(write(tmp_path / "a.gguf", gguf_with(small_keys(), tensors)))
    assert ckpt.tensor("layers.1.ffn.experts.0.w1.weight").scale == 1
    for expert in (1, 2):
        with pytest.raises(Ds4Error, match=r"nvfp4_scale_2' is not a finite number"):
            ckpt.tensor(f"layers.1.ffn.experts.{expert}.w1.weight")


def test_pruned_model_through_the_network(tmp_path: Path) -> None:
    """A K3 hybrid like the published ones, gate and up in sleepy's NVFP4, down in Q2_K, the hash layer unpruned: its
    logits are those of the same weights in f32."""
    rng = np.random.default_rng(2)
    dims = {"hidden_size": 256, "moe_intermediate_size": 256, "n_routed_experts": 5, "num_nextn_predict_layers": 0}
    config = small_config(**dims)
    plain = random_tensors(config)
    keys = small_keys() | {"deepseek4.embedding_length": 256, "deepseek4.expert_feed_forward_length": 256}
    keys |= {"deepseek4.expert_count": 5, "reap.enabled": True, "reap.layout": "ds4-compact-v1"}
    keys |= {"reap.layer.policy": [1, 2, 2], "reap.layer.keep_count": [5, 3, 3]}
    for layer in (1, 2):
        p = f"layers.{layer}.ffn."
        for name in ("gate.weight", "gate.bias"):
            plain[p + name] = plain[p + name][:3].clone()
        for e in (3, 4):
            for w in ("w1", "w2", "w3"):
                del plain[f"{p}experts.{e}.{w}.weight"]
    stored = gguf_model(plain)
    for layer in range(3):
        n = 5 if layer == 0 else 3
        for part, w in (("gate", "w1"), ("up", "w3")):
            base = f"blk.{layer}.ffn_{part}_exps"
            blocks, scale_2 = random_blocks(rng, n, 256, 1), rng.uniform(1, 2, n).astype(np.float32) * 2**-8
            del stored[base + ".weight"]
            stored |= {base + ".nvfp4_weight": stack(blocks), base + ".nvfp4_scale_2": scales(scale_2)}
            for e in range(n):
                values = decoded(blocks[e]).reshape(256, 256) * scale_2[e]
                plain[f"layers.{layer}.ffn.experts.{e}.{w}.weight"] = torch.from_numpy(values)
        down = rng.integers(0, 256, (n, 256, 84), np.uint8)
        down[..., 80:] = np.array([0x00, 0x18, 0x00, 0x18], np.uint8)  # d and dmin 2^-9
        stored[f"blk.{layer}.ffn_down_exps.weight"] = (Q2_K, (n, 256, 256), down.tobytes())
        values = gguf.dequantize(down, gguf.GGMLQuantizationType.Q2_K)
        for e in range(n):
            plain[f"layers.{layer}.ffn.experts.{e}.w2.weight"] = torch.from_numpy(values[e])
    ckpt = open_checkpoint(write(tmp_path / "K3.gguf", gguf_with(keys, stored)))
    assert ckpt.reap is not None
    assert (ckpt.reap.name, ckpt.reap.kept) == ("REAP-K3", (5, 3, 3))
    ids = torch.randint(32, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    logits = []
    for params in (ckpt, TensorParams(plain)):
        model = Transformer(ckpt.config, params, resolve("exact"))
        with torch.no_grad():
            logits.append(model.prefill(ids, 0, model.new_cache(64), all_logits=True))
    # The same numbers multiplied in f32, in another order: the memory of a decoded weight is transposed.
    worst = ((logits[0] - logits[1]).norm(dim=1) / logits[1].norm(dim=1)).max().item()
    assert worst < 2e-5, f"relative difference {worst:.2e}"
