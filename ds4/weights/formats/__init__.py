"""The registry of stored tensor formats: one file a format, one entry here.

A format turns packed bytes into float32 and, where the writer needs it, back.  Rows are independent; blocks run along
the last dimension.
Source:  spec weights.md 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Concatenate

import torch

from ds4.weights.formats import (
    fp8_block,
    ggml_other,
    iq2_xxs,
    mxfp4,
    nvfp4,
    nvfp4_modelopt,
    nvfp4_sleepy,
    plain,
    q2_k,
    q4_k,
    q6_k,
    q8_0,
)

# Written out below, at Format; the last arguments of a Dequantize are the parts.
Dequantize = Callable[Concatenate[torch.Tensor, int, ...], torch.Tensor]
Quantize = Callable[[torch.Tensor], torch.Tensor | tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Format:
    """How one kind of tensor is stored.

    block        weights per block; a row's length is a multiple of it
    block_bytes  bytes per block
    dequantize   (uint8 [n_rows, row_bytes], n_cols) -> f32 [n_rows, n_cols] (integer formats: their own dtype)
    quantize     (f32 [n_rows, n_cols]) -> uint8 [n_rows, row_bytes], or a tuple of that and the parts where the format
                 has some, one row of a part for ``row_block`` rows; None where ds4 cannot write the format.  Values are
                 finite and n_cols is a multiple of ``block``
    ggml_type    the type's id in a GGUF file, None where it has none
    multiplier   what the writer divides a whole tensor by before ``quantize`` and stores beside it, or None
    parts        names of what lies in tensors of its own; ``dequantize`` takes them in this order after ``n_cols``,
                 one row of each for a row of data
    row_block    rows of data that share one row of a part
    """

    name: str
    block: int
    block_bytes: int
    dequantize: Dequantize
    quantize: Quantize | None = None
    ggml_type: int | None = None
    multiplier: Callable[[torch.Tensor], float] | None = None
    parts: tuple[str, ...] = ()
    row_block: int = 1

    def row_bytes(self, n_cols: int) -> int:
        """Bytes of one row of ``n_cols`` weights (a multiple of ``block``)."""
        return n_cols // self.block * self.block_bytes

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``quantize``, always as (data, *parts); ValueError where ds4 cannot write the format."""
        if self.quantize is None:
            raise ValueError(f"ds4 cannot write format {self.name!r}")
        packed = self.quantize(x)
        return packed if isinstance(packed, tuple) else (packed,)


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
        Format("mxfp4", mxfp4.BLOCK, mxfp4.BLOCK_BYTES, mxfp4.dequantize, mxfp4.quantize, 39),
        Format("q4_k", q4_k.BLOCK, q4_k.BLOCK_BYTES, q4_k.dequantize, ggml_type=12),
        Format("q6_k", q6_k.BLOCK, q6_k.BLOCK_BYTES, q6_k.dequantize, ggml_type=14),
        Format("q2_k", q2_k.BLOCK, q2_k.BLOCK_BYTES, q2_k.dequantize, ggml_type=10),
        Format("iq2_xxs", iq2_xxs.BLOCK, iq2_xxs.BLOCK_BYTES, iq2_xxs.dequantize, ggml_type=16),
        Format(
            "mxfp4_official",
            mxfp4.BLOCK,
            mxfp4.OFFICIAL_BLOCK_BYTES,
            mxfp4.dequantize_official,
            mxfp4.quantize_official,
            parts=("scale",),
        ),
        Format("fp8_block", 1, 1, fp8_block.dequantize, fp8_block.quantize, parts=("scale",), row_block=fp8_block.TILE),
        Format(
            "nvfp4_modelopt",
            nvfp4_modelopt.BLOCK,
            nvfp4_modelopt.BLOCK_BYTES,
            nvfp4_modelopt.dequantize,
            nvfp4_modelopt.quantize,
            multiplier=nvfp4.multiplier,
            parts=("scale",),
        ),
        Format(
            "nvfp4_sleepy",
            nvfp4_sleepy.BLOCK,
            nvfp4_sleepy.BLOCK_BYTES,
            nvfp4_sleepy.dequantize,
            nvfp4_sleepy.quantize,
            multiplier=nvfp4.multiplier,
        ),
        *(
            Format(name, block, n_bytes, ggml_other.dequantizer(name), ggml_type=number)
            for name, (number, block, n_bytes) in ggml_other.TYPES.items()
        ),
    )
}
INTEGER_FORMATS = frozenset({"i32", "i64"})
BY_GGML_TYPE = {fmt.ggml_type: fmt for fmt in FORMATS.values() if fmt.ggml_type is not None}
