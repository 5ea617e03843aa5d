"""BF16, F16 and F32 as one plane: values [rows, K] in their own type, every row beginning on 16 bytes.

Source:  spec kernels.md b.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.packing.planes import Packing, Plane
from ds4.weights.formats.plain import elements


def packing(name: str, dtype: torch.dtype) -> Packing:
    """The packing of a float format."""

    def pack(data: Tensor) -> tuple[Tensor]:
        return (elements(data, dtype),)

    return Packing(name, (Plane("values", dtype, 1, 1),), pack, unpack, decode)


def unpack(values: Tensor) -> tuple[Tensor]:
    """Inverse of a packing's ``pack``."""
    return (values.view(torch.uint8),)


def decode(values: Tensor) -> Tensor:
    """f32 [n, K], exact."""
    return values.to(torch.float32)
