"""How long drafts are: what steps and drafts cost, how often drafts are accepted, and the length that pays best.

With acceptance rates a_1, a_2, .. (a_i: draft token i is accepted if those before it were) a step with k drafts yields
E(k) = 1 + a_1 + a_1 a_2 + .. + a_1 .. a_k tokens on average and takes c(k + 1) + d(k) seconds, where c(n) is a decode
step of n tokens and d(k) a draft of k. The best k has the most tokens a second; k = 0 is plain decoding.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
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

    def add(self, n_tok: int, step: float, draft: float) -> None:
        """One decode step of ``n_tok`` tokens took ``step`` seconds, the draft in front of it ``draft``."""
        self._steps[n_tok] = self._median("step", n_tok, step)
        if n_tok > 1:
            self._drafts[n_tok - 1] = self._median("draft", n_tok - 1, draft)

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

    A length follows from how many tokens of earlier drafts were accepted and from times, never from a token that a
    draft lost, so it changes neither the text at temperature 0 nor the distribution above it (ds4/mtp/accept.py).
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

    def __init__(self, wanted: DraftLength, most: int, costs: Costs, *, timed: bool) -> None:
        self._wanted = wanted
        self._most = most
        self._costs = costs
        self._timed = timed
        self._acceptance = Acceptance()
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
            return max(1, best)
        self._doubts += 1
        self.stopped = self._doubts > self.TRIAL
        return 0 if self.stopped else self._doubts % 2

    def _probe_due(self) -> bool:
        if self._costs.measured(1) < self.PROBES:
            return True
        return self._wanted == AUTO and self._since_probe > self.PROBE_EVERY

    def _best(self) -> int:
        costs = self._costs if self._timed else Costs()
        speeds = [e / (costs.step(k + 1) + costs.draft(k)) for k, e in enumerate(self._acceptance.expected())]
        return max(range(self._most + 1), key=lambda k: (speeds[k], -k))

    def add(self, k: int, n: int) -> None:
        """``n`` of ``k`` drafted tokens were accepted."""
        if k:
            self._acceptance.add(k, n)
