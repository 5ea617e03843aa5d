"""Projections of activations by a packed weight."""

from ds4.kernels.proj.ref import Rows, matmul_rows, proj, proj_grouped, proj_in

__all__ = ["Rows", "matmul_rows", "proj", "proj_grouped", "proj_in"]
