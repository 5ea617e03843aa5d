"""How long drafts are: what steps and drafts cost, how often drafts are accepted, and the length that pays best.

With acceptance rates a_1, a_2, .. (a_i: draft token i is accepted if those before it were) a step with k drafts yields
E(k) = 1 + a_1 + a_1 a_2 + .. + a_1 .. a_k tokens on average and takes c(k + 1) + d(k) seconds, where c(n) is a decode
step of n tokens and d(k) a draft of k. The best k has the most tokens a second; k = 0 is plain decoding.

A head that guesses itself how likely each of its tokens is accepted (DSpark) drafts a whole block, and a token is
verified while the chance that the draft lasts to it is worth more than its time brings elsewhere: s_i > r (c(i + 1) -
c(i)), where s_i is the product of the guesses up to token i and r the tokens a second of late (spec model.md 7.2; the
rule is that of a renewal process, which ends where the marginal rate falls below the mean one).
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Final, Literal

from ds4.errors import Ds4Error
from ds4.kernels.launch import DECODE_ROWS

AUTO: Final = "auto"
DraftLength = int | Literal["auto"]
"""Tokens of a draft, 0 for none, or AUTO: whatever pays best."""

MAX_LENGTH = DECODE_ROWS - 1

_ASSUMED_STEP, _ASSUMED_DRAFT = 0.3, 0.35
"""Cost of one more token in a step, and of one drafted token, in plain steps: before anything is measured."""
_ASSUMED_BLOCK = 0.5
"""Cost of a draft whose tokens are made together, likewise: a few stages beside the trunk's layers."""


def draft_length(wanted: int | str) -> DraftLength:
    """What ``--draft`` and ``draft=`` take: "auto", "off", or 0 to 7 as a number or its digits. Error: Ds4Error."""
    if wanted == AUTO:
        return AUTO
    if wanted == "off":
        return 0
    digits = isinstance(wanted, str) and wanted.isascii() and wanted.isdigit()
    number = int(wanted) if digits or (isinstance(wanted, int) and not isinstance(wanted, bool)) else -1
    if not 0 <= number <= MAX_LENGTH:
        raise Ds4Error(f"draft: {wanted!r} is not auto, off or a number from 0 to {MAX_LENGTH}")
    return number


class Costs:
    """Seconds of decode steps by number of tokens and of drafts by length: medians of the last measurements."""

    _KEPT = 9

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int], deque[float]] = defaultdict(lambda: deque(maxlen=self._KEPT))
        self._steps: dict[int, float] = {}
        self._drafts: dict[int, float] = {}

    def add(self, n_tok: int, step: float, draft: float, drafted: int | None = None) -> None:
        """One decode step of ``n_tok`` tokens took ``step`` seconds, the draft in front of it ``draft``.

        drafted  tokens of that draft; None: all but one of ``n_tok``, none was cut off
        """
        drafted = n_tok - 1 if drafted is None else drafted
        self._steps[n_tok] = self._median("step", n_tok, step)
        if drafted:
            self._drafts[drafted] = self._median("draft", drafted, draft)

    def _median(self, what: str, n: int, seconds: float) -> float:
        kept = self._kept[what, n]
        kept.append(seconds)
        return median(kept)

    def measured(self, n_tok: int) -> int:
        """Measurements kept of steps of ``n_tok`` tokens."""
        return len(self._kept.get(("step", n_tok), ()))

    def step(self, n_tok: int) -> float:
        """Seconds of a step; 1 for a plain one as long as nothing was measured."""
        return _interpolated(self._steps, n_tok, 1 - _ASSUMED_STEP, _ASSUMED_STEP)

    def draft(self, k: int) -> float:
        """Seconds of a draft of ``k`` tokens."""
        if not k:
            return 0.0
        if not self._drafts:
            return self.step(1) * _ASSUMED_DRAFT * k
        return _interpolated(self._drafts, k, 0.0, 1.0)


def _interpolated(found: Mapping[int, float], n: int, base: float, slope: float) -> float:
    """What was found at ``n``; where there is nothing, on the line through the nearest two others, or, with only one
    other, on the line ``base + slope n`` scaled to pass it."""
    if n in found:
        return found[n]
    near = sorted(found, key=lambda m: (abs(m - n), m))[:2]
    if not near:
        return base + slope * n
    if len(near) == 1:
        return found[near[0]] * (base + slope * n) / (base + slope * near[0])
    a, b = near
    # Noise must not make a longer step look cheaper than a shorter one.
    return found[a] + max(0.0, (found[b] - found[a]) / (b - a)) * (n - a)


