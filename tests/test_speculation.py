"""Speculative decoding through the engine: the text, the session and what is said about it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import cycle

import pytest
import torch

from ds4 import LLM, Ds4Error, Piece, SamplingParams, Session, Statistics
from ds4.draft_length import AUTO, MAX_LENGTH, Acceptance, Costs, Pace, draft_length
from ds4.mtp.drafter import Draft
from ds4.one_answer_matrix import Adversary
from ds4.sampling import Sampler
from ds4.speculation import DraftStatistics, Speculation

QUESTION = "Tell me a short story about a robot learning to paint."
N = 40


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(ctx=256)


@pytest.fixture(scope="module")
def prompt(llm: LLM) -> list[int]:
    return llm.encode_prompt(QUESTION)


@pytest.fixture(scope="module")
def text(llm: LLM, prompt: list[int]) -> list[int]:
    """The plain answer."""
    return answer(llm, prompt, draft=0)[1].token_ids


def answer(
    llm: LLM, prompt: list[int], session: Session | None = None, draft: int | str | None = None, **params
) -> tuple[list[Piece], Statistics]:
    params.setdefault("max_tokens", N)
    *pieces, statistics = llm.generate(prompt, SamplingParams(**params), session=session, draft=draft)
    assert all(isinstance(piece, Piece) for piece in pieces)
    assert isinstance(statistics, Statistics)
    return pieces, statistics


def knowing(llm: LLM, prompt: list[int], text: list[int], right: int = MAX_LENGTH) -> Session:
    """A session whose drafter knows the text; of every draft the first ``right`` tokens are true."""
    session, whole = llm.session(), [*prompt, *text]

    def propose(at: int, k: int) -> list[int]:
        true = (whole + [0] * k)[at : at + k]
        return [t if i < right else (t + 1) % 1024 for i, t in enumerate(true)]

    session.drafter = Adversary(propose)
    return session


def same_state(a: Session, b: Session) -> bool:
    x, y = a.cache.live(a.position), b.cache.live(b.position)
    return a.ids == b.ids and x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def warm(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain steps are measured already, so that every step may draft."""
    costs = Costs()
    for _ in range(Pace.PROBES):
        costs.add(1, 1.0, 0.0)
    monkeypatch.setattr(llm, "_costs", costs)


# The text and the session


@pytest.mark.parametrize("draft", [1, 2, 7, "auto"])
def test_the_answer_is_the_plain_one(llm: LLM, prompt: list[int], draft: int | str) -> None:
    plain, speculative = llm.session(), llm.session()
    pieces, s = answer(llm, prompt, plain, 0)
    same_pieces, t = answer(llm, prompt, speculative, draft)
    assert (same_pieces, t.token_ids, t.finish_reason) == (pieces, s.token_ids, s.finish_reason)
    assert same_state(plain, speculative)
    assert s.draft is None
    assert t.draft is not None
    assert 0 < t.draft.accepted < t.draft.drafted
    more = llm.encode_prompt("And then?", raw=True)
    for session in (plain, speculative):
        session.prefill([*s.token_ids[-1:], *more])
    assert same_state(plain, speculative)


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_sees_accepted_tokens(llm: LLM, prompt: list[int], penalty: float) -> None:
    expected = answer(llm, prompt, draft=0, repetition_penalty=penalty)[1].token_ids
    for draft in (1, 4):
        assert answer(llm, prompt, draft=draft, repetition_penalty=penalty)[1].token_ids == expected


