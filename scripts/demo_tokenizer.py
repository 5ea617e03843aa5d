"""Tokenizer of the demonstration model: a small byte-level BPE with the pre-tokeniser and control tokens of V4."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from demo_corpus import BOS, EOS, Corpus
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

PAD = "<｜▁pad▁｜>"
SPLITS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
USER_DEFINED = ("<think>", "</think>", "｜DSML｜")
CONTROL = (
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜latest_reminder｜>",
    "<｜action｜>",
    "<｜query｜>",
    "<｜authority｜>",
    "<｜domain｜>",
    "<｜title｜>",
    "<｜read_url｜>",
)
# The added tokens at the end of the vocabulary, in the order of V4.
ADDED = (*CONTROL[:2], *USER_DEFINED, *CONTROL[2:])
TYPE_NORMAL, TYPE_CONTROL, TYPE_USER_DEFINED = 1, 3, 4


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Return the three splits of V4 followed by the byte alphabet."""
    splits = [pre_tokenizers.Split(Regex(r), "isolated") for r in SPLITS]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def assemble(tokens: list[str], merges: list[tuple[str, str]]) -> Tokenizer:
    """Build the tokenizer from its vocabulary in id order and its merges."""
    vocab = {token: i for i, token in enumerate(tokens)}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tok.pre_tokenizer = _pre_tokenizer()
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (BOS, EOS, PAD, *CONTROL)])
    tok.add_tokens([AddedToken(t, special=False, normalized=False) for t in USER_DEFINED])
    assert all(tok.token_to_id(t) == i for t, i in vocab.items())
    return tok


def build_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> Tokenizer:
    """Train a byte-level BPE of exactly ``vocab_size`` tokens on rendered conversations.

    Ids: 0-2 are BOS, EOS and pad, then the 256 bytes, then the merges, then the role and task tokens. Digits are
    left out of the training text, so that every number is spelled digit by digit.
    """
    ordinary = vocab_size - 3 - len(ADDED)
    trainer = trainers.BpeTrainer(
        vocab_size=ordinary, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = _pre_tokenizer()
    learner.train_from_iterator((_plain(text) for text in texts), trainer)
    # The serialised model lists the merges in the order in which they were learned.
    model = json.loads(learner.to_str())["model"]
    learned = sorted(model["vocab"], key=model["vocab"].get)
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    tokens = [BOS, EOS, PAD, *learned, *ADDED]
    if len(tokens) != vocab_size:
        raise ValueError(f"the text yields only {len(tokens)} of {vocab_size} tokens; give more text")
    return assemble(tokens, merges)


def _plain(text: str) -> str:
    """Cut the control tokens and the digits out of a text."""
    for token in (BOS, EOS, PAD, *ADDED):
        text = text.replace(token, "\n")
    return "".join(" " if c.isdigit() else c for c in text)


def tokenizer_metadata(tok: Tokenizer) -> dict[str, Any]:
    """Return the GGUF keys that describe ``tok``."""
    vocab = tok.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.get)
    control, user = {BOS, EOS, PAD, *CONTROL}, set(USER_DEFINED)
    types = [TYPE_CONTROL if t in control else TYPE_USER_DEFINED if t in user else TYPE_NORMAL for t in tokens]
    merges = [m if isinstance(m, str) else " ".join(m) for m in json.loads(tok.to_str())["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "joyai-llm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }


def encode_texts(tok: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Encode rendered conversations to ids."""
    return [e.ids for e in tok.encode_batch_fast(texts, add_special_tokens=False)]


def encode(tok: Tokenizer, text: str) -> list[int]:
    """Encode one rendered conversation to ids."""
    return encode_texts(tok, [text])[0]


def decode(tok: Tokenizer, ids: list[int]) -> str:
    """Return the text of ``ids``, control tokens included."""
    return tok.decode(ids, skip_special_tokens=False)


def batches(
    corpus: Corpus, tok: Tokenizer, seq_len: int, batch: int, seed: int, *, split: str = "train", thinking: float = 0.25
) -> Iterator[np.ndarray]:
    """Yield int64 arrays [batch, seq_len + 2] of packed conversations, for ever.

    Every row starts with the BOS of a conversation and is filled with conversations that still fit; only the last
    one of a row may be cut, and its rest is dropped.
    """
    source = corpus.texts(seed, split, thinking)
    width = seq_len + 2
    pool: list[list[int]] = []
    while True:
        rows = np.empty((batch, width), dtype=np.int64)
        for row in rows:
            filled = 0
            while filled < width:
                if len(pool) < 64:
                    pool = encode_texts(tok, list(islice(source, 512)))[::-1] + pool
                room = width - filled
                fitting = (i for i in range(len(pool) - 1, len(pool) - 64, -1) if len(pool[i]) <= room)
                ids = pool.pop(next(fitting, -1))[:room]
                row[filled : filled + len(ids)] = ids
                filled += len(ids)
        yield rows
