"""Unquantised elements: f32, f16, bf16 and the integers.

Every function takes raw little-endian bytes, uint8 [n_rows, n_cols * itemsize], on any device and of any strides.
Source:  spec weights.md 4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def elements(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Reinterpret uint8 [n_rows, n_cols * itemsize] as ``dtype`` [n_rows, n_cols]; copies only if strides demand it."""
    # Flat, because a single row may keep a stride that is not a multiple of the element size.
    flat = data.reshape(-1)
    # A file may place a tensor at any byte, but a view needs an address that is a multiple of the element size.
    if flat.data_ptr() % dtype.itemsize or flat.storage_offset() % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype).view(*data.shape[:-1], data.shape[-1] // dtype.itemsize)


def dequantizer(dtype: torch.dtype) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """``dequantize(data, n_cols) -> f32 [n_rows, n_cols]`` for a float type; exact, always a new tensor."""

    def dequantize(data: torch.Tensor, n_cols: int) -> torch.Tensor:
        return elements(data, dtype).to(torch.float32, copy=True)

    return dequantize


def quantizer(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """``quantize(x [n_rows, n_cols]) -> uint8 [n_rows, n_cols * itemsize]``: round to nearest even."""

    def quantize(x: torch.Tensor) -> torch.Tensor:
        return x.to(dtype).contiguous().view(torch.uint8)

    return quantize


def integers(dtype: torch.dtype) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """``dequantize(data, n_cols) -> dtype [n_rows, n_cols]`` for an integer type; always a new tensor."""

    def dequantize(data: torch.Tensor, n_cols: int) -> torch.Tensor:
        return elements(data, dtype).clone()

    return dequantize
