"""Sentencepiece models: from a file, and rebuilt from GGUF metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ds4.errors import Ds4Error
from ds4.text.tokenizer import StreamDecoder, Tokenizer

TEXTS = [
    "hello world",
    "the cat sat",
    "naïve 日本 😀",
    "x<｜User｜>the<｜Assistant｜>cat",
    "<think>the</think> cat",
    "",
]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BPE model of 340 pieces with byte fallback, V4 role tokens as control and think tags as user-defined pieces."""
    import sentencepiece

    directory = tmp_path_factory.mktemp("spm")
    corpus = directory / "corpus.txt"
    corpus.write_text("hello world\nthe cat sat on the mat\nworld hello the end\n" * 20, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=310,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        control_symbols=["<｜User｜>", "<｜Assistant｜>"],
        user_defined_symbols=["<think>", "</think>"],
        minloglevel=2,
    )
    return directory / "tokenizer.model"


@pytest.fixture(scope="module")
def metadata(model_file: Path) -> dict[str, Any]:
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(model_file))

    def kind(i: int) -> int:
        tests = [(2, sp.is_unknown), (3, sp.is_control), (6, sp.is_byte), (5, sp.is_unused)]
        return next((k for k, test in tests if test(i)), 4 if sp.id_to_piece(i) in ("<think>", "</think>") else 1)

    ids = range(sp.get_piece_size())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [sp.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [kind(i) for i in ids],
        "tokenizer.ggml.bos_token_id": sp.bos_id(),
        "tokenizer.ggml.eos_token_id": sp.eos_id(),
        "tokenizer.ggml.remove_extra_whitespaces": True,
    }


@pytest.fixture(params=["file", "gguf"])
def tok(request: pytest.FixtureRequest, model_file: Path, metadata: dict[str, Any]) -> Tokenizer:
    if request.param == "file":
        return Tokenizer.from_sentencepiece(model_file)
    return Tokenizer.from_gguf(metadata)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_whole_and_streamed(tok: Tokenizer, text: str) -> None:
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    stream = StreamDecoder(tok)
    assert "".join(map(stream.push, ids)) + stream.flush() == text


def test_ids_equal_the_library(tok: Tokenizer, model_file: Path) -> None:
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    assert tok.n_vocab == sp.get_piece_size() == 310
    for text in ["hello world", "the mat", "naïve 日本 😀", "a  b", "<think>the"]:
        assert tok.encode(text) == sp.encode(text)
        assert tok.decode(sp.encode(text)) == sp.decode(sp.encode(text))


def test_special_ids(tok: Tokenizer) -> None:
    assert (tok.bos_id, tok.eos_id) == (1, 2)
    user, assistant = tok.token_to_id("<｜User｜>"), tok.token_to_id("<｜Assistant｜>")
    assert tok.encode("<｜User｜>") == [user]
    assert tok.stop_ids == {1, 2, user}
    assert tok.hidden_ids == {1, 2, user, assistant}
    assert tok.token_to_id("no such piece") is None
    with pytest.raises(ValueError, match="310"):
        tok.id_to_bytes(310)


def test_from_directory(model_file: Path) -> None:
    tok = Tokenizer.from_directory(model_file.parent)
    assert tok is not None
    assert tok.n_vocab == 310


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_bad_file(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Ds4Error, match=r"tokenizer\.model") as caught:
        Tokenizer.from_sentencepiece(path)
    assert "\n" not in str(caught.value)
