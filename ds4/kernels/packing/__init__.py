"""The layouts that kernels read weights in: planes, one file a format, and the way from a checkpoint's blocks and back.

    packing = packing_of(tensor)
    planes = Planes.allocate(packing, n_rows, n_cols, device)
    pack_rows(tensor, planes)

A layout is a part of its kernels' contract: ``planes.decode()`` defines what a kernel computes with.
Source:  spec kernels.md b.1.
"""

from __future__ import annotations

import torch

from ds4.errors import Ds4Error
from ds4.kernels.packing import fp8_block, iq2_xxs, mxfp4, nvfp4, plain, q2_k, q4_k, q6_k, q8_0
from ds4.kernels.packing.matrix import PlaneMatrix
from ds4.kernels.packing.planes import ALIGN, Packing, Plane, Planes, pack_rows
from ds4.weights.tensor import PackedTensor

PACKINGS = {
    packing.format: packing
    for packing in (
        plain.packing("f32", torch.float32),
        plain.packing("f16", torch.float16),
        plain.packing("bf16", torch.bfloat16),
        q8_0.PACKING,
        q2_k.PACKING,
        q4_k.PACKING,
        q6_k.PACKING,
        iq2_xxs.PACKING,
        mxfp4.PACKING,
        mxfp4.OFFICIAL,
        nvfp4.PACKING,
        nvfp4.MODELOPT,
        nvfp4.SLEEPY,
        fp8_block.PACKING,
    )
}


def packing_of(tensor: PackedTensor) -> Packing:
    """The packing of a weight; Ds4Error, naming the tensor, for a format that kernels do not read."""
    packing = PACKINGS.get(tensor.format)
    if packing is None:
        raise Ds4Error(f"tensor {tensor.name} is stored as {tensor.format}, which ds4 has no GPU kernels for")
    if packing is fp8_block.PACKING and tensor.parts["scale"].dtype == torch.float32:
        return fp8_block.F32_SCALES
    return packing


__all__ = ["ALIGN", "PACKINGS", "Packing", "Plane", "PlaneMatrix", "Planes", "pack_rows", "packing_of"]
