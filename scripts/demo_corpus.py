"""Synthetic conversations on which the demonstration model of ds4 is trained.

``Corpus(seed).sample(rng)`` draws one conversation as a list of chat messages: arithmetic, capitals, stories,
simple facts and small talk. Everything is drawn from the random generator, so a seed fixes the corpus. Some
combinations (a pair of numbers, a country and a phrasing, a protagonist and an activity, ...) are kept out of
the training split by a stable hash; ``split="heldout"`` draws only those.

Run ``python scripts/demo_corpus.py --show 5`` to read samples and ``--stats`` to count tokens.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator

import demo_words as words
from demo_turns import TURNS, Turn

Message = dict[str, str]
Renderer = Callable[[list[Message], bool], str]
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
WEIGHTS = {"arithmetic": 0.42, "capitals": 0.22, "facts": 0.17, "talk": 0.125, "story": 0.065}
HELDOUT_KINDS = ("arithmetic", "capitals", "facts", "story")
THINKING_SHARE = 0.25


def simple_render(messages: list[Message], thinking: bool) -> str:
    """Render plain system/user/assistant conversations as the V4 chat format does."""
    last_user = max(i for i, m in enumerate(messages) if m["role"] == "user")
    out = [BOS]
    for i, message in enumerate(messages):
        if message["role"] == "system":
            out.append(message["content"])
        elif message["role"] == "user":
            tag = "<think>" if thinking and i >= last_user else "</think>"
            out.append(f"<｜User｜>{message['content']}<｜Assistant｜>{tag}")
        else:
            if thinking and i > last_user:
                out.append(message.get("reasoning_content", "") + "</think>")
            out.append(message["content"] + EOS)
    return "".join(out)


def chat_renderer() -> Renderer:
    """Return the chat encoder of ds4, or the equivalent for plain conversations where ds4 is not installed."""
    try:
        from ds4.text.chat import encode_messages
    except ImportError:
        return simple_render
    return lambda messages, thinking: encode_messages(messages, thinking=thinking)


class Corpus:
    """The conversations: deterministic for a seed, endless, and split into a training and a held-out part."""

    def __init__(
        self, seed: int = 0, renderer: Renderer | None = None, weights: dict[str, float] | None = None
    ) -> None:
        """``weights``: other shares of the kinds among turns than ``WEIGHTS``."""
        self.weights = WEIGHTS | (weights or {})
        self.seed = seed
        self.rng = random.Random(seed)
        self.renderer = renderer or chat_renderer()

    def turns(self, rng: random.Random, split: str = "train", kind: str | None = None) -> list[tuple[str, Turn]]:
        """Draw the 1 to 4 turns of one conversation with their kinds; ``kind`` fixes the first."""
        if split not in ("train", "heldout"):
            raise ValueError(f"unknown split {split!r}: expected 'train' or 'heldout'")
        kinds = list(WEIGHTS) if split == "train" else list(HELDOUT_KINDS)
        weights = [self.weights[k] for k in kinds]
        out: list[tuple[str, Turn]] = []
        for _ in range(rng.choices((1, 2, 3, 4), (60, 22, 11, 7))[0]):
            follow = out[-1][1].follow if out else ()
            if follow and rng.random() < 0.7:
                out.append((out[-1][0], Turn(*rng.choice(follow))))
                continue
            what = kind if kind and not out else rng.choices(kinds, weights)[0]
            if what == "story" and any(k == "story" for k, _ in out):
                what = "capitals"
            out.append((what, TURNS[what](rng, split)))
        return out

    def sample(self, rng: random.Random | None = None, split: str = "train", kind: str | None = None) -> list[Message]:
        """Draw one conversation as chat messages, sometimes with a system message in front."""
        rng = rng or self.rng
        messages: list[Message] = []
        if rng.random() < 0.15:
            messages.append({"role": "system", "content": rng.choice(words.SYSTEM)})
        for _, turn in self.turns(rng, split, kind):
            messages.append({"role": "user", "content": _casual(rng, turn.user)})
            messages.append({"role": "assistant", "content": turn.answer, "reasoning_content": turn.reasoning})
        return messages

    def render(self, messages: list[Message], thinking: bool = False) -> str:
        """Render a conversation with the chat format."""
        return self.renderer(messages, thinking)

    def texts(self, seed: int, split: str = "train", thinking: float = THINKING_SHARE) -> Iterator[str]:
        """Yield rendered conversations for ever; ``thinking`` is the share rendered in thinking mode."""
        rng = random.Random(f"{self.seed}/{seed}/{split}")
        while True:
            messages = self.sample(rng, split)
            yield self.render(messages, rng.random() < thinking)


def _casual(rng: random.Random, text: str) -> str:
    """Now and then type a question as people do: politely, in lower case or without the final mark."""
    if len(text) > 12 and rng.random() < 0.04:
        text = rng.choice(("Hello! ", "Hi! ", "Quick question: ", "Please answer: ", "Question: ")) + text
    roll = rng.random()
    if roll < 0.06:
        text = text.lower()
    elif roll < 0.10:
        text = text[:1].lower() + text[1:]
    return text[:-1].rstrip() if rng.random() < 0.06 and len(text) > 4 and text[-1] in ".?!" else text


def _stats(corpus: Corpus, number: int) -> None:
    """Print tokens per conversation and per kind of turn, and characters per token."""
    from demo_tokenizer import build_tokenizer, encode_texts

    source = corpus.texts(1)
    texts = [next(source) for _ in range(number)]
    tok = build_tokenizer(texts)
    tokens = sum(map(len, encode_texts(tok, texts)))
    chars = sum(map(len, texts))
    print(f"vocabulary {tok.get_vocab_size()}, {tokens / number:.1f} tokens and {chars / number:.0f} characters per")
    print(f"conversation, {chars / tokens:.2f} characters per token (control tokens included)")
    rng = random.Random(corpus.seed)
    turns: dict[str, list[Turn]] = {kind: [] for kind in WEIGHTS}
    for _ in range(number):
        for kind, turn in corpus.turns(rng):
            turns[kind].append(turn)
    counts = {}
    for kind, group in turns.items():
        asked, told, thought = (
            sum(map(len, encode_texts(tok, [getattr(t, field) for t in group])))
            for field in ("user", "answer", "reasoning")
        )
        counts[kind] = asked + told + 4 * len(group) + round(THINKING_SHARE * thought)
    for kind, count in counts.items():
        size = len(turns[kind])
        text = "".join(t.user + t.answer for t in turns[kind])
        plain = sum(map(len, encode_texts(tok, [t.user + t.answer for t in turns[kind]])))
        print(
            f"{kind:11} {size / sum(map(len, turns.values())):5.1%} of turns  {count / size:6.1f} tokens per turn  "
            f"{count / sum(counts.values()):5.1%} of tokens  {len(text) / plain:.2f} characters per token"
        )


def main() -> None:
    """Print samples or statistics."""
    parser = argparse.ArgumentParser(description="Show or measure the conversations of the demonstration corpus.")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N conversations")
    parser.add_argument("--kind", choices=list(WEIGHTS), help="only conversations that start with this kind")
    parser.add_argument("--split", choices=("train", "heldout"), default="train")
    parser.add_argument("--stats", action="store_true", help="print tokens per kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    corpus = Corpus(args.seed)
    for _ in range(args.show):
        messages = corpus.sample(split=args.split, kind=args.kind)
        print(corpus.render(messages, corpus.rng.random() < THINKING_SHARE), end="\n\n")
    if args.stats:
        _stats(corpus, 6000)


if __name__ == "__main__":
    main()
