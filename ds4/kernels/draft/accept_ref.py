"""Torch reference of ``accept_drawn``: rejection sampling as ds4/mtp/accept.py has it, with sums of integers."""

from __future__ import annotations

from torch import Tensor

from ds4.kernels.draft import words as at
from ds4.kernels.head.sample_ref import draw, scaled, uniform, unpacked

_TOKEN_STREAM, _ACCEPT_STREAM = 0, 1  # of a position's random numbers


def accept_drawn(p: Tensor, q: Tensor, token: Tensor, status: Tensor, params: Tensor, words: Tensor) -> Tensor:
    """New ``words`` after a step whose rows have the distributions ``p``, its draft's tokens those of ``q``."""
    words, seed = words.clone(), int(unpacked(params)["seed"])
    start, n, following = int(words[at.POS]) + 1, 0, len(token) - 1
    while n < following and not status[n]:
        x = int(words[at.TOKENS + 1 + n])
        if uniform(seed, start + n, _ACCEPT_STREAM) * float(q[n, x]) >= float(p[n, x]):
            break
        n += 1
    chosen = int(token[n])
    if n < following and not status[n]:
        left = scaled((p[n].double() - q[n, : p.shape[1]].double()).clamp(min=0))
        chosen = draw(left, uniform(seed, start + n, _TOKEN_STREAM)) if left.any() else chosen
    words[at.POS] += n + 1
    words[at.TOKENS], words[at.ACCEPTED], words[at.STATUS] = chosen, n, status[n]
    return words
