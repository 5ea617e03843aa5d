"""Side files of draft heads in every GGUF dialect, made with the gguf package, and trunks to attach them to.

The values are random in formats of every kind; what they decode to comes from the gguf package.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from weights.builders import random_tensors, shapes, small_config, small_json

from ds4.config import ModelConfig
from ds4.errors import Ds4Error
from ds4.weights import Checkpoint, open_checkpoint

# Wide enough for blocks of 256 weights.
WIDE = {"hidden_size": 256, "moe_intermediate_size": 256, "q_lora_rank": 32}
TARGETS, RANK, BLOCK, NOISE = (0, 1, 2), 32, 5, 31

# Canonical suffix of a block's tensor -> GGUF suffix, spec weights.md 3.2.
BLOCK_SUFFIXES = {
    "attn_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "hc_attn_fn": "hc_attn_fn.weight",
    "hc_attn_base": "hc_attn_base.weight",
    "hc_attn_scale": "hc_attn_scale.weight",
    "hc_ffn_fn": "hc_ffn_fn.weight",
    "hc_ffn_base": "hc_ffn_base.weight",
    "hc_ffn_scale": "hc_ffn_scale.weight",
    "attn.wq_a.weight": "attn_q_a.weight",
    "attn.q_norm.weight": "attn_q_a_norm.weight",
    "attn.wq_b.weight": "attn_q_b.weight",
    "attn.wkv.weight": "attn_kv.weight",
    "attn.kv_norm.weight": "attn_kv_a_norm.weight",
    "attn.attn_sink": "attn_sinks.weight",
    "attn.wo_a.weight": "attn_output_a.weight",
    "attn.wo_b.weight": "attn_output_b.weight",
    "ffn.gate.weight": "ffn_gate_inp.weight",
    "ffn.gate.bias": "exp_probs_b.bias",
    "ffn.shared_experts.w1.weight": "ffn_gate_shexp.weight",
    "ffn.shared_experts.w3.weight": "ffn_up_shexp.weight",
    "ffn.shared_experts.w2.weight": "ffn_down_shexp.weight",
    "ffn.experts.*.w1.weight": "ffn_gate_exps.weight",
    "ffn.experts.*.w3.weight": "ffn_up_exps.weight",
    "ffn.experts.*.w2.weight": "ffn_down_exps.weight",
}
# Dialect -> names of everything else; S is the stage of the canonical name. Spec weights.md 3.3 and 3.4.
NINE = {
    "dspark": {
        "main_proj.weight": "dspark.main_proj.weight",
        "main_norm.weight": "dspark.main_norm.weight",
        "norm.weight": "dspark.norm.weight",
        "hc_head_fn": "dspark.hc_head_fn.weight",
        "hc_head_base": "dspark.hc_head_base.weight",
        "hc_head_scale": "dspark.hc_head_scale.weight",
        "markov_head.markov_w1.weight": "dspark.markov_w1.weight",
        "markov_head.markov_w2.weight": "dspark.markov_w2.weight",
        "confidence_head.proj.weight": "dspark.conf_proj.weight",
    },
    "legacy": {
        "main_proj.weight": "mtp.S.main_proj.weight",
        "main_norm.weight": "mtp.S.main_norm.weight",
        "norm.weight": "mtp.S.norm.weight",
        "hc_head_fn": "mtp.S.hc_head_fn.weight",
        "hc_head_base": "mtp.S.hc_head_base.weight",
        "hc_head_scale": "mtp.S.hc_head_scale.weight",
        "markov_head.markov_w1.weight": "mtp.S.markov_head.markov_w1.weight",
        "markov_head.markov_w2.weight": "mtp.S.markov_head.markov_w2.weight",
        "confidence_head.proj.weight": "mtp.S.confidence_head.proj.weight",
    },
    "dflash": {
        "main_proj.weight": "fc.weight",
        "main_norm.weight": "enc.output_norm.weight",
        "norm.weight": "output_norm.weight",
        "hc_head_fn": "output_hc_fn.weight",
        "hc_head_base": "output_hc_base.weight",
        "hc_head_scale": "output_hc_scale.weight",
        "markov_head.markov_w1.weight": "markov_w1.weight",
        "markov_head.markov_w2.weight": "markov_w2.weight",
        "confidence_head.proj.weight": "conf_proj.weight",
    },
    "antirez": {
        "e_proj.weight": "mtp.S.e_proj.weight",
        "h_proj.weight": "mtp.S.h_proj.weight",
        "enorm.weight": "mtp.S.enorm.weight",
        "hnorm.weight": "mtp.S.hnorm.weight",
        "norm.weight": "mtp.S.norm.weight",
        "hc_head_fn": "mtp.S.hc_head_fn.weight",
        "hc_head_base": "mtp.S.hc_head_base.weight",
        "hc_head_scale": "mtp.S.hc_head_scale.weight",
    },
    "nextn": {
        "enorm.weight": "blk.3.nextn.enorm.weight",
        "hnorm.weight": "blk.3.nextn.hnorm.weight",
        "norm.weight": "blk.3.nextn.shared_head_norm.weight",
        "hc_head_fn": "output_hc_fn.weight",
        "hc_head_base": "output_hc_base.weight",
        "hc_head_scale": "output_hc_scale.weight",
    },
}
PREFIX = {"dspark": "dspark.S.", "legacy": "mtp.S.", "dflash": "blk.S.", "antirez": "mtp.S.", "nextn": "blk.3."}


@dataclass(frozen=True)
class Packed:
    """A tensor as the gguf package stores it: type, uint8 data [..., row_bytes], and the multipliers beside it."""

    kind: gguf.GGMLQuantizationType
    data: np.ndarray
    multipliers: np.ndarray | None = None

    def values(self) -> np.ndarray:
        """f32, by the gguf package's decoder."""
        out = gguf.dequantize(self.data, self.kind).astype(np.float32)
        return out if self.multipliers is None else out * self.multipliers.reshape(-1, *[1] * (out.ndim - 1))


