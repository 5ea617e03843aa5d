"""One stored tensor into another format, a few rows at a time.

Three ways, the first that applies: the same format is copied byte by byte; the 4-bit formats are cast on their packed
codes, which changes no value that the target can hold; anything else is decoded and quantised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ds4.errors import Ds4Error
from ds4.weights.formats import FORMATS, INTEGER_FORMATS, Format
from ds4.weights.formats.cast import MXFP4, NVFP4, cast_fp4, nvfp4_multiplier
from ds4.weights.tensor import PackedTensor

_TILE = 1 << 20  # weights decoded and quantised at a time
_TILE_BYTES = 1 << 22  # bytes copied at a time

Write = Callable[[str, int, Tensor], None]
"""Takes (role, first row, rows uint8 [n, row_bytes]): role "" is the data, others are names of ``Format.parts``."""


@dataclass(frozen=True)
class Outcome:
    """What became of a tensor's values.

    exact       every value is what it was (zeros may have lost their sign)
    error       norm of the difference over norm of the values; 0 where exact
    multiplier  of all values, to be stored beside the data; 1 for formats without one
    """

    exact: bool
    error: float
    multiplier: float


def encode(tensor: PackedTensor, target: str, write: Write, *, with_multiplier: bool = True) -> Outcome:
    """Give ``write`` a tensor's rows and parts in the format ``target``.

    tensor           any shape; its rows are all dimensions but the last, flattened
    target           a key of ``FORMATS`` that ds4 can write, or the tensor's own format; its blocks divide the rows
    with_multiplier  False: a tensor that is quantised anew gets none (but one that is copied or cast keeps its own)
    Error:           Ds4Error naming the tensor for values that are not finite or that the target cannot hold: too large
                     for it, or integers that do not fit.
    """
    flat = replace(tensor, shape=(tensor.data.shape[0], tensor.shape[-1] if tensor.shape else 1))
    if tensor.format == target:
        return _copy(flat, write)
    four_bit = MXFP4 + NVFP4
    if tensor.format in four_bit and target in four_bit and tensor.scale > 0:
        return _cast(flat, target, write)
    return _quantise(flat, target, write, with_multiplier)


def _copy(tensor: PackedTensor, write: Write) -> Outcome:
    step = max(1, _TILE_BYTES // max(1, tensor.data.shape[1]))
    for first in range(0, tensor.data.shape[0], step):
        write("", first, tensor.data[first : first + step])
    for role, part in tensor.parts.items():
        write(role, 0, part.contiguous().view(torch.uint8))
    return Outcome(True, 0.0, tensor.scale)


def _cast(tensor: PackedTensor, target: str, write: Write) -> Outcome:
    parts = [tensor.parts[role] for role in FORMATS[tensor.format].parts]
    difference = 0.0
    multiplier = tensor.scale
    try:
        if target in MXFP4:
            multiplier = 1.0
        elif tensor.format in MXFP4:
            multiplier = nvfp4_multiplier(tensor.format, tensor.data, *parts) * tensor.scale
        for rows in _tiles(tensor, 1):
            data, *scales = (stored[rows] for stored in (tensor.data, *parts))
            cast = cast_fp4(tensor.format, target, data, *scales, scale=tensor.scale, multiplier=multiplier)
            write("", rows.start, cast.data)
            for role, part in cast.parts.items():
                write(role, rows.start, part)
            if cast.n_inexact:
                shape = (data.shape[0], tensor.shape[1])
                after = PackedTensor(tensor.name, target, shape, cast.data, multiplier, cast.parts).dequantize()
                difference += _square(after - tensor.dequantize(rows=rows))
    except Ds4Error as error:
        raise Ds4Error(f"tensor {tensor.name} ({tensor.format}) {error}") from None
    if not difference:
        return Outcome(True, 0.0, multiplier)
    norm = sum(_square(tensor.dequantize(rows=rows)) for rows in _tiles(tensor, 1))
    return Outcome(False, math.sqrt(difference / norm), multiplier)


def _quantise(tensor: PackedTensor, target: str, write: Write, with_multiplier: bool) -> Outcome:
    form = FORMATS[target]
    multiplier = 1.0
    if form.multiplier and with_multiplier:
        largest = max((float(_values(tensor, rows).abs().max()) for rows in _tiles(tensor, 1)), default=0.0)
        multiplier = form.multiplier(torch.tensor([largest]))  # it depends on the largest magnitude alone
    difference = norm = 0.0
    for rows in _tiles(tensor, form.row_block):
        x = _values(tensor, rows)
        data, *scales = form.encode(x if multiplier == 1.0 else x / multiplier)
        write("", rows.start, data)
        for role, part in zip(form.parts, scales, strict=True):
            write(role, rows.start // form.row_block, part)
        parts = dict(zip(form.parts, scales, strict=True))
        after = PackedTensor(tensor.name, target, (x.shape[0], x.shape[1]), data, multiplier, parts).dequantize()
        if not torch.equal(after, x):
            _refuse(tensor, form, x, after)
            difference += _square(after - x)
        norm += _square(x)
    return Outcome(difference == 0, math.sqrt(difference / norm) if difference else 0.0, multiplier)


def _refuse(tensor: PackedTensor, form: Format, x: Tensor, after: Tensor) -> None:
    """Raise Ds4Error where the values have not been rounded but lost."""
    if form.name in INTEGER_FORMATS:
        raise Ds4Error(f"tensor {tensor.name} holds integers that do not fit {form.name}")
    if not bool(after.isfinite().all()):
        largest = float(x.abs().max())
        raise Ds4Error(f"tensor {tensor.name} holds {largest:g}, which {form.name} cannot hold; use bf16 for it")


def _values(tensor: PackedTensor, rows: slice) -> Tensor:
    """Decoded rows, which must be finite."""
    x = tensor.dequantize(rows=rows)
    if x.is_floating_point() and not bool(x.isfinite().all()):
        raise Ds4Error(f"tensor {tensor.name} ({tensor.format}) holds infinities or not-a-numbers; the file is damaged")
    return x


def _tiles(tensor: PackedTensor, row_block: int) -> Iterator[slice]:
    """Consecutive rows of about _TILE weights, from multiples of ``row_block`` on."""
    n_rows, n_cols = tensor.shape
    step = max(1, _TILE // n_cols // row_block) * row_block
    for first in range(0, n_rows, step):
        yield slice(first, min(first + step, n_rows))


def _square(x: Tensor) -> float:
    """Sum of squares, in f64."""
    return float(x.double().square().sum())
