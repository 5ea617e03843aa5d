"""Torch references of the attention core (spec model.md 2.3 to 2.6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds4.kernels.common import apply_rope, rms_norm
from ds4.kernels.numerics import Numerics


def query(q: Tensor, cis: Tensor, eps: float, numerics: Numerics) -> Tensor:
    """Raw queries f32 ``[n, h, d]`` -> unweighted RMS norm per head, then RoPE; ``cis`` ``[n, n_rope / 2]``."""
    if numerics.bf16:  # the official code does this step on bf16 tensors throughout
        rd = numerics.rd
        q = rd(q * rd(torch.rsqrt(rd(rd(rd(q * q).mean(-1, keepdim=True)) + eps))))
    else:
        q = rms_norm(q, None, eps)
    return numerics.rd(apply_rope(q, cis.unsqueeze(-2)))


def attend(q: Tensor, kv: Tensor, sink: Tensor, mask: Tensor | None, numerics: Numerics) -> Tensor:
    """``o = sum_i e^(s_i - m) v_i / (sum_i e^(s_i - m) + e^(sink - m))``, K = V = ``kv``, scale ``d^-0.5``.

    q f32 ``[n, h, d]``, kv f32 ``[r, d]``, sink f32 ``[h]``, mask bool ``[n, r]`` (True: attended) or None; result
    f32 ``[n, h, d]``.
    """
    n, h, d = q.shape
    scores = (q.reshape(n * h, d) @ kv.T).view(n, h, -1) * d**-0.5
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(1), -torch.inf)
    m = scores.amax(-1, keepdim=True)
    p = torch.exp(scores - m)
    denominator = p.sum(-1, keepdim=True) + torch.exp(sink.unsqueeze(-1) - m)
    o = (numerics.rd(p).view(n * h, -1) @ kv).view(n, h, d)
    return numerics.rd(o / denominator)


def attn_decode(q: Tensor, kv: Sequence[Tensor], sink: Tensor, rows: Sequence[int], numerics: Numerics) -> Tensor:
    """Decode form: token i (in row ``rows[i]`` of q f32 ``[n, h, d]``) attends all of ``kv[i]`` f32 ``[r_i, d]``.

    One token at a time, with shapes that follow from its position alone. Order of the rows: window by position, then
    compressed rows by index.
    """
    out = torch.zeros_like(q)
    for row, token_kv in zip(rows, kv, strict=True):
        out[row] = attend(q[row : row + 1], token_kv, sink, None, numerics)[0]
    return out


def attn_prefill(q: Tensor, kv: Tensor, sink: Tensor, mask: Tensor, numerics: Numerics) -> Tensor:
    """Prefill form: queries f32 ``[n, h, d]`` of a tile against the same ``kv`` ``[r, d]`` under ``mask`` ``[n, r]``.

    As :func:`attend`, but in place: the scores of a prompt are large. At least one row of each query must be attended.
    """
    n, h, d = q.shape
    scores = torch.addmm(q.new_zeros(1, 1), q.reshape(n * h, d), kv.T, beta=0, alpha=d**-0.5).view(n, h, -1)
    scores = scores.masked_fill_(~mask.unsqueeze(1), -torch.inf)
    m = scores.detach().amax(-1, keepdim=True)  # cancels out, and so do its gradients
    p = scores.sub_(m).exp_()
    denominator = p.sum(-1, keepdim=True) + torch.exp(sink.unsqueeze(-1) - m)
    o = (numerics.rd(p).view(n * h, -1) @ kv).view(n, h, d)
    return numerics.rd(o / denominator)
