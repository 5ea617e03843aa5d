"""Projections of activations by a packed weight."""

from ds4.kernels.proj.ref import (
    Rows,
    matmul_rows,
    proj,
    proj_grouped,
    proj_grouped_tiles,
    proj_in,
    proj_in_tiles,
    proj_tiles,
)

__all__ = [
    "Rows",
    "matmul_rows",
    "proj",
    "proj_grouped",
    "proj_grouped_tiles",
    "proj_in",
    "proj_in_tiles",
    "proj_tiles",
]
