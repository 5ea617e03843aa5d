"""The matrix of ds4.one_answer: ways to draft, prompts, and the plain decoding that all is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ds4.draft_length import AUTO, MAX_LENGTH, DraftLength
from ds4.engine import LLM
from ds4.kernels.launch import Launch
from ds4.kv.cache import LayerCache
from ds4.mtp.drafter import Draft
from ds4.sampling import Sampler, SamplingParams
from ds4.session import Session

LENGTHS = (1, 3, 4, 5, 120, 127, 128, 129, 250)
"""Of prompts: around the windows of both compressors and beyond the ring."""
CHUNKS = (None, 64, 7, 3, 1)
"""Tokens of a chunk; None is the whole prompt."""
MOST_CHUNKS = 12
"""A prompt's last chunks have that size; what does not fit into so many comes first, at once."""
RESUMES = ("live", "rewound", "restored")
KINDS = ("story", "question", "text", "noise")
_ASKED = {
    "story": "Tell me a short story about a robot learning to paint.",
    "question": "What is the capital of France, and what is 12 + 30?",
}
_TEXT = (
    "The lighthouse keeper counted the ships every evening and wrote their names in a green book. On May the second "
    "he counted eleven; one of them, the Aurora, carried 340 tons of salt, and her captain asked the price of rope. "
)
_MORE = (3, 17, 1, 40)
"""Tokens of the second turn's question."""


@dataclass(frozen=True)
class Mode:
    """How a run drafts: ``length``, and a drafter of this name instead of the head's; ``ahead``: on the device, each
    step launched before it is known what the one in front of it chose."""

    name: str
    length: DraftLength
    adversary: str | None = None
    ahead: bool = False

    @property
    def accepts(self) -> bool:
        """Whether tokens have to be accepted for a run to mean anything."""
        return self.length != 0 and self.adversary in (None, "right-wrong")


@dataclass(frozen=True)
class Prompt:
    """Tokens of the first turn and of the second's question."""

    kind: str
    turns: tuple[list[int], list[int]]


class Adversary:
    """A drafter that proposes what ``propose(position, k)`` says, whatever the text is."""

    layers: tuple[int, ...] = ()
    max_tokens = MAX_LENGTH

    def __init__(self, propose: Callable[[int, int], list[int]]) -> None:
        self.caches: list[LayerCache] = []
        self.position = 0
        self._propose = propose

    def observe(self, launch: Launch, ids: Tensor, streams: Sequence[Tensor]) -> None:
        self.position = launch.end

    def draft(self, history: Sequence[int], k: int, sampler: Sampler) -> Draft:
        return Draft(self._propose(len(history), k))

    def rewind(self, position: int) -> None:
        self.position = position


def _random(vocab: int, text: Sequence[int], at: int, k: int) -> list[int]:
    return torch.randint(0, vocab, (k,), generator=torch.Generator().manual_seed(at)).tolist()


def _wrong(vocab: int, text: Sequence[int], at: int, k: int) -> list[int]:
    return [(token + 1) % vocab for token in text[at : at + k]]


def _right_wrong(vocab: int, text: Sequence[int], at: int, k: int) -> list[int]:
    n = at % (k + 1)
    return [*text[at : at + n], *_wrong(vocab, text, at + n, k - n)]


ADVERSARIES = {"random": _random, "wrong": _wrong, "right-wrong": _right_wrong}


def modes(llm: LLM) -> list[Mode]:
    """Plain, every length of the model's draft head if it has one, AUTO, and the adversaries; on a GPU all but these
    also with steps launched ahead."""
    head = llm.new_drafter()
    lengths = [Mode(f"k = {k}", k) for k in range(1, head.max_tokens + 1)] if head is not None else []
    auto = [Mode(AUTO, AUTO)] if head is not None else []
    by_head = [Mode("off", 0), *lengths, *auto]
    ahead = [replace(mode, name=f"{mode.name} ahead", ahead=True) for mode in by_head if llm.backend is not None]
    return [*by_head, *ahead, *(Mode(name, MAX_LENGTH, name) for name in ADVERSARIES)]


def prompts(llm: LLM, n: int) -> Iterator[Prompt]:
    """n prompts that go through all lengths and kinds; questions come with the model's own answer."""
    long: dict[str, list[int]] = {}
    generator = torch.Generator().manual_seed(8)
    vocab = llm.config.vocab_size
    for i in range(n):
        kind = KINDS[(i + i // len(LENGTHS)) % len(KINDS)] if llm.tokenizer is not None else "noise"
        noise = torch.randint(0, vocab, (max(LENGTHS) + max(_MORE),), generator=generator).tolist()
        if kind != "noise" and kind not in long:
            long[kind] = _long(llm, kind)
        ids = long.get(kind, noise)
        # The last lengths first: a few prompts alone should reach across the ring.
        length = LENGTHS[-1 - i % len(LENGTHS)]
        yield Prompt(kind, (ids[:length], noise[-_MORE[i % len(_MORE)] :]))


def _long(llm: LLM, kind: str) -> list[int]:
    """At least as many tokens as the longest prompt has."""
    assert llm.tokenizer is not None
    if kind == "text":
        ids = llm.tokenizer.encode(_TEXT)
        return ids * (max(LENGTHS) // len(ids) + 1)
    ids = llm.encode_prompt(_ASKED[kind])
    return [*ids, *plain_turn(drafting_nothing(llm, max(LENGTHS) + len(ids)), ids, max(LENGTHS))[0]]


def drafting_nothing(llm: LLM, ctx: int) -> Session:
    """A session that drafts nothing, and whose cache never grows."""
    session = Session(llm, ctx, first=ctx)
    session.drafter = None
    return session


def plain_turn(session: Session, ids: Sequence[int], n: int) -> tuple[list[int], Tensor]:
    """n greedy tokens behind ``ids`` and the rows f32 ``[n, vocab]`` they were chosen from, one token at a time."""
    sampler = Sampler(SamplingParams())
    rows = [session.prefill(ids).cpu()]
    tokens = [sampler.sample(rows[0], [])]
    while len(tokens) < n:
        rows.append(session.decode(tokens[-1:])[0].cpu())
        tokens.append(sampler.sample(rows[-1], []))
    return tokens, torch.stack(rows)
