"""The planes that a packed matrix is cut into, and their transport: allocation, tiles of rows, and the way back.

A checkpoint interleaves codes and scales in blocks of 17, 34 or 66 bytes.  A kernel wants neighbouring threads to read
neighbouring 16-byte words, so that codes lie in one plane and each kind of scale in another, row by row, every row
beginning on a multiple of 16 bytes; where a row does not fill its last 16 bytes, zeros do.  Only places change: every
packing is reversible bit for bit, which the tests prove on random bytes.
Source:  spec kernels.md b.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ds4.weights.formats import FORMATS
from ds4.weights.tensor import PackedTensor

ALIGN = 16  # bytes; the widest load of one thread
_TILE = 1 << 20  # weights packed or decoded at a time on a CPU
_TILE_DEVICE = 1 << 26  # elsewhere: its bytes are copied to the device first


@dataclass(frozen=True)
class Plane:
    """One plane of a format.

    name       what it holds
    dtype      of its elements
    n          elements for ``block`` weights of a row (a part of a block counts as a whole one)
    row_block  rows of the matrix that share a row of the plane
    """

    name: str
    dtype: torch.dtype
    n: int
    block: int
    row_block: int = 1

    def width(self, n_cols: int) -> int:
        """Elements in use of a row for ``n_cols`` weights."""
        return -(-n_cols // self.block) * self.n

    def row_bytes(self, n_cols: int) -> int:
        """Bytes from one row to the next: a multiple of 16."""
        return -(-self.width(n_cols) * self.dtype.itemsize // ALIGN) * ALIGN

    def n_rows(self, n_rows: int) -> int:
        """Rows of the plane for ``n_rows`` of the matrix."""
        return -(-n_rows // self.row_block)


@dataclass(frozen=True)
class Packing:
    """How one format becomes planes.

    format  a key of ``ds4.weights.formats.FORMATS``; scales of one more dtype make one more Packing of the same planes
    planes  in the order of the three functions' arguments and results
    pack    (data, *parts) -> planes without padding, each [rows, width]; data uint8 [n, row_bytes], parts with one row
            for ``Plane.row_block`` rows of data
    unpack  the inverse: (*planes) -> (data, *parts), bit for bit for any bytes
    decode  (*planes) -> f32 [n, n_cols]: what a kernel has to compute with.  Equal to ``Format.dequantize`` bit for bit
            (times no multiplier: PackedTensor.scale stays beside the planes), but scales that are not finite raise no
            error, they spread
    """

    format: str
    planes: tuple[Plane, ...]
    pack: Callable[..., tuple[Tensor, ...]]
    unpack: Callable[..., tuple[Tensor, ...]]
    decode: Callable[..., Tensor]

    def nbytes(self, n_rows: int, n_cols: int) -> int:
        """Bytes of all planes of a matrix, padding included."""
        return sum(plane.n_rows(n_rows) * plane.row_bytes(n_cols) for plane in self.planes)


@dataclass(frozen=True, eq=False)
class Planes:
    """A packed matrix of ``n_rows`` by ``n_cols`` weights.

    tensors  by the names of ``packing.planes``: [plane.n_rows(n_rows), plane.row_bytes(n_cols) / itemsize], any device.
             Rows are dense; from row to row any stride that is a multiple of 16 bytes will do, so that the rows of two
             matrices can be interleaved in one arena
    """

    packing: Packing
    n_rows: int
    n_cols: int
    tensors: Mapping[str, Tensor]

    @staticmethod
    def allocate(packing: Packing, n_rows: int, n_cols: int, device: torch.device | str = "cpu") -> Planes:
        """Planes of zeros."""
        tensors = {}
        for plane in packing.planes:
            shape = (plane.n_rows(n_rows), plane.row_bytes(n_cols) // plane.dtype.itemsize)
            tensors[plane.name] = torch.zeros(shape, dtype=plane.dtype, device=device)
        return Planes(packing, n_rows, n_cols, tensors)

    def rows(self, first: int, last: int) -> Planes:
        """Rows ``first .. last - 1`` as a view; ``first`` a multiple of every ``row_block``."""
        if not 0 <= first <= last <= self.n_rows:
            raise ValueError(f"rows {first} to {last} of {self.n_rows}")
        tensors = {}
        for plane in self.packing.planes:
            if first % plane.row_block:
                raise ValueError(
                    f"row {first} does not begin a row of plane {plane.name}, which is for {plane.row_block}"
                )
            tensors[plane.name] = self.tensors[plane.name][first // plane.row_block : plane.n_rows(last)]
        return replace(self, n_rows=last - first, tensors=tensors)

    def write(self, data: Tensor, *parts: Tensor, first: int = 0) -> None:
        """Pack rows into these planes.

        data   uint8 [n, row_bytes], any strides and any device; its rows become rows ``first .. first + n - 1``
        parts  as in ``Packing.pack``; where rows share a row of a part, all of them are written at once
        """
        window = self.rows(first, first + data.shape[0])
        for plane, piece in zip(self.packing.planes, self.packing.pack(data, *parts), strict=True):
            window.tensors[plane.name][:, : piece.shape[1]].copy_(piece)

    def read(self) -> tuple[Tensor, ...]:
        """(data, *parts) as the checkpoint stores them."""
        return self.packing.unpack(*self._dense())

    def decode(self) -> Tensor:
        """f32 [n_rows, n_cols], new; a few rows at a time on a CPU."""
        n = tile_rows(self.packing, self.n_cols, self._device)
        tiles = [self.rows(row, min(row + n, self.n_rows)) for row in range(0, self.n_rows, n)]
        return torch.cat([tile.packing.decode(*tile._dense()) for tile in tiles])

    def _dense(self) -> list[Tensor]:
        """The planes without padding, in order."""
        return [self.tensors[plane.name][:, : plane.width(self.n_cols)].contiguous() for plane in self.packing.planes]

    @property
    def _device(self) -> torch.device:
        return self.tensors[self.packing.planes[0].name].device


def tile_rows(packing: Packing, n_cols: int, device: torch.device) -> int:
    """Rows to work on at a time: a multiple of every ``row_block``."""
    row_block = max(plane.row_block for plane in packing.planes)
    weights = _TILE if device.type == "cpu" else _TILE_DEVICE
    return max(1, weights // max(1, n_cols) // row_block) * row_block


def pack_rows(tensor: PackedTensor, planes: Planes, first: int = 0, last: int | None = None, at: int = 0) -> None:
    """Pack rows ``first .. last - 1`` of a weight into rows ``at ..`` of planes that exist, a few rows at a time.

    tensor  of the format of ``planes.packing`` and with as long rows; it may be a view of the memory-mapped file
    Limits: ``first`` and ``at`` are multiples of every ``row_block``, and ``last`` too unless it is the tensor's end
    Error:  ValueError where that does not hold, or formats, row lengths or row counts do not fit
    """
    n_rows, n_cols = tensor.data.shape[0], tensor.shape[-1]
    last = n_rows if last is None else last
    if tensor.format != planes.packing.format or n_cols != planes.n_cols:
        raise ValueError(f"{tensor!r} does not fit planes of {planes.packing.format} with rows of {planes.n_cols}")
    if not (0 <= first <= last <= n_rows and 0 <= at <= planes.n_rows - (last - first)):
        raise ValueError(f"{tensor.name}: rows {first} to {last} of {n_rows} to {at} of {planes.n_rows}")
    fmt = FORMATS[tensor.format]
    if first % fmt.row_block or at % fmt.row_block or (last % fmt.row_block and last != n_rows):
        raise ValueError(f"{tensor.name}: rows {first} to {last} to {at}: {fmt.row_block} rows share their scales")
    device = planes._device
    n = tile_rows(planes.packing, n_cols, device)
    parts = [tensor.parts[name] for name in fmt.parts]
    for row in range(first, last, n):
        end = min(row + n, last)
        pieces = [part[row // fmt.row_block : -(-end // fmt.row_block)] for part in parts]
        moved = [piece.to(device) for piece in (tensor.data[row:end], *pieces)]
        planes.write(*moved, first=at + row - first)
