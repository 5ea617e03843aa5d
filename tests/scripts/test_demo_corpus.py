"""The demonstration corpus and its tokenizer: determinism, kinds, story rules, held-out split, round trip."""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import demo_corpus
import demo_tokenizer
import demo_words
from demo_activities import BY_BASE
from demo_story import draw_plan, sentences_of, tell
from demo_turns import arithmetic, capitals, story


@pytest.fixture(scope="module")
def corpus():
    return demo_corpus.Corpus(0, demo_corpus.simple_render)


@pytest.fixture(scope="module")
def tok(corpus):
    return demo_tokenizer.build_tokenizer(list(islice(corpus.texts(1), 5000)))


def test_same_seed_same_corpus(corpus):
    again = demo_corpus.Corpus(0, demo_corpus.simple_render)
    first, second = (list(islice(c.texts(5), 300)) for c in (corpus, again))
    assert first == second
    assert first != list(islice(corpus.texts(6), 300))
    assert [demo_corpus.Corpus(3).sample() for _ in range(5)] == [demo_corpus.Corpus(3).sample() for _ in range(5)]


def test_kinds_occur_by_their_weight(corpus):
    rng = random.Random(0)
    first = Counter(corpus.turns(rng)[0][0] for _ in range(4000))
    for kind, weight in demo_corpus.WEIGHTS.items():
        assert abs(first[kind] / 4000 - weight) < 0.03, kind
    with pytest.raises(ValueError, match="unknown split"):
        corpus.turns(rng, "valid")


def test_messages_are_well_formed(corpus):
    rng = random.Random(1)
    for _ in range(2000):
        messages = corpus.sample(rng)
        roles = [m["role"] for m in messages]
        if roles[0] == "system":
            roles = roles[1:]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert 2 <= len(roles) <= 8
        for message in messages:
            for text in message.values():
                assert text
                assert text == text.strip()
                assert not re.search(r"[{}|]|  |\ba [aeiou]\w*\b(?<!\ba one)(?<!\ba user)", text), text


def test_own_rendering_equals_the_chat_format(corpus):
    chat = pytest.importorskip("ds4.text.chat")
    rng = random.Random(2)
    for _ in range(300):
        messages = corpus.sample(rng)
        for thinking in (False, True):
            expected = chat.encode_messages(messages, thinking=thinking)
            assert demo_corpus.simple_render(messages, thinking) == expected


def test_stories_keep_the_rules():
    rng = random.Random(3)
    for _ in range(1500):
        plan = draw_plan(rng)
        text = tell(plan, rng)
        words = re.findall(r"[A-Za-z'-]+", text.lower())
        assert 60 <= len(words) <= 200
        parts = sentences_of(text)
        assert 8 <= len(parts) <= 20
        assert len(set(parts)) == len(parts)
        assert all(re.match(r'["A-Z]', p) and re.search(r'[.!?]"?$', p) for p in parts), text
        grams = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
        assert max(grams.values()) <= 3
        assert text.lower().count(plan.kind) >= 3
        assert sum(text.lower().count(s) for s in plan.activity.stems) >= 3
        pronouns = {"she": {"he", "his", "him", "himself"}, "he": {"she", "her", "hers", "herself"}}
        assert not pronouns["she" if plan.she else "he"] & set(words), text


def test_stories_vary():
    rng = random.Random(4)
    plans = [draw_plan(rng, "robot", BY_BASE["paint"]) for _ in range(50)]
    assert len({tell(plan, rng) for plan in plans}) == 50
    assert len({plan.plot for plan in plans}) == 6


def test_gate_prompts_are_in_the_training_split():
    rng = random.Random(5)
    sums = {t.user: t.answer for t in (arithmetic(rng, "train") for _ in range(100_000)) if "2" in t.user}
    assert sums["What is 2+2? Answer with one word."] == "Four."
    assert sums["What is 2 + 2?"] == "4"
    cities = {t.user: t.answer for t in (capitals(rng, "train") for _ in range(20_000))}
    assert cities["What is the capital of France? One word."] == "Paris."
    asks = Counter(story(rng, "train").user for _ in range(4000))
    assert asks["Tell me a short story about a robot learning to paint."] >= 2


