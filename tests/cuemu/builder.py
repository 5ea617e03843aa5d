"""Compiles kernel files into shared libraries for the CPU, and keeps them.

A library is kept under a hash of everything that went into it, in ``.pytest_cache`` of the clone. Any number of
processes may ask for it at the same time: one compiles, and renames the finished file. What has not been used for a
week goes.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import itertools
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from ds4.errors import Ds4Error
from ds4.kernels.compiler import cuda_headers
from ds4.kernels.entry import Constants, macro_definitions

from .errors import CompileError
from .source import rewrite

Mode = Literal["plain", "asan", "tsan"]
MODES: tuple[Mode, ...] = get_args(Mode)

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent.parent / ".pytest_cache" / "d" / "cuemu"
_KEEP_S = 7 * 24 * 3600

_COMMON = ("-std=c++17", "-gdwarf-4", "-fPIC", "-fno-strict-aliasing", "-fno-omit-frame-pointer", "-pthread")
_SANITIZE: dict[Mode, tuple[str, ...]] = {
    "plain": (),
    "asan": ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=undefined"),
    "tsan": ("-fsanitize=thread",),
}
# No contraction: a * b + c rounds twice here, where NVRTC makes one fma of it unless the source says __fmul_rn.
# Hidden symbols: libraries of one source with different constants, loaded side by side, must not share static data.
_KERNEL_FLAGS = (
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-fno-optimize-sibling-calls",  # a kernel that ends with a barrier stays on the stack, for traces
    "-Wno-unknown-pragmas",
    "-Wno-attributes",
    "-include",
    "cuemu.h",
)
_LINK = ("-ldl", "-lrt")


def toolchain_missing() -> str | None:
    """What this machine lacks to compile kernels for the CPU, with the remedy in one line; None if nothing."""
    if _compiler() is None:
        return "no C++ compiler: install g++"
    try:
        cuda_headers()
    except Ds4Error as error:
        return str(error)
    return None


@functools.cache
def _compiler() -> str | None:
    return shutil.which("g++")


@functools.cache
def _compiler_version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class _Job:
    """One run of the compiler. An argument ``{name}`` stands for the file of that name among ``files``, which are
    written for it; ``depends`` are the texts of all other files that it reads, but for the toolkit's."""

    arguments: tuple[str, ...]
    suffix: str
    depends: tuple[str, ...]
    files: dict[str, str] = field(default_factory=dict)

    def key(self, compiler: str) -> str:
        """Hash of everything that decides about the result."""
        texts = (
            compiler,
            _compiler_version(compiler),
            *self.arguments,
            *self.depends,
            *itertools.chain(*self.files.items()),
        )
        digest = hashlib.sha256()
        for text in texts:
            digest.update(text.encode() + b"\0")
        return digest.hexdigest()[:32]


def kernel_library(path: Path, constants: Constants, mode: Mode) -> Path:
    """The shared library of the .cu file ``path`` with ``constants`` defined; built unless it is there.

    Raises SourceError or CompileError, with the position in the .cu file.
    """
    known = _known.get((path, constants, mode))
    if known and all(_stamp(source) == stamp for source, stamp in known[1].items()) and known[0].exists():
        return known[0]
    library, sources = _build_kernels(path, constants, mode)
    _known[path, constants, mode] = library, sources
    return library


# Libraries that this process has asked for, with the state of the sources they were made of.
_known: dict[tuple[Path, Constants, Mode], tuple[Path, dict[Path, tuple[int, int] | None]]] = {}


def _stamp(source: Path) -> tuple[int, int] | None:
    """What changes when a file is written; None for a file that is gone."""
    try:
        stat = source.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


def _build_kernels(path: Path, constants: Constants, mode: Mode) -> tuple[Path, dict[Path, tuple[int, int] | None]]:
    """The library, and the sources with their stamps."""
    rewritten = rewrite(path)
    stamps = {source: _stamp(source) for source in rewritten.sources}
    main = next(iter(rewritten.files))
    defines = [f"-D{definition}" for definition in macro_definitions(constants)]
    optimise = "-O2" if mode == "plain" else "-O1"
    flags = (*_COMMON, *_KERNEL_FLAGS, *_include_flags(), *_SANITIZE[mode], optimise, "-shared", *defines)
    arguments = (*flags, "-x", "c++", f"{{{main}}}", "-x", "none", str(scheduler()), *_LINK)
    return _build(_Job(arguments, ".so", _own_sources(), rewritten.files)), stamps


def runner(mode: Mode) -> Path:
    """The program that runs launches under the sanitizer of ``mode``, in a process of its own."""
    arguments = (*_COMMON, *_include_flags(), *_SANITIZE[mode], "-O1", str(HERE / "runner.cpp"), *_LINK)
    return _build(_Job(arguments, "", _own_sources()))


def scheduler() -> Path:
    """The scheduler's object file, the same for every mode: it is compiled without sanitizers."""
    # The compiler must not make a loop a memset: the sanitizers would watch it.
    flags = ("-fvisibility=hidden", "-fno-tree-loop-distribute-patterns", "-O2")
    arguments = (*_COMMON, *_include_flags(), *flags, "-c", str(HERE / "scheduler.cpp"))
    return _build(_Job(arguments, ".o", _own_sources()))


@functools.cache
def _own_sources() -> tuple[str, ...]:
    """The texts of the emulation's C++ files."""
    files = [*HERE.glob("*.h"), *HERE.glob("*.cpp"), *(HERE / "include").rglob("*")]
    return tuple(file.read_text() for file in sorted(files) if file.is_file())


def _include_flags() -> tuple[str, ...]:
    return (f"-I{HERE / 'include'}", f"-I{cuda_headers()}")


def _build(job: _Job) -> Path:
    compiler = _compiler()
    if compiler is None:
        raise CompileError(str(toolchain_missing()), "")
    CACHE.mkdir(parents=True, exist_ok=True)
    result = CACHE / (job.key(compiler) + job.suffix)
    if result.exists():
        result.touch()
        return result
    _forget_old()
    with result.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who comes second finds the result
        if not result.exists():
            _compile(job, compiler, result)
    return result


def _compile(job: _Job, compiler: str, result: Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="build-") as folder:
        for name, text in job.files.items():
            file = Path(folder, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        arguments = [re.sub(r"^\{(.*)\}$", lambda m: str(Path(folder, m[1])), a) for a in job.arguments]
        output = Path(folder, "output")
        _run([compiler, *arguments, "-o", str(output)])
        output.replace(result)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [
            line for line in done.stderr.splitlines() if re.search(r": (?:fatal )?error: |undefined reference", line)
        ]
        raise CompileError((errors or done.stderr.splitlines() or ["the compiler failed"])[0], done.stderr)


def _forget_old() -> None:
    for file in CACHE.glob("*"):
        try:
            if file.is_file() and time.time() - file.stat().st_mtime > _KEEP_S:
                file.unlink()
        except OSError:  # another process was faster
            continue
