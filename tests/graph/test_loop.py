"""The device's own loop on the CPU's emulation of the kernels: lists recorded once and replayed, launched ahead.

Compared bit for bit with single steps that the host leads, and with lists made anew for every step, across 4- and
128-boundaries, with drafts accepted and rejected.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest
import torch
from cuemu.backend import CpuBackend, missing
from recorded_runner import RecordedRunner

from ds4 import engine
from ds4.ahead import Ahead, decoding
from ds4.draft_length import Costs
from ds4.engine import LLM, Statistics
from ds4.errors import Ds4Error
from ds4.graph.loop import DeviceLoop, Outcome, Plan
from ds4.graph.runner import EagerRunner, Left
from ds4.kernels.draft import words as at
from ds4.kv.spec import MAX_UNDONE
from ds4.mtp.mtp_kernels import KernelMTPDrafter
from ds4.sampling import Sampler, SamplingParams
from ds4.session import Session
from ds4.speculation import Speculation

needs_emulation = pytest.mark.skipif(missing() is not None, reason=str(missing()))
CTX, N_PROMPT, N = 256, 121, 8
GREEDY = SamplingParams()


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """The bundled model as with ``--device cuda``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "resolve_device", lambda device: device)
        patch.setattr(engine, "current_gpu", lambda: torch.device("cpu"))
        patch.setattr(engine, "backend_for", lambda device: CpuBackend())
        yield LLM(device="cuda", ctx=CTX)


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    """The model's own text, so that drafts are good."""
    return [0, *greedy(LLM(device="cpu", ctx=CTX, draft="off").session(), [0], N_PROMPT - 1)]


def greedy(session: Session, prompt: list[int], n: int) -> list[int]:
    """The next n tokens by single steps, which the host leads."""
    ids = [int(session.prefill(prompt).argmax())]
    while len(ids) < n:
        ids.append(int(session.decode([ids[-1]])[0].argmax()))
    return ids


@pytest.fixture(scope="module")
def plain(llm: LLM, prompt: list[int]) -> tuple[list[int], Session]:
    """N + 1 tokens by single steps, and the session."""
    session = llm.session()
    return greedy(session, prompt, N + 1), session


def looped(
    session: Session, first: int, runner: EagerRunner, *, ahead: bool, anew: bool = False
) -> tuple[list[int], list[Outcome]]:
    """At least N tokens behind ``first``, in drafts of 3, 0, 1 and 0 tokens in turn, and what each step did.

    anew  every step is a list of its own, in memory of its own
    """
    decoder, drafter = session._decoder, session._kernel_drafter
    assert decoder is not None
    assert isinstance(drafter, KernelMTPDrafter)
    loop = DeviceLoop(decoder, drafter, runner)
    loop.start(session.position, first)
    ids, outcomes, launched = [first], [], 0
    while len(ids) <= N:
        if anew:
            decoder._steps.clear()
            drafter._first.clear()
            drafter._chain = None
        while len(loop.flying) <= ahead and loop.launch((3, 0, 1, 0)[launched % 4]):
            launched += 1
        session.reach(loop.position + sum(k + 1 for k in loop.flying))
        outcomes.append(session.take(ids[-1], loop))
        ids += outcomes[-1].tokens
    assert loop.position == session.position
    return ids, outcomes


def same_state(session: Session, other: Session) -> bool:
    """Every live byte of the caches, as far as both got."""
    position = min(session.position, other.position)
    live = session.cache.live(position)
    return all(torch.equal(live[name], part) for name, part in other.cache.live(position).items())


