"""Byte-level tokenizer: golden vectors by both roads, special ids, streaming, errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4.errors import Ds4Error
from ds4.text.tokenizer import StreamDecoder, Tokenizer

SETTINGS = settings(max_examples=300, deadline=None)


@pytest.mark.parametrize(("file", "n_vectors"), [("tokenizer_vectors", 424), ("tokenizer_fuzz_vectors", 600)])
def test_golden_vectors(golden: Path, v4: Tokenizer, file: str, n_vectors: int) -> None:
    vectors = json.loads((golden / "tokenizer" / f"{file}.json").read_text(encoding="utf-8"))
    assert len(vectors) == n_vectors
    wrong = [v["t"] for v in vectors if v4.encode(v["t"]) != v["ids"]]
    assert not wrong
    unread = [v["t"] for v in vectors if v4.decode(v["ids"]) != v["t"]]
    assert not unread


def test_ids_of_added_tokens(v4_json: dict[str, Any], v4: Tokenizer) -> None:
    added = v4_json["added_tokens"]
    assert len(added) == 1283
    for token in added:
        assert v4.token_to_id(token["content"]) == token["id"]
        assert v4.encode(token["content"]) == [token["id"]]
        assert v4.id_to_bytes(token["id"]) == token["content"].encode()
    assert v4.n_vocab == 129280
    assert v4.token_to_id("no such token at all") is None


def test_special_ids(v4: Tokenizer) -> None:
    assert (v4.bos_id, v4.eos_id) == (0, 1)
    assert v4.stop_ids == {0, 1, 2, 128803}
    hidden = [0, 1, 2, 128000, 128799, 128803, 128804, 128805, 128828, 128829, 128847, 129261, 129265, 129279]
    shown = [3, 127999, 128821, 128822, 128825, 128840, 128841]
    assert not set(hidden) - v4.hidden_ids
    assert not set(shown) & v4.hidden_ids
    # The rule by look finds what the converter calls control, and the one misspelled marker.
    assert len(v4.hidden_ids) == 1277 + 1


def test_roads_agree(from_file: Tokenizer, from_gguf: Tokenizer) -> None:
    assert from_file.hidden_ids == from_gguf.hidden_ids
    assert all(from_file.id_to_bytes(i) == from_gguf.id_to_bytes(i) for i in range(from_file.n_vocab))


def test_decode_equals_the_library(v4_json: dict[str, Any], from_file: Tokenizer) -> None:
    import random

    import tokenizers

    library = tokenizers.Tokenizer.from_str(json.dumps(v4_json))
    rng = random.Random(0)
    for _ in range(500):
        ids = [rng.randrange(from_file.n_vocab) for _ in range(rng.randrange(1, 12))]
        assert from_file.decode(ids) == library.decode(ids, skip_special_tokens=False)


@SETTINGS
@given(text=st.text())
def test_small_round_trip(small: Tokenizer, text: str) -> None:
    assert small.decode(small.encode(text)) == text


def test_encode_adds_nothing(small: Tokenizer) -> None:
    assert small.encode("") == []
    assert small.encode("abb") == [small.token_to_id("ab"), small.token_to_id("b")]
    assert small.encode("<｜User｜>a</think>") == [3, small.token_to_id("a"), small.token_to_id("</think>")]


def test_skip_special(small: Tokenizer) -> None:
    ids = small.encode("<｜begin▁of▁sentence｜><｜User｜>q<think>r</think>a<｜end▁of▁sentence｜>")
    assert small.decode(ids, skip_special=True) == "q<think>r</think>a"


@SETTINGS
@given(data=st.data())
def test_stream_equals_whole(small: Tokenizer, data: st.DataObject) -> None:
    """Any ids, so mostly broken UTF-8; and real text, where moreover no piece may hold a replacement character."""
    broken = data.draw(st.lists(st.integers(0, small.n_vocab - 1)))
    text = data.draw(st.text())
    for ids in (broken, small.encode(text)):
        for skip in (False, True):
            stream = StreamDecoder(small, skip_special=skip)
            pieces = [stream.push(i) for i in ids]
            pieces.append(stream.flush())
            assert "".join(pieces) == small.decode(ids, skip_special=skip)
    assert "�" in text or not any("�" in piece for piece in pieces)
    raw = b"".join(small.id_to_bytes(i) for i in broken)
    assert small.decode(broken) == raw.decode("utf-8", errors="replace")


def test_stream_holds_back(small: Tokenizer) -> None:
    stream = StreamDecoder(small)
    assert [stream.push(i) for i in small.encode("é😀")] == ["", "é", "", "", "", "😀"]
    assert stream.push(small.encode("é")[0]) == ""
    assert stream.flush() == "�"
    assert stream.flush() == ""


def test_unknown_id(small: Tokenizer) -> None:
    with pytest.raises(ValueError, match="99999"):
        small.decode([99999])


def test_lone_surrogate(small: Tokenizer) -> None:
    with pytest.raises(Ds4Error, match="character 1"):
        small.encode("a\ud800")


def test_huggingface_json_is_preferred(golden: Path, from_gguf: Tokenizer) -> None:
    text = (golden / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8")
    tok = Tokenizer.from_gguf({"tokenizer.huggingface.json": text, "tokenizer.ggml.model": "rwkv"})
    assert tok.encode("Hello <｜User｜>") == from_gguf.encode("Hello <｜User｜>")
    assert (tok.bos_id, tok.eos_id) == (0, 1)


def test_from_directory(golden: Path, tmp_path: Path) -> None:
    assert Tokenizer.from_directory(tmp_path) is None
    tok = Tokenizer.from_directory(golden / "tokenizer")
    assert tok is not None
    assert tok.n_vocab == 129280


def test_deepseek_v3_name(small_metadata: dict[str, Any]) -> None:
    assert Tokenizer.from_gguf(small_metadata | {"tokenizer.ggml.pre": "deepseek-v3"}).n_vocab == 266


BAD_METADATA = {
    "no model": ({"model": None}, "tokenizer.ggml.model is missing"),
    "other model": ({"model": "bert"}, "tokenizer.ggml.model is 'bert'"),
    "other pre": ({"pre": "llama-bpe"}, "tokenizer.ggml.pre is 'llama-bpe'"),
    "no tokens": ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
    "no types": ({"token_type": None}, "tokenizer.ggml.token_type is missing"),
    "no merges": ({"merges": None}, "tokenizer.ggml.merges is missing"),
    "short types": ({"token_type": [1, 1]}, "token_type has 2 entries for 266"),
    "merge of one": ({"merges": ["ab"]}, r"merges\[0\] is 'ab'"),
    "merge of three": ({"merges": ["a b", "a b c"]}, r"merges\[1\] is 'a b c'"),
    "foreign merge": ({"merges": ["a c"]}, "does not fit the tokens"),
    "two alike": ({"tokens": ["a"] * 266}, "holds 'a' twice"),
    "bos outside": ({"bos_token_id": 266}, "bos_token_id is 266, outside"),
    "llama without scores": ({"model": "llama"}, "tokenizer.ggml.scores is missing"),
    "llama short scores": ({"model": "llama", "scores": [0.0]}, "scores has 1 entries"),
    "llama without unknown": ({"model": "llama", "scores": [0.0] * 266}, "0 unknown tokens"),
}


@pytest.mark.parametrize("case", BAD_METADATA)
def test_bad_metadata(small_metadata: dict[str, Any], case: str) -> None:
    changes, message = BAD_METADATA[case]
    changed = small_metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(Ds4Error, match=message) as caught:
        Tokenizer.from_gguf(changed, source="model.gguf")
    assert str(caught.value).startswith("model.gguf: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "damaged tokenizer.json"),
        (b"[1, 2]", "damaged tokenizer.json"),
        (b"\xff\xfe", "cannot read"),
        (b'{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}', "byte-level"),
        (b'{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}', "byte-level"),
        (
            b'{"decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},'
            b'"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
            "no BOS token",
        ),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(Ds4Error, match=message) as caught:
        Tokenizer.from_file(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(Ds4Error, match="cannot read"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


def test_config_names_bos_and_eos(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(
        '{"decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},'
        '"model": {"type": "BPE", "vocab": {"a": 0, "[B]": 1, "[E]": 2}, "merges": []}}'
    )
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"bos_token": "[B]", "eos_token": {"content": "[E]"}}')
    tok = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert (tok.bos_id, tok.eos_id) == (1, 2)
    config.write_text("{")
    with pytest.raises(Ds4Error, match="tokenizer_config"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


def test_import_is_light() -> None:
    code = "import sys, ds4.text.tokenizer; sys.exit(bool({'tokenizers', 'sentencepiece', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
