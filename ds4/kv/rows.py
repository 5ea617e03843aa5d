"""Row formats of the KV cache: the 584-byte row, the 68-byte indexer key, and their unrounded FP32 forms.

A packed row is lossless for values already on its grid, and that grid is the one the official code rounds to
(spec model.md 6.1, 6.2), so nothing is lost by storing rows packed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ds4.weights.formats import block_scale

NOPE_BLOCK = 64
KEY_BLOCK = 32


@dataclass(frozen=True)
class PackedRow:
    """KV row: ``n_nope`` e4m3 codes | one E8M0 scale per 64, padded to 8 bytes | ``n_rope`` bf16. 584 bytes at 512."""

    n_nope: int
    n_rope: int

    @property
    def width(self) -> int:
        return self.n_nope + self.n_rope

    @property
    def _rope_offset(self) -> int:
        return self.n_nope + -(-(self.n_nope // NOPE_BLOCK) // 8) * 8

    @property
    def row_bytes(self) -> int:
        return self._rope_offset + 2 * self.n_rope

    def pack(self, x: Tensor) -> Tensor:
        """f32 ``[n, n_nope + n_rope]`` -> u8 ``[n, row_bytes]``; rounds to the row's grid."""
        codes, exponent = block_scale.quantize_e4m3(x[:, : self.n_nope], NOPE_BLOCK)
        exponent = F.pad(exponent, (0, self._rope_offset - self.n_nope - exponent.shape[1]))
        rope = x[:, self.n_nope :].to(torch.bfloat16).view(torch.uint8)
        return torch.cat((codes.view(torch.uint8), exponent, rope), dim=1)

    def unpack(self, row: Tensor) -> Tensor:
        """u8 ``[n, row_bytes]`` -> f32 ``[n, n_nope + n_rope]``; exact."""
        exponent = row[:, self.n_nope : self.n_nope + self.n_nope // NOPE_BLOCK]
        nope = block_scale.dequantize_e4m3(row[:, : self.n_nope], exponent, NOPE_BLOCK)
        rope = row[:, self._rope_offset :].contiguous().view(torch.bfloat16)
        return torch.cat((nope, rope.to(torch.float32)), dim=1)


@dataclass(frozen=True)
class PackedKey:
    """Indexer key: two E2M1 codes a byte | one E8M0 scale per 32. 68 bytes at width 128."""

    width: int

    @property
    def row_bytes(self) -> int:
        return self.width // 2 + self.width // KEY_BLOCK

    def pack(self, x: Tensor) -> Tensor:
        """f32 ``[n, width]`` -> u8 ``[n, row_bytes]``; rounds to the FP4 grid."""
        codes, exponent = block_scale.quantize_e2m1(x, KEY_BLOCK)
        return torch.cat((block_scale.pack_nibbles(codes), exponent), dim=1)

    def unpack(self, row: Tensor) -> Tensor:
        """u8 ``[n, row_bytes]`` -> f32 ``[n, width]``; exact."""
        codes = block_scale.unpack_nibbles(row[:, : self.width // 2])
        return block_scale.dequantize_e2m1(codes, row[:, self.width // 2 :], KEY_BLOCK)


@dataclass(frozen=True)
class FloatRow:
    """FP32 row for comparisons with implementations that do not round: whatever is put in comes out."""

    width: int
    nope_fp8: int = 0  # leading values rounded to the e4m3 grid before they are stored, 0 for none

    @property
    def row_bytes(self) -> int:
        return 4 * self.width

    def pack(self, x: Tensor) -> Tensor:
        """f32 ``[n, width]`` -> u8 ``[n, 4 * width]``."""
        if self.nope_fp8:
            nope = block_scale.round_e4m3(x[:, : self.nope_fp8], NOPE_BLOCK)
            x = torch.cat((nope, x[:, self.nope_fp8 :]), dim=1)
        return x.contiguous().view(torch.uint8)

    def unpack(self, row: Tensor) -> Tensor:
        """u8 ``[n, 4 * width]`` -> f32 ``[n, width]``."""
        return row.contiguous().view(torch.float32)


RowFormat = PackedRow | PackedKey | FloatRow
