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
from ds4.weights.formats import FORMATS, INTEGER_FORMATS
from ds4.weights.formats.ggml_other import UNDECODABLE
from ds4.weights.formats.plain import elements
from ds4.weights.names import stack_of
from ds4.weights.reap import Reap, expert_counts, summary
from ds4.weights.storage import StoredTensor
from ds4.weights.tensor import PackedTensor, row_count

_VECTOR_FORMATS = frozenset({"f32", "f16", "bf16"})


@dataclass(frozen=True, eq=False, slots=True)
class View:
    """How a canonical tensor is cut from a stored one.

    shape   logical shape of the canonical tensor
    expert  which part of an expert stack, or None
    half    0 or 1 for the left or right half of the columns, or None
    scale   the stored multipliers, one an expert (or a single one), or None
    parts   the stored block scales, where they are tensors of their own
    stack   a whole stack of experts [n_experts, out, in] under a name with ``*`` for the number (``names.stack_of``);
            the experts in it are tensors by themselves, which nothing lists one by one
    kept    which slots of the first dimension count, where others belong to pruned experts; shape has only these
    divides  whether ``scale`` divides instead: the global scales of compressed-tensors do
    """

    stored: StoredTensor
    shape: tuple[int, ...]
    expert: int | None = None
    half: int | None = None
    scale: StoredTensor | None = None
    parts: Mapping[str, StoredTensor] = field(default_factory=dict)
    stack: bool = False
    kept: tuple[int, ...] | None = None
    divides: bool = False

    def tensors(self) -> Iterator[StoredTensor]:
        """The stored tensors that it takes."""
        yield from (self.stored, *((self.scale,) if self.scale else ()), *self.parts.values())


class Checkpoint:
    """An open checkpoint; made by ``ds4.weights.open_checkpoint``.

    path        what was opened
    container   "gguf" or "safetensors"
    config      the validated ModelConfig
    metadata    GGUF key/values, or the parsed config.json
    draft_path  where the draft head comes from, None if it is the checkpoint's own or there is none
    reap        how it was pruned, None if it was not
    warnings    what its user should know, one line each; none for most
    Error:      Ds4Error for views that contradict each other or have a format their name rules out.
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
        draft_path: Path | None = None,
    ) -> None:
        self.path, self.container, self.config, self.metadata = path, container, config, metadata
        self.tokenizer_files, self.draft_path = tokenizer_files, draft_path
        self._stored, self._views = stored, views
        self.warnings: tuple[str, ...] = ()
        _check_formats(views, str(path))
        self.reap: Reap | None = summary(metadata, config, expert_counts(views, config, str(path)), str(path))

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {self.container}, {len(self)} tensors, {self.total_bytes} bytes)"

    def with_draft(
        self, path: Path, config: ModelConfig, stored: list[StoredTensor], views: Mapping[str, View]
    ) -> Checkpoint:
        """This checkpoint with the draft head of another file, in place of its own if it has one.

        path           that file
        config         with the head's settings in it
        stored, views  its tensors, and the ``mtp.*`` weights cut from them
        """
        trunk = {name: view for name, view in self._views.items() if not name.startswith("mtp.")}
        drop = {id(t) for name, view in self._views.items() if name not in trunk for t in view.tensors()}
        drop -= {id(t) for view in trunk.values() for t in view.tensors()}
        tensors = [t for t in self._stored if id(t) not in drop] + stored
        return Checkpoint(
            self.path, self.container, config, self.metadata, tensors, trunk | dict(views), self.tokenizer_files, path
        )

    def names(self) -> list[str]:
        """Canonical names of all tensors, routed experts one by one."""
        out = []
        for name, view in self._views.items():
            if view.stack:
                before, _, after = name.partition("*")
                out += [f"{before}{expert}{after}" for expert in range(view.shape[0])]
            else:
                out.append(name)
        return out

    def _find(self, name: str) -> View | None:
        """How to cut the tensor with this canonical name; None if there is none."""
        view = self._views.get(name)
        if view is not None:
            return None if view.stack else view
        stack_name = stack_of(name) or ""
        stack = self._views.get(stack_name)
        if stack is None or not stack.stack:
            return None
        expert = int(name.split(".")[-3])
        if expert >= stack.shape[0] or name != stack_name.replace("*", str(expert)):  # "experts.007" is no name
            return None
        slot = expert if stack.kept is None else stack.kept[expert]
        return View(stack.stored, stack.shape[1:], expert=slot, scale=stack.scale)

    def _view(self, name: str) -> View:
        view = self._find(name)
        if view is None:
            raise Ds4Error(f"{self.path}: tensor {name} is missing")
        return view

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) is not None

    def __len__(self) -> int:
        return sum(view.shape[0] if view.stack else 1 for view in self._views.values())

    def tensor(self, name: str) -> PackedTensor:
        """The tensor with this canonical name; a view, its bytes are not read (but those of a router whose pruned
        slots are left out are copied).

        Error:   Ds4Error if there is none, or if ds4 cannot decode its type.
        """
        view = self._view(name)
        stored = view.stored
        if stored.format in UNDECODABLE:
            raise Ds4Error(
                f"{self.path}: tensor {stored.name!r:.200} has type {stored.format}, which ds4 cannot decode"
            )
        n_rows = row_count(view.shape)
        data = stored.data
        if view.expert is not None:
            size = stored.nbytes // stored.shape[0]
            data = data[view.expert * size : (view.expert + 1) * size]
        if view.kept is not None:
            data = data.view(stored.shape[0], -1)[list(view.kept)]
        data = data.view(n_rows, -1)
        if view.half is not None:
            width = data.shape[1] // 2
            data = data[:, width * view.half : width * (view.half + 1)]
        parts = {role: _scales(part) for role, part in view.parts.items()}
        return PackedTensor(name, stored.format, view.shape, data, self._multiplier(view), parts)

    def _multiplier(self, view: View) -> float:
        """What all values of the tensor are multiplied by."""
        if view.scale is None:
            return 1.0
        values = PackedTensor(view.scale.name, "f32", view.scale.shape, view.scale.data.view(1, -1)).dequantize()
        scale = float(values.flatten()[0 if values.numel() == 1 else view.expert or 0])
        if not math.isfinite(scale):
            raise Ds4Error(f"{self.path}: tensor {view.scale.name!r:.200} is not a finite number: {scale}")
        if view.divides and not scale:
            raise Ds4Error(f"{self.path}: tensor {view.scale.name!r:.200} is 0, and its weight is divided by it")
        return 1 / scale if view.divides else scale

    def expect(self, name: str, shape: tuple[int, ...]) -> PackedTensor:
        """``tensor(name)``, after checking that it has this logical shape; Ds4Error names both shapes otherwise."""
        tensor = self.tensor(name)
        if tensor.shape != tuple(shape):
            raise Ds4Error(f"{self.path}: tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}")
        return tensor

    def stored_as(self, name: str) -> tuple[str, tuple[int, ...], int]:
        """(format, logical shape, packed bytes) of a canonical tensor, without touching its data."""
        view = self._view(name)
        return view.stored.format, view.shape, _packed_bytes(view)

    def stored_groups(self) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
        """(name, format, logical shape, packed bytes) of all tensors, a stack of experts being one: its name has ``*``
        for their number and its shape their count.  Far fewer than ``names`` for a GGUF."""
        for name, view in self._views.items():
            yield name, view.stored.format, view.shape, _packed_bytes(view)

    def n_experts(self, prefix: str) -> int:
        """Routed experts of ``layers.N`` or ``mtp.S``: the rows of its router, which pruned models shrink."""
        return self._view(f"{prefix}.ffn.gate.weight").shape[0]

    def tensors(self) -> Iterator[StoredTensor]:
        """The stored tensors in file order, with the file's own names; expert stacks are one tensor."""
        return iter(self._stored)

    def unused(self) -> list[str]:
        """The file's names of stored tensors that ds4 makes no use of, but for those that belong to a weight."""
        used = {id(tensor) for view in self._views.values() for tensor in view.tensors()}
        return [tensor.name for tensor in self._stored if id(tensor) not in used and "." not in tensor.format]

    @property
    def total_bytes(self) -> int:
        """Bytes of all stored tensors, without headers and padding."""
        return sum(t.nbytes for t in self._stored)


