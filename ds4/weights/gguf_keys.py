"""The metadata of a ``deepseek4`` GGUF file, and the header that holds it.

Source:  spec weights.md 3.1 and 3.4.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ds4.config import ModelConfig
from ds4.config_keys import GGUF_KEYS
from ds4.weights.formats import FORMATS

# general.file_type says what most weights are; it informs people and is never dispatched on.
_FILE_TYPES = {
    **{"f32": 0, "f16": 1, "q8_0": 7, "q2_k": 10, "q4_k": 15, "q6_k": 18, "iq2_xxs": 19, "bf16": 32},
    **{"mxfp4": 38, "nvfp4": 39},
}
# Keys of another file that stay true of its copy, and those among them that a writer sets or that must not survive.
_CARRIED = ("general.", "deepseek4.", "tokenizer.", "reap.")
_NOT_CARRIED = (
    *("general.architecture", "general.alignment", "general.file_type"),
    *("deepseek4.nextn_predict_layers", "deepseek4.rope.freq_base_swa"),
)


def model_keys(config: ModelConfig, name: str, n_weights: Mapping[str, int], n_nextn: int) -> dict[str, Any]:
    """Every key that llama.cpp's loader reads for the architecture, and those of a DSpark head.

    name       ``general.name``
    n_weights  how many weights there are of each format
    n_nextn    draft blocks in llama.cpp's form, which counts them as blocks
    """
    main_format = max(_FILE_TYPES, key=lambda fmt: n_weights.get(fmt, 0))
    keys: dict[str, Any] = {"general.type": "model", "general.name": name}
    keys["general.file_type"] = _FILE_TYPES[main_format]
    keys["general.quantization_version"] = 2
    model = {key: getattr(config, field) for field, key in GGUF_KEYS.items()}
    layers = config.num_hidden_layers + n_nextn
    model |= {
        "block_count": layers,
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length_out": config.hidden_size * config.hc_mult,
        "attention.head_count_kv": 1,
        "attention.value_length": config.head_dim,
        "attention.compress_ratios": [*config.compress_ratios, *[0] * n_nextn],
        "attention.compress_rope_freq_base": config.compress_rope_theta,
        "expert_shared_count": 1,
        "expert_weights_norm": True,
        "expert_gating_func": 4,
        "swiglu_clamp_exp": [float(config.swiglu_limit)] * layers,
        "swiglu_clamp_shexp": [float(config.swiglu_limit)] * layers,
    }
    if n_nextn:
        model["nextn_predict_layers"] = n_nextn
    if config.rope_original_max_position:
        model |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": config.rope_factor,
            "rope.scaling.original_context_length": config.rope_original_max_position,
            "rope.scaling.yarn_beta_fast": config.rope_beta_fast,
            "rope.scaling.yarn_beta_slow": config.rope_beta_slow,
        }
    else:
        model["rope.scaling.type"] = "none"
    if config.dspark_block_size is not None:
        model |= _dspark_settings(config)
    keys |= {f"deepseek4.{key}": value for key, value in model.items() if value is not None}
    keys["tokenizer.ggml.bos_token_id"] = config.bos_token_id
    keys["tokenizer.ggml.eos_token_id"] = config.eos_token_id
    return keys


def dspark_keys(config: ModelConfig, name: str) -> dict[str, Any]:
    """The metadata of a DSpark head in a file of its own; ``name`` is ``general.name``."""
    return {"general.type": "model", "general.name": name} | {
        f"deepseek4.{key}": value for key, value in _dspark_settings(config).items()
    }


def _dspark_settings(config: ModelConfig) -> dict[str, Any]:
    """The settings of the head of ``config``, by key without the architecture."""
    return {
        "dspark.stage_count": config.n_mtp_layers,
        "dspark.block_size": config.dspark_block_size,
        "dspark.markov_rank": config.dspark_markov_rank,
        "dspark.noise_token_id": config.dspark_noise_token_id,
        "dspark.target_layer_ids": list(config.dspark_target_layer_ids),
    }


def carried_keys(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a GGUF that stay true when it is converted: licence, tokenizer, pruning; not splits and imatrices."""
    return {key: v for key, v in metadata.items() if key.startswith(_CARRIED) and key not in _NOT_CARRIED}


def header_bytes(keys: Mapping[str, Any], tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Everything before the data of a GGUF file, without the padding behind it.

    keys     without ``general.architecture``, which is ``deepseek4``; values are int, float, bool, str or lists of one
             of them, and become what llama.cpp expects: uint32, float32, bool, string; arrays of int32, float32, string
    tensors  (name, format, shape)
    """
    import gguf

    writer = gguf.GGUFWriter("", "deepseek4")
    kinds = gguf.GGUFValueType
    scalars = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}
    items = {**scalars, int: kinds.INT32}
    for key, value in keys.items():
        if isinstance(value, list | tuple):
            if not value:
                continue
            wide = type(value[0]) is int and not all(-1 << 31 <= v < 1 << 31 for v in value)
            writer.add_key_value(key, list(value), kinds.ARRAY, kinds.INT64 if wide else items[type(value[0])])
        elif type(value) is int and not 0 <= value < 1 << 32:
            writer.add_key_value(key, value, kinds.INT64)
        else:
            writer.add_key_value(key, value, scalars[type(value)])
    for name, fmt, shape in tensors:
        form = FORMATS[fmt]
        if form.ggml_type is None:
            raise ValueError(f"{name}: a GGUF has no type for {fmt}")
        n_bytes = form.row_bytes(shape[-1])
        for n in shape[:-1]:
            n_bytes *= n
        writer.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes, gguf.GGMLQuantizationType(form.ggml_type))
    buffer = io.BytesIO()
    # The writer only opens a file of its own where it has none yet.
    writer.fout, writer.state = [io.BufferedWriter(buffer)], gguf.gguf_writer.WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return buffer.getvalue()
