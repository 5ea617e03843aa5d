"""Compiled kernels on disk, so that a source is compiled once a machine and not once a process.

A file's name is the SHA-256 of everything that its contents depend on, so nothing is ever out of date: a change makes
another name. Files appear by renaming, so that any number of processes may share the folder without locks; two that
miss at the same time both compile. A file that is cut short or altered fails its checksum and is compiled anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ds4.kernels.compiler import Cubin, Resources, compile_source, toolchain
from ds4.kernels.entry import INCLUDE_DIR, Constants, Entry, macro_definitions
from ds4.kernels.signature import project_includes, read_source

MAX_BYTES = 512 << 20  # of all cubins; a complete set for one architecture takes a few MB
_MAGIC = b"ds4 cubin 1\n"  # with the number of the format, which encode and decode define
_SUFFIX = ".cubin"
_STALE_S = 3600  # a temporary file older than this was left by a process that died

Compiler = Callable[[Path, Constants, str], Cubin]


def default_directory() -> Path:
    """``$XDG_CACHE_HOME/ds4/kernels`` where that variable holds an absolute path, else ``~/.cache/ds4/kernels``."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "ds4" / "kernels"


def cubin_key(path: Path, constants: Constants, architecture: str) -> str:
    """SHA-256 (hex) over the source, the project's headers it includes, constants, architecture and toolchain."""
    return _digest([repr(_MAGIC), toolchain(), architecture, *macro_definitions(constants), *_sources(path)])


def source_digest(path: Path) -> str:
    """SHA-256 (hex) over the source and the project's headers it includes."""
    return _digest(_sources(path))


def _sources(path: Path) -> list[str]:
    parts = [path.name, read_source(path)]
    for header in project_includes(path):
        # Without the checkout's own place, so that two of them share their cubins.
        shared = header.is_relative_to(INCLUDE_DIR)
        parts += ["include" if shared else "beside", os.path.relpath(header, INCLUDE_DIR if shared else path.parent)]
        parts.append(read_source(header))
    return parts


def _digest(parts: list[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


class CubinCache:
    """Cubins by source, constants and architecture, kept in ``directory`` (the default one if left out).

    The folder is made when the first cubin is stored and kept under ``max_bytes`` by dropping what was not used for
    longest. Where it cannot be written, everything is compiled each time, with one warning.
    """

    def __init__(
        self, directory: Path | None = None, max_bytes: int = MAX_BYTES, compiler: Compiler = compile_source
    ) -> None:
        self.directory = directory or default_directory()
        self.max_bytes = max_bytes
        self._compile = compiler
        self._warned = False

    def get(self, entry: Entry, constants: Constants, architecture: str) -> Cubin:
        """The cubin of the entry's file. Raises what :func:`ds4.kernels.compiler.compile_source` raises."""
        key = cubin_key(entry.path, constants, architecture)
        file = self.directory / f"{key}{_SUFFIX}"
        found = self._read(file, key)
        if found is None:
            found = self._compile(entry.path, constants, architecture)
            self._store(file, encode(found, key))
        return found

    def _read(self, file: Path, key: str) -> Cubin | None:
        """The stored cubin, or None where there is none that passes its checksum."""
        try:
            found = decode(file.read_bytes(), key)
        except OSError:
            return None
        if found is not None:
            with contextlib.suppress(OSError):
                os.utime(file)  # marks the use: the oldest go first
        return found

    def _store(self, file: Path, data: bytes) -> None:
        """Write under a temporary name and rename; a full or read-only disk is not an error."""
        temporary = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.directory, prefix=".tmp-")
            temporary = Path(name)
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
            temporary.replace(file)
            self._shrink(keep=file)
        except OSError as error:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
            if not self._warned:
                self._warned = True
                warnings.warn(f"compiled kernels cannot be kept in {self.directory}: {error}", stacklevel=3)

    def _shrink(self, keep: Path) -> None:
        """Drop the cubins unused for longest until the rest fits, and what dead processes left behind."""
        used: list[tuple[float, int, Path]] = []
        for file in self.directory.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                status = file.stat()
                if file.suffix == _SUFFIX:
                    used.append((status.st_mtime, status.st_size, file))
                elif file.name.startswith(".tmp-") and time.time() - status.st_mtime > _STALE_S:
                    file.unlink()
        total = sum(size for _, size, _ in used)
        for _, size, file in sorted(used):
            if total <= self.max_bytes:
                break
            if file != keep:
                file.unlink(missing_ok=True)
                total -= size


def encode(cubin: Cubin, key: str) -> bytes:
    """Magic, SHA-256 of all that follows (hex), one line of JSON, machine code."""
    about = {
        "key": key,
        "resources": {name: asdict(resources) for name, resources in cubin.resources.items()},
        "warnings": list(cubin.warnings),
    }
    body = json.dumps(about).encode() + b"\n" + cubin.data
    return _MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def decode(data: bytes, key: str) -> Cubin | None:
    """The cubin in ``data``, or None where magic, checksum or key are not as they should be."""
    start = len(_MAGIC) + 65
    body = data[start:]
    if data[:start] != _MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n":
        return None
    about, code = body.split(b"\n", 1)
    fields = json.loads(about)
    if fields["key"] != key:
        return None
    resources = {name: Resources(**values) for name, values in fields["resources"].items()}
    return Cubin(code, resources, tuple(fields["warnings"]))
