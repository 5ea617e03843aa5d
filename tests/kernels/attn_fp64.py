"""The attention core in FP64, written down once more than in ds4/kernels/attn: for both of its forms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ds4.kernels.cases import Inputs


def in_fp64(inputs: Inputs, rows_of: Callable[[Inputs, int], Tensor]) -> Tensor:
    """o f64 ``[n, n_heads, 512]``; ``rows_of(inputs, i)`` are the rows f64 that token i sees."""
    cis = torch.view_as_complex(inputs["cis"].double()).unsqueeze(1)

    def turn(x: Tensor, by: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x[..., 448:].unflatten(-1, (32, 2)).contiguous())
        return torch.cat((x[..., :448], torch.view_as_real(pairs * by).flatten(-2)), dim=-1)

    q = inputs["q"].double()
    q = turn(q / (q.square().mean(-1, keepdim=True) + inputs["eps"]).sqrt(), cis)
    sink = inputs["sink"].double().unsqueeze(1)
    o = []
    for i in range(len(q)):
        rows = rows_of(inputs, i)
        weights = torch.cat((q[i] @ rows.T * 512**-0.5, sink), dim=1).softmax(1)[:, :-1]
        o.append(weights @ rows)
    return turn(torch.stack(o), cis.conj())
