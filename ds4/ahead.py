"""Decoding ahead: on the device's own loop, a step is launched before it is known what the one before it chose."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ds4.draft_length import Costs, DraftLength
from ds4.graph.loop import DeviceLoop
from ds4.kernels.head.op import sample_params
from ds4.kernels.head.sample_op import MAX_VOCAB
from ds4.sampling import Sampler
from ds4.session import Session
from ds4.speculation import Speculation


class Ahead(Speculation):
    """:class:`Speculation` whose :meth:`tokens` come from ``loop``, the session's; rows of logits stay on the device.

    One step at most is launched beyond the tokens that were given out. When nobody asks for more it is worth nothing:
    it lies in front of the session's position, as a rejected draft does.

    A drawn token is the one that the host draws from the same seed, position and length of its draft. So where tokens
    are drawn, a draft is made shorter only when it is known how many tokens are left for it.
    """

    def __init__(self, session: Session, sampler: Sampler, length: DraftLength, costs: Costs, loop: DeviceLoop) -> None:
        super().__init__(session, sampler, length, costs)
        self._loop = loop
        self._params = _drawn_by(sampler)
        self._going = False
        self._wanted: int | None = None  # length of the next draft, once it is chosen

    def tokens(self, history: Sequence[int], most: int) -> list[int]:
        session, loop, token = self.session, self._loop, history[-1]
        if not self._going or (loop.position, loop.token) != (session.position, token):
            loop.start(session.position, token, self._params)
            self._going = True
        while self._launch(most):
            pass
        outcome = session.take(token, loop)
        self._count(outcome.k, outcome.k, len(outcome.tokens) - 1, 0.0, outcome.seconds, confident=False)
        return outcome.tokens

    def _launch(self, most: int) -> bool:
        """Launch a step, if what is flying leaves any of the ``most`` tokens to it, and if all of it can be undone."""
        flying, session = self._loop.flying, self.session
        reach = sum(k + 1 for k in flying)
        left = most - reach
        if left < 1:
            return False
        if self._wanted is None:
            self._wanted = self._pace.next()
        k = min(self._wanted, left - 1) if session.position else 0
        reach += k + 1
        if flying and (reach > session.cache.max_draft or (self._params is not None and k < self._wanted)):
            return False
        session.reach(session.position + reach)
        if not self._loop.launch(k):
            return False
        self._wanted = None
        return True


def _drawn_by(sampler: Sampler) -> Tensor | None:
    """What the launches draw by, i64 [6]; None where they take the likeliest token."""
    p = sampler.params
    if p.temperature == 0:
        return None
    top_k = min(p.top_k, MAX_VOCAB)  # as many as there can be
    return sample_params(temperature=p.temperature, top_k=top_k, top_p=p.top_p, min_p=p.min_p, seed=sampler.seed)


def decoding(session: Session, sampler: Sampler, length: DraftLength, costs: Costs) -> Speculation:
    """How an answer's tokens are made: ahead where the session can, step by step elsewhere."""
    loop = session.loop(sampler, drawing=True)
    return (
        Speculation(session, sampler, length, costs) if loop is None else Ahead(session, sampler, length, costs, loop)
    )
