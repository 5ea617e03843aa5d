"""PlaneMatrix: a weight matrix in the planes that kernels read, which the torch references can read as well."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ds4.kernels.packing.planes import Planes, tile_rows


@dataclass(frozen=True, eq=False)
class PlaneMatrix:
    """A matrix of a checkpoint, packed for the kernels; a ``ds4.weights.tensor.Matrix``.

    name    canonical (official) name
    planes  its rows
    scale   multiplier of every decoded value, as PackedTensor's
    arena   planes of all matrices that were packed as one (the experts of a layer), of which this is number ``index``;
            None for a matrix by itself
    """

    name: str
    planes: Planes
    scale: float = 1.0
    arena: Planes | None = None
    index: int = 0

    @property
    def format(self) -> str:
        return self.planes.packing.format

    @property
    def shape(self) -> tuple[int, int]:
        return self.planes.n_rows, self.planes.n_cols

    @property
    def device(self) -> torch.device:
        return next(iter(self.planes.tensors.values())).device

    def tiles(self, first: int = 0, last: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Decode a part of the rows at a time: (rows, f32 [n, shape[1]])."""
        last = self.planes.n_rows if last is None else last
        n = tile_rows(self.planes.packing, self.planes.n_cols, self.device)
        for start in range(first // n * n, last, n):
            rows = slice(max(start, first), min(start + n, last))
            yield rows, self._decode(start, rows.stop)[rows.start - start :]

    def take_rows(self, ids: Tensor) -> Tensor:
        """Rows by index, i64 [n] -> f32 [n, shape[1]]; no other row is read.

        Limits: formats whose scales are shared between rows are decoded a row at a time, which waits for the device.
        """
        packing, n_cols = self.planes.packing, self.planes.n_cols
        if all(plane.row_block == 1 for plane in packing.planes):
            parts = [self.planes.tensors[p.name][ids][:, : p.width(n_cols)].contiguous() for p in packing.planes]
            return self._scaled(packing.decode(*parts))
        block = max(plane.row_block for plane in packing.planes)
        starts = [(row // block * block, row) for row in ids.tolist()]
        return torch.cat([self._decode(start, row + 1)[-1:] for start, row in starts])

    def dequantize(self) -> Tensor:
        """f32 [*shape], new."""
        return torch.cat([tile for _, tile in self.tiles()])

    def _decode(self, first: int, last: int) -> Tensor:
        return self._scaled(self.planes.rows(first, last).decode())

    def _scaled(self, values: Tensor) -> Tensor:
        if self.scale == 1.0:
            return values
        if float(torch.tensor(self.scale, dtype=torch.float32)) == self.scale:
            return values.mul_(self.scale)
        return values.double().mul_(self.scale).float()  # as PackedTensor: rounded once

    def __repr__(self) -> str:
        return f"PlaneMatrix({self.name!r}, {self.format}, {list(self.shape)}, {self.device})"
