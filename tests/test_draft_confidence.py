"""Drafts cut where the head's own confidence says that a token is not worth verifying."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest

from ds4 import LLM, SamplingParams, Session, Statistics
from ds4.draft_length import AUTO, Costs, DraftLength, Pace
from ds4.mtp.drafter import Draft
from ds4.one_answer_matrix import Adversary
from ds4.sampling import Sampler

QUESTION = "Tell me a short story about a robot learning to paint."
N, BLOCK = 60, 5
SURE, UNSURE = 6.0, -4.0


def measured(step: Callable[[int], float], draft: float) -> Costs:
    """What steps of n tokens and a block of drafts cost."""
    costs = Costs()
    for n in range(1, BLOCK + 2):
        for _ in range(9):
            costs.add(n, step(n), draft, drafted=BLOCK)
    return costs


def pace(costs: Costs | None = None, wanted: DraftLength = AUTO, *, timed: bool = True) -> Pace:
    return Pace(wanted, BLOCK, costs or measured(lambda n: 0.7 + 0.3 * n, 0.2), timed=timed)


@pytest.mark.parametrize(
    ("confidence", "n"),
    [
        ([SURE] * 5, 5),
        ([UNSURE] * 5, 0),
        ([SURE, SURE, UNSURE, SURE, SURE], 2),
        # Each is more likely right than wrong, the third together with those before it is not worth its time.
        ([math.log(0.65 / 0.35)] * 5, 2),  # 0.65, 0.42, 0.27; a token costs 0.3 plain steps
        ([1000.0, -1000.0], 1),
        ([], 0),
    ],
)
def test_a_block_is_cut_where_its_gain_ends(confidence: list[float], n: int) -> None:
    assert pace().keep(confidence) == n
    assert pace(timed=False).keep(confidence) == n  # without measurements such costs are assumed


def test_times_move_the_cut() -> None:
    guesses = [math.log(0.65 / 0.35)] * 5
    assert pace(measured(lambda n: 1 + 0.01 * n, 0.2)).keep(guesses) == 5
    assert pace(measured(lambda n: float(n), 0.2)).keep(guesses) == 0


def test_a_text_that_goes_well_asks_for_more() -> None:
    """A token competes with what its time would bring: the same guess is worth less where drafts are good."""
    fresh, good = pace(), pace()
    for _ in range(20):
        good.add(BLOCK, BLOCK, BLOCK)
    guess = [math.log(0.4 / 0.6)]
    assert fresh.keep(guess) == 1
    assert good.keep(guess) == 0


@pytest.mark.parametrize("wanted", [1, 3, 5])
def test_a_length_that_was_asked_for_is_not_cut(wanted: int) -> None:
    assert pace(wanted=wanted).keep([UNSURE] * wanted) == wanted


def test_the_cut_does_not_depend_on_what_it_cuts_off() -> None:
    """The guess for a token depends on the tokens before it; random numbers of those cut off are used again."""
    rng = random.Random(1)
    for _ in range(300):
        confidence = [rng.gauss(1, 2) for _ in range(BLOCK)]
        p = pace()
        n = p.keep(confidence)
        for _ in range(5):
            assert p.keep([*confidence[: n + 1], *(rng.gauss(0, 9) for _ in confidence[n + 1 :])]) == n


def run(p: Pace, confidence: list[float], right: Callable[[], bool], steps: int) -> list[int]:
    """Lengths asked for; every token is accepted while ``right`` says so."""
    lengths = []
    for _ in range(steps):
        k = p.next()
        lengths.append(k)
        kept = p.keep(confidence[:k]) if k else 0
        n = 0
        while n < kept and right():
            n += 1
        p.add(kept, n, k if k else None)
    return lengths


def test_blocks_are_asked_for_whole_while_they_pay() -> None:
    assert run(pace(), [SURE] * BLOCK, lambda: True, 30)[1:] == [BLOCK] * 29


@pytest.mark.parametrize(("guess", "right"), [(SURE, False), (UNSURE, True), (UNSURE, False)])
def test_drafting_ends_where_the_head_is_wrong_or_never_sure(guess: float, right: bool) -> None:
    p = pace()
    lengths = run(p, [guess] * BLOCK, lambda: right, 120)
    assert p.stopped
    assert sum(k > 0 for k in lengths) <= Pace.EVIDENCE + Pace.TRIAL
    assert set(lengths[-50:]) == {0}


class Guessing(Adversary):
    """Knows the text up to the next of the places where it errs, and how sure it may be."""

    max_tokens = BLOCK

    def __init__(self, text: list[int], errs: Callable[[int], bool], guess: Callable[[bool], float]) -> None:
        super().__init__(lambda at, k: [(t + errs(at + i)) % 1024 for i, t in enumerate((text + [0] * k)[at : at + k])])
        self.errs, self.guess = errs, guess
        self.asked: list[int] = []

    def draft(self, history: Sequence[int], k: int, sampler: Sampler) -> Draft:
        tokens = super().draft(history, k, sampler).tokens
        self.asked.append(len(tokens))
        return Draft(tokens, [], [self.guess(self.errs(len(history) + i)) for i in range(len(tokens))])


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(ctx=256)


@pytest.fixture(scope="module")
def prompt(llm: LLM) -> list[int]:
    return llm.encode_prompt(QUESTION)


@pytest.fixture(scope="module")
def plain(llm: LLM, prompt: list[int]) -> Statistics:
    return answer(llm, prompt, llm.session(), 0)


def answer(llm: LLM, prompt: list[int], session: Session, draft: int | str, **params) -> Statistics:
    *_, statistics = llm.generate(prompt, SamplingParams(max_tokens=N, **params), session=session, draft=draft)
    assert isinstance(statistics, Statistics)
    return statistics


Make = Callable[[Callable[[bool], float]], tuple[Session, Guessing]]


@pytest.fixture
def guessing(llm: LLM, prompt: list[int], plain: Statistics, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes a session whose head errs at every seventh position; times are constant, whatever the machine does."""
    monkeypatch.setattr(llm, "_costs", measured(lambda n: 0.7 + 0.3 * n, 0.2))
    monkeypatch.setattr(Costs, "add", lambda *_: None)

    def make(guess: Callable[[bool], float]) -> tuple[Session, Guessing]:
        session = llm.session()
        drafter = Guessing([*prompt, *plain.token_ids], lambda at: at % 7 == 0, guess)
        session.drafter = drafter
        return session, drafter

    return make