def wide_config(**changes: Any) -> ModelConfig:
    return small_config(**WIDE | {"num_nextn_predict_layers": 0, "compress_ratios": [0, 4, 8]} | changes)


def head_shapes(config: ModelConfig, kind: str) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of a head's tensors: one MTP stage, or three of DSpark; stacks of experts whole."""
    stages = {"mtp": 1, "dspark": 3}[kind]
    d, m = config.hidden_size, config.hc_mult
    extras = ("e_proj", "h_proj", "enorm", "hnorm", "norm", "hc_head")
    out: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes(small_config(**vars_of(config), num_nextn_predict_layers=stages)).items():
        stage, _, suffix = name.removeprefix("mtp.").partition(".")
        if not name.startswith("mtp.") or (kind == "dspark" and suffix.startswith(extras)):
            continue
        if suffix.startswith("ffn.experts."):
            _, _, number, matrix = suffix.split(".", 3)
            suffix, shape = f"ffn.experts.*.{matrix}", (int(number) + 1, *shape)
        out[f"mtp.{stage}.{suffix}"] = shape
    if kind == "dspark":
        out |= {"mtp.0.main_proj.weight": (d, len(TARGETS) * d), "mtp.0.main_norm.weight": (d,)}
        out |= {"mtp.2.norm.weight": (d,), "mtp.2.hc_head_fn": (m, m * d), "mtp.2.hc_head_base": (m,)}
        out |= {f"mtp.2.markov_head.markov_{w}.weight": (config.vocab_size, RANK) for w in ("w1", "w2")}
        out |= {"mtp.2.hc_head_scale": (1,), "mtp.2.confidence_head.proj.weight": (1, d + RANK)}
    return out


