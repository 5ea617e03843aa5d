"""Launches of kernels that have no Entry of their own: fixtures, and kernels one is just writing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ds4.kernels.entry import ArgPack, ConstantValue, Dim3, Entry, KernelCall, constant_set
from ds4.kernels.signature import kernel_signatures, parse_parameters, read_source

FIXTURES = Path(__file__).resolve().parent / "fixtures"


def kernel_call(
    path: Path,
    name: str,
    grid: Dim3,
    block: Dim3,
    *args: Tensor | int | float | None,
    shared_bytes: int = 0,
    cluster: Dim3 | None = None,
    pdl: bool = False,
    constants: Mapping[str, ConstantValue] | None = None,
) -> KernelCall:
    """A launch of kernel ``name`` of the .cu file ``path`` with its arguments in C order, types read from the source.

    Raises ValueError where the file has no such kernel or the arguments do not fit it.
    """
    params = parse_parameters(kernel_signatures(read_source(path))[name])
    entry = Entry(name, str(path.resolve()), params, tuple(constants or {}))
    pack = ArgPack(entry, {param: value for (param, _), value in zip(params, args, strict=True)})
    return KernelCall(entry, constant_set(**(constants or {})), grid, block, shared_bytes, pack, cluster, pdl)
