"""NVFP4 as ggml stores it: 64 weights in 36 bytes, four e4m3 scales (one per 16) then 32 bytes of e2m1 codes.

Sub-block s has its codes in bytes 4+8s .. 11+8s; byte j of them holds weight j in the low nibble and weight j+8 in the
high one.  weight = e2m1(code) * e4m3(scale), times the tensor's own multiplier where the file has one.  The sign of a
scale is ignored and 0x7F, e4m3's not-a-number, means 0.
Source:  spec weights.md 3.7 and 4.7.
"""

from __future__ import annotations

import functools
import math

import torch

from ds4.weights.formats.block_scale import E4M3_MAX, decode_e2m1_runs, e2m1_codes, look_up, nearest_e2m1
from ds4.weights.formats.plain import elements
from ds4.weights.formats.tiling import as_columns, by_row_tiles, column_sums, columns_to_runs

BLOCK = 64
BLOCK_BYTES = 36
GROUP = 16

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SMALLEST = 2.0**-9
_SMALLEST_NORMAL = 2.0**-6


@functools.cache
def _scales(device: torch.device) -> torch.Tensor:
    """f32 [256]: the value of each scale byte, sign ignored, 0x7F as 0; subnormals are mantissa * 2^-9."""
    values = [(b & 7) * 2.0**-9 if b & 0x78 == 0 else (1 + (b & 7) / 8) * 2.0 ** ((b >> 3) - 7) for b in range(127)]
    return torch.tensor((*values, 0.0) * 2, device=device)


def scale_values(byte: torch.Tensor) -> torch.Tensor:
    """u8 [...] -> f32 [...]: the values of scale bytes as ggml reads them."""
    return look_up(_scales(byte.device), byte)


def nearest_scale(x: torch.Tensor) -> torch.Tensor:
    """f32 or f64 [...] >= 0 -> u8 [...] 0x01..0x7E: the nearest e4m3 number that is neither 0 nor not-a-number."""
    return x.clamp(_SMALLEST, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def dequantize(data: torch.Tensor, n_cols: int) -> torch.Tensor:
    """Decode packed rows.

    data     uint8 [n_rows, n_cols / 64 * 36], any strides
    returns  f32 [n_rows, n_cols], exact (2 by 4 significant bits)
    """
    words = elements(data.reshape(-1, BLOCK_BYTES), torch.int32)
    # Copies, since a view as another type may not start, or step, at any place.
    scales = words[:, 0].clone(memory_format=torch.contiguous_format).view(torch.uint8)
    codes = words[:, 1:].clone(memory_format=torch.contiguous_format).view(torch.int64)
    scale = scale_values(scales)
    values = decode_e2m1_runs(codes.view(-1, 1))
    return values.mul_(scale.view(-1, 1)).view(data.shape[0], n_cols)


def quantize(x: torch.Tensor) -> torch.Tensor:
    """Encode rows; the scales by the rule of :func:`encode_groups`.

    x        f32 [n_rows, n_cols], n_cols a multiple of 64, finite; a group above 6 * 448 saturates
    returns  uint8 [n_rows, n_cols / 64 * 36]; scale bytes are 0x01..0x7E, and zeros have code 0
    """
    return by_row_tiles(_encode, x, BLOCK)[0]


def _encode(x: torch.Tensor) -> tuple[torch.Tensor]:
    codes, scale = encode_groups(x)
    packed = columns_to_runs(codes.masked_fill_(codes == 8, 0)).reshape(-1, 32)
    return (torch.cat((scale.view(-1, 4), packed), dim=1).view(x.shape[0], -1),)


def encode_groups(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of every NVFP4 layout.

    Of a few e4m3 scales a group gets the one with the smallest sum of squared errors, and the first of equals: amax / 6
    rounded to the nearest, its two neighbours, amax / 4; and, where amax / 6 is below the normal e4m3 numbers, also
    amax / 3, / 2, / 1.5, / 1 and / 0.5.  So values that a group can hold are held: amax is then a scale times a code,
    and if the scale is normal and the code below 4, half or a quarter of the scale holds them too.  Codes are the
    nearest, ties to the even one.

    x        f32 [n_rows, n_cols], n_cols a multiple of 16, finite
    returns  (codes u8 0..15 [16, n], scales u8 0x01..0x7E [n]) of the n = n_rows * n_cols / 16 groups in order; code 8
             is -0
    Error:   none for values that a group can hold; otherwise |x - decoded| <= amax / 5 for 6 * 2^-6 <= amax <= 6 * 448
             (a scale is up to 3 / 16 above amax / 6, and the gap between its codes 4 and 6 is two scales wide)
    """
    columns = as_columns(x, GROUP)
    amax = columns.abs().amax(0)
    byte = nearest_scale(amax / 6)
    error = _squared_error(columns, byte)
    for candidate in (byte - 1, byte + 1, nearest_scale(amax / 4)):
        candidate.clamp_(1, 0x7E)
        _keep_better(columns, candidate, byte, error)
    small = (amax < 6 * _SMALLEST_NORMAL).nonzero().flatten()
    if small.numel():
        columns_small, byte_small, error_small = columns[:, small], byte[small], error[small]
        for code in _E2M1[1:6]:
            _keep_better(columns_small, nearest_scale(amax[small] / code), byte_small, error_small)
        byte[small] = byte_small
    return e2m1_codes(columns.div_(scale_values(byte))), byte


def _squared_error(columns: torch.Tensor, byte: torch.Tensor) -> torch.Tensor:
    scale = scale_values(byte)
    return column_sums(nearest_e2m1(columns / scale).mul_(scale).sub_(columns).square_())


def _keep_better(columns: torch.Tensor, candidate: torch.Tensor, byte: torch.Tensor, error: torch.Tensor) -> None:
    """Where ``candidate`` gives a smaller error, put it into ``byte`` and its error into ``error``."""
    other = _squared_error(columns, candidate)
    byte.copy_(torch.where(other < error, candidate, byte))
    torch.minimum(error, other, out=error)


def multiplier(x: torch.Tensor) -> float:
    """The tensor-wide scale to divide ``x`` by before ``quantize``: the power of two bringing amax / 4 to (224, 448].

    Without it the scales of ordinary weights (amax below 0.1) are e4m3 subnormals and lose most of their precision.
    Model-Optimizer takes amax / (6 * 448) itself; with a power of two dividing by it is exact, and the scales lose
    nothing, e4m3's relative precision being the same for all normal numbers.  And not amax / 6, since a group whose
    largest code is 4 needs a scale of amax / 4 to be held exactly.
    """
    amax = float(x.abs().max())
    return 2.0 ** min(max(math.ceil(math.log2(amax / (4 * 448))), -120), 120) if amax else 1.0
