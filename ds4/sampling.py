"""Logits to a token: greedy, or a seeded draw from the filtered distribution.

This is the reference form; a device form has to give the same token for the same logits, parameters and position. The
random number of a draw is a pure function of (seed, position), so a token does not depend on how the sampler came to
its position: rewinding and replaying, or restoring a saved conversation, gives the same token again.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ds4.errors import Ds4Error

_MASK64 = (1 << 64) - 1
MAX_SEED = (1 << 63) - 1
NOT_FINITE = "the model's output is not finite (NaN or infinity): the checkpoint's weights look damaged"


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop; values outside their range raise Ds4Error.

    max_tokens          >= 1      tokens to generate at most
    temperature         >= 0      0 is greedy: the filters below then change nothing, the repetition penalty does
    top_k               >= 0      keep the k likeliest tokens; 0 keeps all
    top_p               (0, 1]    keep the likeliest tokens until their probabilities reach top_p; 1 keeps all
    min_p               [0, 1]    keep tokens at least min_p times as likely as the likeliest; 0 keeps all
    repetition_penalty  > 0       logits of tokens already seen: divided by it if positive, else multiplied; 1 is off
    seed                >= 0      None: fresh entropy for each Sampler
    stop_token_ids      >= 0      stop tokens in addition to the checkpoint's own
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_int("max_tokens", self.max_tokens, 1)
        _check_int("top_k", self.top_k, 0)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, MAX_SEED)
        _check_float("temperature", self.temperature, "0 or more", lambda v: v >= 0)
        _check_float("top_p", self.top_p, "above 0 and at most 1", lambda v: 0 < v <= 1)
        _check_float("min_p", self.min_p, "between 0 and 1", lambda v: 0 <= v <= 1)
        _check_float("repetition_penalty", self.repetition_penalty, "above 0", lambda v: v > 0)
        if isinstance(self.stop_token_ids, (str, bytes)) or not isinstance(self.stop_token_ids, Sequence):
            raise Ds4Error(f"stop_token_ids must be a sequence of token ids, got {self.stop_token_ids!r}")
        for token in self.stop_token_ids:
            _check_int("stop_token_ids", token, 0)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))


def _check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise unless ``value`` is an int (not a bool) in [low, high]."""
    allowed = f"{low} or more" if high is None else f"between {low} and {high}"
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        raise Ds4Error(f"{name} must be a whole number, {allowed}, got {value!r}")


def _check_float(name: str, value: object, allowed: str, accept: Callable[[float], bool]) -> None:
    """Raise unless ``value`` is a finite number (not a bool) that ``accept`` takes."""
    number = None if isinstance(value, bool) or not isinstance(value, int | float) else value
    if number is None or not math.isfinite(number) or not accept(number):
        raise Ds4Error(f"{name} must be a finite number, {allowed}, got {value!r}")


def penalised_logits(logits: torch.Tensor, penalty: float, history: Sequence[int]) -> torch.Tensor:
    """Logits after the repetition penalty (a copy when anything changes).

    logits   float [vocab]   any finite value
    history  token ids       each distinct id is penalised once, however often it occurs
    """
    if penalty == 1.0 or not history:
        return logits
    seen = torch.tensor(sorted(set(history)), dtype=torch.int64, device=logits.device)
    values = logits[seen]
    penalised = logits.clone()
    penalised[seen] = torch.where(values > 0, values / penalty, values * penalty)
    return penalised


def greedy_token(logits: torch.Tensor) -> int:
    """Index of the largest logit, the lowest index on ties; Ds4Error if it is not finite (argmax finds a NaN first)."""
    token = int(torch.argmax(logits))
    if not math.isfinite(float(logits[token])):
        raise Ds4Error(NOT_FINITE)
    return token


def filtered_probs(logits: torch.Tensor, params: SamplingParams, history: Sequence[int] = ()) -> torch.Tensor:
    """The distribution a token is drawn from: probabilities after every filter, zero for what was filtered out.

    In this order: repetition penalty; temperature; softmax; top-k; renormalise; top-p; min-p; renormalise.
    top-p keeps a token while the probabilities of the tokens before it sum to less than top_p, so the likeliest
    always stays; min-p compares with the likeliest, so it does not depend on the normalisation.

    logits   float [vocab]   finite
    history  token ids seen so far (prompt and answer), for the repetition penalty only
    returns  f32 [vocab]     sum 1; one-hot at the greedy token when temperature is 0
    Order:   tokens are ranked by falling logit (after the penalty), lower id first on ties; sums are in f64.
    """
    logits = penalised_logits(logits.float(), params.repetition_penalty, history)
    greedy = greedy_token(logits)
    if params.temperature == 0:
        return torch.zeros_like(logits).index_fill_(0, torch.tensor(greedy, device=logits.device), 1.0)
    probs = torch.softmax((logits.double() - logits[greedy].double()) / params.temperature, dim=0)
    if params.top_k or params.top_p < 1:
        probs = _keep_top(probs, torch.sort(logits, descending=True, stable=True).indices, params)
    if params.min_p:
        probs = torch.where(probs >= params.min_p * probs[greedy], probs, 0.0)
    return (probs / probs.sum()).float()


def _keep_top(probs: torch.Tensor, order: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """top-k, then top-p on what is left; ``order`` i64 [vocab] are the ids by falling logit."""
    ranked = probs[order]
    if params.top_k:
        ranked[params.top_k :] = 0
        ranked /= ranked.sum()
    if params.top_p < 1:
        before = ranked.cumsum(0) - ranked
        before[0] = 0  # the likeliest stays whatever the rounding
        ranked = torch.where(before < params.top_p, ranked, 0.0)
    return torch.zeros_like(probs).index_copy_(0, order, ranked)


def uniform(seed: int, position: int, stream: int = 0) -> float:
    """A number in [0, 1), the same for the same arguments on every machine: splitmix64 of (seed, position, stream).

    ``stream`` separates several draws for one position (a verifier needs one to accept and one to resample).
    Integer arithmetic only, 53 bits, so that a kernel can compute the same number.
    """
    state = _splitmix64(seed & _MASK64)
    state = _splitmix64(state ^ (position & _MASK64))
    state = _splitmix64(state ^ (stream & _MASK64))
    return (state >> 11) * 2.0**-53


def _splitmix64(value: int) -> int:
    """One splitmix64 step (Steele, Lea and Flood 2014): a bijection of 64-bit integers that mixes every bit."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def draw(probs: torch.Tensor, number: float) -> int:
    """The token at which the running sum of ``probs`` (float [vocab], in id order, any scale) passes ``number``."""
    sums = probs.double().cumsum(0)
    target = torch.tensor(number, dtype=torch.float64, device=sums.device) * sums[-1]
    token = int(torch.searchsorted(sums, target, right=True))
    if token < len(probs):  # rounding can push the target onto the total: then the last possible token
        return token
    return int(torch.nonzero(probs)[-1])


class Sampler:
    """Chooses the next token by ``params``; holds nothing but the seed, which is drawn once when params has none."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.seed = secrets.randbits(63) if params.seed is None else params.seed

    def sample(self, logits: torch.Tensor, history: Sequence[int]) -> int:
        """The token at position ``len(history)``.

        logits   float [vocab]  of the last token of ``history``
        history  every token id before this one, prompt included: its length is the position of the draw
        """
        params = self.params
        if params.temperature == 0:
            return greedy_token(penalised_logits(logits, params.repetition_penalty, history))
        return draw(filtered_probs(logits, params, history), uniform(self.seed, len(history)))
