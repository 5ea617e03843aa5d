"""Writing the tensors of a checkpoint one at a time to places that are known beforehand.

Both containers lay out a file from names, formats and shapes alone (gguf_write.py, safetensors_write.py); then each
tensor is encoded in tiles that go straight to their place.  So memory holds a few tiles, whatever the model's size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from ds4.config import ModelConfig
from ds4.errors import Ds4Error
from ds4.weights.checkpoint import Checkpoint
from ds4.weights.encode import Outcome, encode
from ds4.weights.formats import FORMATS
from ds4.weights.opening import open_checkpoint
from ds4.weights.tensor import PackedTensor, row_count

Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes in all)."""


@dataclass(frozen=True)
class Written:
    """What became of an item, and how many bytes it takes with its parts."""

    outcome: Outcome
    n_bytes: int


MULTIPLIER = "multiplier"  # the role, beside those of ``Format.parts``, of what multiplies a whole tensor


@dataclass(frozen=True)
class Item:
    """A canonical tensor to write.

    load             gives its stored form; called once, when its turn comes
    format, shape    of what is written; the blocks of the format divide the rows
    with_multiplier  as in ``encode``
    f32_scales       an fp8_block tensor whose scales are F32
    """

    name: str
    load: Callable[[], PackedTensor]
    format: str
    shape: tuple[int, ...]
    with_multiplier: bool = True
    f32_scales: bool = False

    @property
    def row_bytes(self) -> int:
        return FORMATS[self.format].row_bytes(self.shape[-1] if self.shape else 1)

    @property
    def data_bytes(self) -> int:
        """Bytes of the data, without parts."""
        return row_count(self.shape) * self.row_bytes


@dataclass(frozen=True)
class Place:
    """Where the rows of one role of an item go.

    tensor  name of the stored tensor
    start   byte of that tensor where the first row begins
    stride  bytes from one row to the next; 0 for rows that follow each other
    """

    tensor: str
    start: int = 0
    stride: int = 0


@dataclass(frozen=True)
class FileLayout:
    """One file to write.

    name     its name
    header   its first bytes
    offsets  where each stored tensor begins
    size     bytes in all
    """

    name: str
    header: bytes
    offsets: Mapping[str, int]
    size: int


@dataclass(frozen=True)
class Layout:
    """All files, and the places of every item by name and role."""

    files: tuple[FileLayout, ...]
    places: Mapping[str, Mapping[str, Place]]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def write_items(
    directory: Path,
    layout: Layout,
    items: Iterable[Item],
    *,
    progress: Progress | None = None,
    on_write: Callable[[int], None] | None = None,
) -> dict[str, Written]:
    """Write the files of a layout into an existing directory and flush them to the disk.

    on_write  called after each tile with the bytes written so far
    returns   what became of each item
    Error:    OSError as the system gives it; Ds4Error of ``encode``.
    """
    written = {}
    with ExitStack() as stack:
        writer = _Writer(directory, layout, progress, on_write, stack)
        for item in items:
            written[item.name] = writer.write_item(item)
        writer.finish()
    return written


def open_written(written: Path, config: ModelConfig, path: Path) -> Checkpoint:
    """Open what has just been written; Ds4Error, speaking of ``path``, unless it has the same configuration."""
    found = open_checkpoint(written)
    if found.config != config:
        different = [field for field in vars(config) if getattr(found.config, field) != getattr(config, field)]
        raise Ds4Error(f"{path}: would not hold the same {', '.join(different)}; nothing was written")
    return found


class _Writer:
    """The open files of a layout."""

    def __init__(
        self,
        directory: Path,
        layout: Layout,
        progress: Progress | None,
        on_write: Callable[[int], None] | None,
        stack: ExitStack,
    ) -> None:
        self.layout, self.progress, self.on_write = layout, progress, on_write
        self.done = 0
        self.files: list[int] = []
        self.where: dict[str, tuple[int, int]] = {}  # stored tensor -> (file, offset)
        for file in layout.files:
            descriptor = os.open(directory / file.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            stack.callback(os.close, descriptor)
            os.truncate(descriptor, file.size)  # padding reads as zeros
            self.files.append(descriptor)
            self._put(descriptor, 0, file.header)
            self.where |= {name: (descriptor, offset) for name, offset in file.offsets.items()}

    def write_item(self, item: Item) -> Written:
        places, before = self.layout.places[item.name], self.done

        def write(role: str, first: int, rows: Tensor) -> None:
            self.write(places[role], first, rows)

        outcome = encode(item.load(), item.format, write, with_multiplier=item.with_multiplier)
        if MULTIPLIER in places:
            self.write_bytes(places[MULTIPLIER], 0, np.array([outcome.multiplier], dtype="<f4").tobytes())
        elif outcome.multiplier != 1.0:
            raise ValueError(f"{item.name}: there is no place for its multiplier {outcome.multiplier}")
        return Written(outcome, self.done - before)

    def write(self, place: Place, first: int, rows: Tensor) -> None:
        """Rows uint8 [n, row_bytes], of which the first one has number ``first``."""
        width = rows.shape[1]
        raw = rows.contiguous().numpy().reshape(-1).data
        if place.stride in (0, width):
            self.write_bytes(place, first * width, raw)
            return
        for row in range(rows.shape[0]):
            self.write_bytes(place, (first + row) * place.stride, raw[row * width : (row + 1) * width])

    def write_bytes(self, place: Place, at: int, raw: bytes | memoryview) -> None:
        descriptor, offset = self.where[place.tensor]
        self._put(descriptor, offset + place.start + at, raw)
        if self.progress is not None:
            self.progress(self.done, self.layout.size)
        if self.on_write is not None:
            self.on_write(self.done)

    def _put(self, descriptor: int, offset: int, raw: bytes | memoryview) -> None:
        view = memoryview(raw)
        while view:
            n = os.pwrite(descriptor, view, offset)
            view, offset = view[n:], offset + n
            self.done += n

    def finish(self) -> None:
        """Wait until everything is on the disk, so that a file that appears is whole even after a power cut."""
        for descriptor in self.files:
            os.fsync(descriptor)
        if self.progress is not None:
            self.progress(self.layout.size, self.layout.size)
