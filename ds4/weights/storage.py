"""Memory-mapped files and the tensors that lie in them, before any name is translated."""

from __future__ import annotations

import itertools
import mmap
import os
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch

from ds4.errors import Ds4Error


class MappedFile:
    """A read-only memory map of a whole file; pages are read when touched, and stay mapped while a tensor uses them.

    path    the file
    fd      a descriptor of the same file, for reading without touching the map; closed with the object
    map     the map, for parsing headers (slices are bytes)
    bytes   uint8 [size], the same memory as a tensor; writing to it would crash the process
    Error:  Ds4Error for a file that cannot be opened or is empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size == 0:
                    raise Ds4Error(f"{path}: the file is empty")
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self.fd = os.dup(file.fileno())
        except (OSError, ValueError) as error:
            raise Ds4Error(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch warns that the memory is not writable: it is not
            self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)
        weakref.finalize(self, os.close, self.fd)

    def read_into(self, buffer: torch.Tensor, offset: int) -> None:
        """Fill uint8 ``buffer`` (contiguous, in CPU memory) with the bytes from ``offset`` on.

        No page of the map is touched, and what goes wrong is an error where the map would end the process.
        Error:  Ds4Error if the file cannot be read or has become shorter.
        """
        view, done = memoryview(buffer.numpy().data), 0
        while done < len(view):
            try:
                n = os.preadv(self.fd, [view[done:]], offset + done)
            except OSError as error:
                raise Ds4Error(f"{self.path}: cannot be read: {error.strerror or error}") from None
            if n == 0:
                raise Ds4Error(f"{self.path}: has no byte {offset + done}; it was longer when it was opened")
            done += n


@dataclass(frozen=True, eq=False, slots=True)
class StoredTensor:
    """A tensor exactly as its file lists it.

    name    the file's own name for it
    format  a key of ``FORMATS``; for the scales of another tensor, its format, a dot and what they are
    shape   logical and row-major, whatever order the file uses
    file, offset, nbytes  where its bytes are; checked to lie inside the file
    """

    name: str
    format: str
    shape: tuple[int, ...]
    file: MappedFile
    offset: int
    nbytes: int

    @property
    def data(self) -> torch.Tensor:
        """uint8 [nbytes], a view of the file."""
        return self.file.bytes[self.offset : self.offset + self.nbytes]


def check_overlap(tensors: list[StoredTensor]) -> None:
    """Raise Ds4Error if two tensors of one file share bytes."""
    ordered = sorted((t for t in tensors if t.nbytes), key=lambda t: t.offset)
    for before, after in itertools.pairwise(ordered):
        if before.offset + before.nbytes > after.offset:
            raise Ds4Error(
                f"{after.file.path}: tensors {before.name!r:.200} and {after.name!r:.200} overlap; the file is damaged"
            )
