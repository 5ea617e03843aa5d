"""Long prompts: passes and threads change no bit, and a prompt that is broken off goes on as if it had not been."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ds4 import LLM, Ds4Error, Session
from ds4.kv.cache import KVCache, LayerCache
from ds4.model import transformer
from ds4.mtp.mtp_block import MTPDrafter

N = 420
CHUNKS = (1, 3, 7, 8, 9, 64, 127, 128, 129, 1000)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(ctx=1024)


@pytest.fixture
def short_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of one tile, so that a short prompt has several."""
    monkeypatch.setattr(transformer, "PASS_TILES", 1)


def text(n: int = N) -> list[int]:
    return torch.randint(5, 1000, (n,), generator=torch.Generator().manual_seed(3)).tolist()


def state(session: Session) -> dict[str, torch.Tensor]:
    """Everything that what follows depends on, the draft head's part included."""
    drafter = session.drafter
    assert isinstance(drafter, MTPDrafter)
    rows = {f"mtp.{k}": v for k, v in drafter.caches[0].live(drafter.tail.written, 128).items()}
    tail = drafter.tail.state()
    return session.cache.live(session.position) | rows | {key: tail[key] for key in ("counts", "streams", "ids")}


def assert_same(a: Session, b: Session) -> None:
    x, y = state(a), state(b)
    assert a.ids == b.ids
    assert x.keys() == y.keys()
    assert [key for key in x if not torch.equal(x[key], y[key])] == []


@pytest.fixture(scope="module")
def whole(llm: LLM) -> tuple[Session, torch.Tensor]:
    session = llm.session()
    return session, session.prefill(text())


@pytest.mark.parametrize("pass_tiles", [1, 2, 16])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_passes_and_threads_change_no_bit(
    llm: LLM, whole: tuple[Session, torch.Tensor], threads: int, pass_tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformer, "PASS_TILES", pass_tiles)
    before, session = torch.get_num_threads(), llm.session()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(session.prefill(text()), whole[1])
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert_same(session, whole[0])


@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunks_change_no_bit(llm: LLM, chunk: int) -> None:
    """Short chunks at the end of a text, where windows of 4 and 128 close; long ones from its beginning."""
    ids, first = text(1021 if chunk == 1000 else 260 if chunk > 60 else 136), 0 if chunk > 60 else 112
    one, session = llm.session(), llm.session()
    if first:
        session.prefill(ids[:first])
    assert torch.equal(session.prefill(ids[first:], chunk=chunk), one.prefill(ids))
    assert_same(session, one)


def test_prefill_and_decode_agree() -> None:
    """The tolerance between the forms that docs/numerics.md states, without rounding."""
    exact, ids = LLM(ctx=256, numerics="exact"), text(200)
    decoded = exact.session()
    decoded.prefill(ids[:1])
    rows = torch.cat([decoded.decode(ids[i : i + 8]) for i in range(1, 200, 8)])
    assert ((rows - exact.logits(ids)[1:]).norm(dim=1) / rows.norm(dim=1)).max() < 1e-4


# Broken off


def interrupt_at(call: int) -> Callable[[int, int], None]:
    """Progress that is interrupted when it is told for the ``call``-th time."""
    calls = []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == call:
            raise KeyboardInterrupt

    return progress


def broken_off(llm: LLM, call: int) -> Session:
    session = llm.session()
    session.prefill(text()[:40])
    with pytest.raises(KeyboardInterrupt):
        session.prefill(text()[40:], progress=interrupt_at(call))
    return session


@pytest.mark.usefixtures("short_passes")
@pytest.mark.parametrize(("call", "kept"), [(1, 40), (2, 40), (4, 128), (8, 256), (12, 384), (13, N)])
def test_a_prompt_that_was_broken_off_goes_on(
    llm: LLM, whole: tuple[Session, torch.Tensor], call: int, kept: int
) -> None:
    """Interrupted in each pass, after its first layers and after its last; three layers make a pass."""
    session = broken_off(llm, call)
    assert session.ids == text()[:kept]
    if kept < N:
        assert torch.equal(session.prefill(text()[kept:]), whole[1])
    assert_same(session, whole[0])
    session.rewind(8)
    one = llm.session()
    one.prefill(text())
    one.rewind(8)
    assert torch.equal(session.decode(text()[N - 8 :]), one.decode(text()[N - 8 :]))


@pytest.mark.usefixtures("short_passes")
def test_rings_that_are_not_put_back_are_seen(
    llm: LLM, whole: tuple[Session, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above would notice it."""
    with monkeypatch.context() as patched:
        patched.setattr(LayerCache, "rings", lambda self: [])
        session = broken_off(llm, 5)
    assert session.ids == text()[:128]
    assert not torch.equal(session.prefill(text()[128:]), whole[1])


def test_ctrl_c_again_while_rings_are_put_back(llm: LLM) -> None:
    cache = KVCache(llm.config, llm.model.formats(), 256)
    before = [ring.clone() for layer in cache.layers for ring in layer.rings()]
    asked = []

    def unfinished() -> bool:
        asked.append(True)
        return len(asked) < 9

    class Twice(torch.Tensor):
        """A ring during whose copy Ctrl-C comes, once."""

        def copy_(self, kept: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            if len(asked) == 1:
                raise KeyboardInterrupt
            return super().copy_(kept)

    layer = cache.layers[0]
    layer.ring = layer.ring.as_subclass(Twice)

    def overwrite() -> None:
        with cache.undone_if(unfinished):
            for ring in (ring for layer in cache.layers for ring in layer.rings()):
                ring.fill_(7)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        overwrite()
    assert len(asked) == 2
    assert all(torch.equal(a, b) for a, b in zip((r for x in cache.layers for r in x.rings()), before, strict=True))


@pytest.mark.usefixtures("short_passes")
def test_an_observer_that_is_interrupted_leaves_an_empty_session(
    llm: LLM, whole: tuple[Session, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own rings are behind the session's then, and only the beginning needs nothing of them."""
    session = llm.session()
    assert session.drafter is not None
    observe = session.drafter.observe

    def interrupted(launch, ids, streams) -> None:
        observe(launch, ids, streams)
        if launch.end > 128:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(session.drafter, "observe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.prefill(text())
    assert (session.ids, session.undoable) == ([], 0)
    assert torch.equal(session.prefill(text()), whole[1])
    assert_same(session, whole[0])


@pytest.mark.usefixtures("short_passes")
def test_progress_is_told_after_every_layer(llm: LLM) -> None:
    seen: list[tuple[int, int]] = []
    llm.session().prefill(text(300), chunk=200, progress=lambda done, total: seen.append((done, total)))
    done = [128 * i // 3 for i in (1, 2, 3)] + [128 + 72 * i // 3 for i in (1, 2, 3)]
    done += [200 + 56 * i // 3 for i in (1, 2, 3)] + [256 + 44 * i // 3 for i in (1, 2, 3)] + [300]
    assert seen == [(n, 300) for n in done]


def test_what_does_not_fit_is_refused_before_it_starts(llm: LLM) -> None:
    session = llm.session(ctx=256)
    missing = llm.session_bytes(300) - llm.session_bytes(256)
    with pytest.raises(Ds4Error, match=rf"ctx: 300 tokens .* context of 256; .* --ctx 300.*{missing:,} bytes"):
        session.prefill(text(300))
    assert session.position == 0
