"""The comparison of ``ds4 verify --one-answer``: it passes as things are, and fails where something is broken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from cuemu.backend import missing
from mtp.emulation import emulated_llm

import ds4.kv.cache
from ds4 import LLM, one_answer, one_answer_matrix, speculation
from ds4.ahead import Ahead
from ds4.kv.cache import KVCache
from ds4.kv.spec import MAX_UNDONE, layer_spec
from ds4.model.compressor import Compressor
from ds4.mtp.accept import Accepted, accept
from ds4.mtp.drafter import Draft
from ds4.mtp.mtp_block import MTPDrafter
from ds4.one_answer import Cell, Report, verify_one_answer
from ds4.one_answer_matrix import ADVERSARIES, CHUNKS, KINDS, LENGTHS, RESUMES, Mode, Prompt, modes, prompts
from ds4.sampling import Sampler
from ds4.session import Session

ADVERSE = Mode("right-wrong", 7, "right-wrong")


@lru_cache(maxsize=1)
def llm() -> LLM:
    torch.set_num_threads(1)
    return LLM(ctx=512)


def run(monkeypatch: pytest.MonkeyPatch, tokens: int, ways: list[Mode] | None = None, **constants) -> Report:
    if ways is not None:
        monkeypatch.setattr(one_answer, "modes", lambda llm: ways)
    for name, value in constants.items():
        monkeypatch.setattr(one_answer, name, value)
    return verify_one_answer(llm(), tokens)


def test_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(one_answer, "_RUN_TOKENS", 30)
    monkeypatch.setattr(one_answer_matrix, "LENGTHS", (3, 5))
    ways = [Mode("off", 0), Mode("k = 3", 3), Mode("auto", "auto"), ADVERSE]
    monkeypatch.setattr(one_answer, "modes", lambda llm: ways)
    report = verify_one_answer(llm(), 600, lambda done, total: seen.append((done, total)))
    assert report.mismatches == 0
    assert report.first_mismatch is None
    assert report.tokens >= 600
    assert report.prompts == 5
    assert seen == [(i + 1, 20) for i in range(20)]
    by_draft = {mode.name: [c for c in report.cells if c.draft == mode.name] for mode in ways}
    assert not any(c.accepted + c.rejected for c in by_draft["off"])
    for name in ("k = 3", "right-wrong"):
        assert sum(c.accepted for c in by_draft[name]) > 0
        assert sum(c.rejected for c in by_draft[name]) > 0
    assert {c.resume for c in report.cells} == set(RESUMES)
    assert {c.chunk for c in report.cells} == set(CHUNKS)
    record = report.to_dict()
    assert (record["tokens"], record["mismatches"]) == (report.tokens, 0)
    assert len(record["cells"]) == len(report.cells)


def test_the_whole_matrix_has_every_pair() -> None:
    """Each way to draft meets each chunk size, each resume point, each length and each kind."""
    n = len(LENGTHS) * len(KINDS)
    for j in range(12):
        places = [(CHUNKS[(i + j) % 5], RESUMES[(i + i // 9 + j) % 3]) for i in range(n)]
        assert len(set(places)) == len(CHUNKS) * len(RESUMES)
    made = list(prompts(llm(), n))
    assert {p.kind for p in made} == set(KINDS)
    for length in LENGTHS:
        assert len({p.kind for p in made if len(p.turns[0]) == length}) > 1
    assert all(0 <= t < llm().config.vocab_size for p in made for turn in p.turns for t in turn)


def test_modes_are_those_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [mode.name for mode in modes(llm())]
    assert names == ["off", *(f"k = {k}" for k in range(1, 8)), "auto", *ADVERSARIES]
    monkeypatch.setattr(llm(), "_make_drafter", None)
    assert [mode.name for mode in modes(llm())] == ["off", *ADVERSARIES]


# What is broken is seen


def test_a_ring_of_exactly_the_window_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def strict(config, ratio, max_draft=MAX_UNDONE):
        return replace(layer_spec(config, ratio, max_draft), ring_slots=config.sliding_window)

    assert run(monkeypatch, 40, [ADVERSE]).mismatches == 0
    monkeypatch.setattr(ds4.kv.cache, "layer_spec", strict)
    report = run(monkeypatch, 40, [ADVERSE])
    assert report.mismatches > 0
    found = report.first_mismatch
    assert found is not None
    assert found.logits != found.expected_logits
    assert len(found.logits) == len(found.expected_logits) == llm().config.vocab_size
    assert "differ from plain decoding" in report.problems[0]


def test_a_stale_compressor_row_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rejected token's row stays where the right token's should be."""
    right, written = Compressor.decode, {}

    def stale(self, kv, gate, ctx, state):
        before, seen = state.clone(), written.setdefault(state.data_ptr(), set())
        closed = right(self, kv, gate, ctx, state)
        for p in range(ctx.launch.start, ctx.launch.end):
            if p in seen:
                state[p % len(state)] = before[p % len(state)]
            seen.add(p)
        return closed

    monkeypatch.setattr(Compressor, "decode", stale)
    report = run(monkeypatch, 40, [ADVERSE], RESUMES=("live",))
    assert report.mismatches > 0
    assert report.first_mismatch is not None


