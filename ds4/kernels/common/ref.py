"""Torch references of the shared pieces."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``x * rsqrt(mean(x^2) + eps) * weight`` over the last dimension, f32 (spec model.md 2.1); no weight: none."""
    y = x * (x * x).sum(-1, keepdim=True).mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
    return y if weight is None else y * weight


def rope_frequencies(
    n_dims: int, base: float, factor: float, original_max_position: int, beta_fast: float, beta_slow: float
) -> Tensor:
    """f32 ``[n_dims / 2]`` angle per position; YaRN when ``original_max_position`` > 0 (spec model.md 1.3).

    YaRN here only blends frequencies; the attention factor of other implementations is not part of this model.
    """
    f = 1.0 / (base ** (torch.arange(0, n_dims, 2, dtype=torch.float32) / n_dims))
    if original_max_position <= 0:
        return f

    def correction(n_rotations: float) -> float:
        return n_dims * math.log(original_max_position / (n_rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(correction(beta_fast)), 0)
    high: float = min(math.ceil(correction(beta_slow)), n_dims - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(n_dims // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return f / factor * ramp + f * (1 - ramp)


def rope_angles(pos: Tensor, frequencies: Tensor) -> Tensor:
    """i64 positions ``[n]`` -> complex64 ``[n, n_dims / 2]``, cos + i sin of ``fp32(pos) * frequency``."""
    angle = pos.to(torch.float32).unsqueeze(-1) * frequencies
    return torch.complex(angle.cos(), angle.sin())


def apply_rope(x: Tensor, cis: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate the last dimensions of ``x`` f32 ``[..., d]`` by ``cis`` ``[..., n_rope / 2]``, interleaved pairs.

    ``inverse`` rotates back. ``cis`` broadcasts over the leading dimensions.
    """
    n_rope = 2 * cis.shape[-1]
    pairs = torch.view_as_complex(x[..., -n_rope:].unflatten(-1, (-1, 2)).contiguous())
    rotated = torch.view_as_real(pairs * (cis.conj() if inverse else cis)).flatten(-2)
    return torch.cat((x[..., :-n_rope], rotated), dim=-1)


@lru_cache(maxsize=8)
def _hadamard_matrix(n: int) -> Tensor:
    h = torch.ones(1, 1)
    while h.shape[0] < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)), 0)
    return h * n**-0.5


def hadamard(x: Tensor) -> Tensor:
    """``x H / sqrt(n)`` over the last dimension, Sylvester order, no random signs (spec model.md 5.3)."""
    return x @ _hadamard_matrix(x.shape[-1]).to(x.device)