class Acceptance:
    """Acceptance rates by place in the draft, the last drafts counting most."""

    _FADE, _PRIOR, _PRIOR_WEIGHT, _NEXT = 0.97, 0.7, 2.0, 0.85

    def __init__(self) -> None:
        self.drafts = 0
        self._tried = [0.0] * MAX_LENGTH
        self._kept = [0.0] * MAX_LENGTH

    def add(self, k: int, n: int) -> None:
        """``n`` of ``k`` drafted tokens were accepted."""
        self.drafts += 1
        for i in range(min(n + 1, k)):
            self._tried[i] = self._tried[i] * self._FADE + 1
            self._kept[i] = self._kept[i] * self._FADE + (i < n)

    def expected(self) -> list[float]:
        """E(0) .. E(7); a place not tried yet is expected to be almost as good as the one before it."""
        out, prior, product = [1.0], self._PRIOR, 1.0
        for tried, kept in zip(self._tried, self._kept, strict=True):
            rate = (kept + prior * self._PRIOR_WEIGHT) / (tried + self._PRIOR_WEIGHT)
            product *= rate
            out.append(out[-1] + product)
            prior = rate * self._NEXT
        return out


class Pace:
    """Chooses the length of each draft of one request.

    A length follows from how many tokens of earlier drafts were accepted, from times, and from what the head thinks of
    the tokens that stay, never from a token that a draft lost, so it changes neither the text at temperature 0 nor the
    distribution above it (ds4/mtp/accept.py).
    wanted   as asked for
    most     longest draft of the head
    timed    whether measured times decide; else assumed costs do, so that a seed gives the same text again
    stopped  AUTO: drafting does not pay for this request and has ended
    """

    EVIDENCE, TRIAL = 12, 16
    """Drafts before AUTO may doubt, and steps, every other one plain, through which it has to doubt to give up: costs
    measured side by side are compared fairly even on a machine whose speed changes."""
    PROBES, PROBE_EVERY = 3, 64
    """Plain steps at first and ever so often, from which to know what drafting saves."""
    _RECENT = 48
    """Drafts with confidence over which tokens a second are counted."""

    def __init__(self, wanted: DraftLength, most: int, costs: Costs, *, timed: bool) -> None:
        self._wanted = wanted
        self._most = most
        self._costs = costs
        self._timed = timed
        self._acceptance = Acceptance()
        self._recent: deque[tuple[int, int, int]] = deque(maxlen=self._RECENT)  # drafted, verified, accepted
        self._since_probe = 0
        self._doubts = 0
        self.stopped = False

    def next(self) -> int:
        """Length of the next draft; 0 for none."""
        if self._wanted == 0 or self.stopped or not self._most:
            return 0
        self._since_probe += 1
        if self._timed and self._probe_due():
            self._since_probe = 0
            return 0
        if self._wanted != AUTO:
            return min(self._wanted, self._most)
        best = self._best()
        if best or self._acceptance.drafts < self.EVIDENCE:
            self._doubts = 0
            return best or self._shortest
        self._doubts += 1
        self.stopped = self._doubts > self.TRIAL
        return 0 if self.stopped or self._doubts % 2 == 0 else self._shortest

    @property
    def _shortest(self) -> int:
        """Draft with which to learn whether drafting pays; a block that will be cut is as long as it can be."""
        return self._most if self._recent else 1

    def keep(self, confidence: Sequence[float]) -> int:
        """How many tokens of a draft are worth verifying, from the head's guesses (raw logits) for each of them.

        Whether a token stays depends on the guesses up to its own, and so on the tokens in front of it. All of them
        where AUTO does not decide.
        """
        if self._wanted != AUTO:
            return len(confidence)
        costs = self._pricing()
        rate, lasts = max(self._rate(costs), 1 / costs.step(1)), 1.0
        for n, logit in enumerate(confidence):
            lasts *= 0.5 + 0.5 * math.tanh(0.5 * logit)  # the logistic function, which does not overflow like this
            if lasts <= rate * (costs.step(n + 2) - costs.step(n + 1)):
                return n
        return len(confidence)

    def _rate(self, costs: Costs) -> float:
        """Tokens a second of the last steps with a draft that had confidence; 0 if there were none."""
        drafts = sum(costs.draft(drafted) if self._timed else _ASSUMED_BLOCK for drafted, _, _ in self._recent)
        seconds = drafts + sum(costs.step(kept + 1) for _, kept, _ in self._recent)
        return sum(n + 1 for _, _, n in self._recent) / seconds if seconds else 0.0

    def _pricing(self) -> Costs:
        return self._costs if self._timed else Costs()

    def _probe_due(self) -> bool:
        if self._costs.measured(1) < self.PROBES:
            return True
        return self._wanted == AUTO and self._since_probe > self.PROBE_EVERY

    def _best(self) -> int:
        costs = self._pricing()
        if self._recent:
            return self._most if self._rate(costs) > 1 / costs.step(1) else 0
        speeds = [e / (costs.step(k + 1) + costs.draft(k)) for k, e in enumerate(self._acceptance.expected())]
        return max(range(self._most + 1), key=lambda k: (speeds[k], -k))

    def add(self, k: int, n: int, drafted: int | None = None) -> None:
        """``n`` of ``k`` verified tokens were accepted.

        drafted  tokens before those were cut off that :meth:`keep` left out; None: the draft had no confidence
        """
        if drafted is not None:
            self._recent.append((drafted, k, n))
        if k or drafted:
            self._acceptance.add(k, n)
