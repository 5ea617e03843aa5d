"""Opening a safetensors checkpoint: config.json, the shards, what their tensors are called, and what belongs together.

Source:  spec weights.md 1 and 2; the other spelling of names is that of transformers' ``deepseek_v4``.
"""

from __future__ import annotations

import functools
import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ds4.config import ModelConfig
from ds4.errors import Ds4Error
from ds4.weights import companions, safetensors
from ds4.weights.checkpoint import Checkpoint, draft_stages
from ds4.weights.draft_settings import of_trunk
from ds4.weights.storage import MappedFile, StoredTensor

# Parts of names in transformers' spelling -> official ones, applied in this order to what follows ``layers.N.``
# (or ``mtp.S.``) and, for a routed expert, its number.
_RENAMED = [
    (re.compile(pattern), official)
    for pattern, official in (
        (r"^input_layernorm\.", "attn_norm."),
        (r"^post_attention_layernorm\.", "ffn_norm."),
        (r"^(attn|ffn)_hc\.", r"hc_\1_"),
        (r"^hc_head\.hc_", "hc_head_"),
        (r"^self_attn\.", "attn."),
        (r"^attn\.sinks$", "attn.attn_sink"),
        (r"^attn\.q_a_norm\.", "attn.q_norm."),
        (r"^attn\.compressor\.indexer\.(?:scorer\.)?(weights_proj|q_b_proj|wq_b)\.", r"attn.indexer.\1."),
        (r"^attn\.compressor\.indexer\.", "attn.indexer.compressor."),
        (r"^attn\.((?:indexer\.)?compressor)\.kv_norm\.", r"attn.\1.norm."),
        (r"^attn\.((?:indexer\.)?compressor)\.position_bias$", r"attn.\1.ape"),
        (r"^attn\.((?:indexer\.)?compressor)\.gate_proj\.", r"attn.\1.wgate."),
        (r"^attn\.((?:(?:indexer\.)?compressor\.)?)kv_proj\.", r"attn.\1wkv."),
        (r"^attn\.((?:indexer\.)?)([qo]_[ab])_proj\.", r"attn.\1w\2."),
        (r"^mlp\.", "ffn."),
        (r"^ffn\.gate\.e_score_correction_bias$", "ffn.gate.bias"),
        (r"^((?:ffn\.shared_experts\.)?)gate_proj\.", r"\1w1."),
        (r"^((?:ffn\.shared_experts\.)?)down_proj\.", r"\1w2."),
        (r"^((?:ffn\.shared_experts\.)?)up_proj\.", r"\1w3."),
    )
]
_RENAMED_OUTSIDE = (("embed_tokens.", "embed."), ("lm_head.", "head."), ("hc_head.hc_", "hc_head_"))
_PLAIN = ("f32", "f16", "bf16", "i64", "i32")
_FORMATS = frozenset(_PLAIN) | frozenset(companions.RAW)
_READABLE = ", ".join([fmt.upper() for fmt in _PLAIN] + list(companions.RAW.values()))
_IN_BLOCK = re.compile(r"(?:model\.)?((?:layers|mtp)\.[0-9]+\.)(?:(?:ffn|mlp)\.experts\.([0-9]+)\.)?(.+)")


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Python looks for unused cycles whenever some thousands of objects are new, and walks over all there are: half of
    the time that 100,000 tensors take.  Reading headers makes no cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_collector_paused()
def open_safetensors(path: Path) -> Checkpoint:
    """Open a safetensors file, a directory of them, one of its shards or its index; Ds4Error for all that is wrong."""
    directory, shards, weight_map = safetensors.find_shards(path)
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise Ds4Error(f"{directory}: config.json is missing; it belongs beside the weights")
    stored = _read(shards, weight_map)
    views = companions.group(stored)
    metadata = safetensors.read_json(config_file)
    stages = draft_stages({name for name in views if name.startswith("mtp.") and name.endswith(".attn_norm.weight")})
    config = ModelConfig.from_json(metadata, source=str(config_file), n_mtp_layers=stages)
    config = of_trunk(config, metadata, views, config_file)
    return Checkpoint(path, "safetensors", config, metadata, list(stored.values()), views, directory)


def _read(shards: list[Path], weight_map: dict[str, str] | None) -> dict[str, StoredTensor]:
    """The tensors of the model by official name; ``weight_map`` loses the entries that were found."""
    stored: dict[str, StoredTensor] = {}
    for shard in shards:
        file_name = shard.name
        for tensor in safetensors.read_safetensors(MappedFile(shard)):
            if weight_map is not None:
                if weight_map.get(tensor.name) != file_name:
                    continue
                del weight_map[tensor.name]
            name = official_name(tensor.name)
            if name is not None:
                _add(stored, name, tensor)
    for name, file_name in (weight_map or {}).items():
        if official_name(name) is not None:
            raise Ds4Error(
                f"{shards[0].parent / file_name}: tensor {name!r:.200} is missing, though the index lists it"
            )
    if not stored:
        raise Ds4Error(f"{shards[0]}: holds no tensor of a DeepSeek-V4 model; is it another model, or an adapter?")
    return stored


def _add(stored: dict[str, StoredTensor], name: str, tensor: StoredTensor) -> None:
    """File a tensor of the model under its official name."""
    other = stored.setdefault(name, tensor)
    if tensor.format not in _FORMATS:
        problem = f"has dtype {tensor.format.upper()}, which ds4 cannot read; it reads {_READABLE}"
    elif not tensor.nbytes:
        problem = f"is empty: {list(tensor.shape)}"
    elif other is not tensor:
        problem = f"is the same weight as {other.name!r:.200}; the checkpoint must have one of them"
    else:
        return
    raise Ds4Error(f"{tensor.file.path}: tensor {tensor.name!r:.200} {problem}")


def official_name(name: str) -> str | None:
    """The official name of a tensor in either spelling; None for one that is no part of a text model.

    transformers' spelling prefixes ``model.`` and renames most parts: ``model.layers.0.mlp.experts.3.up_proj.weight``
    is ``layers.0.ffn.experts.3.w3.weight``.  Files with parts of both spellings exist, so every part is judged alone.
    What is under ``layers.``, ``mtp.``, ``embed.``, ``head.``, ``norm.`` and ``hc_head_`` belongs to the model, known
    or not, but for ``bias_vl``; the rest is not looked at: ``vision.``, ``aligner.``, ``image_``, calibration data.
    Source:  spec weights.md 1, 1.1 and 7; transformers' conversion mapping for ``deepseek_v4``.
    """
    found = _IN_BLOCK.fullmatch(name)
    if not found:
        return _outside_blocks(name)
    block, expert, rest = found.groups()
    part = _official_part(rest)
    if part == "ffn.gate.bias_vl":
        return None
    official = f"{block}{part}" if expert is None else f"{block}ffn.experts.{expert}.{part}"
    return name if official == name else official  # one string for both, where there are 100,000 of them


def _outside_blocks(name: str) -> str | None:
    name = name.removeprefix("model.")
    for other, official in _RENAMED_OUTSIDE:
        if name.startswith(other):
            name = official + name.removeprefix(other)
    return name if name.startswith(("embed.", "head.", "norm.", "hc_head_")) else None


@functools.lru_cache(maxsize=1024)  # a checkpoint has some 80 of them
def _official_part(rest: str) -> str:
    for pattern, official in _RENAMED:
        rest = pattern.sub(official, rest)
    return rest
