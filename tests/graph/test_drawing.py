"""Answers that are drawn in the device's own loop, on the CPU's emulation of the kernels: token for token what the host
draws from the same logits, with drafts accepted and rejected, by other parameters from answer to answer."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from cuemu.backend import missing
from recorded_runner import RecordedRunner

sys.path.append(str(Path(__file__).resolve().parents[1] / "mtp"))

from emulation import emulated_llm

from ds4.ahead import Ahead, decoding
from ds4.demo import bundled_draft_path
from ds4.draft_length import Costs
from ds4.engine import LLM
from ds4.errors import Ds4Error
from ds4.graph.loop import DeviceLoop
from ds4.sampling import Sampler, SamplingParams
from ds4.session import Session
from ds4.speculation import DraftStatistics, Speculation

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

CTX, N = 128, 7
PROMPT = [0, *range(5, 26)]
ANSWERS = (
    SamplingParams(temperature=0.8, top_p=0.95, seed=11),
    SamplingParams(),  # other lists, on the same words
    SamplingParams(temperature=1.4, top_k=20, min_p=0.05, seed=2**62),
)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with emulated_llm(CTX) as made:
        yield made


def answered(going: Speculation, history: list[int], n: int) -> list[int]:
    """``history`` and n tokens more."""
    end = len(history) + n
    while len(history) < end:
        history = [*history, *going.tokens(history, end - len(history))]
    assert going.session.ids == history[:-1]
    return history


def by_the_host(llm: LLM, k: int, answers: Sequence[SamplingParams]) -> tuple[list[int], Session]:
    """Answers one behind the other in drafts of k tokens, the drawn ones chosen step by step by the host."""
    session = llm.session()
    history = [*PROMPT, int(session.prefill(PROMPT).argmax())]
    for params in answers:
        history = answered(Speculation(session, Sampler(params), k, Costs()), history, N)
    return history, session


def by_the_device(
    llm: LLM, k: int, answers: Sequence[SamplingParams]
) -> tuple[list[int], Session, list[DraftStatistics]]:
    """The same in the device's loop, whose lists are recorded once and replayed."""
    session, statistics = llm.session(), []
    decoder = session._decoder
    assert decoder is not None
    runner = RecordedRunner(decoder)
    loop = session._loop = DeviceLoop(decoder, session._kernel_drafter, runner)
    history = [*PROMPT, int(session.prefill(PROMPT).argmax())]
    for params in answers:
        going = decoding(session, Sampler(params), k, Costs())
        assert isinstance(going, Ahead)
        history = answered(going, history, N)
        statistics.append(going.statistics)
    assert runner.recorded == len(loop._ready)  # each list once, whatever the parameters
    return history, session, statistics


def assert_alike(llm: LLM, k: int, answers: Sequence[SamplingParams]) -> list[DraftStatistics]:
    """The device's statistics of drawn answers, its text and live bytes being the host's."""
    want, host = by_the_host(llm, k, answers)
    got, session, statistics = by_the_device(llm, k, answers)
    assert got == want
    live = session.cache.live(session.position)
    assert all(torch.equal(live[name], part) for name, part in host.cache.live(host.position).items())
    return [s for s, params in zip(statistics, answers, strict=True) if params.temperature]


def test_drawn_tokens_are_the_hosts(llm: LLM) -> None:
    assert_alike(llm, 0, ANSWERS[:1])


def test_drawn_drafts_are_the_hosts(llm: LLM) -> None:
    assert all(0 < s.accepted < s.drafted for s in assert_alike(llm, 2, ANSWERS))


def test_drawn_blocks_are_the_hosts() -> None:
    with emulated_llm(CTX, bundled_draft_path()) as llm:
        drawn = assert_alike(llm, 4, ANSWERS[:1])
    assert 0 < sum(s.accepted for s in drawn) < sum(s.drafted for s in drawn)


def test_a_row_that_is_not_finite_is_an_error(llm: LLM) -> None:
    session, sampler = llm.session(), Sampler(SamplingParams(temperature=1.0, seed=1))
    history = [*PROMPT[:20], int(session.prefill(PROMPT[:20]).argmax())]
    norm = llm.model.norm.clone()
    for k in (0, 1):
        going = decoding(session, sampler, k, Costs())
        try:
            llm.model.norm.fill_(torch.nan)
            with pytest.raises(Ds4Error, match="not finite"):
                going.tokens(history, 4)
        finally:
            llm.model.norm.copy_(norm)
        assert session.position == 20


def test_a_penalty_is_the_hosts(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, repetition_penalty=1.1)
    assert type(decoding(llm.session(), Sampler(params), 1, Costs())) is Speculation