@needs_emulation
def test_recorded_and_launched_ahead_is_plain(llm: LLM, prompt: list[int], plain: tuple[list[int], Session]) -> None:
    session = llm.session()
    session.prefill(prompt)
    decoder = session._decoder
    assert decoder is not None
    runner = RecordedRunner(decoder)
    ids, outcomes = looped(session, plain[0][0], runner, ahead=True)
    assert ids[: N + 1] == plain[0]
    kept = [(outcome.k, len(outcome.tokens) - 1) for outcome in outcomes]
    assert any(n > 0 for _, n in kept)
    assert any(n < k for k, n in kept)
    assert {0, 1, 3} == {k for k, _ in kept}
    assert session.position // 128 == 1 + N_PROMPT // 128
    assert same_state(session, plain[1])
    assert all(outcome.finite and outcome.seconds > 0 for outcome in outcomes)
    assert runner.recorded < runner.replayed - 1  # the same lists, over and over


@needs_emulation
def test_lists_made_anew_for_every_step_do_the_same(
    llm: LLM, prompt: list[int], plain: tuple[list[int], Session]
) -> None:
    """Nothing that a replay finds in the tensors it works in comes from the one before."""
    session = llm.session()
    session.prefill(prompt)
    decoder = session._decoder
    assert decoder is not None
    runner = EagerRunner(decoder)
    ids, _ = looped(session, plain[0][0], runner, ahead=False, anew=True)
    assert ids[: N + 1] == plain[0]
    assert same_state(session, plain[1])


@needs_emulation
def test_a_step_too_many_leaves_no_trace(llm: LLM, prompt: list[int], plain: tuple[list[int], Session]) -> None:
    """An answer that a stop token ends, its text gone on with, and logits that are not finite."""
    session, ids = llm.session(), plain[0]
    end = next(i for i in range(N - 7, N) if ids[i] not in ids[:i])
    *_, statistics = llm.generate(prompt, SamplingParams(stop_token_ids=(ids[end],)), session=session, draft=1)
    assert isinstance(statistics, Statistics)
    assert (statistics.token_ids, statistics.finish_reason) == (ids[: end + 1], "stop")
    assert session.position == N_PROMPT + end
    assert session._loop is not None
    assert session._loop.flying  # launched, and of no use to anybody
    assert same_state(session, plain[1])

    history, norm = [*prompt, *ids[: end + 1]], llm.model.norm.clone()
    going = decoding(session, Sampler(GREEDY), 0, Costs())
    assert isinstance(going, Ahead)
    try:
        llm.model.norm.fill_(torch.nan)
        with pytest.raises(Ds4Error, match="not finite"):
            going.tokens(history, 2)
    finally:
        llm.model.norm.copy_(norm)
    session.rewind(session.position - len(history) + 1)
    assert decoding(session, Sampler(GREEDY), 0, Costs()).tokens(history, 1) == [ids[end + 1]]
    assert same_state(session, plain[1])


@needs_emulation
def test_two_long_drafts_can_be_undone(llm: LLM, prompt: list[int], plain: tuple[list[int], Session]) -> None:
    """Down to the first token, and the text goes on from there (tests/kv/test_cache.py shows that the rings are just
    long enough for it)."""
    session, ids = llm.session(), plain[0]
    session.prefill(prompt)
    loop = session.loop(Sampler(GREEDY))
    assert loop is not None
    session.reach(N_PROMPT + 16)
    loop.start(N_PROMPT, ids[0])
    assert [loop.launch(7), loop.launch(7), loop.flying] == [True, True, [7, 7]]
    outcome = session.take(ids[0], loop)
    assert outcome.tokens == ids[1 : len(outcome.tokens) + 1]
    session.rewind(session.position - N_PROMPT - 1)
    for token, following in itertools.pairwise(ids[1:]):
        assert int(session.decode([token])[0].argmax()) == following
    assert same_state(session, plain[1])


