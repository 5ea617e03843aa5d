"""The Python API: LLM, Session and generate, on the bundled model and on golden/tiny."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ds4 import LLM, Ds4Error, Piece, SamplingParams, Session, Statistics, load_model
from ds4.demo import bundled_model_path
from ds4.kernels.numerics import GROUPS
from ds4.kv.spec import MAX_DRAFT
from ds4.weights import dense_cache
from ds4.weights.tensor import PackedTensor

QUESTION = "What is the capital of France? One word."


@pytest.fixture(scope="module")
def bundled() -> LLM:
    if not bundled_model_path().is_file():
        pytest.skip("the bundled model does not exist yet (ds4/demo/demo.gguf)")
    return LLM(ctx=512)


@pytest.fixture(scope="module")
def tiny(golden) -> LLM:
    return LLM(golden / "tiny", ctx=512)


@pytest.fixture(params=["bundled", "tiny"])
def llm(request: pytest.FixtureRequest) -> LLM:
    return request.getfixturevalue(request.param)


@pytest.fixture
def untokenized(golden, tmp_path: Path) -> Path:
    """golden/tiny without its tokenizer files."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(golden / "tiny" / name)
    return tmp_path


def some_ids(llm: LLM, n: int, seed: int = 1) -> list[int]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(2, llm.config.vocab_size, (n,), generator=g).tolist()


def run(llm: LLM, prompt, session: Session | None = None, **params) -> tuple[list[Piece], Statistics]:
    *pieces, statistics = llm.generate(prompt, SamplingParams(**params), session=session)
    assert all(isinstance(piece, Piece) for piece in pieces)
    assert isinstance(statistics, Statistics)
    return pieces, statistics


def same_state(a: Session, b: Session) -> bool:
    x, y = a.cache.live(a.position), b.cache.live(b.position)
    return a.ids == b.ids and x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


# Logits and sessions


def test_logits_are_one_f32_row_a_token(llm: LLM):
    ids = some_ids(llm, 9)
    logits = llm.logits(ids)
    assert (logits.shape, logits.dtype) == ((9, llm.config.vocab_size), torch.float32)
    assert torch.isfinite(logits).all()
    assert torch.equal(llm.logits(torch.tensor(ids)), logits)


def test_prefill_does_not_depend_on_its_chunks_and_ends_like_logits(llm: LLM):
    ids = some_ids(llm, 261)
    whole = llm.session()
    expected = whole.prefill(ids)
    assert (expected.shape, expected.dtype) == ((llm.config.vocab_size,), torch.float32)
    torch.testing.assert_close(expected, llm.logits(ids)[-1], rtol=1e-4, atol=1e-4)
    for chunk in (127, 128, 131):
        session = llm.session()
        assert torch.equal(session.prefill(ids, chunk=chunk), expected), chunk
        assert same_state(session, whole), chunk
    start, session = 252, llm.session()
    session.prefill(ids[:start])
    assert torch.equal(session.prefill(ids[start:], chunk=1), expected)
    assert same_state(session, whole)


def test_decode_takes_one_to_eight_tokens(llm: LLM):
    ids = some_ids(llm, 12)
    session = llm.session()
    assert session.position == 0
    session.prefill(ids[:3])
    assert session.position == 3
    one = session.decode(ids[3:4])
    assert (one.shape, one.dtype, session.position) == ((1, llm.config.vocab_size), torch.float32, 4)
    eight = session.decode(ids[4:12])
    assert (eight.shape, session.position, session.ids) == ((8, llm.config.vocab_size), 12, ids)
    session.rewind(MAX_DRAFT)
    assert session.position == 4
    assert torch.equal(session.decode(ids[4:5])[0], eight[0])
    with pytest.raises(ValueError, match="at most 8 tokens, got 9"):
        session.decode(ids[:9])