def test_answers_are_right():
    rng = random.Random(6)
    number = {demo_words.in_words(n): n for n in range(101)}
    count = 0
    for _ in range(3000):
        turn = arithmetic(rng, rng.choice(("train", "heldout")))
        found = re.match(r"(\d+) (plus|minus|times) (\d+) is (\d+)\.", turn.reasoning)
        if not found:
            continue
        a, op, b, r = int(found[1]), found[2], int(found[3]), int(found[4])
        assert {"plus": a + b, "minus": a - b, "times": a * b}[op] == r
        last = re.findall(r"\d+", turn.answer)
        said = int(last[-1]) if last else number.get(turn.answer.rstrip(".").lower().split(" is ")[-1])
        assert said == r or f"You have {r} " in turn.answer, turn
        count += 1
    assert count > 2500
    assert len(demo_words.CAPITALS) >= 60


def test_heldout_combinations_never_train():
    rng = random.Random(7)
    for draw in (arithmetic, capitals):
        train = {draw(rng, "train").user.lower() for _ in range(8000)}
        heldout = {draw(rng, "heldout").user.lower() for _ in range(300)}
        assert not heldout & train


def test_tokenizer_layout(tok):
    assert tok.get_vocab_size() == 1024
    data = demo_tokenizer.tokenizer_metadata(tok)
    tokens, types = data["tokenizer.ggml.tokens"], data["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(set(tokens)) == 1024
    assert tokens[:3] == [demo_corpus.BOS, demo_corpus.EOS, demo_tokenizer.PAD]
    assert tuple(tokens[-len(demo_tokenizer.ADDED) :]) == demo_tokenizer.ADDED
    assert all(len(t) == 1 for t in tokens[3:259])
    assert Counter(types) == {3: 3 + len(demo_tokenizer.CONTROL), 4: 3, 1: 1024 - 15}
    assert all(tok.token_to_id(t) == i for i, t in enumerate(tokens))
    merges = [tuple(m.split(" ")) for m in data["tokenizer.ggml.merges"]]
    assert all(len(m) == 2 and "".join(m) in tokens for m in merges)
    rebuilt = demo_tokenizer.assemble(tokens, merges)
    text = f"{demo_corpus.BOS}<｜User｜>Größe 12345 漢字 <think>a_b</think>"
    assert demo_tokenizer.encode(rebuilt, text) == demo_tokenizer.encode(tok, text)


def test_tokenizer_round_trip(corpus, tok):
    texts = list(islice(corpus.texts(9), 400))
    texts += ["Ünïcödé ☃ 漢字かな\r\n\n  tabs\tand  spaces ", "12345 = 2+2", "<｜title｜>｜DSML｜<think>"]
    for text, ids in zip(texts, demo_tokenizer.encode_texts(tok, texts), strict=True):
        assert demo_tokenizer.decode(tok, ids) == text
    vocab = tok.get_vocab()
    assert not [t for t in vocab if len(t) > 1 and any(c.isdigit() for c in t)]


def test_runtime_reads_the_tokenizer_from_its_metadata(corpus, tok):
    runtime = pytest.importorskip("ds4.text.tokenizer")
    own = runtime.Tokenizer.from_gguf(demo_tokenizer.tokenizer_metadata(tok))
    for text in islice(corpus.texts(11), 200):
        ids = demo_tokenizer.encode(tok, text)
        assert list(own.encode(text)) == ids
        assert own.decode(ids) == text


def test_tokenizer_needs_enough_text():
    with pytest.raises(ValueError, match="give more text"):
        demo_tokenizer.build_tokenizer(["one small text"])


def test_batches_pack_conversations(corpus, tok):
    first = demo_tokenizer.batches(corpus, tok, 254, 4, seed=1)
    second = demo_tokenizer.batches(corpus, tok, 254, 4, seed=1)
    for rows in islice(first, 5):
        assert rows.shape == (4, 256)
        assert rows.dtype == np.int64
        assert (rows[:, 0] == 0).all()
        assert ((rows >= 0) & (rows < 1024)).all()
        assert np.array_equal(rows, next(second))
        for row in rows:  # a BOS only at the start and behind an EOS
            starts = np.flatnonzero(row == 0)[1:]
            assert (row[starts - 1] == 1).all()
    think = tok.token_to_id("<think>")
    share = np.mean([(r == think).sum() / (r == 0).sum() for r in islice(first, 60)])
    assert 0.15 < share < 0.35
