"""A strict reader of safetensors headers and of the index of a sharded checkpoint; data is mapped, never read.

Source:  spec weights.md 1, and the format description of the safetensors project.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ds4.errors import Ds4Error
from ds4.weights.companions import RAW
from ds4.weights.storage import MappedFile, StoredTensor, check_overlap

INDEX = "model.safetensors.index.json"

_FORMATS = {"F32": "f32", "F16": "f16", "BF16": "bf16", "I64": "i64", "I32": "i32"}
_FORMATS |= {dtype: raw for raw, dtype in RAW.items()}  # what they mean, their companions tell
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
_BYTES |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
_MAX_HEADER = 100_000_000  # the limit of the safetensors library


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
    """The tensors of one safetensors file, in file order, without the parts that ds4 ignores.

    Those of 8-bit elements have a format of ``companions.RAW`` until they are grouped.
    Error:   Ds4Error naming the file, and the tensor where it is about one: a header past the end or malformed, bytes
             that do not match dtype and shape, overlaps, a dtype that ds4 does not read.
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
    tensors = [_tensor(file, name, entry, 8 + length) for name, entry in header.items()]
    check_overlap(tensors)
    return [t for t in tensors if t.format]


def _tensor(file: MappedFile, name: str, entry: Any, start: int) -> StoredTensor:
    """One checked header entry; its format is "" where ds4 ignores the tensor."""

    def fail(problem: str) -> Ds4Error:
        return Ds4Error(f"{file.path}: tensor {name!r:.200} {problem}")

    if not isinstance(entry, dict):
        raise fail("has no description")
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BYTES:
        raise fail(f"has unknown dtype {dtype!r:.60}")
    if not isinstance(shape, list) or len(shape) > 8 or any(type(n) is not int or n < 0 for n in shape):
        raise fail(f"has a malformed shape {shape!r:.60}")
    if not isinstance(span, list) or len(span) != 2 or any(type(n) is not int for n in span):
        raise fail("has malformed data_offsets")
    begin, end = span
    if not 0 <= begin <= end:
        raise fail(f"has impossible data_offsets {span}")
    if end - begin != math.prod(shape) * _BYTES[dtype]:
        raise fail(f"has {end - begin} bytes, but {dtype} {shape} needs {math.prod(shape) * _BYTES[dtype]}")
    if start + end > file.size:
        raise fail(f"ends at byte {start + end} of a file of {file.size}; the file is truncated or damaged")
    ignored = is_ignored(name)
    if not ignored and dtype not in _FORMATS:
        raise fail(f"has dtype {dtype}, which ds4 cannot read; it reads {' '.join(_FORMATS)}")
    if not ignored and not math.prod(shape):
        raise fail(f"is empty: {shape}")
    return StoredTensor(name, "" if ignored else _FORMATS[dtype], tuple(shape), file, start + begin, end - begin)


def is_ignored(name: str) -> bool:
    """Whether a text model does without this tensor: parts of the multimodal releases (spec weights.md 1.1)."""
    return name.startswith(("vision.", "aligner.", "image_")) or name.endswith(".gate.bias_vl")


def find_shards(path: Path) -> tuple[Path, list[Path], dict[str, str] | None]:
    """The files of a safetensors checkpoint.

    path     a directory, a single ``.safetensors`` file, one shard of several, or the index file
    returns  the checkpoint's directory; its safetensors files; and tensor name -> file name where there is an index
    Error:   Ds4Error for a malformed index or a missing shard, naming it.
    """
    directory = path if path.is_dir() else path.parent
    index = directory / INDEX
    if index.is_file() and (path.is_dir() or path == index or path.name in _weight_map(index).values()):
        weight_map = _weight_map(index)
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
    contents = read_json(index)
    weight_map = contents.get("weight_map") if isinstance(contents, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise Ds4Error(f"{index}: has no weight_map")
    for name, shard in weight_map.items():
        # A shard is a plain file name: an index must not reach outside its directory.
        if not isinstance(shard, str) or not shard.isprintable() or shard in ("", ".", "..") or set(shard) & set("/\\"):
            raise Ds4Error(f"{index}: weight_map sends {name!r:.100} to {shard!r:.100}, which is not a file name")
    return weight_map
