"""PackedTensor: one named weight, still in the bits its checkpoint stores."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ds4.weights.formats import FORMATS, INTEGER_FORMATS


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """A weight as stored, plus what is needed to decode it.

    name     canonical (official) name, e.g. ``layers.3.attn.wq_a.weight``
    format   a key of ``ds4.weights.formats.FORMATS``
    shape    logical, row-major: ``[out, in]`` for matrices; ``()`` for a scalar
    data     uint8 [n_rows, row_bytes]; rows are all dimensions but the last, flattened (1 row for vectors and
             scalars).  Straight from ``open_checkpoint`` it is a view of the read-only memory map: never write to it.
             It may be strided along rows (a column slice of a wider tensor); within a row it is dense.
    scale    multiplier of every decoded value, 1 unless the format is nvfp4
    """

    name: str
    format: str
    shape: tuple[int, ...]
    data: torch.Tensor
    scale: float = 1.0

    @property
    def nbytes(self) -> int:
        """Packed bytes of this tensor (of the slice, where it is one)."""
        return self.data.numel()

    def dequantize(self, dtype: torch.dtype = torch.float32, rows: slice | None = None) -> torch.Tensor:
        """Decode to a new tensor on the device of ``data``.

        dtype    result type; the value is exact in float32, then rounded once (ignored by integer formats, which give
                 their own integer type)
        rows     part of the rows, for tensors of two dimensions; None means all
        returns  ``dtype`` [*shape], or [n_selected, shape[1]] with ``rows``
        Error:   exact, but for a ``scale`` other than 1, which costs one float32 rounding.
        """
        data, shape = self.data, self.shape
        if rows is not None:
            if len(shape) != 2:
                raise ValueError(f"{self.name}: rows need a tensor of two dimensions, this one has shape {shape}")
            data = data[rows]
            shape = (data.shape[0], shape[1])
        fmt = FORMATS[self.format]
        values = fmt.dequantize(data, shape[-1] if shape else 1).reshape(shape)
        if self.format in INTEGER_FORMATS:
            return values
        if self.scale != 1.0:
            values *= self.scale
        return values.to(dtype)

    def __repr__(self) -> str:
        return f"PackedTensor({self.name!r}, {self.format}, {list(self.shape)}, {self.nbytes} bytes)"


def row_count(shape: tuple[int, ...]) -> int:
    """Rows of the packed form of a tensor: the product of all dimensions but the last."""
    return math.prod(shape[:-1])