def vars_of(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that tests change."""
    fields = ("hidden_size", "moe_intermediate_size", "q_lora_rank", "num_hidden_layers", "n_routed_experts")
    fields += ("num_experts_per_tok", "head_dim", "hc_mult", "vocab_size")
    return {field: getattr(config, field) for field in fields} | {"compress_ratios": [*config.compress_ratios, 0]}


def is_projection(name: str) -> bool:
    return ".attn.w" in name or name.endswith(("main_proj.weight", "e_proj.weight", "h_proj.weight"))


def _format(name: str) -> str:
    """What tools write: blocks for experts and projections, F16 for the Markov matrices, the rest in full."""
    if ".experts." in name:
        stage, matrix = name.split(".")[1], name.split(".")[-2]
        return {"w2": "Q4_K"}.get(matrix, {"0": "IQ2_XXS", "1": "NVFP4"}.get(stage, "Q2_K"))
    if ".markov_w" in name:
        return "F16"
    if ".shared_experts." in name:
        return "BF16"
    return "Q8_0" if is_projection(name) else "F32"


def pack(fmt: str, shape: tuple[int, ...], rng: np.random.Generator) -> Packed:
    """Random values in a format; blocks are random bytes but for their scales, which must be finite."""
    kind = gguf.GGMLQuantizationType[fmt]
    if fmt in ("F32", "F16", "BF16", "Q8_0"):
        values = rng.standard_normal(shape, dtype=np.float32) * 0.05
        data = gguf.quantize(values, kind)
        return Packed(kind, data.view(np.uint8).reshape(*shape[:-1], -1))
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
    half = rng.uniform(0.001, 0.01, (*data.shape[:-1], 2)).astype(np.float16).view(np.uint8)
    places = {"IQ2_XXS": slice(0, 2), "Q4_K": slice(0, 4), "Q2_K": slice(80, 84)}
    if fmt in places:
        data[..., places[fmt]] = half[..., : places[fmt].stop - places[fmt].start]
        return Packed(kind, data.reshape(*shape[:-1], -1))
    data[..., :4] = rng.integers(0, 0x7E, data[..., :4].shape, dtype=np.uint8)
    return Packed(kind, data.reshape(*shape[:-1], -1), rng.uniform(0.5, 2, shape[:1]).astype(np.float32))


def random_head(config: ModelConfig, kind: str, seed: int = 0, fmt: str | None = None) -> dict[str, Packed]:
    """Canonical name (stacks with "*") -> a random tensor, all in one format if it is given."""
    rng = np.random.default_rng(seed)
    return {name: pack(fmt or _format(name), shape, rng) for name, shape in head_shapes(config, kind).items()}


def file_names(dialect: str, head: Mapping[str, Packed]) -> Iterator[tuple[str, Packed]]:
    """The head's tensors under the dialect's names, multipliers beside their weights."""
    for canonical, packed in head.items():
        stage, _, suffix = canonical.removeprefix("mtp.").partition(".")
        if dialect == "nextn" and suffix in ("e_proj.weight", "h_proj.weight"):
            continue
        single = NINE[dialect].get(suffix)
        name = (single or PREFIX[dialect] + BLOCK_SUFFIXES[suffix]).replace("S", stage)
        yield name, packed
        if packed.multipliers is not None:
            scales = Packed(gguf.GGMLQuantizationType.F32, packed.multipliers.view(np.uint8))
            yield name.removesuffix(".weight") + ".scale", scales
    if dialect == "nextn":
        e, h = head["mtp.0.e_proj.weight"], head["mtp.0.h_proj.weight"]
        yield "blk.3.nextn.eh_proj.weight", Packed(e.kind, np.concatenate([e.data, h.data], axis=-1))


def write_side_file(
    path: Path,
    tensors: Mapping[str, Packed] | Iterator[tuple[str, Packed]],
    keys: Mapping[str, Any] | None = None,
    architecture: str = "deepseek4",
) -> Path:
    """A GGUF file with these tensors and keys."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (keys or {}).items():
        if isinstance(value, list | tuple):
            writer.add_array(key, list(value))
        else:
            {int: writer.add_uint32, str: writer.add_string, float: writer.add_float32, bool: writer.add_bool}[
                type(value)
            ](key, value)
    for name, packed in tensors.items() if isinstance(tensors, Mapping) else tensors:
        writer.add_tensor(name, packed.data, raw_dtype=packed.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def by_expert(head: Mapping[str, Packed]) -> dict[str, np.ndarray]:
    """Canonical name, experts one by one -> values."""
    out: dict[str, np.ndarray] = {}
    for name, packed in head.items():
        values = packed.values()
        if "*" in name:
            out |= {name.replace("*", str(expert)): matrix for expert, matrix in enumerate(values)}
        else:
            out[name] = values
    return out


CONFIG = wide_config()
KEYS: dict[str, dict[str, Any]] = {
    "dspark": {
        "deepseek4.dspark.layer_count": 3,
        "deepseek4.dspark.block_size": BLOCK,
        "deepseek4.dspark.markov_rank": RANK,
        "deepseek4.dspark.noise_token_id": NOISE,
        "deepseek4.dspark.target_layers": list(TARGETS),
        "deepseek4.dspark.expert_count": 3,
    },
    "legacy": {
        "dspark.n_layers": 3,
        "dspark.stage_count": 3,
        "dspark.block_size": BLOCK,
        "dspark.markov_rank": RANK,
        "dspark.noise_token_id": NOISE,
        "dspark.target_layer_ids": list(TARGETS),
    },
    "dflash": {
        "dflash.block_count": 3,
        "dflash.block_size": BLOCK,
        "dflash.target_layers": [layer + 1 for layer in TARGETS],
        "tokenizer.ggml.mask_token_id": NOISE,
        "dflash.attention.compress_ratios": [0, 0, 0],
    },
    "antirez": {},
    "nextn": {"deepseek4.block_count": 4, "deepseek4.nextn_predict_layers": 1},
}
KINDS = {"dspark": "dspark", "legacy": "dspark", "dflash": "dspark", "antirez": "mtp", "nextn": "mtp"}


def plain(*shape: int) -> Packed:
    return pack("F32", shape, np.random.default_rng(9))


def side_file(path: Path, dialect: str, head: dict[str, Packed] | None = None, **keys: Any) -> Path:
    """A side file in a dialect; a llama.cpp MTP file also has copies of the trunk's embedding, head and norm."""
    head = head or random_head(CONFIG, KINDS[dialect])
    tensors = dict(file_names(dialect, head))
    if dialect == "nextn":
        tensors |= {"token_embd.weight": plain(32, 256), "output.weight": plain(32, 256)}
        tensors |= {"output_norm.weight": plain(256), "blk.3.nextn.shared_head_head.weight": plain(32, 256)}
    architecture = keys.pop("architecture", "dflash" if dialect == "dflash" else "deepseek4")
    return write_side_file(path, tensors, KEYS[dialect] | keys, architecture)


def trunk(path: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> Checkpoint:
    """A safetensors trunk of random values in the dimensions of CONFIG; nothing in it tells the release."""
    path.mkdir()
    fields: dict[str, Any] = {"hidden_size": 256, "moe_intermediate_size": 256, "q_lora_rank": 32}
    fields |= {"compress_ratios": [0, 4, 8], "num_nextn_predict_layers": 0}
    (path / "config.json").write_text(json.dumps(small_json(**fields | changes)))
    save_file(random_tensors(CONFIG) if tensors is None else tensors, path / "model.safetensors")
    return open_checkpoint(path)


def refused(call: Callable[[], Any], *parts: str) -> str:
    with pytest.raises(Ds4Error) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message
