"""A tokenizer that goes from files to GGUF keys, or back, encodes as before."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ds4.errors import Ds4Error
from ds4.text import tokenizer_files
from ds4.text.tokenizer import Tokenizer
from ds4.weights import open_checkpoint

DEMO = Path(__file__).resolve().parents[2] / "ds4" / "demo" / "demo.gguf"
IDS = {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1}  # a writer has them from the configuration


def write(directory: Path, files: dict[str, bytes]) -> Path:
    directory.mkdir(exist_ok=True)
    for name, contents in files.items():
        (directory / name).write_bytes(contents)
    return directory


def same(a: Tokenizer | None, b: Tokenizer | None, texts: list[str]) -> None:
    assert a is not None
    assert b is not None
    for text in texts:
        ids = a.encode(text)
        assert b.encode(text) == ids, text
        assert a.decode(ids) == b.decode(ids)
    assert (a.bos_id, a.eos_id, a.stop_ids, a.hidden_ids, a.n_vocab) == (
        (b.bos_id, b.eos_id, b.stop_ids, b.hidden_ids, b.n_vocab)
    )


def test_v4_there_and_back(golden: Path, tmp_path: Path) -> None:
    """The real tokenizer, by published vectors; the counts of control and user-defined tokens are llama.cpp's."""
    keys = tokenizer_files.gguf_keys(golden / "tokenizer", 129280)
    assert len(keys["tokenizer.ggml.tokens"]) == 129280
    assert len(keys["tokenizer.ggml.merges"]) == 127741
    kinds = Counter(keys["tokenizer.ggml.token_type"])
    assert (kinds[3], kinds[4], kinds[5]) == (1277, 6, 0)
    assert keys["tokenizer.ggml.pre"] == "joyai-llm"
    assert keys["tokenizer.ggml.padding_token_id"] == 2
    assert "tokenizer.huggingface.json" not in keys
    vectors = json.loads((golden / "tokenizer" / "tokenizer_vectors.json").read_text(encoding="utf-8"))[::2]
    fuzz = json.loads((golden / "tokenizer" / "tokenizer_fuzz_vectors.json").read_text(encoding="utf-8"))[::4]
    by_keys = Tokenizer.from_gguf(keys | IDS)
    assert all(by_keys.encode(v["t"]) == v["ids"] for v in vectors + fuzz)
    files = tokenizer_files.files_from_gguf(keys | IDS, "x.gguf")
    again = Tokenizer.from_directory(write(tmp_path, files))
    assert again is not None
    assert all(again.encode(v["t"]) == v["ids"] for v in vectors + fuzz)
    same(by_keys, again, [])


def test_bundled_model_there_and_back(tmp_path: Path) -> None:
    metadata = open_checkpoint(DEMO).metadata
    directory = write(tmp_path, tokenizer_files.files_from_gguf(metadata, "demo"))
    keys = tokenizer_files.gguf_keys(directory, 1024)
    for key, value in keys.items():
        assert metadata[key] == value, key
    assert {key for key in metadata if key.startswith("tokenizer.")} == set(keys) | set(IDS)
    texts = ["What is 2+2?", "<｜User｜>Hi<｜Assistant｜></think>naïve 日本\n\n  12345", ""]
    same(Tokenizer.from_gguf(metadata), Tokenizer.from_directory(directory), texts)


def test_another_byte_level_bpe_comes_along_whole(golden: Path, tmp_path: Path) -> None:
    """GGUF keys cannot describe its pre-tokeniser, so that the tokenizer.json itself goes into the GGUF."""
    keys = tokenizer_files.gguf_keys(golden / "tiny", 520)
    text = (golden / "tiny" / "tokenizer.json").read_text(encoding="utf-8")
    assert keys["tokenizer.huggingface.json"] == text
    assert "tokenizer.ggml.pre" not in keys
    assert keys["tokenizer.ggml.tokens"][512:514] == ["[PAD512]", "[PAD513]"]
    assert keys["tokenizer.ggml.token_type"][512:] == [5] * 8
    files = tokenizer_files.files_from_gguf(keys | IDS, "x.gguf")
    assert files["tokenizer.json"].decode() == text
    directory = write(tmp_path, files)
    same(Tokenizer.from_directory(golden / "tiny"), Tokenizer.from_directory(directory), ["the cat <user> 12"])


