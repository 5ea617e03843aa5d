"""The registry of stored tensor formats: one file a format, one entry here.

A format turns packed bytes into float32 and, where the writer needs it, back.  Rows are independent; blocks run along
the last dimension.
Source:  spec weights.md 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ds4.weights.formats import nvfp4, plain, q8_0


@dataclass(frozen=True)
class Format:
    """How one kind of tensor is stored.

    block        weights per block; a row's length is a multiple of it
    block_bytes  bytes per block
    dequantize   (uint8 [n_rows, row_bytes], n_cols) -> f32 [n_rows, n_cols] (integer formats: their own dtype)
    quantize     (f32 [n_rows, n_cols]) -> uint8 [n_rows, row_bytes]; None where ds4 cannot write the format
    ggml_type    the type's id in a GGUF file, None where it has none
    multiplier   what the writer divides a whole tensor by before ``quantize`` and stores beside it, or None
    """

    name: str
    block: int
    block_bytes: int
    dequantize: Callable[[torch.Tensor, int], torch.Tensor]
    quantize: Callable[[torch.Tensor], torch.Tensor] | None = None
    ggml_type: int | None = None
    multiplier: Callable[[torch.Tensor], float] | None = None

    def row_bytes(self, n_cols: int) -> int:
        """Bytes of one row of ``n_cols`` weights (a multiple of ``block``)."""
        return n_cols // self.block * self.block_bytes


def _floats(name: str, dtype: torch.dtype, ggml_type: int) -> Format:
    return Format(name, 1, dtype.itemsize, plain.dequantizer(dtype), plain.quantizer(dtype), ggml_type)


def _integers(name: str, dtype: torch.dtype, ggml_type: int) -> Format:
    return Format(name, 1, dtype.itemsize, plain.integers(dtype), plain.quantizer(dtype), ggml_type)


FORMATS = {
    fmt.name: fmt
    for fmt in (
        _floats("f32", torch.float32, 0),
        _floats("f16", torch.float16, 1),
        _floats("bf16", torch.bfloat16, 30),
        _integers("i32", torch.int32, 26),
        _integers("i64", torch.int64, 27),
        Format("q8_0", q8_0.BLOCK, q8_0.BLOCK_BYTES, q8_0.dequantize, q8_0.quantize, 8),
        Format("nvfp4", nvfp4.BLOCK, nvfp4.BLOCK_BYTES, nvfp4.dequantize, nvfp4.quantize, 40, nvfp4.multiplier),
    )
}
INTEGER_FORMATS = frozenset({"i32", "i64"})
BY_GGML_TYPE = {fmt.ggml_type: fmt for fmt in FORMATS.values() if fmt.ggml_type is not None}
