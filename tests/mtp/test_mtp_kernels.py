"""Drafting, verifying and accepting through kernels, on the CPU's emulation, with the bundled model's MTP block.

The same answer as plain decoding through kernels, bit for bit; the block's ring as if nothing had ever been rejected.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from cuemu.backend import CpuBackend, missing
from emulation import assert_as_plain, emulated_llm, greedy, speculated, stepped
from feeding import relative
from torch import Tensor

from ds4.engine import LLM
from ds4.errors import Ds4Error
from ds4.kernels.draft.words import TOKENS
from ds4.kernels.entry import KernelCall
from ds4.kv.ring import ring_read
from ds4.mtp.mtp_kernels import KernelMTPDrafter
from ds4.sampling import Sampler, SamplingParams
from ds4.session import Session

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
CTX, N_PROMPT, N = 256, 120, 10  # past position 128, where all windows are full and HCA closes one
CLOSE = 2e-2  # of a row's norm: codes of the ring that fell differently, as sums are taken in another order


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """The bundled model as with ``--device cuda``."""
    with emulated_llm(CTX) as llm:
        yield llm


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    """The model's own text, so that drafts are good."""
    return [0, *greedy(LLM(device="cpu", ctx=CTX, draft="off").session(), [0], N_PROMPT - 1)[0]]


@pytest.fixture(scope="module")
def plain(llm: LLM, prompt: list[int]) -> tuple[list[int], Tensor, Session]:
    """Plain decoding through kernels: tokens, their rows, and the session, whose drafter was shown every step.

    It goes no further than what can be undone: its caches have all that an earlier position sees.
    """
    session = llm.session()
    return *greedy(session, prompt, N + 8), session


def drafter_of(session: Session) -> KernelMTPDrafter:
    assert isinstance(session.drafter, KernelMTPDrafter)
    return session.drafter


def ring(session: Session, position: int) -> Tensor:
    """Packed rows of the block that a draft at ``position`` can see, but the one that needs the next token."""
    drafter = drafter_of(session)
    drafter.tail.fill()
    return ring_read(drafter.caches[0].ring, position - 128, position - 1)


def test_drafted_and_verified_is_plain(llm: LLM, prompt: list[int], plain: tuple[list[int], Tensor, Session]) -> None:
    """Tokens, logits, every live byte of the cache, and the block's ring; drafts accepted and rejected."""
    session = llm.session()
    ids, rows, kept = speculated(session, prompt, N, (1, 0, 7, 0, 0))
    assert sum(kept) > 0
    assert sum(kept) < sum((1, 7)[i % 2] for i in range(len(kept)))
    position, other = assert_as_plain(session, ids, rows, plain)
    assert torch.equal(ring(session, position), ring(other, position))


def test_the_same_launches_fit_every_step(
    llm: LLM, prompt: list[int], plain: tuple[list[int], Tensor, Session]
) -> None:
    """Draft, verification and acceptance over and over without the host: what a graph has to do."""
    session = llm.session()
    session.prefill(prompt)
    ids, kept = stepped(session, plain[0][0], 1, 2, N)
    assert ids == plain[0][: len(ids)]
    assert sum(kept) > 0


def test_drafts_of_host_device_and_torch(llm: LLM, prompt: list[int], plain: tuple[list[int], Tensor, Session]) -> None:
    """Greedy drafts chosen by the host from the kernels' logits, on the device, and by the block in torch."""
    by_torch = LLM(device="cpu", ctx=CTX).session()
    session = llm.session()
    for each in (session, by_torch):
        each.prefill(prompt)
        each.decode(plain[0][:2])
    history = [*prompt, *plain[0][:3]]
    seen: list[Tensor] = []

    class Recorder(Sampler):
        def sample(self, logits: Tensor, history: Sequence[int]) -> int:
            seen.append(logits.clone())
            return super().sample(logits, history)

    drafts = [each.draft(history, 3, Recorder(SamplingParams())).tokens for each in (session, by_torch)]
    assert drafts[0] == drafts[1]
    assert 0 < relative(torch.stack(seen[:3]), torch.stack(seen[3:])) < CLOSE
    decoder = session._decoder
    assert decoder is not None
    calls = drafter_of(session).draft_calls(3)
    decoder.state.write(session.position, history[-1:])
    decoder.backend.run(calls)
    assert decoder.state.words[TOKENS : TOKENS + 4].tolist() == [history[-1], *drafts[0]]
    sampler = Sampler(SamplingParams(temperature=1.0, top_k=9, seed=4))
    drawn = [session.draft(history, 2, sampler) for _ in range(2)]
    assert drawn[0].tokens == drawn[1].tokens
    tail, position = drafter_of(session).tail, session.position
    assert tail.written == position
    session.decode([history[-1] + 1])  # not what was drafted behind: the row made of it is not true
    assert tail.written == position - 1
    assert [int((p > 0).sum()) for p in drawn[0].probs] == [9, 9]


class Failing:
    """The emulation, until it breaks off at a kernel: the ``nth`` launch of an entry."""

    def __init__(self, entry: str, nth: int) -> None:
        self.entry, self.left = entry, nth
        self._backend = CpuBackend()

    def run(self, calls: Sequence[KernelCall]) -> None:
        for call in calls:
            if call.entry.name == self.entry:
                self.left -= 1
                if not self.left:
                    raise KeyboardInterrupt
            self._backend.run([call])


def test_broken_off_and_not_finite(llm: LLM, prompt: list[int], plain: tuple[list[int], Tensor, Session]) -> None:
    """Either leaves the session where it was, and nothing that shows later."""
    session = llm.session()
    session.prefill(prompt)
    decoder = session._decoder
    assert decoder is not None
    backend = decoder.backend
    for entry, nth in (("draft_push", 1), ("draft_tap", 1)):
        decoder.backend = Failing(entry, nth)
        with pytest.raises(KeyboardInterrupt):
            session.speculate(plain[0][0], 1)
        assert (session.position, drafter_of(session).position) == (N_PROMPT, N_PROMPT)
    decoder.backend = backend
    norm = llm.model.norm.clone()
    try:
        llm.model.norm.fill_(torch.nan)
        with pytest.raises(Ds4Error, match="not finite"):
            session.speculate(plain[0][0], 1)
    finally:
        llm.model.norm.copy_(norm)
    assert session.undoable == 14  # of 16, two tokens having been processed in vain
    tokens, rows = session.speculate(plain[0][0], 1)
    assert tokens == plain[0][1 : 1 + len(tokens)]
    assert torch.equal(rows, plain[1][1 : 1 + len(tokens)])
    assert torch.equal(ring(session, session.position), ring(plain[2], session.position))
