"""Sessions on disk: what is restored goes on like the session that was never interrupted, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from cuemu.backend import CpuBackend, missing
from pretend_device import DEVICE, PretendDevice
from safetensors import safe_open
from torch import Tensor

from ds4 import engine, store
from ds4.engine import LLM, Session
from ds4.kv.cache import KVCache
from ds4.kv.spec import MAX_UNDONE, RowFormats
from ds4.mtp.accept import accept
from ds4.mtp.dspark import DSparkDrafter
from ds4.mtp.mtp_block import MTPDrafter
from ds4.sampling import Sampler, SamplingParams
from ds4.weights.published import FLASH

# Around the windows of 4 and 128 tokens, the ring of 144 rows, the draft ring of 152, and second times around.
POSITIONS = (1, 4, 5, 127, 128, 131, 143, 144, 145, 152, 153, 287, 289)
GENERATED = 40


@cache
def llm(numerics: str = "serve", draft: str = "auto") -> LLM:
    torch.set_num_threads(1)
    return LLM(ctx=512, numerics=numerics, draft=draft)


def text(n: int, model: LLM | None = None) -> list[int]:
    vocab = (model or llm()).config.vocab_size
    return torch.randint(2, vocab, (n,), generator=torch.Generator().manual_seed(8)).tolist()


class Recorder(Sampler):
    """A greedy sampler that keeps the logits it was asked about."""

    def __init__(self) -> None:
        super().__init__(SamplingParams())
        self.rows: list[Tensor] = []

    def sample(self, logits: Tensor, history) -> int:
        self.rows.append(logits.clone())
        return super().sample(logits, history)


def grown(position: int, model: LLM | None = None) -> Session:
    """A session of ``position`` tokens, a few of them decoded behind drafts that were refused."""
    session = (model or llm()).session()
    ids = text(position, model)
    session.prefill(ids[: max(1, position - 6)])
    while session.position < position:
        token = ids[session.position]
        draft = session.draft([*session.ids, token], 3, Sampler(SamplingParams()))
        session.decode([token, *draft.tokens])
        session.rewind(len(draft.tokens))
    return session


def go_on(session: Session, n: int, k: int = 3) -> tuple[list[int], list[Tensor]]:
    """The next ``n`` greedy tokens, and all logits that chose them and their drafts (verified ``k`` at a time)."""
    sampler, ids = Recorder(), [*session.ids, 3]
    end = len(ids) + n
    while len(ids) < end:
        draft = session.draft(ids, k, sampler)
        logits = session.decode([ids[-1], *draft.tokens])
        sampler.rows += list(logits)
        accepted = accept(draft, logits, ids, Sampler(SamplingParams()))
        session.rewind(len(draft.tokens) - accepted.n)
        ids += [*draft.tokens[: accepted.n], accepted.token]
    return ids, sampler.rows


def state(session: Session) -> dict[str, Tensor]:
    """All that a session has to keep."""
    out = {"ids": torch.tensor(session.ids), **session.cache.live(session.position)}
    if isinstance(session.drafter, MTPDrafter | DSparkDrafter):
        out |= session.drafter.tail.state()
        for i, cache in enumerate(session.drafter.caches):
            out |= {f"draft.{i}.{k}": v for k, v in cache.live(session.position, 128).items()}
    return out


def check_equal(a: Session, b: Session) -> None:
    assert a.undoable == b.undoable
    x, y = state(a), state(b)
    assert x.keys() == y.keys()
    different = [name for name in x if not torch.equal(x[name], y[name])]
    assert not different


def check_continues_alike(a: Session, b: Session, n: int = GENERATED) -> None:
    (ids, rows), (restored_ids, restored_rows) = go_on(a, n), go_on(b, n)
    assert ids == restored_ids
    assert len(rows) == len(restored_rows)
    assert all(torch.equal(x, y) for x, y in zip(rows, restored_rows, strict=True))
    check_equal(a, b)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.session"


@pytest.mark.parametrize("position", POSITIONS)
def test_restored_is_uninterrupted(path: Path, position: int) -> None:
    session = grown(position)
    session.save(path)
    restored = llm().load_session(path, ctx=600)
    assert isinstance(restored.drafter, MTPDrafter)
    check_equal(session, restored)
    check_continues_alike(session, restored)


@pytest.mark.parametrize(("position", "undo"), [(5, 3), (129, 1), (131, 5), (137, 4), (145, 5), (273, 2)])
def test_undone_right_after_loading(path: Path, position: int, undo: int) -> None:
    session = grown(position)
    session.save(path)
    restored = llm().load_session(path, ctx=position + 30)
    for each in (session, restored):
        each.rewind(undo)
    check_continues_alike(session, restored, 20)


@pytest.mark.parametrize("position", [16, 144, 148, 276])
def test_all_undone(path: Path, position: int) -> None:
    """After single steps, so that nothing was undone before."""
    session, ids = llm().session(), text(position)
    session.prefill(ids[: position - 4])
    for token in ids[position - 4 :]:
        session.decode([token])
    session.save(path)
    restored = llm().load_session(path)
    for each in (session, restored):
        each.rewind(MAX_UNDONE)
    assert torch.equal(session.prefill(ids[position - MAX_UNDONE :]), restored.prefill(ids[position - MAX_UNDONE :]))
    check_continues_alike(session, restored, 12)


def test_saved_while_tokens_are_undone(path: Path) -> None:
    """They count: their rows have taken the place of older ones."""
    session = grown(140)
    session.decode(text(8))
    session.rewind(5)
    session.save(path)
    restored = llm().load_session(path)
    assert restored.undoable == MAX_UNDONE - 5
    with pytest.raises(ValueError, match="can undo at most 11 more"):
        restored.rewind(12)
    for each in (session, restored):
        each.rewind(3)
    check_continues_alike(session, restored)


@pytest.mark.parametrize("numerics", ["official", "exact"])
def test_other_numerics(path: Path, numerics: str) -> None:
    model = llm(numerics)
    session = grown(139, model)
    session.save(path)
    check_continues_alike(session, model.load_session(path))


@pytest.mark.parametrize("position", [3, 130, 147])
def test_a_block_drafter(golden: Path, path: Path, position: int) -> None:
    model = LLM(golden / "dspark", ctx=256)
    session = grown(position, model)
    session.save(path)
    restored = model.load_session(path)
    assert isinstance(restored.drafter, DSparkDrafter)
    check_continues_alike(session, restored)


def test_a_prompt_goes_on_in_the_prefill_form(path: Path) -> None:
    session, ids = grown(133), text(200)
    session.save(path)
    restored = llm().load_session(path)
    assert torch.equal(session.prefill(ids[133:]), restored.prefill(ids[133:], chunk=13))
    check_equal(session, restored)


def test_an_empty_session(path: Path) -> None:
    llm().session().save(path)
    restored, fresh = llm().load_session(path), llm().session()
    ids = text(9)
    assert torch.equal(restored.prefill(ids), fresh.prefill(ids))
    check_equal(restored, fresh)


@pytest.mark.parametrize(("writer", "reader"), [("auto", "off"), ("off", "auto")])
def test_a_draft_head_that_only_one_side_has(path: Path, writer: str, reader: str) -> None:
    """The text is the same; a head that has not seen the beginning of it stays out."""
    session = grown(60, llm(draft=writer))
    session.save(path)
    restored = llm(draft=reader).load_session(path)
    assert restored.drafter is None
    plain = grown(60, llm(draft="off"))
    check_continues_alike(plain, restored)


def test_without_the_rows_behind_the_window_undone_tokens_are_noticed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison can fail: a file with only what the next token sees is not enough to undo."""
    session = llm().session()
    session.prefill(text(150))
    saved = store._layer_rows

    def window_only(layer, position):
        return {
            name: replace(rows, first=max(rows.first, position - 128)) if name == "ring" else rows
            for name, rows in saved(layer, position).items()
        }

    monkeypatch.setattr(store, "_layer_rows", window_only)
    session.save(path)
    restored = llm().load_session(path)
    check_equal(session, restored)
    for each in (session, restored):
        each.rewind(MAX_UNDONE)
    with pytest.raises(AssertionError):
        check_continues_alike(session, restored)