def test_missing_tokens_are_filled_in_as_unused(tmp_path: Path) -> None:
    directory = write(tmp_path, tokenizer_files.files_from_gguf(open_checkpoint(DEMO).metadata, "demo"))
    keys = tokenizer_files.gguf_keys(directory, 1030)
    assert keys["tokenizer.ggml.tokens"][1024:] == [f"[PAD{n}]" for n in range(1024, 1030)]
    tokenizer = Tokenizer.from_gguf(keys | IDS)
    assert tokenizer.n_vocab == 1030
    assert tokenizer.encode("[PAD1024]") == Tokenizer.from_gguf(open_checkpoint(DEMO).metadata).encode("[PAD1024]")


def test_chat_template_comes_along(tmp_path: Path) -> None:
    metadata = open_checkpoint(DEMO).metadata | {"tokenizer.chat_template": "{{ x }}"}
    directory = write(tmp_path, tokenizer_files.files_from_gguf(metadata, "demo"))
    assert tokenizer_files.gguf_keys(directory, 1024)["tokenizer.chat_template"] == "{{ x }}"
    (directory / "chat_template.jinja").write_text("{{ y }}")
    assert tokenizer_files.gguf_keys(directory, 1024)["tokenizer.chat_template"] == "{{ y }}"


def train_sentencepiece(directory: Path, **options: Any) -> Path:
    import sentencepiece

    corpus = directory / "corpus.txt"
    corpus.write_text("hello world\nthe cat sat on the mat\nworld hello the end\n" * 20, encoding="utf-8")
    settings = {
        "vocab_size": 310,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "control_symbols": ["<｜User｜>"],
        "user_defined_symbols": ["<think>"],
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(directory / "tokenizer"), minloglevel=2, **(settings | options)
    )
    corpus.unlink()
    return directory


def test_sentencepiece_there_and_back(tmp_path: Path) -> None:
    directory = train_sentencepiece(tmp_path)
    keys = tokenizer_files.gguf_keys(directory, 310)
    ids = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    texts = ["hello  world", "naïve 日本 😀", "x<｜User｜>the <think>cat", ""]
    before, between = Tokenizer.from_directory(directory), Tokenizer.from_gguf(keys | ids)
    same(before, between, texts)
    files = tokenizer_files.files_from_gguf(keys | ids, "x.gguf")
    assert set(files) == {"tokenizer.model", "tokenizer_config.json"}
    (tmp_path / "back").mkdir()
    same(before, Tokenizer.from_directory(write(tmp_path / "back", files)), texts)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"model_type": "unigram", "vocab_size": 279}, "is no BPE model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises characters"),
    ],
)
def test_sentencepiece_that_a_gguf_cannot_hold(tmp_path: Path, options: dict, problem: str) -> None:
    with pytest.raises(Ds4Error, match=rf"tokenizer.model: {problem}"):
        tokenizer_files.gguf_keys(train_sentencepiece(tmp_path, **options), 310)


def test_nothing_where_there_is_no_tokenizer(tmp_path: Path) -> None:
    assert tokenizer_files.gguf_keys(tmp_path, 10) == {}
    assert tokenizer_files.files_from_gguf({}, "x.gguf") == {}
    assert tokenizer_files.copied_files(tmp_path) == {}


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(Ds4Error, match=r"x.gguf: tokenizer.ggml.model is 'bert'"):
        tokenizer_files.files_from_gguf({"tokenizer.ggml.model": "bert"}, "x.gguf")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(Ds4Error, match=r"tokenizer.json: damaged"):
        tokenizer_files.gguf_keys(tmp_path, 10)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(Ds4Error, match=r"tokenizer_config.json: cannot read it as JSON"):
        tokenizer_files.gguf_keys(tmp_path, 10)


def test_files_between_directories_are_copied(golden: Path) -> None:
    files = tokenizer_files.copied_files(golden / "tiny")
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}
    assert files["tokenizer.json"] == (golden / "tiny" / "tokenizer.json").read_bytes()
