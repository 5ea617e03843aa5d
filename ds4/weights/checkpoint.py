"""Checkpoint: named, lazy, packed tensors, whatever files they lie in.

Source:  spec weights.md 1, 3 and 5.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ds4.config import ModelConfig
from ds4.errors import Ds4Error
from ds4.weights.formats import FORMATS
from ds4.weights.formats.plain import elements
from ds4.weights.storage import StoredTensor
from ds4.weights.tensor import PackedTensor, row_count


@dataclass(frozen=True, eq=False)
class View:
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
    """An open checkpoint; made by ``ds4.weights.open_checkpoint``.

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
        views: dict[str, View],
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


def draft_stages(found: set[str]) -> int:
    """Draft blocks in the checkpoint: consecutive stages from ``mtp.0`` (spec model.md 1.1: count, do not believe)."""
    stages = {int(m[1]) for name in found if (m := re.fullmatch(r"mtp\.([0-9]{1,4})\.attn_norm\.weight", name))}
    return next(n for n in range(len(stages) + 1) if n not in stages)
