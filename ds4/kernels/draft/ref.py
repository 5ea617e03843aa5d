"""Torch references of drafting's small operations (spec model.md 7.1 to 7.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.common import rms_norm
from ds4.kernels.draft import words as at
from ds4.kv.ring import ring_read, ring_write


def tap(streams: Tensor, words: Tensor, tail: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """New ``tail`` and ``ids``: rows of ``streams`` and the step's tokens at the step's positions."""
    tail, ids, n_tok, pos = tail.clone(), ids.clone(), streams.shape[0], int(words[at.POS])
    ring_write(tail, pos, streams)
    ring_write(ids, pos, words[at.TOKENS : at.TOKENS + n_tok].long())
    return tail, ids


def mean(streams: Tensor, words: Tensor, tail: Tensor, ids: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """As ``tap``, of the means over ``streams`` f32 ``[n_tok, m, d]``, into columns ``first ..`` of the rows."""
    columns = slice(first, first + streams.shape[2])
    rows, ids = tap(streams.mean(1), words, tail[:, columns], ids)
    tail = tail.clone()
    tail[:, columns] = rows
    return tail, ids


def pairs(words: Tensor, tail: Tensor, ids: Tensor, n_pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """(words, h, tokens) of the last ``n_pairs`` pairs."""
    words, pos = words.clone(), int(words[at.POS])
    tokens = torch.cat((ring_read(ids, pos - n_pairs + 1, pos).int(), words[at.TOKENS : at.TOKENS + 1]))
    words[at.PAIR], words[at.LAST], words[at.DRAFTED] = pos - n_pairs, pos - 1, 0
    return words, ring_read(tail, pos - n_pairs, pos).contiguous(), tokens


def block(words: Tensor, noise: int, n_tok: int) -> tuple[Tensor, Tensor]:
    """(words, tokens i32 ``[n_tok]``) of a block of the step's first token and ``noise``."""
    words = words.clone()
    words[at.CHAIN], words[at.LAST], words[at.DRAFTED] = words[at.TOKENS], words[at.POS] + n_tok - 1, 0
    return words, torch.cat((words[at.TOKENS : at.TOKENS + 1], words.new_full((n_tok - 1,), noise)))


def choose(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(biased f32 ``[1, vocab]``, token i32 ``[1]``) from a row of logits and its bias, f32 ``[1, vocab]``."""
    biased = logits + bias
    return biased, biased.argmax(1).int()


def push(token: Tensor, words: Tensor) -> Tensor:
    """New ``words`` with ``token`` i32 ``[1]`` behind those that the step has."""
    words = words.clone()
    words[at.TOKENS + 1 + int(words[at.DRAFTED])] = words[at.CHAIN] = token[0]
    words[at.DRAFTED] += 1
    words[at.LAST] += 1
    return words


def accept(token: Tensor, status: Tensor, words: Tensor) -> Tensor:
    """New ``words`` after a step whose rows chose ``token`` i32 ``[n_tok]`` with ``status``."""
    words, n = words.clone(), 0
    while n < len(token) - 1 and not status[n] and token[n] == words[at.TOKENS + 1 + n]:
        n += 1
    words[at.POS] += n + 1
    words[at.TOKENS], words[at.ACCEPTED], words[at.STATUS] = token[n], n, status[n]
    return words


def join(embedded: Tensor, h: Tensor, enorm: Tensor, hnorm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(e f32 ``[n, d]``, hn f32 ``[n, m, d]``) of embedding rows in ``embedded`` and streams ``h`` ``[n, m, d]``."""
    return rms_norm(embedded[:, 0], enorm, eps), rms_norm(h, hnorm, eps)
