"""Drafting on the bundled model, whose MTP block is trained: speculative decoding gives the plain text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from ds4.demo import bundled_model_path
from ds4.kernels.launch import Launch
from ds4.kernels.numerics import resolve
from ds4.kv.cache import LayerCache
from ds4.model.transformer import Transformer
from ds4.mtp.accept import accept
from ds4.mtp.drafter import DRAFT_STREAM, Draft, Drafter
from ds4.mtp.heads import draft_head
from ds4.mtp.mtp_block import MTPDrafter
from ds4.sampling import Sampler, SamplingParams, draw, uniform
from ds4.weights import Checkpoint, open_checkpoint

N_PROMPT, N_TEXT = 125, 40


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(bundled_model_path())


@pytest.fixture(scope="module")
def trunk(checkpoint: Checkpoint) -> Transformer:
    return Transformer(checkpoint.config, checkpoint, resolve("serve"))


@pytest.fixture(scope="module")
def prompt(trunk: Transformer) -> list[int]:
    """The model's own text from its first token on, so that drafts are good and windows are crossed."""
    return plain(trunk, [0], N_PROMPT - 1)[0]


def plain(trunk: Transformer, prompt: list[int], n: int) -> tuple[list[int], Tensor]:
    """Prompt and n tokens by single steps, and each step's logits."""
    sampler, ids = Sampler(SamplingParams()), list(prompt)
    cache = trunk.new_cache(512)
    rows = [trunk.prefill(ids, 0, cache)]
    while len(ids) < len(prompt) + n:
        ids.append(sampler.sample(rows[-1], ids))
        rows.append(trunk.decode(ids[-1:], len(ids) - 1, cache)[0])
    return ids, torch.stack(rows)


def speculative(
    trunk: Transformer, drafter: Drafter, prompt: list[int], n: int, k: int
) -> tuple[list[int], Tensor, list[int]]:
    """The same with drafts of k, and how many tokens each step kept."""
    sampler, ids = Sampler(SamplingParams()), list(prompt)
    cache = trunk.new_cache(512)
    rows, kept = [trunk.prefill(ids, 0, cache, observer=drafter)], []
    ids.append(sampler.sample(rows[0], ids))
    while len(ids) < len(prompt) + n:
        draft = drafter.draft(ids, k, sampler)
        start = len(ids) - 1
        logits = trunk.decode([ids[-1], *draft.tokens], start, cache, drafter)
        accepted = accept(draft, logits, ids, sampler)
        drafter.rewind(start + 1 + accepted.n)
        rows += logits[: accepted.n + 1]
        kept.append(accepted.n)
        ids += [*draft.tokens[: accepted.n], accepted.token]
    return ids[: len(prompt) + n], torch.stack(rows[: n + 1]), kept


class Adversary:
    """Proposes what it was told to, whatever the text is."""

    layers: tuple[int, ...] = ()
    max_tokens = 7

    def __init__(self, propose: Callable[[int, int], list[int]]) -> None:
        self.caches: list[LayerCache] = []
        self.propose = propose
        self.position = 0

    def observe(self, launch: Launch, ids: Tensor, streams: Sequence[Tensor]) -> None:
        assert launch.start == self.position
        self.position = launch.end

    def draft(self, history: Sequence[int], k: int, sampler: Sampler) -> Draft:
        return Draft(self.propose(len(history), k))

    def rewind(self, position: int) -> None:
        self.position = position


@pytest.mark.parametrize("k", [1, 2, 4, 7])
def test_speculative_is_plain(trunk: Transformer, checkpoint: Checkpoint, prompt: list[int], k: int) -> None:
    """Tokens and logits, bit for bit, with drafts accepted and rejected."""
    expected, expected_rows = plain(trunk, prompt, N_TEXT)
    make = draft_head(trunk, checkpoint)
    assert make is not None
    drafter = make()
    assert isinstance(drafter, MTPDrafter)
    ids, rows, kept = speculative(trunk, drafter, prompt, N_TEXT, k)
    assert ids == expected
    assert torch.equal(rows, expected_rows[: len(rows)])
    assert max(kept) > 0
    assert min(kept) < k


def wrong(text: list[int], at: int, k: int) -> list[int]:
    return [(t + 1) % 1024 for t in text[at : at + k]]


def right_then_wrong(text: list[int], at: int, k: int) -> list[int]:
    n = at % (k + 1)
    return text[at : at + n] + wrong(text, at + n, k - n)


def random(text: list[int], at: int, k: int) -> list[int]:
    return torch.randint(0, 1024, (k,), generator=torch.Generator().manual_seed(at)).tolist()


@pytest.mark.parametrize("propose", [wrong, right_then_wrong, random])
def test_adversarial_drafts_change_nothing(trunk: Transformer, prompt: list[int], propose: Callable) -> None:
    expected, expected_rows = plain(trunk, prompt, N_TEXT + 8)
    ids, rows, kept = speculative(trunk, Adversary(partial(propose, expected)), prompt, N_TEXT, 7)
    assert ids == expected[: len(ids)]
    assert torch.equal(rows, expected_rows[: len(rows)])
    assert (max(kept) > 0) == (propose is right_then_wrong)


def test_drawn_drafts(trunk: Transformer, checkpoint: Checkpoint, prompt: list[int]) -> None:
    """Above temperature 0 a draft comes with what it was drawn from, and is the same again for the same seed."""
    make = draft_head(trunk, checkpoint)
    assert make is not None
    drafter, sampler = make(), Sampler(SamplingParams(temperature=1.0, top_k=9, seed=4))
    cache = trunk.new_cache(512)
    ids = [*prompt, sampler.sample(trunk.prefill(prompt, 0, cache, observer=drafter), prompt)]
    draft, again = drafter.draft(ids, 5, sampler), drafter.draft(ids, 5, sampler)
    assert draft.tokens == again.tokens
    assert all(torch.equal(p, q) for p, q in zip(draft.probs, again.probs, strict=True))
    for i, (token, probs) in enumerate(zip(draft.tokens, draft.probs, strict=True)):
        assert 1 < (probs > 0).sum() <= 9
        assert token == draw(probs, uniform(4, len(ids) + i, DRAFT_STREAM))
    accepted = accept(draft, trunk.decode([ids[-1], *draft.tokens], len(ids) - 1, cache, drafter), ids, sampler)
    assert accepted == accept(draft, trunk.decode([ids[-1], *draft.tokens], len(ids) - 1, cache), ids, sampler)
    assert accepted.n > 0


def test_a_model_without_a_head(trunk: Transformer, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunk, "config", replace(trunk.config, n_mtp_layers=0))
    assert draft_head(trunk, checkpoint) is None
