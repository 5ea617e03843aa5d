"""Drafts of a known quality: cut from the plain answer, each token right with a given probability."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

from ds4.one_answer_matrix import Adversary

SEED = 2


def propose(known: Callable[[], Sequence[int]], vocab: int, rate: float, at: int, k: int) -> list[int]:
    """``k`` tokens for places ``at ..`` of the known text; a place's token is right with probability ``rate``, and
    whether it is depends on the place alone. Beyond the text nothing is known and nothing proposed."""
    text = known()
    places = range(at, min(at + k, len(text)))
    return [text[i] if random.Random(f"{SEED}/{i}").random() < rate else (text[i] + 1) % vocab for i in places]


def forced_drafter(known: Callable[[], Sequence[int]], vocab: int, rate: float) -> Adversary:
    """A drafter that costs nothing and is right at ``rate``; ``known()`` is the plain answer as far as it goes."""
    return Adversary(partial(propose, known, vocab, rate))
