"""What a conversion did, as data: the contents of ``ds4 convert``'s summary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ds4.weights.checkpoint import Checkpoint
from ds4.weights.recipes import Container, group_of
from ds4.weights.writing import Item, Written


@dataclass
class Line:
    """What became of the tensors of one group and one stored format.

    group             "experts", "dense", "LM head" or "other" (recipes.py)
    source, target    formats
    tensors           how many; experts one by one
    source_bytes, target_bytes
    inexact           tensors whose values changed -> norm of the difference over norm of the values
    """

    group: str
    source: str
    target: str
    tensors: int = 0
    source_bytes: int = 0
    target_bytes: int = 0
    inexact: dict[str, float] = field(default_factory=dict)

    @property
    def max_relative_error(self) -> float:
        return max(self.inexact.values(), default=0.0)


@dataclass(frozen=True)
class Report:
    """A finished conversion.

    path, container  what was written
    source_bytes     of the tensors that were read
    file_bytes       of what was written
    lines            what became of the tensors
    left_out         stored tensors that ds4 does not know, or that the container has no name for
    notes            what a user should know besides, as sentences
    """

    path: Path
    container: Container
    source_bytes: int
    file_bytes: int
    lines: tuple[Line, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        lines = [{**asdict(line), "max_relative_error": line.max_relative_error} for line in self.lines]
        return {**asdict(self), "path": str(self.path), "lines": lines}


def summarise(ckpt: Checkpoint, items: Mapping[str, Item], written: Mapping[str, Written]) -> tuple[Line, ...]:
    """A line for every group, stored format and target format; experts first, and then by size."""
    lines: dict[tuple[str, str, str], Line] = {}
    for item in items.values():
        source, _, n_bytes = ckpt.stored_as(item.name)
        key = (group_of(item.name), source, item.format)
        line = lines.setdefault(key, Line(*key))
        line.tensors += 1
        line.source_bytes += n_bytes
        line.target_bytes += written[item.name].n_bytes
        if not written[item.name].outcome.exact:
            line.inexact[item.name] = written[item.name].outcome.error
    order = ("experts", "dense", "LM head", "other")
    return tuple(sorted(lines.values(), key=lambda line: (order.index(line.group), -line.source_bytes)))
