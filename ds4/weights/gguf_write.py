"""Writing a ``deepseek4`` GGUF file: llama.cpp's metadata keys and names.

An MTP block goes in as one more block, ``blk.N.nextn.*``, which llama.cpp loads; that form has no place for a stream
collapse (hc_head) of the block's own, so a block that has one is written as ``mtp.S.*``, which only ds4 loads.

Source:  spec weights.md 3.1 to 3.3.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ds4.config import ModelConfig
from ds4.config_keys import GGUF_KEYS
from ds4.errors import Ds4Error
from ds4.weights import names
from ds4.weights.formats import FORMATS, INTEGER_FORMATS
from ds4.weights.opening import open_checkpoint

if TYPE_CHECKING:
    import gguf

# general.file_type says what most weights are; it informs people and is never dispatched on.
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32, "nvfp4": 39}


def write_gguf(
    path: str | os.PathLike[str],
    config: ModelConfig,
    tensors: Iterable[tuple[str, torch.Tensor, str]],
    *,
    tokenizer_metadata: Mapping[str, Any],
    name: str,
    extra: Mapping[str, Any] | None = None,
    multipliers: bool = True,
) -> Path:
    """Quantise tensors and write them with ``config`` as one GGUF file; the file appears whole or not at all.

    tensors             (canonical name, values, format name): floats of any float type for float and block formats,
                        integers for i32; shapes as in the official checkpoint.  Experts come one by one and are
                        stacked; those of one stack must agree in shape and format.  nvfp4
                        weights get a multiplier each, stored as ``<base>.scale``.
    tokenizer_metadata  full GGUF keys, ``tokenizer.ggml.tokens`` and so on; bos and eos ids come from ``config``
                        unless given here
    name                ``general.name``
    extra               further keys; int, float, bool, str or a list of one of them
    multipliers         False: nvfp4 weights are written without one, so that readers which ignore ``<base>.scale``
                        (llama.cpp's deepseek4 graph does) get them right; only for weights that suit it
    returns  the path written
    Error:   ValueError for tensors that cannot be written (unknown name or format, gaps in a stack, not finite, wrong
             row length); Ds4Error if the file cannot be written, or would not open again with the same config.
    Limits:  the packed tensors are held in memory until the file is complete.
    """
    import gguf

    path = Path(path)
    tensors = list(tensors)
    draft = [n for n, _, _ in tensors if n.startswith("mtp.0.")]
    as_nextn = config.n_mtp_layers == 1 and bool(draft) and not any("hc_head" in n for n in draft)
    packed = list(_stacked(tensors, without_multiplier="" if not multipliers else "mtp." if as_nextn else None))
    if as_nextn:
        packed = _as_nextn_block(packed, config.num_hidden_layers)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".gguf")
        os.close(handle)
    except OSError as error:
        raise Ds4Error(f"{path}: cannot be written: {error.strerror or error}") from None
    try:
        writer = gguf.GGUFWriter(temporary, "deepseek4")
        weights: dict[str, int] = dict.fromkeys(_FILE_TYPES, 0)
        for _, tensor in packed:
            if tensor.format in weights:
                weights[tensor.format] += math.prod(tensor.shape)
        _add_metadata(writer, _metadata(config, name, max(weights, key=lambda fmt: weights[fmt]), int(as_nextn)))
        _add_metadata(writer, {**tokenizer_metadata, **(extra or {})})
        for gguf_name, tensor in packed:
            form = FORMATS[tensor.format]
            raw = gguf.GGMLQuantizationType(form.ggml_type or 0)  # _pack refused formats without one
            data = tensor.data.reshape(*tensor.shape[:-1], form.row_bytes(tensor.shape[-1]))
            writer.add_tensor(gguf_name, data.numpy(), raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        written = open_checkpoint(temporary).config
        if written != config:
            different = [field for field in vars(config) if getattr(written, field) != getattr(config, field)]
            raise Ds4Error(f"{path}: the GGUF would not hold the same {', '.join(different)}; nothing was written")
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise Ds4Error(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def _umask() -> int:
    """The process's file mode mask: a temporary file is private, the finished one should be like any other."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


@dataclass(frozen=True, eq=False)
class _Packed:
    """One tensor ready to store: data uint8 [n_rows, row_bytes], and its multiplier where the format has one."""

    format: str
    shape: tuple[int, ...]
    data: torch.Tensor
    multiplier: float | None


def _stacked(
    tensors: Iterable[tuple[str, torch.Tensor, str]], *, without_multiplier: str | None
) -> Iterator[tuple[str, _Packed]]:
    """(GGUF name, tensor) of everything to store, in the order in which each name first comes.

    Names that begin with ``without_multiplier`` get none: llama.cpp skips a draft block's weights but would count their
    ``.scale`` tensors as unknown ones and refuse the file.
    """
    stacks: dict[str, dict[int | None, _Packed]] = {}
    for canonical, values, fmt in tensors:
        place = names.to_gguf(canonical)
        if place is None:
            raise ValueError(f"{canonical}: no GGUF name is known for this tensor")
        gguf_name, expert = place
        stack = stacks.setdefault(gguf_name, {})
        if expert in stack:
            raise ValueError(f"{canonical}: given twice")
        plain = without_multiplier is not None and canonical.startswith(without_multiplier)
        stack[expert] = _pack(canonical, values, fmt, with_multiplier=not plain)
    for gguf_name, stack in stacks.items():
        if set(stack) not in ({None}, set(range(len(stack)))):
            raise ValueError(f"{gguf_name}: experts are not 0..{len(stack) - 1} without gaps")
        parts = [stack[key] for key in sorted(stack, key=lambda expert: expert or 0)]
        fmt, shape = parts[0].format, parts[0].shape
        if any((part.format, part.shape) != (fmt, shape) for part in parts):
            raise ValueError(f"{gguf_name}: experts differ in format or shape")
        full = shape if None in stack else (len(parts), *shape)
        yield gguf_name, _Packed(fmt, full, torch.cat([part.data for part in parts]), None)
        if parts[0].multiplier is not None:
            scales = torch.tensor([[part.multiplier for part in parts]], dtype=torch.float32).view(torch.uint8)
            yield gguf_name.removesuffix(".weight") + ".scale", _Packed("f32", (len(parts),), scales, None)


def _as_nextn_block(packed: list[tuple[str, _Packed]], number: int) -> list[tuple[str, _Packed]]:
    """``mtp.0.*`` renamed to ``blk.<number>.*``; e_proj and h_proj become the columns of one eh_proj."""
    nextn = {canonical: suffix for suffix, canonical in names.NEXTN.items()}
    found = dict(packed)
    out = []
    for name, tensor in packed:
        suffix = name.removeprefix("mtp.0.")
        if suffix == name:
            out.append((name, tensor))
        elif suffix == "e_proj.weight":
            h = found["mtp.0.h_proj.weight"]
            if (h.format, h.shape) != (tensor.format, tensor.shape):
                raise ValueError(f"{name}: e_proj and h_proj differ in format or shape")
            both = torch.cat((tensor.data, h.data), dim=1)
            joined = _Packed(tensor.format, (tensor.shape[0], 2 * tensor.shape[1]), both, None)
            out.append((f"blk.{number}.{names.EH_PROJ}", joined))
        elif suffix != "h_proj.weight":
            out.append((f"blk.{number}.{'nextn.' + nextn[suffix] if suffix in nextn else suffix}", tensor))
    return out


def _pack(name: str, values: torch.Tensor, fmt: str, *, with_multiplier: bool) -> _Packed:
    """One tensor in a format, on the CPU; ValueError for values that the format cannot hold."""
    form = FORMATS.get(fmt)
    if form is None or form.quantize is None or form.ggml_type is None:
        raise ValueError(f"{name}: ds4 cannot write format {fmt!r}")
    values = values.detach().cpu()
    if not values.dim() or not values.numel() or values.shape[-1] % form.block:
        raise ValueError(f"{name}: shape {list(values.shape)} does not fit {fmt}, whose blocks hold {form.block}")
    if values.is_floating_point() == (fmt in INTEGER_FORMATS):
        raise ValueError(f"{name}: {values.dtype} values cannot be stored as {fmt}")
    if values.is_floating_point() and not values.isfinite().all():
        raise ValueError(f"{name}: holds infinities or not-a-numbers")
    rows = values.reshape(-1, values.shape[-1])
    if fmt not in INTEGER_FORMATS:
        rows = rows.to(torch.float32)
    multiplier = form.multiplier(rows) if form.multiplier and with_multiplier else None
    return _Packed(fmt, tuple(values.shape), form.quantize(rows / multiplier if multiplier else rows), multiplier)


def _metadata(config: ModelConfig, name: str, main_format: str, n_nextn: int) -> dict[str, Any]:
    """Every key that llama.cpp's loader reads for the architecture; it counts ``n_nextn`` draft blocks as blocks."""
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
    keys |= {f"deepseek4.{key}": value for key, value in model.items()}
    keys["tokenizer.ggml.bos_token_id"] = config.bos_token_id
    keys["tokenizer.ggml.eos_token_id"] = config.eos_token_id
    return keys


def _add_metadata(writer: gguf.GGUFWriter, keys: Mapping[str, Any]) -> None:
    """Add keys with the types llama.cpp expects: uint32, float32, bool, string; arrays of int32, float32, string."""
    import gguf

    kinds = gguf.GGUFValueType
    scalars = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}
    items = {**scalars, int: kinds.INT32}
    for key, value in keys.items():
        if key in writer.kv_data[0]:
            del writer.kv_data[0][key]  # the caller's tokenizer keys win
        if isinstance(value, list | tuple):
            if not value:
                continue
            writer.add_key_value(key, list(value), kinds.ARRAY, items[type(value[0])])
        elif type(value) is int and not 0 <= value < 1 << 32:
            writer.add_key_value(key, value, kinds.INT64)
        else:
            writer.add_key_value(key, value, scalars[type(value)])
