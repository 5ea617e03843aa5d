"""NVFP4 as ggml stores it: 64 weights in 36 bytes, four e4m3 scales (one per 16) then 32 bytes of e2m1 codes.

Sub-block s has its codes in bytes 4+8s .. 11+8s; byte j of them holds weight j in the low nibble and weight j+8 in the
high one.  weight = e2m1(code) * e4m3(scale), times the tensor's own multiplier where the file has one.  The sign of a
scale is ignored and 0x7F, e4m3's not-a-number, means 0.
Source:  spec weights.md 3.7 and 4.7.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch

from ds4.weights.formats.block_scale import decode_e2m1_runs, look_up
from ds4.weights.formats.plain import elements

BLOCK = 64
BLOCK_BYTES = 36

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@functools.cache
def _scales(device: torch.device) -> torch.Tensor:
    """f32 [256]: the value of each scale byte, sign ignored, 0x7F as 0; subnormals are mantissa * 2^-9."""
    values = [(b & 7) * 2.0**-9 if b & 0x78 == 0 else (1 + (b & 7) / 8) * 2.0 ** ((b >> 3) - 7) for b in range(127)]
    return torch.tensor((*values, 0.0) * 2, device=device)


def dequantize(data: torch.Tensor, n_cols: int) -> torch.Tensor:
    """Decode packed rows.

    data     uint8 [n_rows, n_cols / 64 * 36], any strides
    returns  f32 [n_rows, n_cols], exact (2 by 4 significant bits)
    """
    words = elements(data.reshape(-1, BLOCK_BYTES), torch.int32)
    # Copies, since a view as another type may not start, or step, at any place.
    scales = words[:, 0].clone(memory_format=torch.contiguous_format).view(torch.uint8)
    codes = words[:, 1:].clone(memory_format=torch.contiguous_format).view(torch.int64)
    scale = look_up(_scales(data.device), scales)
    values = decode_e2m1_runs(codes.view(-1, 1))
    return values.mul_(scale.view(-1, 1)).view(data.shape[0], n_cols)


def quantize(x: torch.Tensor) -> torch.Tensor:
    """Encode rows: per 16 weights the scale is amax / 6 rounded to e4m3, each code the nearest e2m1, ties to even.

    x        f32 [n_rows, n_cols], n_cols a multiple of 64, finite; a group above 6 * 448 saturates
    returns  uint8 [n_rows, n_cols / 64 * 36]; scale bytes are 0x00..0x7E, never not-a-number
    """
    groups = x.to(torch.float32).reshape(x.shape[0], -1, 4, 16)
    wanted = groups.abs().amax(dim=-1) / 6
    # Above 464 the conversion to e4m3 gives not-a-number, so clamp to the largest finite value first.
    scale = wanted.clamp(max=448).to(torch.float8_e4m3fn).view(torch.uint8)
    value = look_up(_scales(x.device), scale).unsqueeze(-1)
    ratio = torch.where(value == 0, torch.zeros_like(groups), groups / value)
    codes = nearest_e2m1(ratio)
    packed = codes[..., :8] | codes[..., 8:] << 4
    return torch.cat((scale, packed.reshape(*scale.shape[:-1], 32)), dim=-1).reshape(x.shape[0], -1)


def multiplier(x: torch.Tensor) -> float:
    """The tensor-wide scale to divide ``x`` by before ``quantize``: the power of two bringing amax / 6 to (224, 448].

    Without it the scales of ordinary weights (amax below 0.1) are e4m3 subnormals and lose most of their precision.
    """
    amax = float(x.abs().max())
    return 2.0 ** min(max(math.ceil(math.log2(amax / (6 * 448))), -120), 120) if amax else 1.0


def nearest_e2m1(x: torch.Tensor) -> torch.Tensor:
    """uint8 code 0..15 of the nearest e2m1 value, ties to the even code, beyond 6 saturating.  x f32, any shape."""
    # Midpoints between neighbours; at an odd midpoint index the even code lies above, so equality rounds up.
    magnitude = x.abs().unsqueeze(-1)
    middle = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(_E2M1)], device=x.device)
    up = torch.tensor([i % 2 == 1 for i in range(7)], device=x.device)
    code = ((magnitude > middle) | ((magnitude == middle) & up)).sum(dim=-1)
    return (code + 8 * (torch.signbit(x) & (code > 0))).to(torch.uint8)
