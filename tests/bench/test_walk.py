"""What ``ds4 bench`` measures: which tokens are processed where, in which order, and what is made of the times."""

from __future__ import annotations

import itertools
import random

import pytest

from ds4.bench import walk
from ds4.bench.energy import Meter, cpu_meter
from ds4.bench.figures import Spread
from ds4.bench.forced import propose
from ds4.bench.prompts import KINDS, Prompt, kinds_of
from ds4.bench.walk import Plan, chunk_ends, frontiers, warm_up
from ds4.engine import LLM
from ds4.errors import Ds4Error


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(ctx=512)


def plan(**options) -> Plan:
    defaults = {"frontiers": (40, 100), "prompts": ("chat",), "tokens": 6, "repeats": 2, "chunk": 32}
    return Plan(**{**defaults, **options})


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_have_any_length_and_do_not_loop(llm, kind):
    text = Prompt(llm, kind, 400)
    assert text.upto([], 400) == text.upto([], 400)
    longer, shorter = text.upto([], 400), text.upto([], 300)
    assert (len(longer), len(shorter)) == (400, 300)
    assert longer[:200] == shorter[:200]
    assert Prompt(llm, kind, 400).body == text.body
    grams = [tuple(longer[i : i + 12]) for i in range(250)]
    assert len(set(grams)) > 240
    assert not set(text.body) & set(llm.tokenizer.stop_ids)


def test_a_chat_ends_with_its_question(llm):
    text = Prompt(llm, "chat", 200)
    asked = llm.encode_prompt("Tell me a short story about a robot learning to paint.")
    assert text.upto([], 150)[-len(asked) :] == asked
    assert text.upto([1] * 50, 150)[:50] == [1] * 50
    assert text.upto([1] * 50, 150)[-len(asked) :] == asked
    assert text.upto([], 5) == text.body[:5]  # no room for it


def test_without_a_tokenizer_only_random_tokens(llm, monkeypatch):
    monkeypatch.setattr(llm, "_tokenizer", None)
    monkeypatch.setattr(llm, "_tokenizer_known", True)
    assert kinds_of(llm) == ("random",)
    assert len(Prompt(llm, "random", 30).body) == 30
    with pytest.raises(Ds4Error, match="has no tokenizer; use --prompts random"):
        Prompt(llm, "code", 30)


def test_chunks():
    rng = random.Random(0)
    for _ in range(200):
        start, length, chunk = rng.randrange(2000), rng.randrange(1, 3000), 128 * rng.randrange(1, 6)
        assert all(end > start for end in chunk_ends(start, start + length, rng.randrange(1, 100)))
        ends = chunk_ends(start, start + length, chunk)
        assert ends[-1] == start + length
        pieces = [b - a for a, b in itertools.pairwise([start, *ends])]
        assert all(0 < piece <= 1.5 * chunk for piece in pieces)
        assert all(end % 128 == 0 for end in ends[:-1])
        assert all(piece >= chunk / 2 for piece in pieces[1:])


@pytest.mark.parametrize(("draft", "accept"), [(0, None), (1, None), (3, 0.5)])
def test_a_walk_processes_every_token_once(llm, draft, accept):
    wanted = plan(draft=draft, accept=accept)
    text, counted = Prompt(llm, "chat", wanted.ctx), []
    found = list(frontiers(llm, wanted, text, Meter("test", iter(range(1000)).__next__), counted.append))
    assert [one.ctx for one in found] == [40, 100]
    assert [one.prefill.tokens for one in found] == [40, 100 - 40 - 2 * 6]
    assert sum(counted) == (100 + 2 * 6) * (2 if draft else 1)
    assert wanted.work >= sum(counted)
    for one in found:
        assert one.plain.tokens == 12
        assert one.plain.steps == {"1": 12}
        assert one.plain.tokens_per_step == 1
        assert one.plain.joules_per_token is not None
        assert (one.draft is None) == (draft == 0)
        assert one.plain.tokens_per_second.n == 2
        assert one.plain.tokens_per_second.min <= one.plain.tokens_per_second.median
    if draft:
        drafted = [one.draft for one in found]
        assert sum(one.drafted for one in drafted) > 0
        assert all(one.accepted <= one.drafted for one in drafted)
        assert all(int(n) <= draft + 1 for one in drafted for n in one.steps)
        assert all(sum(one.steps.values()) + one.accepted == one.tokens for one in drafted)


