"""A strict reader of safetensors headers and of the index of a sharded checkpoint; data is mapped, never read.

Source:  spec weights.md 1, and the format description of the safetensors project.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ds4.errors import Ds4Error
from ds4.weights.storage import MappedFile, StoredTensor, check_overlap

INDEX = "model.safetensors.index.json"

# dtype -> what ds4 calls such elements, and their bytes.  What 8-bit elements mean, their companions tell; the last two
# lines ds4 cannot decode, which is no fault in a tensor that the model does not need.
_DTYPES = {"F32": ("f32", 4), "F16": ("f16", 2), "BF16": ("bf16", 2), "I64": ("i64", 8), "I32": ("i32", 4)}
_DTYPES |= {"F8_E4M3": ("e4m3", 1), "F8_E8M0": ("e8m0", 1), "I8": ("i8", 1), "U8": ("u8", 1)}
_DTYPES |= {"F64": ("f64", 8), "U64": ("u64", 8), "U32": ("u32", 4), "I16": ("i16", 2), "U16": ("u16", 2)}
_DTYPES |= {"F8_E5M2": ("f8_e5m2", 1), "BOOL": ("bool", 1)}
_MAX_HEADER = 100_000_000  # the limit of the safetensors library
_INTEGER = {int}
_Kind = tuple[str, tuple[int, ...], int]  # format, shape, bytes


def read_json(path: Path) -> Any:
    """The parsed contents of a small JSON file; Ds4Error if it is missing, unreadable or malformed."""
    try:
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise Ds4Error(f"{path}: cannot be read: {error.strerror or error}") from None


def parse_json(data: bytes, source: str) -> Any:
    """JSON without duplicate keys; anything malformed is a Ds4Error naming ``source``."""
    try:
        return json.loads(data.decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise Ds4Error(f"{source}: is not valid JSON: {str(error).splitlines()[0][:120]}") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key occurs twice")
    return out


def read_safetensors(file: MappedFile) -> list[StoredTensor]:
    """The tensors of one safetensors file, in the order of its header, with the file's own names.

    The format is the dtype in lower case, but for e4m3 and e8m0.
    Error:   Ds4Error naming the file, and the tensor where it is about one: a header past the end or malformed, bytes
             that do not match dtype and shape, overlaps.
    """
    fail = f"{file.path}: "
    if file.size < 8:
        raise Ds4Error(fail + "is too short for a safetensors file")
    length = int.from_bytes(file.map[:8], "little")
    if length > min(file.size - 8, _MAX_HEADER):
        raise Ds4Error(fail + f"the header of {length} bytes does not fit; the file is truncated or not safetensors")
    header = parse_json(file.map[8 : 8 + length], f"{file.path}: header")
    if not isinstance(header, dict):
        raise Ds4Error(fail + "the header is not a JSON object")
    header.pop("__metadata__", None)
    kinds: dict[tuple[Any, ...], _Kind] = {}
    tensors = [_tensor(file, name, entry, 8 + length, kinds) for name, entry in header.items()]
    check_overlap(tensors)
    return tensors


def _tensor(file: MappedFile, name: str, entry: Any, start: int, kinds: dict[tuple[Any, ...], _Kind]) -> StoredTensor:
    """One checked header entry.  The thousands of experts of a file are of a few ``kinds`` and share their parts."""

    def fail(problem: str) -> Ds4Error:
        return Ds4Error(f"{file.path}: tensor {name!r:.200} {problem}")

    if not isinstance(entry, dict):
        raise fail("has no description")
    dtype, dims, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise fail(f"has unknown dtype {dtype!r:.60}")
    if not isinstance(dims, list) or len(dims) > 8 or not set(map(type, dims)) <= _INTEGER or min(dims, default=0) < 0:
        raise fail(f"has a malformed shape {dims!r:.60}")
    if not isinstance(span, list) or len(span) != 2 or set(map(type, span)) != _INTEGER:
        raise fail("has malformed data_offsets")
    begin, end = span
    if not 0 <= begin <= end:
        raise fail(f"has impossible data_offsets {span}")
    key = (dtype, *dims)
    if key not in kinds:
        fmt, size = _DTYPES[dtype]
        kinds[key] = fmt, tuple(dims), math.prod(dims) * size
    fmt, shape, n_bytes = kinds[key]
    if end - begin != n_bytes:
        raise fail(f"has {end - begin} bytes, but {dtype} {dims} needs {n_bytes}")
    if start + end > file.size:
        raise fail(f"ends at byte {start + end} of a file of {file.size}; the file is truncated or damaged")
    return StoredTensor(name, fmt, shape, file, start + begin, n_bytes)


def find_shards(path: Path) -> tuple[Path, list[Path], dict[str, str] | None]:
    """The files of a safetensors checkpoint.

    path     a directory, a single ``.safetensors`` file, one shard of several, or the index file
    returns  the checkpoint's directory; its safetensors files; and tensor name -> file name where there is an index
    Error:   Ds4Error for a malformed index or a missing shard, naming it.
    """
    directory = path if path.is_dir() else path.parent
    index = directory / INDEX
    weight_map = _weight_map(index) if index.is_file() else None
    if weight_map and (path.is_dir() or path == index or path.name in weight_map.values()):
        shards = [directory / name for name in sorted(set(weight_map.values()))]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise Ds4Error(f"{directory}: shard {missing[0]}{more} of {len(shards)} is missing; download it again")
        return directory, shards, weight_map
    if not path.is_dir():
        return directory, [path], None
    files = sorted(directory.glob("*.safetensors"))
    preferred = directory / "model.safetensors"
    if preferred in files:
        return directory, [preferred], None
    if len(files) == 1:
        return directory, files, None
    if files:
        raise Ds4Error(
            f"{directory}: has {len(files)} safetensors files but no {INDEX}; name one file, or add the index"
        )
    raise Ds4Error(f"{directory}: holds no checkpoint (neither *.safetensors nor one *.gguf)")


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, one string object a file; ``metadata`` is not read, it is often stale."""
    contents = read_json(index)
    weight_map = contents.get("weight_map") if isinstance(contents, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise Ds4Error(f"{index}: has no weight_map")
    files: dict[str, str] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or (shard not in files and not _is_file_name(shard)):
            raise Ds4Error(f"{index}: weight_map sends {name!r:.100} to {shard!r:.100}, which is not a file name")
        weight_map[name] = files.setdefault(shard, shard)
    return weight_map


def _is_file_name(shard: str) -> bool:
    """Whether it stays in its directory: an index must not reach outside."""
    return shard.isprintable() and shard not in ("", ".", "..") and not set(shard) & set("/\\")