def test_prefill_tells_how_far_it_is(tiny: LLM):
    seen: list[tuple[int, int]] = []
    tiny.session().prefill(some_ids(tiny, 200), progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert 0 < seen[0][0] < 200
    assert seen[-1] == (200, 200)


@pytest.mark.parametrize("n", [-1, 6, MAX_DRAFT + 1])
def test_rewind_errors(tiny: LLM, n: int):
    session = tiny.session()
    session.prefill(some_ids(tiny, 5))
    with pytest.raises(ValueError, match=f"can undo at most 5 more tokens here, asked for {n}"):
        session.rewind(n)
    assert session.position == 5


def test_bad_tokens_and_chunks(tiny: LLM):
    vocab, session = tiny.config.vocab_size, tiny.session()
    for bad in (-1, vocab):
        for call in (session.prefill, session.decode, tiny.logits):
            with pytest.raises(Ds4Error, match=f"token id {bad} is outside the vocabulary of {vocab}"):
                call([1, bad])
    for call in (session.prefill, session.decode, tiny.logits):
        with pytest.raises(ValueError, match="no tokens given"):
            call([])
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        session.prefill([1], chunk=0)
    assert session.position == 0


def test_the_context_is_a_limit(tiny: LLM):
    session = tiny.session(ctx=6)
    with pytest.raises(Ds4Error, match="ctx: 7 tokens do not fit the context of 6"):
        session.prefill(some_ids(tiny, 7))
    session.prefill(some_ids(tiny, 6))
    with pytest.raises(Ds4Error, match="ctx: 7 tokens"):
        session.decode([1])
    for ctx in (0, tiny.config.max_position_embeddings + 1):
        with pytest.raises(Ds4Error, match=f"ctx: {ctx} is outside 1 to"):
            tiny.session(ctx=ctx)
    with pytest.raises(Ds4Error, match="ctx: 521 tokens do not fit the context of 512"):
        next(iter(tiny.generate(some_ids(tiny, 521))))


def test_an_interrupted_prefill_leaves_a_session_that_works(tiny: LLM):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    ids, session, other = some_ids(tiny, 300), tiny.session(), tiny.session()
    session.prefill(ids[:100])
    with pytest.raises(KeyboardInterrupt):
        session.prefill(ids[100:], progress=stop)
    assert session.ids == ids[:100]
    assert torch.equal(session.prefill(ids[100:]), other.prefill(ids))
    assert same_state(session, other)


# generate


def test_pieces_and_statistics(bundled: LLM):
    pieces, s = run(bundled, QUESTION, max_tokens=40)
    ids = [i for piece in pieces for i in piece.token_ids]
    stops = s.token_ids[len(ids) :]
    assert s.token_ids[: len(ids)] == ids
    assert s.finish_reason == ("stop" if stops else "length")
    assert all(i in bundled.tokenizer.stop_ids for i in stops)
    assert "".join(piece.text for piece in pieces) == bundled.tokenizer.decode(ids, skip_special=True)
    assert s.generated_tokens == len(s.token_ids)
    assert s.prompt_tokens == len(bundled.encode_prompt(QUESTION))
    assert s.cached_tokens == 0
    assert s.weights_bytes == bundled.checkpoint.total_bytes
    assert s.peak_memory_bytes > s.weights_bytes
    assert 0 < s.prefill_seconds <= s.first_token_seconds
    record = s.to_dict()
    assert record["tokens_per_second"] == s.tokens_per_second == (len(s.token_ids) - 1) / s.decode_seconds
    assert record["prompt_tokens_per_second"] == s.prompt_tokens / s.prefill_seconds


def test_finish_reasons(tiny: LLM):
    ids = some_ids(tiny, 20)
    _, s = run(tiny, ids, max_tokens=6)
    assert (s.finish_reason, s.generated_tokens) == ("length", 6)
    stop = s.token_ids[3]
    pieces, t = run(tiny, ids, max_tokens=6, stop_token_ids=(stop,))
    given = [i for piece in pieces for i in piece.token_ids]
    n = s.token_ids.index(stop)
    assert (t.finish_reason, t.token_ids, given) == ("stop", s.token_ids[: n + 1], s.token_ids[:n])
    session = tiny.session(ctx=23)
    _, t = run(tiny, ids, session, max_tokens=99)
    assert (t.finish_reason, t.token_ids, session.position) == ("length", s.token_ids[:4], 23)
    session = tiny.session(ctx=20)
    assert run(tiny, ids, session)[1].token_ids == s.token_ids[:1]


def test_greedy_follows_the_largest_logit_and_repeats(tiny: LLM):
    ids = some_ids(tiny, 10)
    _, s = run(tiny, ids, max_tokens=5)
    assert run(tiny, ids, max_tokens=5)[1].token_ids == s.token_ids
    session = tiny.session()
    expected = [int(session.prefill(ids).argmax())]
    while len(expected) < 5:
        expected.append(int(session.decode(expected[-1:])[0].argmax()))
    assert s.token_ids == expected


def test_seeds(tiny: LLM):
    def draw(seed: int) -> list[int]:
        return run(tiny, some_ids(tiny, 10), max_tokens=8, temperature=1.5, seed=seed)[1].token_ids

    assert draw(7) == draw(7)
    assert len({tuple(draw(seed)) for seed in range(4)}) == 4


def test_a_conversation_continues_its_session(llm: LLM):
    """The second turn processes its own tokens only, and equals the same tokens in a live session, bit for bit."""
    first, more = some_ids(llm, 140), some_ids(llm, 9, seed=2)
    session, live = llm.session(), llm.session()
    _, s = run(llm, first, session, max_tokens=11)
    assert session.position == len(first) + s.generated_tokens - 1  # nothing needed the last token yet
    second = first + s.token_ids + more
    _, t = run(llm, second, session, max_tokens=5)
    assert (t.prompt_tokens, t.cached_tokens) == (len(second), len(first) + s.generated_tokens - 1)

    live.prefill(first)
    live.decode(s.token_ids[:-1][:8])
    if s.token_ids[8:-1]:
        live.decode(s.token_ids[8:-1])
    logits, expected = live.prefill(s.token_ids[-1:] + more), []
    for _ in t.token_ids:
        expected.append(int(logits.argmax()))
        if len(expected) < len(t.token_ids):
            logits = live.decode(expected[-1:])[0]
    assert t.token_ids == expected
    assert same_state(session, live)


def test_a_session_of_another_text_is_refused(tiny: LLM):
    session = tiny.session()
    session.prefill([5, 6, 7])
    for prompt in ([5, 6, 8, 9], [5, 6, 7], [5]):
        with pytest.raises(ValueError, match="not a proper beginning"):
            run(tiny, prompt, session)


@pytest.mark.parametrize("after", [1, 3])
def test_ctrl_c_while_decoding(tiny: LLM, monkeypatch: pytest.MonkeyPatch, after: int):
    ids, session = some_ids(tiny, 10), tiny.session()
    _, whole = run(tiny, ids, max_tokens=6)
    plain_decode, calls = Session.decode, 0

    def decode(self: Session, given: list[int]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == after:
            raise KeyboardInterrupt
        return plain_decode(self, given)

    monkeypatch.setattr(Session, "decode", decode)
    pieces, s = run(tiny, ids, session, max_tokens=6)
    monkeypatch.undo()
    assert s.finish_reason == "interrupted"
    assert s.token_ids == [i for piece in pieces for i in piece.token_ids] == whole.token_ids[:after]
    assert session.position == len(ids) + after - 1
    assert session.decode(s.token_ids[-1:])[0].argmax() == whole.token_ids[after]  # the session goes on


def test_ctrl_c_while_reading_the_prompt(tiny: LLM):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    [s] = tiny.generate(some_ids(tiny, 200), progress=stop)
    assert isinstance(s, Statistics)
    assert (s.finish_reason, s.generated_tokens, s.tokens_per_second) == ("interrupted", 0, 0)
    assert (s.prompt_tokens_per_second, s.decode_seconds) == (0, 0)


def test_ctrl_c_while_a_piece_is_printed(tiny: LLM):
    """How the command line hands on a Ctrl-C that did not come inside the engine."""
    stream = tiny.generate(some_ids(tiny, 10), SamplingParams(max_tokens=6))
    next(stream)
    s = stream.throw(KeyboardInterrupt())
    while isinstance(s, Piece):
        s = next(stream)
    assert (s.finish_reason, s.generated_tokens) == ("interrupted", 1)


# Prompts and tokenizers


def test_prompts_are_chat_raw_text_or_ids(bundled: LLM):
    tokenizer = bundled.tokenizer
    assert bundled.encode_prompt("Hello", raw=True) == tokenizer.encode("Hello")
    chat = bundled.encode_prompt("Hello")
    assert chat == bundled.encode_prompt([{"role": "user", "content": "Hello"}])
    assert tokenizer.decode(chat) == "<｜begin▁of▁sentence｜><｜User｜>Hello<｜Assistant｜></think>"
    assert bundled.encode_prompt("Hello", thinking=True)[-1] == tokenizer.token_to_id("<think>")
    assert bundled.encode_prompt(chat) == bundled.encode_prompt(torch.tensor(chat)) == chat
    pieces, s = run(bundled, chat, max_tokens=3)
    by_text = list(bundled.generate("Hello", SamplingParams(max_tokens=3)))
    assert by_text[:-1] == pieces
    [*_, raw] = bundled.generate("Hello", SamplingParams(max_tokens=3), raw=True)
    assert raw.prompt_tokens == len(tokenizer.encode("Hello")) < s.prompt_tokens


def test_bad_prompts(tiny: LLM):
    for empty in ([], torch.tensor([], dtype=torch.int64)):
        with pytest.raises(Ds4Error, match="prompt: it is empty"):
            run(tiny, empty)
    with pytest.raises(Ds4Error, match="prompt: it mixes"):
        run(tiny, [{"role": "user", "content": "a"}, 5])
    with pytest.raises(TypeError):
        run(tiny, [1.5])


def test_a_checkpoint_without_a_tokenizer_takes_token_ids(untokenized: Path, tiny: LLM):
    llm = LLM(untokenized, ctx=64)
    assert llm.tokenizer is None
    ids = some_ids(llm, 10)
    pieces, s = run(llm, ids, max_tokens=4)
    assert s.token_ids == run(tiny, ids, max_tokens=4)[1].token_ids
    assert [piece.text for piece in pieces] == [""] * len(pieces)
    for prompt in ("hello", [{"role": "user", "content": "hello"}]):
        with pytest.raises(Ds4Error, match="the checkpoint has no tokenizer; give token ids instead of text"):
            run(llm, prompt)


def test_tokens_that_the_tokenizer_lacks_have_no_text(tiny: LLM, monkeypatch: pytest.MonkeyPatch):
    """Vocabularies are padded; a padding entry can be drawn and must not end the program."""
    monkeypatch.setattr(tiny.tokenizer, "n_vocab", 2)
    pieces, s = run(tiny, some_ids(tiny, 10), max_tokens=4)
    assert s.generated_tokens == 4
    assert [piece.text for piece in pieces] == [""] * 4


# Options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"numerics": "fast"}, "numerics: unknown group 'fast'; choose one of official, serve, exact"),
        ({"device": "tpu"}, "device: 'tpu' is not one of auto, cpu, cuda"),
        ({"draft": 9}, "draft: 9 is not auto, off or a number from 0 to 7"),
        ({"draft": 2}, "draft: .* has no draft head"),
        ({"ctx": 0}, "ctx: 0 is outside 1 to"),
    ],
)
def test_bad_options(untokenized: Path, options: dict, words: str):
    with pytest.raises(Ds4Error, match=words):
        LLM(untokenized, **options)


