"""Caches that grow with the text: no result depends on how large they were at first, nor on when they grew."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from cuemu.backend import missing
from mtp.emulation import emulated_llm
from torch import Tensor

from ds4 import session as session_module
from ds4.ahead import Ahead, decoding
from ds4.draft_length import Costs, Pace
from ds4.engine import LLM, Session
from ds4.errors import Ds4Error
from ds4.kv import cache as cache_module
from ds4.model import steps
from ds4.sampling import Sampler, SamplingParams
from ds4.speculation import Speculation

needs_emulation = pytest.mark.skipif(missing() is not None, reason=str(missing()))
CTX = 400


@cache
def llm() -> LLM:
    torch.set_num_threads(1)
    return LLM(ctx=CTX)


def text(n: int) -> list[int]:
    return torch.randint(2, 900, (n,), generator=torch.Generator().manual_seed(3)).tolist()


class Told:
    """A session as it goes on: every row of logits, and the live state behind each turn."""

    def __init__(self, session: Session) -> None:
        self.session, self.rows = session, list[Tensor]()
        self.states = list[dict[str, Tensor]]()
        self.capacities: list[int] = []

    def prefill(self, ids: list[int], chunk: int | None = None) -> None:
        self.rows.append(self.session.prefill(ids, chunk))
        self._note()

    def decode(self, n: int, k: int) -> None:
        """At least ``n`` greedy tokens in drafts of ``k``."""
        sampler = Sampler(SamplingParams())
        history = [*self.session.ids, sampler.sample(self.rows[-1], self.session.ids)]
        speculation, end = Speculation(self.session, sampler, k, Costs()), len(history) + n
        while len(history) < end:
            step = speculation.step(history, 8)
            history += step.tokens
            self.rows += list(step.logits)
        self._note()

    def _note(self) -> None:
        state = self.session.cache.live(self.session.position)
        self.states.append({name: part.clone() for name, part in state.items()})
        self.capacities.append(self.session.cache.capacity)


def conversation(session: Session, file: Path | None = None) -> Told:
    """Prompts in pieces, answers with drafts and without them, rewinding, and the way through a file."""
    told = Told(session)
    told.prefill(text(3))
    told.prefill(text(60), chunk=20)
    told.decode(6, k=3)
    told.session.rewind(4)
    told.prefill(text(50))
    told.decode(4, k=0)
    if file is not None:
        told.session.save(file)
        told.session = llm().load_session(file)
    told.session.rewind(told.session.undoable)
    told.decode(6, k=7)
    told.prefill(text(40), chunk=32)
    return told


def check_equal(one: Told, other: Told) -> None:
    assert one.session.ids == other.session.ids
    assert len(one.rows) == len(other.rows)
    assert all(map(torch.equal, one.rows, other.rows))
    for state, expected in zip(one.states, other.states, strict=True):
        assert state.keys() == expected.keys()
        assert [name for name in state if not torch.equal(state[name], expected[name])] == []


@cache
def whole() -> Told:
    """The conversation in a cache that never grows."""
    told = conversation(Session(llm(), CTX, first=CTX))
    assert set(told.capacities) == {CTX}
    return told


@pytest.mark.parametrize("first", [1, 50])
def test_whenever_it_grows(first: int) -> None:
    """In prompts, in steps with drafts and without, behind tokens that were undone."""
    told = conversation(Session(llm(), CTX, first=first))
    check_equal(told, whole())
    assert len(set(told.capacities)) >= 3
    assert told.session.position <= told.session.cache.capacity < 2 * told.session.position


def test_in_a_session_that_comes_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "FIRST_TOKENS", 36)
    told = conversation(llm().session(), tmp_path / "a.session")
    check_equal(told, whole())
    assert told.capacities[0] == 36
    assert told.capacities[-1] > told.capacities[-2]  # the restored one grew too


def test_entries_that_get_lost_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the tests above."""
    right = cache_module._resized

    def lost(tensor: Tensor, n: int) -> Tensor:
        new = right(tensor, n)
        new[:1] = 0
        return new

    monkeypatch.setattr(cache_module, "_resized", lost)
    with pytest.raises(AssertionError):
        check_equal(conversation(Session(llm(), CTX, first=50)), whole())


def test_a_session_that_cannot_grow_is_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensor: Tensor, n: int) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    session = Session(llm(), CTX, first=64)
    told, expected = Told(session), Told(Session(llm(), CTX, first=CTX))
    for one in (told, expected):
        one.prefill(text(56))
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "_resized", full)
        with pytest.raises(Ds4Error, match=r"^ctx: no memory for more than 64 tokens of context; the next 64 take"):
            session.prefill(text(9))
        with pytest.raises(Ds4Error, match=r"^ctx: no memory"):
            told.decode(30, k=2)  # as far as there is room
        assert 60 <= session.position <= 64
        session.rewind(session.position - 56)
    told.rows[1:] = []
    for one in (told, expected):
        one.decode(9, k=2)
    check_equal(told, expected)
    assert session.cache.capacity == 128


# Through kernels: lists of launches point to the pools


@pytest.fixture(scope="module")
def emulated() -> Iterator[LLM]:
    with emulated_llm(CTX) as made:
        yield made


@needs_emulation
@torch.inference_mode()
def test_lists_are_made_anew_when_pools_move_and_only_then(emulated: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that are launched ahead, with drafts: one of them makes the cache grow while another one is flying."""
    made: Counter[int] = Counter()

    class Counted(steps.DecodeStep):
        def __init__(self, model, cache, n_tok, *rest) -> None:
            made[n_tok] += 1
            super().__init__(model, cache, n_tok, *rest)

    monkeypatch.setattr(steps, "DecodeStep", Counted)
    prompt = emulated.encode_prompt("Tell me a story about a lighthouse.")
    n, found, flying, costs = 9, [], [], Costs()
    for _ in range(Pace.PROBES):
        costs.add(1, 1.0, 0.0)  # or the first steps were plain, to measure them
    for first in (CTX, len(prompt) + 4):
        made.clear()
        session, sampler = Session(emulated, CTX, first), Sampler(SamplingParams())
        history = [*prompt, sampler.sample(session.prefill(prompt), prompt)]
        going, capacity = decoding(session, sampler, 1, costs), session.cache.capacity
        pools = [weakref.ref(layer.pool) for layer in session.cache.layers if layer.pool is not None]
        assert isinstance(going, Ahead)
        while len(history) < len(prompt) + n:
            before = going._loop.flying
            history += going.tokens(history, 3)
            if session.cache.capacity != capacity:
                flying.append(before)
                capacity = session.cache.capacity
                assert all(pool() is None for pool in pools)  # nobody keeps launches that point to them
        session.rewind(session.position - len(prompt) - n + 1)
        found.append((history[: len(prompt) + n], session.cache.live(session.position), dict(made)))
    (ids, state, once), (grown_ids, grown_state, twice) = found
    assert grown_ids == ids
    assert [name for name, part in state.items() if not torch.equal(part, grown_state[name])] == []
    assert set(once.values()) == {1}
    assert set(twice.values()) == {1, 2} or set(twice.values()) == {2}
    assert len(flying) == 1
    assert flying[0]
