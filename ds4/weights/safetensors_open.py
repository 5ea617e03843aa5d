"""Opening a safetensors checkpoint: config.json, the shards, and what belongs together in them.

Source:  spec weights.md 1 and 2.
"""

from __future__ import annotations

from pathlib import Path

from ds4.config import ModelConfig
from ds4.errors import Ds4Error
from ds4.weights import companions, safetensors
from ds4.weights.checkpoint import Checkpoint, View, draft_stages
from ds4.weights.storage import MappedFile, StoredTensor


def open_safetensors(path: Path) -> Checkpoint:
    directory, shards, weight_map = safetensors.find_shards(path)
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise Ds4Error(f"{directory}: config.json is missing; it belongs beside the weights")
    stored: dict[str, StoredTensor] = {}
    for shard in shards:
        for tensor in safetensors.read_safetensors(MappedFile(shard)):
            if weight_map is not None and weight_map.get(tensor.name) != shard.name:
                continue
            if tensor.name in stored:
                raise Ds4Error(f"{shard}: tensor {tensor.name!r:.200} occurs twice")
            stored[tensor.name] = tensor
    for name, shard_name in (weight_map or {}).items():
        if name not in stored and not safetensors.is_ignored(name):
            raise Ds4Error(f"{directory / shard_name}: tensor {name!r:.200} is missing, though the index lists it")
    tensors, groups = companions.group(stored)
    views = {n: View(g.weight, g.weight.shape, scale=g.multiplier, parts=g.parts) for n, g in groups.items()}
    metadata = safetensors.read_json(config_file)
    config = ModelConfig.from_json(metadata, source=str(config_file), n_mtp_layers=draft_stages(set(stored)))
    return Checkpoint(path, "safetensors", config, metadata, tensors, views, directory)
