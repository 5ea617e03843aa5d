"""Kernel entries, their arguments and their launches, as data: what every backend runs.

An :class:`Entry` is one ``extern "C" __global__`` function, an :class:`ArgPack` one typed set of its arguments, and a
:class:`KernelCall` one launch. The pack is laid out as cuLaunchKernel's ``kernelParams``, so the GPU backend and a CPU
emulation of the kernels share it. Nothing here touches a driver or a compiler.
"""

from __future__ import annotations

import ctypes
import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ds4.kernels.arch import ARCHITECTURES

KERNEL_ROOT = Path(__file__).resolve().parent
INCLUDE_DIR = KERNEL_ROOT / "include"

# Scalar types of kernel parameters -> their C storage.
SCALARS: dict[str, Any] = {
    "i32": ctypes.c_int32,
    "u32": ctypes.c_uint32,
    "i64": ctypes.c_int64,
    "u64": ctypes.c_uint64,
    "f32": ctypes.c_float,
}
# Pointer types -> the dtypes they may point to. torch computes little on unsigned types, so their signed twins pass.
POINTERS: dict[str, tuple[torch.dtype, ...]] = {
    "f32*": (torch.float32,),
    "bf16*": (torch.bfloat16,),
    "f16*": (torch.float16,),
    "u8*": (torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu),
    "i8*": (torch.int8,),
    "i32*": (torch.int32,),
    "u32*": (torch.uint32, torch.int32),
    "i64*": (torch.int64,),
    "u64*": (torch.uint64, torch.int64),
}
POINTER_ALIGNMENT = 16  # bytes; every kernel may read and write its tensors with 16-byte vectors
MAX_THREADS = 1024  # per block, on every architecture
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)

ConstantValue = int | float | str
Constants = tuple[tuple[str, ConstantValue], ...]
Dim3 = tuple[int, int, int]


def constant_set(**values: ConstantValue) -> Constants:
    """Template constants in their canonical order (by name), as KernelCall and the compiler take them."""
    return tuple(sorted(values.items()))


def macro_definitions(constants: Constants) -> list[str]:
    """``NAME=VALUE`` of each constant, the same for NVRTC and a host compiler's ``-D``.

    A float is written with all its digits and the suffix f, a bool is refused (write 0 or 1), a str stands as it is.
    Raises ValueError for a name that is no C identifier, a value that is not finite, or a str with blanks or quotes.
    """
    lines = []
    for name, value in constants:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError(f"constant {name!r} is not a C identifier")
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError(f"constant {name}: {value!r} is neither int, float nor str")
        if isinstance(value, float):
            if not math.isfinite(value):
                raise ValueError(f"constant {name}: {value} is not finite")
            text = f"{value!r}f"
        else:
            text = str(value)
        if not text or re.search(r"[\s\"'\\]", text):
            raise ValueError(f"constant {name}: {text!r} is empty or has blanks or quotes")
        lines.append(f"{name}={text}")
    return lines


@dataclass(frozen=True)
class Entry:
    """One ``extern "C" __global__`` function of a .cu file.

    ``file`` is relative to ds4/kernels (an absolute path is taken as it is). ``params`` are (name, type) in C order,
    types as in SCALARS and POINTERS. ``constants`` names the macros that the file needs defined, ``architectures``
    those the kernel exists for. :func:`ds4.kernels.signature.check_entry` compares all this with the source.
    Raises ValueError for an unknown type or architecture, or a name given twice.
    """

    name: str
    file: str
    params: tuple[tuple[str, str], ...]
    constants: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ARCHITECTURES

    def __post_init__(self) -> None:
        for param, kind in self.params:
            if kind not in SCALARS and kind not in POINTERS:
                raise ValueError(f"{self.name}: parameter {param} has unknown type {kind!r}")
        for what, names in (("parameter", [name for name, _ in self.params]), ("constant", list(self.constants))):
            if len(set(names)) < len(names):
                raise ValueError(f"{self.name}: a {what} is named twice in {', '.join(names)}")
        unknown = set(self.architectures) - set(ARCHITECTURES)
        if unknown or not self.architectures:
            raise ValueError(f"{self.name}: unknown architectures {sorted(unknown)}, or none at all")

    @property
    def path(self) -> Path:
        """The source file."""
        return KERNEL_ROOT / self.file


