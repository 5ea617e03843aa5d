"""Laying out a safetensors checkpoint in official naming: shards, their headers, the index, and config.json.

    format          <base>.weight                 beside it
    fp8_block       F8_E4M3 [out, in]             <base>.scale  F8_E8M0 or F32 [ceil(out / 128), ceil(in / 128)]
    mxfp4_official  I8 [out, in / 2]              <base>.scale  F8_E8M0 [out, in / 32]
    nvfp4_modelopt  U8 [out, in / 2]              <base>.weight_scale  F8_E4M3 [out, in / 16]
                                                  <base>.weight_scale_2  F32 []
    others          F32, F16, BF16 or I64 of the logical shape

Source:  spec weights.md 1 and 2.1, and the format description of the safetensors project.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ds4.config import ModelConfig
from ds4.weights.formats import FORMATS
from ds4.weights.safetensors import INDEX
from ds4.weights.writing import MULTIPLIER, FileLayout, Item, Layout, Place

_DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "i64": "I64"}
_PACKED_DTYPES = {"fp8_block": "F8_E4M3", "mxfp4_official": "I8", "nvfp4_modelopt": "U8"}
_SCALE_DTYPES = {"fp8_block": "F8_E8M0", "mxfp4_official": "F8_E8M0", "nvfp4_modelopt": "F8_E4M3"}
_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8}
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Entry:
    """One tensor of a shard."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        return _BYTES.get(self.dtype, 1)

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.item_bytes


def plan_safetensors(items: Iterable[Item], shard_bytes: int, *, file_name: str | None = None) -> Layout:
    """Give every item a place.

    items        in the order of the files
    shard_bytes  tensor bytes in a shard, at most, but for a tensor that is larger by itself
    file_name    of the one file there shall be, however large; None for ``model.safetensors``, or numbered shards
    returns      the layout; tensors of one item are in one shard
    Error:       ValueError for a format that safetensors does not have
    """
    shards: list[list[Entry]] = [[]]
    places: dict[str, dict[str, Place]] = {}
    used = 0
    for item in items:
        entries = _entries(item)
        size = sum(entry.n_bytes for entry in entries.values())
        if used and used + size > shard_bytes and file_name is None:
            shards.append([])
            used = 0
        shards[-1] += entries.values()
        used += size
        places[item.name] = {role: Place(entry.name) for role, entry in entries.items()}
    count = len(shards)
    names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    if count == 1:
        names = [file_name or _SINGLE]
    return Layout(tuple(_file(name, entries) for name, entries in zip(names, shards, strict=True)), places)


def _entries(item: Item) -> dict[str, Entry]:
    """The stored tensors of an item by role."""
    base = item.name.removesuffix("weight")
    if item.format in _DTYPES:
        return {"": Entry(item.name, _DTYPES[item.format], item.shape)}
    if item.format not in _PACKED_DTYPES or not item.name.endswith(".weight") or len(item.shape) != 2:
        raise ValueError(f"{item.name}: {item.format} {list(item.shape)} cannot be stored in safetensors")
    n_rows, n_cols = item.shape
    out = {"": Entry(item.name, _PACKED_DTYPES[item.format], (n_rows, item.row_bytes))}
    dtype = _SCALE_DTYPES[item.format]
    if item.format == "fp8_block":
        tile = FORMATS["fp8_block"].row_block
        grid = (-(-n_rows // tile), -(-n_cols // tile))
        out["scale"] = Entry(base + "scale", "F32" if item.f32_scales else dtype, grid)
    else:
        blocks = (n_rows, n_cols // FORMATS[item.format].block)
        name = "scale" if item.format == "mxfp4_official" else "weight_scale"
        out["scale"] = Entry(base + name, dtype, blocks)
    if item.format == "nvfp4_modelopt":
        out[MULTIPLIER] = Entry(base + "weight_scale_2", "F32", ())
    return out


def _file(name: str, entries: list[Entry]) -> FileLayout:
    """One file; wider elements come first, since the readers of the format need them aligned."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for entry in sorted(entries, key=lambda entry: -entry.item_bytes):
        starts[entry.name] = end
        end += entry.n_bytes
        span = [starts[entry.name], end]
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(8, "little") + text
    return FileLayout(name, raw, {name: len(raw) + start for name, start in starts.items()}, len(raw) + end)


def index_json(layout: Layout) -> dict[str, Any] | None:
    """The contents of the index file; None where there is one shard only."""
    if len(layout.files) == 1:
        return None
    total = sum(file.size - len(file.header) for file in layout.files)
    weight_map = {name: file.name for file in layout.files for name in file.offsets}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def config_json(config: ModelConfig, base: Mapping[str, Any], name: str, items: Iterable[Item]) -> dict[str, Any]:
    """An official config.json that ``ModelConfig.from_json`` reads back as ``config``.

    base   another config.json to start from, or empty
    name   what the model is called
    items  what the weights are stored as, which ``expert_dtype`` and ``quantization_config`` tell
    """
    drop = ("quantization_config", "expert_dtype", "compression_config")
    out = {key: value for key, value in base.items() if key not in drop} or _from_fields(config, name)
    out["num_nextn_predict_layers"] = config.n_mtp_layers
    formats: dict[str, set[str]] = {"experts": set(), "others": set()}
    for item in items:
        formats["experts" if ".ffn.experts." in item.name else "others"].add(item.format)
    experts = formats["experts"]
    if experts & {"mxfp4_official", "nvfp4_modelopt"}:
        out["expert_dtype"] = "fp4"
    elif "fp8_block" in experts:
        out["expert_dtype"] = "fp8"
    quantization: dict[str, Any] = {}
    if "fp8_block" in experts | formats["others"]:
        quantization = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
            "activation_scheme": "dynamic",
        }
    if "nvfp4_modelopt" in experts:
        quantization |= {"quant_algo": "MIXED_PRECISION", "moe_quant_algo": "NVFP4", "group_size": 16}
        quantization["ignore"] = ["*.attn.*", "*.ffn.shared_experts.*", "head"]
    if quantization:
        out["quantization_config"] = quantization
    return out


def _from_fields(config: ModelConfig, name: str) -> dict[str, Any]:
    """Every field of the official config.json, with the constants that all releases share."""
    out: dict[str, Any] = {
        "_name_or_path": name,
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "num_key_value_heads": 1,
        "n_shared_experts": 1,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    renamed = ("rope_factor", "rope_original_max_position", "rope_beta_fast", "rope_beta_slow", "n_mtp_layers")
    for field, value in vars(config).items():
        if field not in renamed and value is not None and value != ():
            out[field] = list(value) if isinstance(value, tuple) else value
    out["compress_ratios"] = [*config.compress_ratios, *[0] * config.n_mtp_layers]
    out["rope_scaling"] = None
    if config.rope_original_max_position:
        out["rope_scaling"] = {
            "type": "yarn",
            "factor": config.rope_factor,
            "original_max_position_embeddings": config.rope_original_max_position,
            "beta_fast": config.rope_beta_fast,
            "beta_slow": config.rope_beta_slow,
        }
    return out


def text_files(layout: Layout, config: Mapping[str, Any]) -> dict[str, bytes]:
    """config.json, and the index where there are several shards."""
    files = {"config.json": config}
    index = index_json(layout)
    if index is not None:
        files[INDEX] = index
    return {name: (json.dumps(contents, indent=2) + "\n").encode() for name, contents in files.items()}
