"""Settings of a DSpark head: from the metadata in any spelling, checked against the shapes, or the released values.

Source:  spec weights.md 1.1 and 3.4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds4.config import ModelConfig
from ds4.errors import Ds4Error

if TYPE_CHECKING:
    from ds4.weights.checkpoint import View

# Settings of the released checkpoints, for files that leave them out.
BLOCK_SIZE = 5
NOISE_TOKEN_ID = 128799
TARGET_LAYER_IDS = (40, 41, 42)
# A setting's key: anything, "dspark" or "dflash", a dot or an underscore, and one of the spellings below.
_KEY = re.compile(r"(?:.*[._-])?(dspark|dflash)[._]([a-z_]+)")
_SETTINGS = {
    "block_size": "block_size",
    "markov_rank": "markov_rank",
    "noise_token_id": "noise_token_id",
    "mask_token_id": "noise_token_id",
    "target_layer_ids": "target_layer_ids",
    "target_layers": "target_layer_ids",
    "layer_count": "stages",
    "n_layers": "stages",
    "stage_count": "stages",
}


@dataclass(frozen=True)
class DSparkSettings:
    """Settings of a DSpark head.

    block_size        tokens drafted at a time
    markov_rank       columns of the Markov matrices
    noise_token_id    token that fills the block behind its first
    target_layer_ids  trunk layers whose outputs the head reads
    """

    block_size: int
    markov_rank: int
    noise_token_id: int
    target_layer_ids: tuple[int, ...]


def dspark_settings(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], n_stages: int, path: Path
) -> DSparkSettings:
    """The settings of a DSpark head: what the metadata says, checked against the shapes, or else the released values.

    metadata  GGUF key/values or a parsed config.json
    shapes    logical shapes by canonical name
    n_stages  stages there are
    path      the file, for messages
    Error:    Ds4Error naming the file and the key for a value that is no positive integer (or list of them), for two
              keys that contradict each other, and for one that contradicts the tensors; or naming a missing tensor.
    Source:   spec weights.md 1.1 and 3.4.
    """
    markov, fusion = f"mtp.{n_stages - 1}.markov_head.markov_w1.weight", "mtp.0.main_proj.weight"
    for name in (markov, fusion):
        if len(shapes.get(name, ())) != 2:
            problem = f"must be a matrix, not {list(shapes[name])}" if name in shapes else "is missing"
            raise Ds4Error(f"{path}: tensor {name} {problem}")
    rank, (hidden, columns) = shapes[markov][1], shapes[fusion]
    found = _found_settings(metadata, path)
    for setting, actual, what in (("stages", n_stages, "stages"), ("markov_rank", rank, "Markov columns")):
        key, given = found.get(setting, ("", actual))
        if given != actual:
            raise Ds4Error(f"{path}: {key} is {given}, but the file holds {actual} DSpark {what}")
    key, targets = found.get("target_layer_ids", ("the default of target_layer_ids", TARGET_LAYER_IDS))
    if len(targets) * hidden != columns:
        raise Ds4Error(f"{path}: {key} has {len(targets)} layers of {hidden}, but {fusion} has {columns} columns")
    block_size = found.get("block_size", ("", BLOCK_SIZE))[1]
    return DSparkSettings(block_size, rank, found.get("noise_token_id", ("", NOISE_TOKEN_ID))[1], targets)


def _found_settings(metadata: Mapping[str, Any], path: Path) -> dict[str, tuple[str, Any]]:
    """Setting -> (key, value) of every DSpark setting in the metadata, layers counted as the trunk counts them."""
    found: dict[str, tuple[str, Any]] = {}
    dflash = metadata.get("general.architecture") == "dflash" or any(key.startswith("dflash.") for key in metadata)
    for key, value in metadata.items():
        match = _KEY.fullmatch(key)
        setting = _SETTINGS.get(match[2]) if match else None
        if dflash and key == "tokenizer.ggml.mask_token_id":
            setting = "noise_token_id"
        if setting is None or value is None:
            continue
        if setting == "target_layer_ids":
            # llama.cpp taps the inputs of layers, so its numbers are one above those whose outputs are meant.
            first = 1 if match and match[1] == "dflash" else 0
            if not isinstance(value, list | tuple) or not value or any(type(v) is not int or v < first for v in value):
                raise Ds4Error(f"{path}: {key} must be a list of layer numbers, not {value!r:.60}")
            value = tuple(v - first for v in value)
        elif type(value) is not int or value < (0 if setting == "noise_token_id" else 1):
            raise Ds4Error(f"{path}: {key} must be a positive integer, not {value!r:.60}")
        if setting in found and found[setting][1] != value:
            raise Ds4Error(f"{path}: {key} and {found[setting][0]} contradict each other")
        found.setdefault(setting, (key, value))
    return found


def configured(config: ModelConfig, n_stages: int, settings: DSparkSettings | None, source: str) -> ModelConfig:
    """A trunk's configuration with a draft head of ``n_stages``: DSpark with these settings, or MTP.

    Error:   Ds4Error naming ``source`` if they do not fit the trunk: a noise token outside its vocabulary, a layer that
             it does not have.
    """
    changed = replace(
        config,
        n_mtp_layers=n_stages,
        dspark_block_size=settings.block_size if settings else None,
        dspark_markov_rank=settings.markov_rank if settings else None,
        dspark_noise_token_id=settings.noise_token_id if settings else None,
        dspark_target_layer_ids=settings.target_layer_ids if settings else (),
    )
    changed.validate(source)
    return changed


def of_trunk(config: ModelConfig, metadata: Mapping[str, Any], views: Mapping[str, View], path: Path) -> ModelConfig:
    """The configuration of a checkpoint with the settings of a DSpark head in its own files; unchanged without one.

    A part of a checkpoint need not hold the tensors that the settings are checked against; then it is unchanged too.
    Error:   Ds4Error as ``dspark_settings`` and ``configured``.
    """
    last = config.n_mtp_layers - 1
    needed = ("mtp.0.main_proj.weight", f"mtp.{last}.markov_head.markov_w1.weight")
    if any(name not in views for name in needed):
        return config
    shapes = {name: views[name].shape for name in needed}
    return configured(config, last + 1, dspark_settings(metadata, shapes, last + 1, path), str(path))
