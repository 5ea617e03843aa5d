"""One answer: any schedule of chunks, decode widths and rewinds equals the plain one, bit for bit (design.md).

The plain schedule of a text is one prefill of the prompt and then single tokens. A random schedule prefills the same
prompt in chunks (sometimes undoing and redoing a few tokens), then decodes 1 to 8 tokens at a time, some of them wrong
drafts that are undone. Compared: every logit row of a right token, and all live cache bytes at the end.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from functools import cache, lru_cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ds4.kv.cache
from ds4.engine import LLM, Session
from ds4.kv.spec import MAX_DRAFT, MAX_UNDONE, layer_spec

# Prompt lengths around the windows of 4 and 128, the ring, and 512 tokens, beyond which the indexer leaves rows out.
PROMPTS = (1, 5, 127, 128, 131, 259, 509, 523)
GENERATED = 28
BASES = (0, 120, 500)


@lru_cache(maxsize=1)
def llm() -> LLM:
    torch.set_num_threads(1)
    return LLM(ctx=640, draft="off")


@lru_cache(maxsize=1)
def text() -> tuple[int, ...]:
    g = torch.Generator().manual_seed(20261121)
    return tuple(torch.randint(0, llm().config.vocab_size, (max(PROMPTS) + GENERATED,), generator=g).tolist())


def digest(session: Session) -> str:
    """Hash of everything the next token can see."""
    h = hashlib.sha256()
    for name, tensor in sorted(session.cache.live(session.position).items()):
        h.update(name.encode())
        h.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


@cache
def plain(prompt: int) -> tuple[torch.Tensor, list[torch.Tensor], list[str]]:
    """Prefill logits, logits of each generated token, and the state's digest after each (the prompt's first)."""
    session = llm().session()
    first = session.prefill(text()[:prompt])
    digests, rows = [digest(session)], []
    for token in text()[prompt : prompt + GENERATED]:
        rows.append(session.decode([token])[0])
        digests.append(digest(session))
    return first, rows, digests


@cache
def base(position: int) -> Session:
    """A session whose first ``position`` tokens were prefilled at once; copied, so that schedules can be short."""
    session = llm().session()
    if position:
        session.prefill(text()[:position])
    return session


def start(position: int) -> Session:
    model, source = llm(), base(position)
    session = model.session()
    session.ids, session.cache, session._highest = list(source.ids), copy.deepcopy(source.cache), source._highest
    return session


def wrong(token: int) -> int:
    return (token + 1) % llm().config.vocab_size


@st.composite
def schedules(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, int]], list[tuple[int, int, int]]]:
    """(prompt, base, prefill chunks as (size, undo), decode steps as (right, wrong, undo))."""
    prompt = draw(st.sampled_from(PROMPTS))
    begin = draw(st.sampled_from([b for b in BASES if b < prompt]))
    chunks, left = [], prompt - begin
    while left:
        most = left if len(chunks) >= 3 else min(left, 200)
        size = left if len(chunks) >= 4 else draw(st.integers(1, most))
        undo = draw(st.integers(0, min(MAX_DRAFT, size)))
        chunks.append((size, undo))
        left -= size
    steps, done = [], 0
    while done < GENERATED:
        right = draw(st.integers(1, min(8, GENERATED - done)))
        drafts = draw(st.integers(0, 8 - right))
        undo = draw(st.integers(0, min(right - 1, MAX_DRAFT - drafts)))
        steps.append((right, drafts, undo))
        done += right - undo
    return prompt, begin, chunks, steps


def run(schedule: tuple[int, int, list[tuple[int, int]], list[tuple[int, int, int]]]) -> None:
    prompt, begin, chunks, steps = schedule
    first, rows, digests = plain(prompt)
    session, ids = start(begin), text()
    logits = torch.empty(0)
    for size, undo in chunks:
        at = session.position
        logits = session.prefill(ids[at : at + size])
        if undo:
            session.rewind(undo)
            logits = session.prefill(ids[at + size - undo : at + size])
    assert torch.equal(logits, first)
    assert digest(session) == digests[0]
    for right, drafts, undo in steps:
        at = session.position
        given_ids = [*ids[at : at + right], *(wrong(i) for i in range(drafts))]
        logits = session.decode(given_ids)
        for i in range(right):
            assert torch.equal(logits[i], rows[at + i - prompt]), f"token {at + i} of {schedule}"
        session.rewind(drafts + undo)
    assert digest(session) == digests[session.position - prompt]


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(schedules())
def test_every_schedule_equals_the_plain_one(schedule) -> None:
    run(schedule)


WIDE = (259, 120, [(139, 0)], [(8, 0, 0), (1, 7, 0), (8, 0, 4), (8, 0, 0), (7, 1, 0)])


def test_the_wide_schedule_passes_as_it_is() -> None:
    run(WIDE)


def test_a_ring_of_exactly_the_window_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second token's row lands on one that the first still attends: seen, so the comparison can see it."""

    def strict(config, ratio, max_draft=MAX_DRAFT):
        return replace(layer_spec(config, ratio, max_draft), ring_slots=config.sliding_window)

    plain(WIDE[0])
    monkeypatch.setattr(ds4.kv.cache, "layer_spec", strict)
    base.cache_clear()
    try:
        with pytest.raises(AssertionError):
            run(WIDE)
    finally:
        base.cache_clear()


def test_compressor_rings_without_room_for_drafts_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undone tokens would have overwritten rows that the redone window still pools."""

    def strict(config, ratio, max_draft=MAX_DRAFT):
        spec = layer_spec(config, ratio, max_draft)
        return replace(spec, state_slots=spec.lookback)

    plain(WIDE[0])
    monkeypatch.setattr(ds4.kv.cache, "layer_spec", strict)
    base.cache_clear()
    try:
        with pytest.raises((AssertionError, ValueError)):
            run(WIDE)
    finally:
        base.cache_clear()


def test_rewinding_further_than_allowed_is_refused() -> None:
    session = start(120)
    session.decode(text()[120:124])
    session.rewind(3)
    session.rewind(MAX_UNDONE - 3)
    with pytest.raises(ValueError, match="can undo at most 0 more"):
        session.rewind(1)
