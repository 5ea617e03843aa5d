"""A strict reader of GGUF headers: key/values and the tensor list; tensor data is mapped, never read.

Nothing in the file is believed before it is checked against the file's size, so a truncated or damaged file ends in a
Ds4Error and cannot cause a large allocation.
Source:  spec weights.md 3, and the GGUF specification of the ggml project.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np

from ds4.errors import Ds4Error
from ds4.weights.formats import BY_GGML_TYPE, FORMATS, Format
from ds4.weights.names import SLEEPY
from ds4.weights.storage import MappedFile, StoredTensor, check_overlap

MAGIC = b"GGUF"

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_MAX_NAME = 4096
_MAX_STRING = 1 << 24
# Strings, numbers, keys and tensors in a header, all together; a real one has half a million, its vocabulary.  Without
# a bound, a large file of zeros would become a list of as many Python objects.
_MAX_ITEMS = 1 << 22


def read_gguf(file: MappedFile) -> tuple[dict[str, Any], list[StoredTensor]]:
    """Parse the header of a GGUF file, version 3.

    returns  key -> int, float, bool, str or list of them; and the tensors in file order, shapes row-major
    Error:   Ds4Error naming the file for anything out of order: bad magic or version, a length past the end, a
             duplicate name, an unknown type, a tensor misaligned, overlapping another or outside the file.
    """
    try:
        return _Header(file).parse()
    except (struct.error, IndexError):
        raise Ds4Error(f"{file.path}: the GGUF header ends too early; the file is truncated or damaged") from None
    except UnicodeDecodeError:
        raise Ds4Error(f"{file.path}: a string in the GGUF header is not UTF-8; the file is damaged") from None


class _Header:
    """A cursor over the header."""

    def __init__(self, file: MappedFile) -> None:
        self.file, self.map, self.pos = file, file.map, 0
        self.items = 0
        self.metadata: dict[str, Any] = {}

    def fail(self, problem: str) -> Ds4Error:
        return Ds4Error(f"{self.file.path}: {problem}")

    def take(self, layout: str) -> Any:
        value = struct.unpack_from("<" + layout, self.map, self.pos)[0]
        self.pos += struct.calcsize("<" + layout)
        return value

    def room(self, count: int, size: int, what: str) -> None:
        """Raise unless ``count`` items of at least ``size`` bytes can still follow."""
        if count * size > self.file.size - self.pos:
            raise self.fail(f"{what} runs past the end of the file; it is truncated or damaged")
        self.items += count
        if self.items > _MAX_ITEMS:
            raise self.fail(f"{what} makes the header longer than {_MAX_ITEMS} values; the file is damaged")

    def string(self, what: str) -> str:
        length = self.take("Q")
        self.room(1, length, what)
        if length > _MAX_STRING:
            raise self.fail(f"{what} of {length} bytes is not believable; the file is damaged")
        self.pos += length
        return self.map[self.pos - length : self.pos].decode()

    def strings(self, count: int, key: str) -> list[str]:
        """``count`` strings; a loop kept small, since a vocabulary and its merges are 260,000 of them."""
        self.room(count, 8, f"the array {key!r:.200}")
        unpack, data, pos, size = struct.Struct("<Q").unpack_from, self.map, self.pos, self.file.size
        out = []
        for _ in range(count):
            end = pos + 8 + unpack(data, pos)[0]
            if end > size:
                raise self.fail(f"a string of {key!r:.200} runs past the end of the file; it is truncated or damaged")
            out.append(data[pos + 8 : end].decode())
            pos = end
        self.pos = pos
        return out

    def numbers(self, kind: int, count: int, key: str) -> list[Any]:
        dtype = np.dtype(_SCALARS[kind])
        self.room(count, dtype.itemsize, f"the value of {key!r:.200}")
        values = np.frombuffer(self.map, dtype, count, self.pos).tolist() if count else []
        self.pos += count * dtype.itemsize
        return [bool(v) for v in values] if kind == _BOOL else values

    def value(self, key: str) -> Any:
        kind = self.take("I")
        if kind == _STRING:
            return self.string(f"the value of {key!r:.200}")
        if kind == _ARRAY:
            kind, count = self.take("I"), self.take("Q")
            if kind == _STRING:
                return self.strings(count, key)
            if kind in _SCALARS:
                return self.numbers(kind, count, key)
            raise self.fail(f"key {key!r:.200} is an array of unknown type {kind}")
        if kind in _SCALARS:
            return self.numbers(kind, 1, key)[0]
        raise self.fail(f"key {key!r:.200} has unknown type {kind}")

    def parse(self) -> tuple[dict[str, Any], list[StoredTensor]]:
        if self.map[:4] != MAGIC:
            raise self.fail("is not a GGUF file (it does not start with 'GGUF')")
        self.pos = 4
        version = self.take("I")
        if version != 3:
            hint = "; it is big-endian" if version == 3 << 24 else ""
            raise self.fail(f"GGUF version {version} is not supported, only 3{hint}")
        n_tensors, n_keys = self.take("Q"), self.take("Q")
        self.room(n_keys, 13, f"a list of {n_keys} keys")
        self.room(n_tensors, 24, f"a list of {n_tensors} tensors")
        metadata = self.metadata
        for _ in range(n_keys):
            key = self.string("a key")
            if key in metadata:
                raise self.fail(f"key {key!r:.200} occurs twice")
            metadata[key] = self.value(key)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self.fail(f"general.alignment must be a power of two, not {alignment!r:.60}")
        entries = [self.entry() for _ in range(n_tensors)]
        start = -(-self.pos // alignment) * alignment
        tensors = [self.place(*entry, start, alignment) for entry in entries]
        names = set()
        for tensor in tensors:
            if tensor.name in names:
                raise self.fail(f"tensor {tensor.name!r:.200} occurs twice")
            names.add(tensor.name)
        check_overlap(tensors)
        return metadata, tensors

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """One line of the tensor list: name, dimensions in row-major order, type id, offset."""
        name = self.string("a tensor name")
        if not 0 < len(name) <= _MAX_NAME:
            raise self.fail(f"a tensor name of {len(name)} characters is not believable; the file is damaged")
        n_dims = self.take("I")
        if n_dims > 4:
            raise self.fail(f"tensor {name!r:.200} has {n_dims} dimensions, at most 4 are possible")
        self.room(n_dims, 8, f"tensor {name!r:.200}")
        shape = tuple(self.take("Q") for _ in range(n_dims))[::-1]
        return name, shape, self.take("I"), self.take("Q")

    def format(self, name: str, type_id: int) -> Format:
        """The format of a tensor: its type's, but for the sleepy dialect, whose tensors borrow a type's number."""
        fmt = BY_GGML_TYPE.get(type_id)
        if fmt is None:
            raise self.fail(f"tensor {name!r:.200} has type number {type_id}, which ds4 does not know")
        if name.endswith(SLEEPY):
            if fmt.name != "nvfp4":
                raise self.fail(f"tensor {name!r:.200} must have type number 40, not {type_id} ({fmt.name})")
            return FORMATS["nvfp4_sleepy"]
        return fmt

    def place(
        self, name: str, shape: tuple[int, ...], type_id: int, offset: int, start: int, alignment: int
    ) -> StoredTensor:
        """Check one tensor against the file and its format."""
        fmt = self.format(name, type_id)
        if 0 in shape:
            policy = self.metadata.get("reap.layer.policy")
            disabled = isinstance(policy, list) and 3 in policy
            why = "; layers without experts (reap.layer.policy 3) are not supported" if disabled else ""
            raise self.fail(f"tensor {name!r:.200} has an empty dimension: {list(shape)}{why}")
        n_cols = shape[-1] if shape else 1
        if n_cols % fmt.block:
            raise self.fail(
                f"tensor {name!r:.200}: rows of {n_cols} are not a multiple of the {fmt.name} block {fmt.block}"
            )
        nbytes = math.prod(shape[:-1]) * fmt.row_bytes(n_cols)
        if offset % alignment:
            raise self.fail(
                f"tensor {name!r:.200} lies at offset {offset}, not a multiple of the alignment {alignment}"
            )
        if start + offset + nbytes > self.file.size:
            raise self.fail(
                f"tensor {name!r:.200} needs bytes {start + offset}..{start + offset + nbytes} of a file of "
                f"{self.file.size}; the file is truncated or damaged"
            )
        return StoredTensor(name, fmt.name, shape, self.file, start + offset, nbytes)