def test_groups_of_roundings(golden, tiny: LLM):
    ids = some_ids(tiny, 40)
    logits = {name: LLM(golden / "tiny", ctx=64, numerics=name).logits(ids) for name in GROUPS}
    assert torch.equal(tiny.logits(ids), logits["serve"])  # the default
    assert torch.equal(LLM(golden / "tiny", ctx=64, numerics=GROUPS["exact"]).logits(ids), logits["exact"])
    for a, b in (("serve", "exact"), ("serve", "official"), ("official", "exact")):
        assert torch.isfinite(logits[a]).all()
        assert not torch.equal(logits[a], logits[b]), (a, b)


def test_load_model_is_a_shorthand(untokenized: Path):
    llm = load_model(str(untokenized), ctx=32, numerics="exact")
    assert (llm.ctx, llm.device, llm.path) == (32, "cpu", untokenized)
    assert llm.session().ctx == 32


# Memory


def weights(part: object, found: list[PackedTensor | torch.Tensor]) -> list[PackedTensor | torch.Tensor]:
    """Every weight below ``part`` of a model."""
    if isinstance(part, (PackedTensor, torch.Tensor)):
        found.append(part)
    elif isinstance(part, (list, tuple)):
        for item in part:
            weights(item, found)
    elif type(part).__module__.startswith(("ds4.model", "ds4.kernels")):
        for item in vars(part).values():
            weights(item, found)
    return found