# Size


@pytest.mark.parametrize("tokens", [0, 3, 130, 300])
def test_bytes_are_those_of_the_formula(path: Path, tokens: int) -> None:
    model = llm(draft="off")
    session = model.session()
    if tokens:
        session.prefill(text(tokens))
    size = session.save(path)
    assert size == path.stat().st_size
    with safe_open(path, framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - a method, not a mapping
    stored = sum(t.numel() * t.element_size() for t in tensors)
    assert stored == store.saved_bytes(model.config, model.model.formats(), tokens)
    assert stored < size < stored + 4096


@pytest.mark.parametrize(("tokens", "table"), [(8 << 10, 30.5), (128 << 10, 442), (1 << 20, 3.43 * 1024)])
def test_bytes_at_the_real_dimensions(tokens: int, table: float) -> None:
    """Spec model.md 6.3: windows and pools as in its table; more are the tokens, the rows to undo, and the states."""
    formats = RowFormats.of(FLASH, kv_fp8=True, kv_rope_bf16=True, index_fp4=True)
    saved = store.saved_bytes(FLASH, formats, tokens)
    undo = 43 * MAX_UNDONE * 584
    states = 21 * (8 + MAX_UNDONE) * 2 * 4 * (1024 + 256) + 20 * (128 + MAX_UNDONE) * 2 * 4 * 512
    print(
        f"{tokens} tokens: {saved / 2**20:.1f} MiB = 43 x 128 x 584 + {tokens} x (21 x (584 + 68) / 4 + 20 x 584 / 128)"
        f" + {undo} (rows to undo) + {states} (states) + {4 * tokens} (tokens)"
    )
    rest = saved - undo - states - 4 * tokens
    assert rest == 43 * 128 * 584 + tokens * (21 * (584 + 68) / 4 + 20 * 584 / 128)
    assert rest / 2**20 == pytest.approx(table, rel=2e-3)


# On a device


def test_rows_go_to_a_device_and_come_back() -> None:
    config, formats = llm().config, llm().model.formats()
    session = grown(141)
    rows = {k: r.read() for k, r in store._all_rows(session.cache.layers, "layers", 141).items()}
    with PretendDevice():
        cache = KVCache(config, formats, 256, device=DEVICE, decoded=False)
        places = store._all_rows(cache.layers, "layers", 141)
        assert places.keys() == rows.keys()
        for name, place in places.items():
            place.write(rows[name])
        back = {name: place.read() for name, place in places.items()}
    assert all(t.device.type == "cpu" and torch.equal(t, rows[name]) for name, t in back.items())


def test_with_kernels(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session whose cache kernels write, saved and restored: the same bits from kernels and from the prefill form."""
    if missing() is not None:
        pytest.skip(str(missing()))
    monkeypatch.setattr(engine, "resolve_device", lambda device: device)
    monkeypatch.setattr(engine, "current_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(engine, "backend_for", lambda device: CpuBackend())
    model = LLM(device="cuda", ctx=256)
    session, ids = model.session(), text(150)
    session.prefill(ids[:133])
    session.decode(ids[133:135])
    session.save(path)
    restored = model.load_session(path)
    check_equal(session, restored)
    for each in (session, restored):
        each.rewind(2)
    assert torch.equal(session.decode(ids[133:138]), restored.decode(ids[133:138]))
    assert torch.equal(session.prefill(ids[138:]), restored.prefill(ids[138:]))
    check_equal(session, restored)
