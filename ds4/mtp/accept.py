"""How much of a draft is kept: greedy acceptance, and rejection sampling that leaves the distribution as it is.

The verifier gives one row of logits for the token before the draft and one for each drafted token. At temperature 0 a
draft token is kept while it is what the verifier chooses there, and behind the last kept one comes a token of the
verifier's own: the plain text, token for token. Above it a token x, drawn from q, is kept with probability
min(1, p(x) / q(x)), and the token that replaces a rejected one is drawn from max(0, p - q): together that is a draw
from p, whatever q is (spec model.md 7.3; Leviathan et al. 2023).

A rule that shortens drafts may look at the tokens that stay in a draft, not at those it cuts off: the random numbers of
the latter are used again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds4.mtp.drafter import Draft
from ds4.sampling import Sampler, filtered_probs, uniform

ACCEPT_STREAM = 1
"""Which of a position's random numbers decides on its draft; 0 draws the token itself, as without a draft."""


@dataclass(frozen=True)
class Accepted:
    """``n`` tokens of the draft are kept; ``token`` comes behind them."""

    n: int
    token: int


def accept(draft: Draft, logits: Tensor, history: Sequence[int], sampler: Sampler) -> Accepted:
    """What is kept of a draft.

    logits   f32 [len(draft.tokens) + 1, vocab], on the CPU: the verifier's; row 0 follows ``history``, row i is behind
             draft token i - 1
    history  every token id before the draft; the draft's first token has position ``len(history)``
    Error:   Ds4Error where logits that are needed are not finite; ValueError for another number of rows.
    """
    k = len(draft.tokens)
    if logits.shape[0] != k + 1:
        raise ValueError(f"a draft of {k} tokens needs {k + 1} rows of logits, got {logits.shape[0]}")
    if sampler.params.temperature == 0:
        return _accept_greedy(draft.tokens, logits, history, sampler)
    start, seed, seen = len(history), sampler.seed, [*history, *draft.tokens]
    # Made one by one, as far as they are needed: a filter over a large vocabulary takes a while.
    target = (filtered_probs(row, sampler.params, seen[: start + i])[None] for i, row in enumerate(logits))
    tokens = torch.tensor([draft.tokens], dtype=torch.int64)
    probs = [p[None] for p in draft.probs] or [_certain(t, logits) for t in draft.tokens]
    tests = torch.tensor([[uniform(seed, start + i, ACCEPT_STREAM) for i in range(k)]], dtype=torch.float64)
    draws = torch.tensor([[uniform(seed, start + i) for i in range(k + 1)]], dtype=torch.float64)
    n, token = accept_sampled(tokens, probs, target, tests, draws)
    return Accepted(int(n), int(token))


def _accept_greedy(tokens: Sequence[int], logits: Tensor, history: Sequence[int], sampler: Sampler) -> Accepted:
    seen = list(history)
    for i, row in enumerate(logits[:-1]):
        token = sampler.sample(row, seen)
        if token != tokens[i]:
            return Accepted(i, token)
        seen.append(token)
    return Accepted(len(tokens), sampler.sample(logits[-1], seen))


def _certain(token: int, logits: Tensor) -> Tensor:
    """The distribution f32 ``[1, vocab]`` of a token that was not drawn."""
    return logits.new_zeros(1, logits.shape[1]).index_fill_(1, torch.tensor(token, device=logits.device), 1.0)


def accept_sampled(
    tokens: Tensor, probs: Sequence[Tensor], target: Iterable[Tensor], tests: Tensor, draws: Tensor
) -> tuple[Tensor, Tensor]:
    """Rejection sampling of b drafts of k tokens, each on its own: (number kept i64 ``[b]``, next token i64 ``[b]``).

    tokens  i64 [b, k]
    probs   k of f32 [b, vocab]      the distributions they were drawn from
    target  k + 1 of f32 [b, vocab]  the verifier's, filtered; taken only as long as a draft is still being kept
    tests   f64 [b, k]      in [0, 1): whether token i is kept
    draws   f64 [b, k + 1]  in [0, 1): the next token, if it comes in place i
    """
    n_drafts, k = tokens.shape
    n, token = torch.zeros(n_drafts, dtype=torch.int64), torch.zeros(n_drafts, dtype=torch.int64)
    going = torch.ones(n_drafts, dtype=torch.bool)
    for i, p in enumerate(target):
        kept = going & _passes(tokens[:, i], probs[i], p, tests[:, i]) if i < k else torch.zeros_like(going)
        ended = going & ~kept
        if ended.any():
            left = remainder(p[ended], probs[i][ended]) if i < k else p[ended]
            token[ended] = draw_rows(left, draws[ended, i])
        n += kept
        going = kept
        if not going.any():
            break
    return n, token


def _passes(token: Tensor, q: Tensor, p: Tensor, number: Tensor) -> Tensor:
    """Bool ``[b]``: ``number < p(token) / q(token)``."""
    at = token[:, None]
    return number * q.gather(1, at)[:, 0].double() < p.gather(1, at)[:, 0].double()


def remainder(p: Tensor, q: Tensor) -> Tensor:
    """What a rejected token is replaced from, not normalised: ``max(0, p - q)`` of f32 ``[b, vocab]``.

    ``p`` itself where nothing is left: then both are equal up to rounding, and so is the draw.
    """
    left = (p.double() - q.double()).clamp_(min=0)
    return torch.where(left.sum(1, keepdim=True) > 0, left, p.double())


def draw_rows(probs: Tensor, numbers: Tensor) -> Tensor:
    """``ds4.sampling.draw`` of each row: float ``[b, vocab]``, f64 ``[b]`` -> i64 ``[b]``."""
    sums = probs.double().cumsum(1)
    found = torch.searchsorted(sums, numbers[:, None] * sums[:, -1:], right=True)[:, 0]
    # Rounding can push the target onto the total: then the last possible token, where the total is first reached.
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())[:, 0]
    return torch.minimum(found, last)
