"""Kernel sources -> cubins, with NVRTC. Works without a GPU or a driver.

Cubins and not PTX: they need no compilation in the driver, and the driver's age does not matter within a CUDA major
version. The bytes are taken out of cuda.core's ObjectCode at once; without a driver its other methods can wait forever.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ds4.errors import Ds4Error
from ds4.kernels.arch import ARCHITECTURES
from ds4.kernels.entry import INCLUDE_DIR, Constants, macro_definitions
from ds4.kernels.signature import read_source

_INSTALL = "pip install 'ds4[gpu]'"
# Everything that decides about the code but source, constants and architecture. No fast-math: division, square root and
# denormals are IEEE's. Multiply-adds are contracted, NVRTC's default.
OPTIONS: dict[str, Any] = {"std": "c++17", "lineinfo": True, "ptxas_options": ["-v"]}
# The toolkit headers that kernels may include, and what those include of the same kind.
_TOOLKIT_HEADERS = ("cuda_fp16.*", "cuda_bf16.*", "cuda_fp8.*", "cuda_fp6.*", "cuda_fp4.*", "math_constants.h")

_ERROR = re.compile(r"(?P<file>[^\n(]+)\((?P<line>\d+)\): (?:catastrophic )?error[^:\n]*: (?P<text>[^\n]+)")
_PTXAS_ERROR = re.compile(r"ptxas (?P<where>[^\n;:]*;)? *(?:error|fatal) *: (?P<text>[^\n]+)")
_WARNING = re.compile(r"^[^\n]*\bwarning\b[^\n]*: [^\n]+", re.MULTILINE)
_FUNCTION = re.compile(
    r"Function properties for (?P<name>\w+)\n[^\n]*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r"[^\n]*?Used (?P<registers>\d+) registers(?P<more>[^\n]*)"
)


class CompileError(Ds4Error):
    """A kernel does not compile. The message is one line; ``log`` is all that the compiler said."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class Resources:
    """What ptxas says a kernel uses: registers a thread; the rest in bytes, stack and spills a thread too."""

    registers: int
    static_shared_bytes: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


@dataclass(frozen=True)
class Cubin:
    """Machine code of one source file for one architecture, and the resources of each of its kernels by name."""

    data: bytes
    resources: dict[str, Resources]
    warnings: tuple[str, ...] = ()


def compile_source(path: Path, constants: Constants, architecture: str) -> Cubin:
    """Compile the .cu file at ``path`` with ``constants`` defined, for one of ARCHITECTURES.

    "..." and <...> includes are looked up beside the file, in ds4/kernels/include and in the CUDA toolkit's headers.
    Raises CompileError; Ds4Error where NVRTC, headers or source are missing; ValueError for other architectures.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture} is not one of {', '.join(ARCHITECTURES)}")
    macros = [tuple(definition.split("=", 1)) for definition in macro_definitions(constants)]
    source, include_path = read_source(path), [str(path.parent), str(INCLUDE_DIR), str(cuda_headers())]
    nvrtc_version()  # that NVRTC is there, with an error that says so
    from cuda.core import Program, ProgramOptions

    log = io.StringIO()
    # An absolute name lets errors, debuggers and profilers find the source.
    options = ProgramOptions(
        name=str(path), arch=architecture, include_path=include_path, define_macro=macros or None, **OPTIONS
    )
    program = Program(source, "c++", options)
    try:
        data = bytes(program.compile("cubin", logs=log).code)
    except Exception as error:  # cuda.core raises several kinds, which it does not export
        text = f"{error}\n{log.getvalue()}"
        raise CompileError(f"{_first_error(path, architecture, text)}{_with(macros)}", text) from None
    finally:
        program.close()
    return Cubin(data, parse_resources(log.getvalue()), tuple(_WARNING.findall(log.getvalue())))


def _with(macros: list[Any]) -> str:
    """The constants, for the end of a message."""
    return f" [{' '.join('='.join(macro) for macro in macros)}]" if macros else ""


def _first_error(path: Path, architecture: str, log: str) -> str:
    """One line from a compiler's log: file:line, architecture, first error."""
    if match := _ERROR.search(log):
        return f"{match['file'].strip()}:{match['line']}: {architecture}: {match['text'].strip()}"
    if match := _PTXAS_ERROR.search(log):
        return f"{path}: {architecture}: ptxas: {match['text'].strip()}"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f"{path}: {architecture}: {' '.join(lines[:2]) or 'no log'}"


def parse_resources(log: str) -> dict[str, Resources]:
    """Kernel name -> resources, from the log of ``ptxas -v``. Device functions that were not inlined are not listed."""
    found = {}
    for match in _FUNCTION.finditer(log):
        shared = re.search(r"(\d+) bytes smem", match["more"])
        found[match["name"]] = Resources(
            registers=int(match["registers"]),
            static_shared_bytes=int(shared[1]) if shared else 0,
            stack_bytes=int(match["stack"]),
            spill_store_bytes=int(match["stores"]),
            spill_load_bytes=int(match["loads"]),
        )
    return found


@cache
def nvrtc_version() -> str:
    """Version of NVRTC, "13.0". Raises Ds4Error where it is missing or does not answer."""
    try:
        from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Ds4Error(f"NVRTC, which compiles the kernels, cannot be loaded ({reason}); {_INSTALL}") from None
    if int(status):
        raise Ds4Error(f"NVRTC does not answer (error {int(status)}); {_INSTALL}")
    return f"{major}.{minor}"


@cache
def cuda_headers() -> Path:
    """Folder of the CUDA toolkit's headers. Raises Ds4Error where there is none.

    The first with cuda_bf16.h of: the pip or conda package, CUDA_PATH or CUDA_HOME, the toolkit of the nvcc on PATH,
    /usr/local/cuda.
    """
    for folder in _header_folders():
        if (folder / "cuda_bf16.h").is_file():
            return folder.resolve()
    raise Ds4Error(f"the CUDA headers (cuda_bf16.h) are not found; {_INSTALL}, or set CUDA_HOME to a toolkit")


def _header_folders() -> Iterator[Path]:
    """Where the headers may be, in order."""
    from cuda import pathfinder

    with contextlib.suppress(RuntimeError):  # an older pathfinder that does not know these headers
        found = pathfinder.find_nvidia_header_directory("cudart")
        if found:
            yield Path(found)
    nvcc = shutil.which("nvcc")
    if nvcc:
        yield Path(nvcc).resolve().parent.parent / "include"
    yield Path("/usr/local/cuda/include")


@cache
def toolchain() -> str:
    """Identifies what compiles: NVRTC's version and size (builds of a version differ), the headers' text, OPTIONS."""
    from cuda import pathfinder

    version = nvrtc_version()
    library = Path(pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path or "")
    digest = hashlib.sha256()
    for pattern in _TOOLKIT_HEADERS:
        for header in sorted(cuda_headers().glob(pattern)):
            digest.update(f"{header.name}\0".encode() + header.read_bytes())
    size = library.stat().st_size if library.is_file() else 0
    return f"nvrtc {version} {size} headers {digest.hexdigest()} options {OPTIONS}"
