"""open_checkpoint: a GGUF file or a safetensors checkpoint as named, lazy, packed tensors.

Opening costs time proportional to the headers; no weight is read until somebody touches its data.
Source:  spec weights.md 1, 3 and 5.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ds4.config import ModelConfig
from ds4.errors import Ds4Error
from ds4.weights import companions, gguf, names, safetensors
from ds4.weights.formats import FORMATS
from ds4.weights.formats.plain import elements
from ds4.weights.storage import MappedFile, StoredTensor
from ds4.weights.tensor import PackedTensor, row_count


@dataclass(frozen=True, eq=False)
class _View:
    """How a canonical tensor is cut from a stored one.

    shape   logical shape of the canonical tensor
    expert  which part of an expert stack, or None
    half    0 or 1 for the left or right half of the columns, or None
    scale   the stored ``<base>.scale``, one multiplier an expert (or a single one), or None
    parts   the stored block scales, where they are tensors of their own
    """

    stored: StoredTensor
    shape: tuple[int, ...]
    expert: int | None = None
    half: int | None = None
    scale: StoredTensor | None = None
    parts: Mapping[str, StoredTensor] = field(default_factory=dict)


class Checkpoint:
    """An open checkpoint; made by ``open_checkpoint``.

    path       what was opened
    container  "gguf" or "safetensors"
    config     the validated ModelConfig
    metadata   GGUF key/values, or the parsed config.json
    """

    def __init__(
        self,
        path: Path,
        container: str,
        config: ModelConfig,
        metadata: dict[str, Any],
        stored: list[StoredTensor],
        views: dict[str, _View],
        tokenizer_files: Path | None,
    ) -> None:
        self.path, self.container, self.config, self.metadata = path, container, config, metadata
        self.tokenizer_files = tokenizer_files
        self._stored, self._views = stored, views

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {self.container}, {len(self._views)} tensors, {self.total_bytes} bytes)"

    def names(self) -> list[str]:
        """Canonical names of all tensors, routed experts one by one."""
        return list(self._views)

    def __contains__(self, name: object) -> bool:
        return name in self._views

    def __len__(self) -> int:
        return len(self._views)

    def tensor(self, name: str) -> PackedTensor:
        """The tensor with this canonical name; a view, its bytes are not read.  Ds4Error if there is none."""
        view = self._views.get(name)
        if view is None:
            raise Ds4Error(f"{self.path}: tensor {name} is missing")
        stored = view.stored
        n_rows = row_count(view.shape)
        data = stored.data
        if view.expert is not None:
            size = stored.nbytes // stored.shape[0]
            data = data[view.expert * size : (view.expert + 1) * size]
        data = data.view(n_rows, -1)
        if view.half is not None:
            width = data.shape[1] // 2
            data = data[:, width * view.half : width * (view.half + 1)]
        scale = 1.0
        if view.scale is not None:
            values = PackedTensor(view.scale.name, "f32", view.scale.shape, view.scale.data.view(1, -1)).dequantize()
            scale = float(values.flatten()[0 if values.numel() == 1 else view.expert or 0])
            if not math.isfinite(scale):
                raise Ds4Error(f"{self.path}: tensor {view.scale.name!r:.200} is not a finite number: {scale}")
        parts = {role: _scales(part) for role, part in view.parts.items()}
        return PackedTensor(name, stored.format, view.shape, data, scale, parts)

    def expect(self, name: str, shape: tuple[int, ...]) -> PackedTensor:
        """``tensor(name)``, after checking that it has this logical shape; Ds4Error names both shapes otherwise."""
        tensor = self.tensor(name)
        if tensor.shape != tuple(shape):
            raise Ds4Error(f"{self.path}: tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}")
        return tensor

    def stored_as(self, name: str) -> tuple[str, tuple[int, ...], int]:
        """(format, logical shape, packed bytes) of a canonical tensor, without touching its data."""
        view = self._views.get(name)
        if view is None:
            raise Ds4Error(f"{self.path}: tensor {name} is missing")
        fmt = view.stored.format
        n_bytes = FORMATS[fmt].row_bytes(view.shape[-1] if view.shape else 1)
        return fmt, view.shape, row_count(view.shape) * n_bytes + sum(part.nbytes for part in view.parts.values())

    def n_experts(self, prefix: str) -> int:
        """Routed experts of ``layers.N`` or ``mtp.S``: the rows of its router, which pruned models may shrink."""
        return self.tensor(f"{prefix}.ffn.gate.weight").shape[0]

    def tensors(self) -> Iterator[StoredTensor]:
        """The stored tensors in file order, with the file's own names; expert stacks are one tensor."""
        return iter(self._stored)

    @property
    def total_bytes(self) -> int:
        """Bytes of all stored tensors, without headers and padding."""
        return sum(t.nbytes for t in self._stored)


