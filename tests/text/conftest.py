"""The V4 tokenizer from the golden data, and metadata as a GGUF converter would write it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ds4.text.tokenizer import Tokenizer


def gguf_metadata(tokenizer_json: dict[str, Any]) -> dict[str, Any]:
    """``tokenizer.ggml.*`` for a tokenizer.json, by the rules of chat.md 1.4."""
    model = tokenizer_json["model"]
    tokens = {i: text for text, i in model["vocab"].items()}
    types = dict.fromkeys(tokens, 1)
    for added in tokenizer_json["added_tokens"]:
        tokens[added["id"]] = added["content"]
        looks_control = re.fullmatch(r"<\|.*\|>|<｜.*｜>", added["content"])
        types[added["id"]] = 3 if added["special"] or looks_control else 4
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "joyai-llm",
        "tokenizer.ggml.tokens": [tokens[i] for i in range(len(tokens))],
        "tokenizer.ggml.token_type": [types[i] for i in range(len(tokens))],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    }


@pytest.fixture(scope="session")
def v4_json(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def v4_metadata(v4_json: dict[str, Any]) -> dict[str, Any]:
    return gguf_metadata(v4_json)


@pytest.fixture(scope="session")
def from_file(golden: Path) -> Tokenizer:
    return Tokenizer.from_file(golden / "tokenizer" / "tokenizer.json")


@pytest.fixture(scope="session")
def from_gguf(v4_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(v4_metadata)


@pytest.fixture(scope="session", params=["from_file", "from_gguf"])
def v4(request: pytest.FixtureRequest) -> Tokenizer:
    """The V4 tokenizer by either road."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def small_metadata() -> dict[str, Any]:
    """A tokenizer of 256 bytes, one merge, the V4 control tokens and one padding entry: needs no golden data."""
    from ds4.text.bpe import byte_alphabet

    letters = [char for char, _ in sorted(byte_alphabet().items(), key=lambda item: item[1])]
    control = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<｜User｜>", "<｜Assistant｜>"]
    user_defined = ["<think>", "</think>", "｜DSML｜"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "joyai-llm",
        "tokenizer.ggml.tokens": [*control, *letters, "ab", *user_defined, "[PAD265]"],
        "tokenizer.ggml.token_type": [3] * 5 + [1] * 257 + [4] * 3 + [5],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


@pytest.fixture(scope="session")
def small(small_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(small_metadata)