def test_the_text_is_what_the_model_says(llm):
    """Greedy tokens behind the prompt, as ``generate`` gives them."""
    wanted = plan(frontiers=(40,))
    text = Prompt(llm, "chat", wanted.ctx)
    (one,) = walk._walks(llm, wanted, wanted.ctx, lambda n: None)
    one.prefill(text.upto([], 40), 32)
    one.decode(6, Meter())
    session = llm.session(200)
    session.drafter = None
    ids = text.upto([], 40)
    logits = session.prefill(ids)
    while len(ids) < len(one.history):
        ids = [*ids, int(logits.argmax())]
        logits = session.decode(ids[-1:])[0]
    assert one.history == ids
    assert one.session.ids == ids[:-1]


def test_drafts_that_change_the_tokens_are_found(llm, monkeypatch):
    wanted = plan(frontiers=(40,), draft=1)
    real = walk.Walk.decode

    def wrong(self, n, meter):
        made = real(self, n, meter)
        if self.session.drafter is not None:
            self.history[-1] += 1
        return made

    monkeypatch.setattr(walk.Walk, "decode", wrong)
    with pytest.raises(Ds4Error, match="the tokens with and without drafts differ"):
        list(frontiers(llm, wanted, Prompt(llm, "chat", wanted.ctx), Meter(), lambda n: None))


def test_lengths_that_leave_no_room_between_them():
    with pytest.raises(Ds4Error, match="12 tokens are decoded at each length of --ctx; put these further apart"):
        plan(frontiers=(40, 52))
    assert plan(frontiers=(40, 53)).ctx == 53 + 12 + 1


@pytest.mark.parametrize("ctx", [(1,), (40,)])
def test_warm_up_fits_any_context(llm, ctx):
    wanted = plan(frontiers=ctx, tokens=1, repeats=1, draft=1)
    warm_up(llm, wanted, Prompt(llm, "random", wanted.ctx))


def test_forced_drafts():
    text = list(range(100, 1100))
    made = [propose(lambda: text, 5000, 0.7, at, 5) for at in range(1000)]
    assert all(len(draft) == 5 for draft in made[:990])
    assert made[-1] == [] or len(made[-1]) == 1  # nothing is known beyond the text
    right = [a == b for draft, i in zip(made, itertools.count()) for a, b in zip(draft, text[i:], strict=False)]
    assert sum(right) / len(right) == pytest.approx(0.7, abs=0.05)  # 1,000 draws: three standard deviations
    assert propose(lambda: text, 5000, 1.0, 3, 4) == text[3:7]
    assert propose(lambda: [7, 8], 9, 0.0, 0, 2) == [8, 0]
    assert made[0][2] == made[2][0]  # a place's fate does not depend on the draft


def test_spread():
    assert Spread.of([3.0, 1.0, 2.0, 9.0]) == Spread(2.5, 1.0, 9.0, 4)


def test_energy_counters(tmp_path):
    assert cpu_meter(tmp_path / "none").source is None
    assert cpu_meter(tmp_path).joules() is None
    for name, value in (("intel-rapl:0", 5_000_000), ("intel-rapl:1", 2_000_000), ("intel-rapl:0:0", 9_000_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
    assert cpu_meter(tmp_path).joules() == 7.0  # a part of a package is in it already
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("denied")
    assert cpu_meter(tmp_path).source is None