def _scales(part: StoredTensor) -> torch.Tensor:
    """Block scales as PackedTensor holds them: f32, or uint8 for the 8-bit floats."""
    data = part.data.view(part.shape[0], -1)
    return elements(data, torch.float32) if part.nbytes == 4 * math.prod(part.shape) else data


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a GGUF file, a safetensors file or shard, or a directory that holds either.

    Error:   Ds4Error, one line, for everything that can be wrong with the files.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise Ds4Error(f"{path}: no such file or directory")
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if ggufs and not any(path.glob("*.safetensors")) and not (path / safetensors.INDEX).exists():
            if len(ggufs) > 1:
                raise Ds4Error(f"{path}: holds {len(ggufs)} GGUF files; name one of them")
            return _open_gguf(ggufs[0])
        return _open_safetensors(path)
    if path.name == safetensors.INDEX:
        return _open_safetensors(path)
    if not path.is_file():
        raise Ds4Error(f"{path}: is neither a file nor a directory")
    with_magic = MappedFile(path).map[:4] == gguf.MAGIC
    if with_magic or path.suffix == ".gguf":
        return _open_gguf(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    raise Ds4Error(f"{path}: is neither a GGUF nor a .safetensors file")


def _open_safetensors(path: Path) -> Checkpoint:
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
    views = {n: _View(g.weight, g.weight.shape, scale=g.multiplier, parts=g.parts) for n, g in groups.items()}
    metadata = safetensors.read_json(config_file)
    config = ModelConfig.from_json(metadata, source=str(config_file), n_mtp_layers=_draft_stages(set(stored)))
    return Checkpoint(path, "safetensors", config, metadata, tensors, views, directory)


_HC_HEAD = ("hc_head_fn", "hc_head_scale", "hc_head_base")


def _open_gguf(path: Path) -> Checkpoint:
    metadata, stored = gguf.read_gguf(MappedFile(path))
    if metadata.get("split.count", 1) not in (0, 1):
        raise Ds4Error(
            f"{path}: is one part of {metadata['split.count']}; join the parts with llama-gguf-split --merge"
        )
    by_name = {tensor.name: tensor for tensor in stored}
    # llama.cpp counts draft blocks in block_count and marks them by their nextn tensors; the key may be a leftover.
    nextn = sorted({b[1] for n in by_name if (b := names.split_block(n)) and b[0] == "blk" and b[2] == names.EH_PROJ})
    n_layers = metadata.get("deepseek4.block_count", 0)
    if nextn and (type(n_layers) is not int or nextn != list(range(n_layers - len(nextn), n_layers))):
        raise Ds4Error(f"{path}: draft blocks {nextn} are not the last of deepseek4.block_count = {n_layers!r:.40}")
    views: dict[str, _View] = {}
    for tensor in stored:
        for name, view in _gguf_views(tensor, by_name, nextn):
            if name in views:
                raise Ds4Error(f"{path}: both {views[name].stored.name!r} and {tensor.name!r:.200} hold tensor {name}")
            views[name] = view
    if nextn:  # this form has one stream collapse, which trunk and draft block share
        views |= {f"mtp.0.{part}": views[part] for part in _HC_HEAD if part in views and f"mtp.0.{part}" not in views}
    config = ModelConfig.from_gguf(
        metadata, source=str(path), n_mtp_layers=_draft_stages(set(views)), n_nextn_blocks=len(nextn)
    )
    return Checkpoint(path, "gguf", config, metadata, stored, views, None)


def _gguf_views(
    tensor: StoredTensor, by_name: dict[str, StoredTensor], nextn: list[int]
) -> Iterator[tuple[str, _View]]:
    """Canonical names of one GGUF tensor, with how each is cut from it; nothing for a tensor that ds4 does not know."""
    scale = by_name.get(tensor.name.removesuffix(".weight") + ".scale") if tensor.format == "nvfp4" else None
    if scale is not None and scale.format != "f32":
        raise Ds4Error(f"{tensor.file.path}: tensor {scale.name!r:.200} must be f32, not {scale.format}")
    if tensor.name in names.GLOBAL:
        yield names.GLOBAL[tensor.name], _View(tensor, tensor.shape, scale=scale)
        return
    block = names.split_block(tensor.name)
    if block is None:
        return
    kind, number, suffix = block
    draft = kind == "mtp" or number in nextn
    prefix = f"mtp.{nextn.index(number) if kind == 'blk' else number}." if draft else f"layers.{number}."
    n_scales = row_count((*scale.shape, 1)) if scale is not None else 1
    if suffix in names.EXPERTS:
        if len(tensor.shape) != 3:
            raise Ds4Error(
                f"{tensor.file.path}: tensor {tensor.name!r:.200} must have 3 dimensions, not {list(tensor.shape)}"
            )
        if n_scales not in (1, tensor.shape[0]):
            raise Ds4Error(
                f"{tensor.file.path}: {tensor.name!r:.200} has {tensor.shape[0]} experts but {n_scales} scales"
            )
        for expert in range(tensor.shape[0]):
            name = f"{prefix}ffn.experts.{expert}.{names.EXPERTS[suffix]}.weight"
            yield name, _View(tensor, tensor.shape[1:], expert=expert, scale=scale)
        return
    if n_scales != 1:
        raise Ds4Error(f"{tensor.file.path}: {tensor.name!r:.200} has {n_scales} scales, expected 1")
    if suffix == names.EH_PROJ and kind == "blk":
        *lead, n_cols = tensor.shape
        if len(tensor.shape) != 2 or n_cols % (2 * FORMATS[tensor.format].block):
            raise Ds4Error(
                f"{tensor.file.path}: {tensor.name!r:.200} {list(tensor.shape)} cannot be split into two halves"
            )
        for half, name in enumerate(("e_proj", "h_proj")):
            yield f"{prefix}{name}.weight", _View(tensor, (*lead, n_cols // 2), half=half, scale=scale)
        return
    table = names.BLOCK | names.MTP if kind == "mtp" else names.BLOCK
    canonical = table.get(suffix)
    if canonical is None and draft and kind == "blk":
        canonical = names.NEXTN.get(suffix.removeprefix("nextn.")) if suffix.startswith("nextn.") else None
    if canonical is None:
        return
    shape = tensor.shape
    if canonical == "attn.wo_a.weight" and len(shape) == 3:  # groups as a dimension of their own
        shape = (shape[0] * shape[1], shape[2])
    yield prefix + canonical, _View(tensor, shape, scale=scale)


def _draft_stages(found: set[str]) -> int:
    """Draft blocks in the checkpoint: consecutive stages from ``mtp.0`` (spec model.md 1.1: count, do not believe)."""
    stages = {int(m[1]) for name in found if (m := re.fullmatch(r"mtp\.([0-9]{1,4})\.attn_norm\.weight", name))}
    return next(n for n in range(len(stages) + 1) if n not in stages)