@pytest.mark.parametrize("n", range(2, 12))
def test_the_end_may_come_inside_accepted_tokens(
    llm: LLM, prompt: list[int], text: list[int], n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stop token, the number of tokens, the end of the context: as plain decoding, one token after another."""
    warm(llm, monkeypatch)
    stop = text[n - 1]
    first = text.index(stop) + 1
    for params, ctx, count, reason in (
        ({"max_tokens": n}, 256, n, "length"),
        ({"stop_token_ids": (stop,)}, 256, first, "stop"),
        ({}, len(prompt) + n - 1, n, "length"),
    ):
        plain, session = llm.session(ctx), knowing(llm, prompt, text)
        session.ctx = ctx
        pieces, s = answer(llm, prompt, plain, 0, **params)
        same_pieces, t = answer(llm, prompt, session, 7, **params)
        assert (t.token_ids, t.finish_reason) == (text[:count], reason)
        assert (same_pieces, t.token_ids, t.finish_reason) == (pieces, s.token_ids, s.finish_reason)
        assert session.ids == plain.ids == [*prompt, *text[: count - 1]]
        assert t.draft is not None
        assert count < 3 or t.draft.accepted > 0


def test_ids_are_right_after_every_step(llm: LLM, prompt: list[int], text: list[int]) -> None:
    session, sampler, history = llm.session(), Sampler(SamplingParams()), [*prompt, text[0]]
    session.prefill(prompt)
    speculation = Speculation(session, sampler, 3, Costs())
    while len(history) < len(prompt) + 20:
        step = speculation.step(history, 99)
        history += step.tokens
        assert step.logits.shape == (len(step.tokens), llm.config.vocab_size)
        assert session.ids == history[:-1]
        assert session.drafter is not None
        assert session.drafter.position == session.position
    assert history == [*prompt, *text][: len(history)]


def test_a_reader_that_goes_away_leaves_what_it_was_given(llm: LLM, prompt: list[int], text: list[int]) -> None:
    session = knowing(llm, prompt, text)
    stream = llm.generate(prompt, SamplingParams(max_tokens=N), session=session, draft=7)
    given = [next(stream) for _ in range(7)]
    assert [i for piece in given if isinstance(piece, Piece) for i in piece.token_ids] == text[:7]
    stream.close()
    assert session.ids == [*prompt, *text[:6]]
    plain = llm.session()
    answer(llm, prompt, plain, 0, max_tokens=7)
    assert same_state(session, plain)


@pytest.mark.parametrize("where", ["decode", "draft", "logits"])
@pytest.mark.parametrize("after", [2, 5])
def test_ctrl_c_leaves_a_usable_session(
    llm: LLM, prompt: list[int], text: list[int], where: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In front of a step, while drafting, and in a step that the drafter has been shown already."""
    warm(llm, monkeypatch)
    session, calls = llm.session(), 0
    owner, name = {
        "decode": (Session, "decode"),
        "draft": (Session, "draft"),
        "logits": (type(llm.model), "logits"),
    }[where]
    right = getattr(owner, name)

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls == after:
            raise KeyboardInterrupt
        return right(*args)

    monkeypatch.setattr(owner, name, interrupted)
    pieces, s = answer(llm, prompt, session, 2)
    monkeypatch.undo()
    assert s.finish_reason == "interrupted"
    assert [i for piece in pieces for i in piece.token_ids] == s.token_ids == text[: s.generated_tokens]
    assert 0 < s.generated_tokens < N
    assert session.ids == [*prompt, *s.token_ids[:-1]]
    assert session.drafter is not None
    assert session.drafter.position == session.position
    speculation = Speculation(session, Sampler(SamplingParams()), 2, Costs())
    history = [*prompt, *s.token_ids]
    while len(history) < len(prompt) + N:
        history += speculation.step(history, len(prompt) + N - len(history)).tokens
    assert history == [*prompt, *text]


def test_undone_tokens_are_decoded_again(llm: LLM, prompt: list[int], text: list[int]) -> None:
    session = llm.session()
    answer(llm, prompt, session, 3, max_tokens=30)
    session.rewind(1 + session.undoable // 2)
    history = [*prompt, *text][: session.position + 1]
    speculation = Speculation(session, Sampler(SamplingParams()), 3, Costs())
    while len(history) < len(prompt) + N:
        history += speculation.step(history, len(prompt) + N - len(history)).tokens
    assert history == [*prompt, *text]


def test_rows_of_rejected_tokens_count_as_processed(llm: LLM, prompt: list[int], text: list[int]) -> None:
    """They lie where older rows did, so fewer tokens can be undone behind them."""
    session = knowing(llm, prompt, text, right=0)
    session.prefill(prompt)
    history = [*prompt, text[0]]
    costs = Costs()
    for _ in range(Pace.PROBES):
        costs.add(1, 1.0, 0.0)
    step = Speculation(session, Sampler(SamplingParams()), 5, costs).step(history, 99)
    assert step.tokens == text[1:2]
    assert session.undoable == session.cache.max_draft - 5
    with pytest.raises(ValueError, match="can undo at most 11 more tokens"):
        session.rewind(12)


def test_an_interrupted_prompt_leaves_an_empty_session(llm: LLM, prompt: list[int], text: list[int]) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    session = llm.session()
    with pytest.raises(KeyboardInterrupt):
        session.prefill([5] * 200, progress=stop)
    assert (session.position, session.undoable) == (0, 0)
    assert answer(llm, prompt, session, 2)[1].token_ids == text


# Above temperature 0


def test_a_seed_repeats_its_text_whatever_the_times(
    llm: LLM, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = set()
    for seed in range(3):
        warm(llm, monkeypatch)
        rng = random.Random(seed)
        monkeypatch.setattr(Costs, "add", lambda self, n, *_, rng=rng: self._steps.update({n: rng.random()}))
        statistics = answer(llm, prompt, draft="auto", temperature=1.0, seed=4)[1]
        texts.add(tuple(statistics.token_ids))
        assert statistics.draft is not None
        assert statistics.draft.drafted > 0
    assert len(texts) == 1


def test_times_change_the_steps_but_not_the_greedy_text(
    llm: LLM, prompt: list[int], text: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = set()
    for seed in range(3):
        warm(llm, monkeypatch)
        rng = random.Random(seed)
        monkeypatch.setattr(Costs, "add", lambda self, n, *_, rng=rng: self._steps.update({n: rng.random()}))
        statistics = answer(llm, prompt, draft="auto")[1]
        assert statistics.token_ids == text
        assert statistics.draft is not None
        steps.add(str(statistics.draft.steps))
    assert len(steps) > 1


# How long drafts are


def measured(step: Callable[[int], float], draft: Callable[[int], float]) -> Costs:
    costs = Costs()
    for n in range(1, MAX_LENGTH + 2):
        for _ in range(9):
            costs.add(n, step(n), draft(n - 1))
    return costs


def drafted(pace: Pace, rate: float, n: int) -> list[int]:
    """Lengths of n drafts of which each token is accepted at this rate."""
    rng, lengths = random.Random(1), []
    for _ in range(n):
        k = pace.next()
        lengths.append(k)
        kept = 0
        while kept < k and rng.random() < rate:
            kept += 1
        pace.add(k, kept)
    return lengths


def test_cheap_and_good_drafts_become_long() -> None:
    pace = Pace(AUTO, 7, measured(lambda n: 1 + 0.01 * n, lambda k: 0.01), timed=True)
    assert drafted(pace, 1.0, 80)[-10:] == [7] * 10
    assert not pace.stopped


def test_costly_drafts_stay_short() -> None:
    pace = Pace(AUTO, 7, measured(lambda n: 1 + 0.3 * n, lambda k: 0.3 * k), timed=True)
    assert set(drafted(pace, 0.6, 80)[-10:]) <= {1, 2}
    assert not pace.stopped


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_drafting_ends_where_it_does_not_pay(rate: float) -> None:
    pace = Pace(AUTO, 7, measured(lambda n: 1 + 0.3 * n, lambda k: 0.3 * k), timed=True)
    lengths = drafted(pace, rate, 100)
    assert pace.stopped
    assert sum(k > 0 for k in lengths) <= Pace.EVIDENCE + Pace.TRIAL
    assert set(lengths[-50:]) == {0}


def test_a_trial_that_turns_out_well_goes_on() -> None:
    """Plain steps looked cheap because of an old measurement."""
    costs = measured(lambda n: 0.5 if n == 1 else 1.5, lambda k: 0.1)
    pace = Pace(AUTO, 7, costs, timed=True)
    for _ in range(60):
        k = pace.next()
        costs.add(k + 1, 1.0 if k == 0 else 1.2, 0.1)
        pace.add(k, k)
    assert not pace.stopped
    assert pace.next() > 0


def test_fixed_lengths() -> None:
    assert drafted(Pace(3, 7, measured(lambda n: n, lambda k: k), timed=True), 0.0, 50) == [3] * 50
    assert drafted(Pace(7, 5, measured(lambda n: n, lambda k: k), timed=True), 0.0, 5) == [5] * 5
    assert drafted(Pace(0, 7, Costs(), timed=True), 1.0, 5) == [0] * 5
    assert drafted(Pace(3, 0, Costs(), timed=True), 1.0, 5) == [0] * 5  # no head


def test_costs_between_and_beyond_measurements() -> None:
    costs = Costs()
    assert (costs.step(1), costs.step(2), costs.draft(0)) == (1.0, pytest.approx(1.3), 0.0)
    assert costs.draft(2) == pytest.approx(0.7)
    for seconds in (2.0, 2.0, 50.0):
        costs.add(1, seconds, 0.0)
    assert costs.step(1) == 2.0
    assert costs.step(3) == pytest.approx(2 * 1.6)
    costs.add(3, 4.0, 1.0)
    assert (costs.step(2), costs.step(5)) == (3.0, 6.0)
    assert costs.draft(4) == 2.0
    costs.add(5, 1.0, 1.0)
    assert costs.step(8) >= costs.step(5)


def test_expected_tokens() -> None:
    acceptance = Acceptance()
    for _ in range(2000):
        acceptance.add(2, 1)
    expected = acceptance.expected()
    assert expected[0] == 1
    assert expected[1] == pytest.approx(2, abs=0.05)
    assert expected[2] == pytest.approx(expected[1], abs=0.05)


# Options and statistics


@pytest.mark.parametrize(("given", "length"), [("auto", AUTO), ("off", 0), ("0", 0), (0, 0), ("7", 7), (1, 1)])
def test_draft_lengths(given: int | str, length: int | str) -> None:
    assert draft_length(given) == length


@pytest.mark.parametrize("bad", [8, -1, "8", "x", "", "-1", 1.5, True, None, "²"])
def test_bad_draft_lengths(bad) -> None:
    with pytest.raises(Ds4Error, match=r"draft: .* is not auto, off or a number from 0 to 7"):
        draft_length(bad)


def test_without_a_head(golden, tmp_path) -> None:
    llm = LLM(golden / "tiny", ctx=64)
    assert llm.draft == 0
    assert llm.session().drafter is None
    assert answer(llm, [5, 6, 7], max_tokens=3)[1].draft is None
    with pytest.raises(Ds4Error, match="has no draft head; give one with --draft-model, or use --draft off"):
        LLM(golden / "tiny", draft=1)
    with pytest.raises(Ds4Error, match="has no draft head"):
        answer(llm, [5, 6, 7], draft=1)


def test_a_model_loaded_without_its_head(prompt: list[int]) -> None:
    llm = LLM(ctx=64, draft="off")
    assert llm.session().drafter is None
    with pytest.raises(Ds4Error, match="loaded without its draft head"):
        answer(llm, prompt, draft=1)


def test_a_head_that_drafts_less(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ds4.mtp.mtp_block.MTPDrafter.max_tokens", 5)
    assert LLM(ctx=64, draft=5).draft == 5
    with pytest.raises(Ds4Error, match="drafts at most 5 tokens, 6 were wanted"):
        LLM(ctx=64, draft=6)


def test_draft_model_needs_drafts(tmp_path) -> None:
    with pytest.raises(Ds4Error, match="draft: it is off, so the draft model would not be used"):
        LLM(draft="off", draft_model=tmp_path / "x.gguf")
    with pytest.raises(Ds4Error, match=r"x\.gguf: no such file"):
        LLM(draft_model=tmp_path / "x.gguf")


def test_statistics_add_up(llm: LLM, prompt: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    warm(llm, monkeypatch)
    s = answer(llm, prompt, draft=3)[1]
    d = s.draft
    assert d is not None
    assert d.tokens == s.generated_tokens - 1
    assert sum(d.steps.values()) == d.tokens - d.accepted
    assert d.drafts == sum(n for n_tok, n in d.steps.items() if n_tok > 1)
    assert d.drafted == sum((n_tok - 1) * n for n_tok, n in d.steps.items())
    assert d.mean_accepted == d.accepted / d.drafts
    assert d.tokens_per_step == d.tokens / sum(d.steps.values())
    assert sum(d.seconds.values()) + d.draft_seconds < s.decode_seconds
    record = s.to_dict()["draft"]
    assert isinstance(record, dict)
    assert record["mode"] == 3
    assert record["step_seconds"].keys() == record["steps"].keys() == {str(n) for n in d.steps}
    assert record["gain"] == d.gain


def test_gain() -> None:
    d = DraftStatistics(tokens=30, draft_seconds=1.0, steps={2: 15}, seconds={2: 9.0})
    assert d.gain is None
    d.plain_seconds = 0.5
    assert d.gain == pytest.approx(1.5)
    assert DraftStatistics().gain is None


def test_a_drafter_may_propose_less_than_wanted(llm: LLM, prompt: list[int], text: list[int]) -> None:
    session = knowing(llm, prompt, text)
    assert isinstance(session.drafter, Adversary)
    right, lengths = session.drafter.draft, cycle((0, 1, 2))

    def shorter(history: Sequence[int], k: int, sampler: Sampler) -> Draft:
        return Draft(right(history, k, sampler).tokens[: next(lengths)])

    session.drafter.draft = shorter  # type: ignore[method-assign]
    s = answer(llm, prompt, session, 5)[1]
    assert s.token_ids == text
    assert s.draft is not None
    assert set(s.draft.steps) == {1, 2, 3}
