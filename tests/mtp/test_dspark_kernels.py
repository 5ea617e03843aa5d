"""DSpark drafts through kernels, on the CPU's emulation, with the bundled model and the bundled head.

The same answer as plain decoding through kernels, bit for bit, and the drafts of the head in torch: logits of a row
within 1e-4 of its norm, as sums are taken in another order (measured 1.2e-5 and less).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from cuemu.backend import missing
from emulation import assert_as_plain, emulated_llm, greedy, prefill_in_torch, speculated, stepped
from feeding import Recorder, drafted, relative
from torch import Tensor

from ds4.demo import bundled_draft_path
from ds4.engine import LLM
from ds4.errors import Ds4Error
from ds4.kernels.draft.words import TOKENS
from ds4.kv.ring import ring_read
from ds4.model.device_params import DeviceParams
from ds4.mtp.dspark import DSpark
from ds4.mtp.dspark_kernels import KernelDSparkDrafter
from ds4.sampling import Sampler, SamplingParams
from ds4.session import Session

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
CTX, N_PROMPT, N = 256, 142, 12  # the rings have 144 slots, so that a block's rows take the place of old ones
CLOSE = 1e-4


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """The bundled model as with ``--device cuda``."""
    with emulated_llm(CTX, bundled_draft_path()) as llm:
        yield llm


@pytest.fixture(scope="module")
def by_torch() -> LLM:
    return LLM(device="cpu", ctx=CTX, draft_model=bundled_draft_path())


@pytest.fixture(scope="module")
def prompt(by_torch: LLM) -> list[int]:
    """A question and the beginning of the model's own answer, so that drafts are good."""
    ids = by_torch.encode_prompt("Tell me a short story about a robot learning to paint.")
    session = by_torch.session()
    session.drafter = None
    return [*ids, *greedy(session, ids, N_PROMPT - len(ids))[0]]


@pytest.fixture(scope="module")
def plain(llm: LLM, prompt: list[int]) -> tuple[list[int], Tensor, Session]:
    """Plain decoding through kernels: tokens, their rows, and the session, whose drafter was shown every step."""
    session = llm.session()
    return *greedy(session, prompt, N + 8), session


def drafter_of(session: Session) -> KernelDSparkDrafter:
    assert isinstance(session.drafter, KernelDSparkDrafter)
    return session.drafter


def rings(session: Session, position: int) -> Tensor:
    """Packed rows that a draft at ``position`` can see, of all stages, but that of the prompt's last token: a draft
    behind the prompt writes it anew, in the decode form."""
    drafter = drafter_of(session)
    drafter.tail.fill()
    rows = torch.stack([ring_read(cache.ring, position - 128, position) for cache in drafter.caches])
    last = N_PROMPT - 1 - (position - 128)
    return torch.cat((rows[:, :last], rows[:, last + 1 :]), dim=1)


def test_drafted_and_verified_is_plain(llm: LLM, prompt: list[int], plain: tuple[list[int], Tensor, Session]) -> None:
    """Tokens, logits, every live byte of the cache, and the rings; drafts accepted and rejected."""
    session = llm.session()
    ids, rows, kept = speculated(session, prompt, N, (4, 0))
    assert 0 < sum(kept) < 4 * len(kept)
    position, other = assert_as_plain(session, ids, rows, plain)
    assert torch.equal(rings(session, position), rings(other, position))


def test_the_same_launches_fit_every_step(
    llm: LLM, prompt: list[int], plain: tuple[list[int], Tensor, Session]
) -> None:
    """Draft, verification and acceptance over and over without the host: what a graph has to do."""
    session = llm.session()
    session.prefill(prompt)
    ids, kept = stepped(session, plain[0][0], 4, 5, N)
    assert ids == plain[0][: len(ids)]
    assert 0 < sum(kept) < 4 * len(kept)


def test_drafts_of_host_device_and_torch(
    llm: LLM, by_torch: LLM, prompt: list[int], plain: tuple[list[int], Tensor, Session]
) -> None:
    """Chosen by the host from the kernels' logits, on the device, and by the head in torch."""
    session, reference = llm.session(), by_torch.session()
    for each in (session, reference):
        prefill_in_torch(each, prompt)
        each.decode(plain[0][:1])
    history = [*prompt, *plain[0][:2]]
    drafter, other = drafter_of(session), reference.drafter
    assert other is not None
    for _ in range(2):  # the second time nothing is missing, and the block's own rows lie in the rings
        (draft, logits), (expected, rows) = (drafted(each, history, 5) for each in (drafter, other))
        assert draft.tokens == expected.tokens
        assert 0 < relative(logits, rows) < CLOSE
        assert draft.confidence == pytest.approx(expected.confidence, abs=CLOSE)
    assert drafter.draft(history, 2, Recorder()).tokens == draft.tokens[:2]
    decoder = session._decoder
    assert decoder is not None
    calls = drafter.draft_calls(5)
    decoder.state.write(session.position, history[-1:])
    decoder.backend.run(calls)
    assert decoder.state.words[TOKENS : TOKENS + 6].tolist() == [history[-1], *draft.tokens]
    sampler = Sampler(SamplingParams(temperature=1.0, top_k=9, seed=4))
    drawn = [drafter.draft(history, 2, sampler) for _ in range(2)]
    assert drawn[0].tokens == drawn[1].tokens
    assert [int((p > 0).sum()) for p in drawn[0].probs] == [9, 9]


def test_first_tokens_of_a_text(llm: LLM, by_torch: LLM, prompt: list[int]) -> None:
    """None in front of the first; then a context that is shorter than the block."""
    session, reference = llm.session(), by_torch.session()
    drafter, other = drafter_of(session), reference.drafter
    assert other is not None
    assert drafter.draft(prompt[:1], 5, Recorder()).tokens == []
    for each in (session, reference):
        prefill_in_torch(each, prompt[:2])
    (draft, logits), (expected, rows) = (drafted(each, prompt[:3], 5) for each in (drafter, other))
    assert draft.tokens == expected.tokens
    assert relative(logits, rows) < CLOSE


def test_a_block_that_is_too_long(llm: LLM) -> None:
    config = replace(llm.config, dspark_block_size=9)
    head = DSpark(config, DeviceParams(llm.checkpoint, "cpu"), llm.model)
    decoder = llm.session()._decoder
    assert decoder is not None
    with pytest.raises(Ds4Error, match=r"draft: a DSpark block of 9 tokens has no kernels, which take 8 at most"):
        KernelDSparkDrafter(head, decoder)