class ArgPack:
    """One entry's arguments, checked and laid out for ``kernelParams``; immutable, built once and launched often.

    ``values`` has one value for every parameter: a Tensor, or None for a null pointer, where the type is a pointer;
    an int or float where it is a scalar. Tensors must be contiguous, of the pointer's dtype, start on 16 bytes, and
    lie on one device. The pack keeps them alive; it does not keep them from being written or resized.
    Raises ValueError naming entry and parameter.
    """

    def __init__(self, entry: Entry, values: Mapping[str, Tensor | int | float | None]) -> None:
        names = [name for name, _ in entry.params]
        if set(values) != set(names):
            missing, extra = sorted(set(names) - set(values)), sorted(set(values) - set(names))
            raise ValueError(f"{entry.name}: arguments missing: {missing}, not parameters: {extra}")
        self.entry = entry
        self.tensors = tuple(value for value in values.values() if isinstance(value, Tensor))
        self.device: torch.device | None = self.tensors[0].device if self.tensors else None
        cells = []
        for name, kind in entry.params:
            try:
                cells.append(_pointer(values[name], kind) if kind in POINTERS else _scalar(values[name], kind))
            except ValueError as error:
                raise ValueError(f"{entry.name}: argument {name}: {error}") from None
        for name, _ in entry.params:
            value = values[name]
            if isinstance(value, Tensor) and value.device != self.device:
                raise ValueError(f"{entry.name}: argument {name} is on {value.device}, others on {self.device}")
        self._cells = cells  # the array below points into them
        self._params = (ctypes.c_void_p * max(1, len(cells)))(*[ctypes.addressof(cell) for cell in cells])

    @property
    def address(self) -> int:
        """Address of the ``void*[]`` with one pointer to each argument's storage; valid while the pack lives."""
        return ctypes.addressof(self._params)


def _pointer(value: Any, kind: str) -> ctypes.c_uint64:
    """Storage of a pointer argument."""
    if value is None:
        return ctypes.c_uint64(0)
    if not isinstance(value, Tensor):
        raise ValueError(f"a tensor or None is wanted for {kind}, got {type(value).__name__}")
    if value.dtype not in POINTERS[kind]:
        raise ValueError(f"dtype {value.dtype} does not fit {kind}")
    if not value.is_contiguous():
        raise ValueError(f"the tensor of shape {list(value.shape)} is not contiguous (strides {list(value.stride())})")
    if value.data_ptr() % POINTER_ALIGNMENT:
        raise ValueError(f"the tensor does not start on {POINTER_ALIGNMENT} bytes (address {value.data_ptr():#x})")
    return ctypes.c_uint64(value.data_ptr())


def _scalar(value: Any, kind: str) -> Any:
    """Storage of a scalar argument; numpy's scalars pass where Python's do."""
    storage = SCALARS[kind]
    if isinstance(value, bool | str | Tensor) or value is None:
        raise ValueError(f"a number is wanted for {kind}, got {type(value).__name__}")
    if kind == "f32":
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"a number is wanted for {kind}, got {type(value).__name__}") from None
        if math.isfinite(number) and math.isinf(storage(number).value):
            raise ValueError(f"{number} overflows {kind}")
        return storage(number)
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"an int is wanted for {kind}, got {type(value).__name__}") from None
    if storage(number).value != number:
        raise ValueError(f"{number} is out of range for {kind}")
    return storage(number)


@dataclass(frozen=True, eq=False)
class KernelCall:
    """One launch. ``grid`` counts blocks, also where blocks form clusters; ``shared_bytes`` is dynamic shared memory.

    ``constants`` are sorted by name (:func:`constant_set`) and are exactly the entry's. ``pdl`` allows the launch to
    begin before its predecessor on the stream has ended (programmatic dependent launch; the kernel waits by itself);
    architectures without it ignore it. Raises ValueError for sizes no device takes or constants the entry lacks.
    """

    entry: Entry
    constants: Constants
    grid: Dim3
    block: Dim3
    shared_bytes: int
    args: ArgPack
    cluster: Dim3 | None = None
    pdl: bool = False

    def __post_init__(self) -> None:
        name = self.entry.name
        if self.args.entry != self.entry:
            raise ValueError(f"{name}: the arguments are those of {self.args.entry.name}")
        if [key for key, _ in self.constants] != sorted(self.entry.constants):
            raise ValueError(f"{name}: constants {dict(self.constants)} are not {sorted(self.entry.constants)}, sorted")
        for what, size, limit in (("grid", self.grid, MAX_GRID), ("block", self.block, MAX_BLOCK)):
            if len(size) != 3 or not all(1 <= n <= most for n, most in zip(size, limit, strict=True)):
                raise ValueError(f"{name}: {what} {size} is not within (1, 1, 1) and {limit}")
        if math.prod(self.block) > MAX_THREADS:
            raise ValueError(f"{name}: block {self.block} has more than {MAX_THREADS} threads")
        if self.shared_bytes < 0:
            raise ValueError(f"{name}: shared_bytes is {self.shared_bytes}")
        if self.cluster is not None and (
            len(self.cluster) != 3
            or min(self.cluster) < 1
            or any(n % c for n, c in zip(self.grid, self.cluster, strict=True))
        ):
            raise ValueError(f"{name}: grid {self.grid} is not a multiple of cluster {self.cluster}")

    def describe(self) -> str:
        """Entry and configuration in one line, for error messages."""
        constants = " ".join(macro_definitions(self.constants))
        parts = [f"grid {self.grid}", f"block {self.block}", f"{self.shared_bytes} bytes of dynamic shared memory"]
        parts += [f"cluster {self.cluster}"] if self.cluster else []
        parts += [constants] if constants else []
        return f"{self.entry.name} ({', '.join(parts)})"


class Backend(Protocol):
    """Whatever runs launches in order: the GPU, or its emulation in the tests."""

    def run(self, calls: Sequence[KernelCall]) -> None:
        """Run (or enqueue, on a GPU) ``calls`` in order."""
        ...
