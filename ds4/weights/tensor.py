"""PackedTensor: one named weight, still in the bits its checkpoint stores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from ds4.errors import Ds4Error
from ds4.weights.formats import FORMATS, INTEGER_FORMATS

_TILE = 1 << 19  # weights decoded at a time on a CPU: few enough for the intermediate results to stay in its cache
_ALIGNMENT = 64


class Matrix(Protocol):
    """A weight matrix whose bits are packed in some layout: what the torch references need of it.

    name, shape [out, in] and device; ``tiles`` and ``take_rows`` as of PackedTensor
    """

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def device(self) -> torch.device: ...

    def tiles(self, first: int = 0, last: int | None = None) -> Iterator[tuple[slice, torch.Tensor]]: ...

    def take_rows(self, ids: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """A weight as stored, plus what is needed to decode it.

    name     canonical (official) name, e.g. ``layers.3.attn.wq_a.weight``
    format   a key of ``ds4.weights.formats.FORMATS``
    shape    logical, row-major: ``[out, in]`` for matrices; ``()`` for a scalar
    data     uint8 [n_rows, row_bytes]; rows are all dimensions but the last, flattened (1 row for vectors and
             scalars).  Straight from ``open_checkpoint`` it is a view of the read-only memory map: never write to it.
             It may be strided along rows (a column slice of a wider tensor); within a row it is dense.
    scale    multiplier of every decoded value, 1 unless the format is nvfp4, nvfp4_sleepy or nvfp4_modelopt.  A
             float32, or the reciprocal of one in double precision; then the product is made in double precision and
             gives the quotient rounded once, since a code times an e4m3 scale has too few digits for a near tie
    parts    what the format keeps in tensors of their own, by the names in ``Format.parts``; block scales are
             [ceil(n_rows / row_block), n], uint8 as stored (e8m0 or e4m3 bytes) or f32
    """

    name: str
    format: str
    shape: tuple[int, ...]
    data: torch.Tensor
    scale: float = 1.0
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Packed bytes of this tensor (of the slice, where it is one) and its parts."""
        return self.data.numel() + sum(part.numel() * part.element_size() for part in self.parts.values())

    @property
    def device(self) -> torch.device:
        """Where ``data`` lies."""
        return self.data.device

    def dequantize(self, dtype: torch.dtype = torch.float32, rows: slice | None = None) -> torch.Tensor:
        """Decode to a new tensor on the device of ``data``.

        dtype    result type; the value is exact in float32, then rounded once (ignored by integer formats, which give
                 their own integer type)
        rows     part of the rows, for tensors of two dimensions; None means all
        returns  ``dtype`` [*shape], or [n_selected, shape[1]] with ``rows``
        Error:   exact, but for a ``scale`` other than 1, which costs one float32 rounding.  Ds4Error, naming the
                 tensor, for block scales that are not finite.
        """
        shape, n_rows = self.shape, self.data.shape[0]
        first, last, step = 0, n_rows, 1
        if rows is not None:
            if len(shape) != 2:
                raise ValueError(f"{self.name}: rows need a tensor of two dimensions, this one has shape {shape}")
            first, last, step = rows.indices(n_rows)
            if step != 1:
                raise ValueError(f"{self.name}: rows must follow each other, not in steps of {step}")
            last = max(first, last)
            shape = (last - first, shape[1])
        if self.format in INTEGER_FORMATS:
            return self._decode(slice(first, last)).reshape(shape)
        if self.data.device.type != "cpu" or (last - first) * self._n_cols <= _TILE:
            return self._decode(slice(first, last)).reshape(shape).to(dtype)
        values = empty((last - first, self._n_cols), dtype)
        for part, tile in self.tiles(first, last):
            values[part.start - first : part.stop - first] = tile
        return values.view(shape)

    def tiles(self, first: int = 0, last: int | None = None) -> Iterator[tuple[slice, torch.Tensor]]:
        """Decode a part of the rows at a time: (rows, f32 [n, shape[-1]]), each within the cache of a CPU."""
        last = self.data.shape[0] if last is None else last
        n = max(1, _TILE // self._n_cols)
        for row in range(first, last, n):
            rows = slice(row, min(row + n, last))
            yield rows, self._decode(rows)

    @property
    def _n_cols(self) -> int:
        return self.shape[-1] if self.shape else 1

    def take_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Decode rows by index, in the order given; no other row is read.  For tensors of two dimensions.

        ids      i64 [n], n > 0, 0 <= id < shape[0], repetitions allowed; any device
        returns  f32 [n, shape[1]] on the device of ``data`` (integer formats: their own integer type)
        Error:   ValueError for other tensors, IndexError for an id out of range, Ds4Error as in ``dequantize``.
        """
        if len(self.shape) != 2:
            raise ValueError(f"{self.name}: rows need a tensor of two dimensions, this one has shape {self.shape}")
        if not 0 <= int(ids.min()) <= int(ids.max()) < self.shape[0]:
            raise IndexError(f"{self.name}: row {ids.tolist()} is outside 0 to {self.shape[0] - 1}"[:200])
        return self._decode(ids.to(self.data.device))

    def _decode(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Rows by slice (start and stop given) or index, as f32 (integer formats: as they are) [n_selected, n_cols]."""
        fmt = FORMATS[self.format]
        parts = []
        for name in fmt.parts:
            part = self.parts[name]
            if part.shape[0] != -(-self.data.shape[0] // fmt.row_block):
                raise ValueError(f"{self.name}: {part.shape[0]} rows of {name} for {self.data.shape[0]} of data")
            if fmt.row_block == 1:
                part = part[rows]
            else:
                index = torch.arange(rows.start, rows.stop, device=part.device) if isinstance(rows, slice) else rows
                part = part[index // fmt.row_block]
            parts.append(part)
        try:
            values = fmt.dequantize(self.data[rows], self._n_cols, *parts)
        except Ds4Error as error:
            raise Ds4Error(f"tensor {self.name} ({self.format}) {error}") from None
        if self.scale == 1.0:
            return values
        if float(torch.tensor(self.scale, dtype=torch.float32)) == self.scale:
            return values.mul_(self.scale)
        return values.double().mul_(self.scale).float()  # torch would round the multiplier to float32 first

    def __repr__(self) -> str:
        return f"PackedTensor({self.name!r}, {self.format}, {list(self.shape)}, {self.nbytes} bytes)"


def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """An uninitialised CPU tensor that starts at a multiple of 64 bytes, as torch's own do: what a matrix product gives
    may depend on that.  Its memory comes from numpy, which asks for huge pages where torch does not: writing to fresh
    memory is then four times as fast."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT - 1, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return torch.from_numpy(raw[start : start + size]).view(dtype).view(shape)


def row_count(shape: tuple[int, ...]) -> int:
    """Rows of the packed form of a tensor: the product of all dimensions but the last."""
    return math.prod(shape[:-1])