def test_weights_stay_views_of_the_mapped_file(llm: LLM):
    file = next(llm.checkpoint.tensors()).file.bytes
    found = weights(llm.model, [])
    packed = [w for w in found if isinstance(w, PackedTensor)]
    assert sum(w.nbytes for w in packed) > 0.6 * llm.checkpoint.total_bytes
    for w in packed:
        assert file.data_ptr() <= w.data.data_ptr() < file.data_ptr() + len(file), w
    dense = sum(w.nbytes for w in found if isinstance(w, torch.Tensor))
    assert dense < 0.1 * llm.checkpoint.total_bytes  # norms, mHC parameters, tables of the hash router


def test_dense_copies_are_bounded_and_change_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    ids, results = some_ids(llm, 24), []
    for budget in (1 << 30, 1_000_000, 0):
        cache = dense_cache.DenseCache(budget)
        monkeypatch.setattr(dense_cache, "CACHE", cache)
        session = llm.session()
        results.append(torch.cat((session.prefill(ids[:20]).unsqueeze(0), session.decode(ids[20:]))))
        held = sum(t.nbytes for t in cache._entries.values())
        assert cache.used_bytes == held <= budget
        assert (held > 0) == (budget > 0)
        assert torch.equal(results[-1], results[0])


def test_session_bytes(llm: LLM):
    session = llm.session(ctx=256)
    assert llm.session_bytes(256) == session.cache.nbytes()
    assert llm.session_bytes(512) > llm.session_bytes(256)