def test_a_head_that_knows_its_errors_verifies_none_of_them(
    llm: LLM, prompt: list[int], plain: Statistics, guessing: Make
) -> None:
    session, drafter = guessing(lambda wrong: UNSURE if wrong else SURE)
    s = answer(llm, prompt, session, AUTO)
    assert s.token_ids == plain.token_ids
    d = s.draft
    assert d is not None
    assert d.accepted == d.drafted > 30
    assert d.cut == sum(drafter.asked) - d.drafted > 0
    assert BLOCK + 1 in d.steps  # some blocks are verified whole
    assert len(set(d.steps) - {1, BLOCK + 1}) > 1  # and others in part
    assert d.to_dict()["cut"] == d.cut
    assert session.ids == [*prompt, *plain.token_ids[:-1]]


def test_a_head_that_is_always_sure_verifies_all(llm: LLM, prompt: list[int], guessing: Make) -> None:
    session, drafter = guessing(lambda wrong: SURE)
    d = answer(llm, prompt, session, AUTO).draft
    assert d is not None
    assert (d.cut, d.drafted) == (0, sum(drafter.asked))
    assert 0 < d.accepted < d.drafted


@pytest.mark.parametrize("draft", [AUTO, 1, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_whatever_the_head_says_the_text_is_the_plain_one(
    llm: LLM, prompt: list[int], plain: Statistics, guessing: Make, draft: int | str, seed: int
) -> None:
    rng = random.Random(seed)
    session, _ = guessing(lambda wrong: rng.gauss(2, 3))
    s = answer(llm, prompt, session, draft)
    assert s.token_ids == plain.token_ids
    assert s.draft is not None
    assert s.draft.drafted > 0
    assert (s.draft.cut > 0) == (draft == AUTO)


def test_drafting_time_counts_where_nothing_is_verified(llm: LLM, prompt: list[int], guessing: Make) -> None:
    session, _ = guessing(lambda wrong: UNSURE)
    d = answer(llm, prompt, session, AUTO).draft
    assert d is not None
    assert (d.drafts, d.drafted, set(d.steps)) == (0, 0, {1})
    assert d.cut > 0
    assert d.draft_seconds > 0
    assert d.stopped_after is not None
