"""Texts of any length to measure with: a question at the end of prose, source code, random tokens.

They do not repeat themselves as far as they can help it: a text that loops makes drafts look better than they are.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ds4.errors import Ds4Error

if TYPE_CHECKING:
    from ds4.engine import LLM

QUESTION = "Tell me a short story about a robot learning to paint."
SEED = 1

_WHO = ("The keeper", "Her sister", "A clerk", "The captain", "An old teacher", "The baker", "One of the twins", "Mia")
_DID = ("counted", "sold", "carried", "painted", "borrowed", "described", "lost", "repaired")
_WHAT = (
    "eleven ships",
    "a green book",
    "340 tons of salt",
    "the tall clock",
    "two maps",
    "a coil of rope",
    "the letter",
)
_WHERE = ("in the harbour", "behind the mill", "on May the second", "before the storm", "for a friend", "at the market")
_AND = (
    "and nobody asked why",
    "while it rained",
    "as on every evening",
    "but only once",
    "and wrote it down",
    "at last",
)


def _prose(n_chars: int) -> str:
    """Sentences, drawn anew each time from some 16,000 different ones."""
    rng, parts, length = random.Random(SEED), [], 0
    while length < n_chars:
        parts.append(" ".join(rng.choice(words) for words in (_WHO, _DID, _WHAT, _WHERE, _AND)) + ". ")
        length += len(parts[-1])
    return "".join(parts)


def _code(n_chars: int) -> str:
    """ds4's own source, from the beginning again where it is too short."""
    files = sorted(Path(__file__).resolve().parents[1].rglob("*.py"))
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    return (text * (n_chars // len(text) + 1))[:n_chars]


def _encoded(llm: LLM, make: Callable[[int], str], n: int) -> list[int]:
    """The first ``n`` tokens of a text; it grows until it has as many."""
    assert llm.tokenizer is not None
    n_chars = 4 * n + 64
    while len(ids := llm.tokenizer.encode(make(n_chars))) < n:
        n_chars *= 2
    return ids[:n]


def _random_ids(llm: LLM, n: int) -> list[int]:
    """Any tokens but the ones that end a text."""
    rng = random.Random(SEED)
    tokenizer = llm.tokenizer
    stop = tokenizer.stop_ids if tokenizer else {llm.config.eos_token_id}
    known = min(llm.config.vocab_size, tokenizer.n_vocab) if tokenizer else llm.config.vocab_size
    usable = [token for token in range(known) if token not in stop]
    return rng.choices(usable, k=n)


KINDS = ("chat", "code", "random")
"""chat: prose, then a question in the chat format; code: source code; random: tokens that follow from nothing."""


class Prompt:
    """A text of one of KINDS, of any length.

    ``body``: tokens to take in order. ``ending``: tokens that a prompt of any length ends with; empty but for "chat".
    Raises Ds4Error for text without a tokenizer.
    """

    def __init__(self, llm: LLM, kind: str, n: int) -> None:
        self.kind = kind
        self.ending: list[int] = []
        if kind == "random":
            self.body = _random_ids(llm, n)
        elif llm.tokenizer is None:
            raise Ds4Error(f"{llm.path}: the checkpoint has no tokenizer; use --prompts random")
        else:
            self.body = _encoded(llm, _prose if kind == "chat" else _code, n)
            self.ending = llm.encode_prompt(QUESTION) if kind == "chat" else []

    def upto(self, before: list[int], end: int) -> list[int]:
        """``before`` and as many tokens more as make ``end``; before itself where it is as long already."""
        if len(before) >= end:
            return before
        n_ending = len(self.ending) if len(self.ending) <= end - len(before) else 0
        ids = before + self.body[len(before) : end - n_ending]
        return ids + self.ending[:n_ending]


def kinds_of(llm: LLM) -> tuple[str, ...]:
    """The kinds that this model can be given."""
    return KINDS if llm.tokenizer is not None else ("random",)