@needs_emulation
def test_who_has_a_loop(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    session = llm.session()
    loop = session.loop(Sampler(GREEDY))
    assert loop is not None
    assert session.loop(Sampler(GREEDY)) is loop  # with its graphs
    drawn = Sampler(SamplingParams(temperature=0.5))
    assert session.loop(drawn) is None
    assert session.loop(drawn, drawing=True) is loop
    for temperature in (0.0, 0.5):
        penalised = Sampler(SamplingParams(temperature=temperature, repetition_penalty=1.1))
        assert session.loop(penalised, drawing=True) is None
        assert type(decoding(session, penalised, 0, Costs())) is Speculation
    session.drafter = None
    without = session.loop(Sampler(GREEDY))
    assert without is not None
    assert (without is loop, without.drafter) == (False, None)
    monkeypatch.setattr(type(session._decoder), "timed", True)
    assert session.loop(Sampler(GREEDY)) is None
    assert LLM(device="cpu", ctx=CTX).session().loop(Sampler(GREEDY)) is None


# The host's part alone: what is launched when


class Device:
    """Runner, decoder and draft head of a device that keeps ``accepted`` tokens of each draft in turn, if there are
    so many; its tokens count up, each one is its position's number."""

    def __init__(self, accepted: Sequence[int] = ()) -> None:
        self.accepted_in_turn = accepted or (0,)
        self.accepted = itertools.cycle(self.accepted_in_turn)
        self.plans: list[Plan] = []
        self.status = 0
        self.backend = None
        self.state = self.cache = self
        self.holders: set[object] = set()
        self._left: list[Left] = []
        self._words = [0] * at.WORDS
        self._steps: dict[int, SimpleNamespace] = {}
        self.unwritten, self.highest = 0, 0

    # of the decoder and its state

    def step(self, n_tok: int) -> SimpleNamespace:
        return self._steps.setdefault(n_tok, SimpleNamespace(calls=[], accept=[n_tok - 1]))

    def write(self, position: int, tokens: list[int]) -> None:
        self._words[at.POS], self._words[at.TOKENS] = position, tokens[0]

    # of the runner

    def ready(self, calls: list) -> list:
        return calls

    def launch(self, ready: list) -> None:
        k, pairs = ready[-1], next(iter(ready[:-1]), 0)
        words, start = self._words, self._words[at.POS]
        assert pairs <= start
        if pairs:
            assert self.unwritten <= pairs <= 8
            self.unwritten = 0
        n = min(k, next(self.accepted))
        words[at.POS], words[at.ACCEPTED], words[at.STATUS] = start + n + 1, n, self.status
        words[at.TOKENS : at.TOKENS + k + 1] = [start + n + 1, *range(start + 1, start + k + 1)]
        self.unwritten += n + 1
        self.highest = max(self.highest, start + k + 1)
        self.plans.append(Plan(k, pairs))
        self._left.append(Left(list(words), 1.0))

    def left(self) -> Left:
        return self._left.pop(0)

    def forget(self) -> None:
        self._left.clear()

    # of the head

    def n_unwritten(self) -> int:
        return self.unwritten

    def draft_calls(self, k: int, pairs: int) -> list:
        return [pairs]

    draft_steps = draft_calls

    def rows_calls(self, pairs: int) -> list:
        return [pairs]

    def told(self, value: int) -> None:
        pass

    begin = end = drafted = rewind = told

    def loop(self, *, head: bool = True) -> DeviceLoop:
        return DeviceLoop(self, self if head else None, self)  # type: ignore[arg-type]


def test_rows_of_the_head_are_caught_up_with_in_time():
    device = Device()
    loop = device.loop()
    device.unwritten = 1
    loop.start(20, 20)
    for k in (0, 0, 2, 2, 0, 7, *[0] * 9):
        assert loop.launch(k)
        loop.take()
    pairs = [plan.pairs for plan in device.plans]
    assert pairs == [0, 0, 3, 3, 0, 4, 8, 0, 0, 0, 0, 0, 0, 0, 8]


def test_a_short_text_waits_until_it_is_known_how_long_it_is():
    device = Device()
    loop = device.loop()
    loop.start(0, 0)
    with pytest.raises(ValueError, match="cannot be drafted at position 0"):
        loop.launch(1)
    assert loop.launch(0)
    loop.take()
    assert loop.launch(5)
    assert not loop.launch(1)  # up to 6 rows may be missing, of a text that may have 2 tokens
    loop.take()
    assert loop.launch(1)
    assert device.plans == [Plan(0, 0), Plan(5, 1), Plan(1, 2)]
    with pytest.raises(ValueError, match="cannot be drafted"):
        device.loop(head=False).launch(1)


def test_a_loop_without_a_head_never_minds():
    device = Device()
    loop = device.loop(head=False)
    loop.start(5, 5)
    for _ in range(20):
        assert loop.launch(0)
        assert loop.take().tokens == [loop.position]
    assert set(device.plans) == {Plan(0, 0)}


class Text:
    """A session as far as Ahead is concerned."""

    def __init__(self, position: int, ctx: int, n_draft: int) -> None:
        self.ids, self.ctx, self.highest = list(range(position)), ctx, position
        self.drafter = SimpleNamespace(max_tokens=n_draft)
        self.cache = SimpleNamespace(max_draft=MAX_UNDONE)

    @property
    def position(self) -> int:
        return len(self.ids)

    def reach(self, position: int) -> None:
        self.highest = max(self.highest, position)

    take = Session.take

    def _drafter_back(self) -> None:
        pass


@pytest.mark.parametrize("k", range(8))
@pytest.mark.parametrize("accepted", [(0,), (7,), (1, 0, 3, 7, 0, 2)], ids=str)
def test_nothing_is_launched_that_could_not_be_undone(k: int, accepted: tuple[int, ...]) -> None:
    """Wherever in the given tokens an answer may end; and no token more than wanted is chosen."""
    device, text = Device(accepted), Text(30, 200, 7)
    device.unwritten = 1
    going = Ahead(text, Sampler(GREEDY), k, Costs(), device.loop())  # type: ignore[arg-type]
    history, followed = list(range(31)), set()
    while left := 101 - len(history):
        before = text.position
        tokens = going.tokens(history, left)
        assert 1 <= len(tokens) <= left
        history += tokens
        assert text.ids == history[:-1]
        assert device.highest - before <= MAX_UNDONE
        assert device.highest <= text.highest
        if 16 < left < 60:  # behind the first steps, which are plain, and before drafts have to be shorter
            followed.add(bool(going._loop.flying))
    assert history == list(range(101))
    assert device.highest <= 100
    steps = going.statistics.steps
    assert max(steps) == k + 1
    assert followed == {True}  # by the next draft, at once


@pytest.mark.parametrize("k", [1, 3, 7])
def test_a_drawn_draft_is_as_long_as_the_hosts(k: int) -> None:
    """Who draws other drafts draws another text: near the answer's end they are as long as if each step had waited for
    the one before it."""
    device, text = Device((1, 0, 3, 7, 0, 2)), Text(30, 200, 7)
    device.unwritten = 1
    loop = device.loop()
    params = []
    loop.__dict__["_drawing"] = SimpleNamespace(
        write=params.append, accept=lambda step: step.accept, draft=lambda steps: steps
    )
    going = Ahead(text, Sampler(SamplingParams(temperature=1.0, seed=3)), k, Costs(), loop)  # type: ignore[arg-type]
    history = list(range(31))
    while left := 101 - len(history):
        history += going.tokens(history, left)
    position, kept = 30, itertools.cycle(device.accepted_in_turn)
    for plan in device.plans:
        assert plan.k == min(k, 100 - position - 1)
        position += min(plan.k, next(kept)) + 1
    assert position == 100
    assert len(params) == 1  # written once
    assert device.highest == 100


def test_a_step_that_is_not_finite_is_an_error():
    device, text = Device(), Text(30, 100, 0)
    going = Ahead(text, Sampler(GREEDY), 0, Costs(), device.loop(head=False))  # type: ignore[arg-type]
    assert going.tokens(list(range(31)), 9) == [31]
    device.status = 1
    assert going.tokens(list(range(32)), 9) == [32]  # was launched before
    with pytest.raises(Ds4Error, match="the model's output is not finite"):
        going.tokens(list(range(33)), 9)
    assert text.position == 32