def test_a_wrong_acceptance_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more token kept than is right: the first wrong token is found where it stands."""

    def generous(draft, logits, history, sampler):
        n = min(accept(draft, logits, history, sampler).n + 1, len(draft.tokens))
        return Accepted(n, sampler.sample(logits[n], history))

    monkeypatch.setattr(speculation, "accept", generous)
    report = run(monkeypatch, 40, [Mode("wrong", 7, "wrong")])
    found = report.first_mismatch
    assert found is not None
    assert found.token == (found.expected_token + 1) % llm().config.vocab_size
    assert found.position > found.prompt_tokens


def test_a_session_that_comes_back_changed_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LLM.load_session

    def changed(self: LLM, path, ctx=None) -> Session:
        session = right(self, path, ctx)
        ring = session.cache.layers[1].ring_f32
        assert ring is not None
        with torch.inference_mode():
            ring[(session.position - 1) % len(ring)] = 0
        return session

    monkeypatch.setattr(LLM, "load_session", changed)
    assert run(monkeypatch, 40, [ADVERSE], RESUMES=("restored",)).mismatches > 0


def test_chunks_that_matter_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Session.prefill

    def cut(self, ids, chunk=None, progress=None):
        logits = right(self, ids, chunk, progress)
        return logits + 1 if chunk == 7 else logits

    monkeypatch.setattr(Session, "prefill", cut)
    assert run(monkeypatch, 40, [ADVERSE], CHUNKS=(7,)).mismatches == 1


# What proves nothing is a problem


@pytest.mark.parametrize(
    ("tokens", "words"),
    [([], "no draft was rejected"), ([0] * 7, "no draft was accepted")],
    ids=["nothing is drafted", "only wrong drafts"],
)
def test_cells_without_accepts_or_rejects_fail(monkeypatch: pytest.MonkeyPatch, tokens: list[int], words: str) -> None:
    def draft(self, history, k, sampler: Sampler) -> Draft:
        return Draft(list(tokens[:k]))

    monkeypatch.setattr(MTPDrafter, "draft", draft)
    report = run(monkeypatch, 40, [Mode("k = 7", 7)])
    assert report.mismatches == 0
    assert any(words in problem for problem in report.problems)


def test_cells_count_what_they_should() -> None:
    def problems(mode: Mode, **counts: int) -> list[str]:
        return list(one_answer._problems(Cell(mode.name, None, "live", runs=1, tokens=9, **counts), mode))

    assert problems(Mode("off", 0)) == []
    assert problems(Mode("wrong", 7, "wrong"), rejected=1) == []
    assert len(problems(Mode("wrong", 7, "wrong"))) == 1
    assert problems(Mode("k = 1", 1), rejected=1, accepted=1) == []
    assert len(problems(Mode("k = 1", 1))) == 2
    assert problems(Mode("k = 1", 1), mismatches=1) == [
        "draft k = 1, chunk whole, live: 1 of 1 runs differ from plain decoding"
    ]


# Through kernels


@pytest.fixture(scope="module")
def emulated() -> Iterator[LLM]:
    if missing() is not None:
        pytest.skip(str(missing()))
    with emulated_llm(512) as made:
        yield made


def short(monkeypatch: pytest.MonkeyPatch, model: LLM) -> int:
    """One short prompt only; how many tokens it has."""
    ids = model.encode_prompt("Tell me a story about a lighthouse.")
    monkeypatch.setattr(one_answer, "prompts", lambda llm, n: [Prompt("story", (ids, ids[:3]))])
    return len(ids)


def test_it_holds_through_kernels(emulated: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the device's own loop, with its own drafts, ahead too, and by drafts of the host; caches grow meanwhile."""
    ways = [Mode("k = 2", 2), Mode("k = 1 ahead", 1, ahead=True), ADVERSE]
    n_prompt = short(monkeypatch, emulated)
    monkeypatch.setattr(one_answer, "modes", lambda llm: ways)
    monkeypatch.setattr(one_answer, "CHUNKS", (None,))
    monkeypatch.setattr(one_answer, "_FIRST_TOKENS", n_prompt + 2)
    ahead, grown, right, grow = [], [], Ahead.tokens, KVCache._grow

    def watched(self: Ahead, history, most: int) -> list[int]:
        tokens = right(self, history, most)
        ahead.append(len(self._loop.flying))
        return tokens

    def growing(self: KVCache, capacity: int) -> None:
        grown.append(capacity)
        grow(self, capacity)

    monkeypatch.setattr(Ahead, "tokens", watched)
    monkeypatch.setattr(KVCache, "_grow", growing)
    report = verify_one_answer(emulated, 24)
    assert (report.mismatches, report.tokens) == (0, 24)
    assert [cell.draft for cell in report.cells] == [mode.name for mode in ways]
    assert {cell.resume for cell in report.cells} == set(RESUMES)
    assert [sum(c.accepted for c in report.cells) > 0, sum(c.rejected for c in report.cells) > 0] == [True, True]
    assert max(ahead) == 1
    assert len(grown) >= len(ways)


def test_a_wrong_token_is_seen_where_rows_stay_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def generous(draft, logits, history, sampler):
        n = min(accept(draft, logits, history, sampler).n + 1, len(draft.tokens))
        return Accepted(n, sampler.sample(logits[n], history))

    ways = [Mode("k = 3 ahead", 3, ahead=True)]
    short(monkeypatch, llm())
    assert run(monkeypatch, 24, ways).mismatches == 0
    monkeypatch.setattr(speculation, "accept", generous)
    found = run(monkeypatch, 24, ways).first_mismatch
    assert found is not None
    assert found.token != found.expected_token
    assert (found.logits, len(found.expected_logits)) == ([], llm().config.vocab_size)


def test_modes_of_a_gpu(emulated: LLM) -> None:
    names = [mode.name for mode in modes(emulated)]
    by_head = ["off", *(f"k = {k}" for k in range(1, 8)), "auto"]
    assert names == [*by_head, *(f"{name} ahead" for name in by_head), *ADVERSARIES]
    assert [mode.ahead for mode in modes(emulated)] == [name.endswith("ahead") for name in names]
