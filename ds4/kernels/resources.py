"""What every shipped kernel takes of a multiprocessor: the committed table, and how it is made.

``resources.json`` has one row for each variant of the registered operations and architecture, from ``ptxas -v``. It
changes with a kernel, so that a review sees registers and spills move; scripts/kernel_resources.py writes it anew. With
the rows stand digests of the sources that they were made from: the tests compare these, and compile for each kernel and
architecture one variant, as compiling all of them takes a quarter of an hour.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ds4.errors import Ds4Error
from ds4.kernels.compiler import nvrtc_version
from ds4.kernels.cubin_cache import CubinCache, source_digest
from ds4.kernels.entry import KERNEL_ROOT, Constants, Entry, macro_definitions
from ds4.kernels.registry import Operation

TABLE = KERNEL_ROOT / "resources.json"
_IDENTITY = ("file", "entry", "constants", "architecture")


def shipped(operations: Sequence[Operation]) -> list[tuple[Entry, Constants, str]]:
    """Every (entry, constants, architecture) that the operations' variants name, each once, sorted."""
    found = {
        (entry.file, entry.name, constants, architecture): (entry, constants, architecture)
        for operation in operations
        for entry, constants in operation.variants
        for architecture in entry.architectures
    }
    return [found[key] for key in sorted(found)]


def row(entry: Entry, constants: Constants, architecture: str, cubins: CubinCache) -> dict[str, Any]:
    """One row of the table, compiling where the cache has nothing. Raises as the compiler does."""
    cubin = cubins.get(entry, constants, architecture)
    if entry.name not in cubin.resources:
        raise Ds4Error(f"{entry.file}: ptxas lists no kernel {entry.name} for {architecture}")
    about = {
        "file": entry.file,
        "entry": entry.name,
        "constants": " ".join(macro_definitions(constants)),
        "architecture": architecture,
    }
    return about | asdict(cubin.resources[entry.name])


def identity(row: dict[str, Any]) -> tuple[str, ...]:
    """What a row is about: file, entry, constants, architecture."""
    return tuple(row[field] for field in _IDENTITY)


def build_table(operations: Sequence[Operation], cubins: CubinCache) -> Iterator[dict[str, Any]]:
    """The rows of all shipped kernels, one after another: compiling them takes a while."""
    for entry, constants, architecture in shipped(operations):
        yield row(entry, constants, architecture, cubins)


def samples(operations: Sequence[Operation]) -> list[tuple[Entry, Constants, str]]:
    """Of what is shipped, for each operation and kernel its last variant: as a rule, the one with the most tokens."""
    found = {}
    for operation in operations:
        for entry in operation.entries:
            constants = [constants for one, constants in operation.variants if one == entry][-1]
            for architecture in entry.architectures:
                found[entry.file, entry.name, constants, architecture] = (entry, constants, architecture)
    return [found[key] for key in sorted(found)]


def sources(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Digests of the kernel files of the rows and of their headers: what the rows are right for."""
    return {file: source_digest(KERNEL_ROOT / file) for file in sorted({row["file"] for row in rows})}


def dump_table(rows: Sequence[dict[str, Any]]) -> str:
    """The table as JSON with a row a line, so that a difference shows which kernel changed."""
    lines = ",\n".join(f"    {json.dumps(one)}" for one in rows)
    head = f'  "nvrtc": {json.dumps(nvrtc_version())},\n  "sources": {json.dumps(sources(rows), indent=4)},\n'
    return f'{{\n{head}  "rows": [\n{lines}\n  ]\n}}\n'


def load_table(path: Path = TABLE) -> tuple[str, dict[str, str], list[dict[str, Any]]]:
    """NVRTC's version, digests of the kernel files and the rows of the committed table.

    Raises Ds4Error where the file is missing or broken.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return table["nvrtc"], table["sources"], table["rows"]
    except (OSError, ValueError, KeyError) as error:
        raise Ds4Error(f"{path}: no table of resources ({error}); run scripts/kernel_resources.py") from None


def spills(rows: Sequence[dict[str, Any]], operations: Sequence[Operation]) -> list[str]:
    """One line for each row that spills registers and belongs to an operation of the decode step."""
    decode = {
        (entry.file, entry.name, " ".join(macro_definitions(constants)))
        for operation in operations
        if operation.decode
        for entry, constants in operation.variants
    }
    return [
        f"{' '.join(identity(one))}: {one['spill_store_bytes']} bytes stored, {one['spill_load_bytes']} loaded"
        for one in rows
        if identity(one)[:3] in decode and (one["spill_store_bytes"] or one["spill_load_bytes"])
    ]