def _check_formats(views: Mapping[str, View], source: str) -> None:
    """Raise Ds4Error for a tensor whose format its name rules out: tables are integers, vectors plain floats."""
    for name, view in views.items():
        fmt = view.stored.format
        if name.endswith(".ffn.gate.tid2eid"):
            wrong, wanted = fmt not in INTEGER_FORMATS, "i32 or i64, a table of expert numbers"
        elif len(view.shape) < 2:
            wrong, wanted = fmt not in _VECTOR_FORMATS, "f32, f16 or bf16"
        else:
            wrong, wanted = fmt in INTEGER_FORMATS, "a float or quantised format"
        if wrong:
            raise Ds4Error(f"{source}: tensor {view.stored.name!r:.200} is {fmt}, but has to be {wanted}")


def _packed_bytes(view: View) -> int:
    row = FORMATS[view.stored.format].row_bytes(view.shape[-1] if view.shape else 1)
    return row_count(view.shape) * row + sum(part.nbytes for part in view.parts.values())


def _scales(part: StoredTensor) -> torch.Tensor:
    """Block scales as PackedTensor holds them: uint8 for the 8-bit floats, or f32, into which bf16 is converted."""
    data = part.data.view(part.shape[0], -1)
    dtype = {4: torch.float32, 2: torch.bfloat16}.get(part.nbytes // math.prod(part.shape))
    return data if dtype is None else elements(data, dtype).float()


def draft_stages(found: set[str]) -> int:
    """Draft blocks in the checkpoint: consecutive stages from ``mtp.0`` (spec model.md 1.1: count, do not believe)."""
    stages = {int(m[1]) for name in found if (m := re.fullmatch(r"mtp\.([0-9]{1,4})\.attn_norm\.weight", name))}
    return next(n for n in range(len(stages) + 1) if n not in stages)
