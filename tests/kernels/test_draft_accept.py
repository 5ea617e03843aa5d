"""Acceptance of drawn drafts on the device against ds4/mtp/accept.py; the distribution stays the verifier's."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from cuemu.backend import CpuBackend, missing
from torch import Tensor

from ds4.kernels.cases import Inputs, Outputs
from ds4.kernels.draft import words as at
from ds4.kernels.draft.accept_cases import MOST_DRAFTED
from ds4.kernels.draft.cases import words_of
from ds4.kernels.draft.op import ACCEPT_DRAWN
from ds4.kernels.head.op import sample, sample_params
from ds4.kernels.registry import run_kernels
from ds4.mtp.accept import Accepted, accept
from ds4.mtp.drafter import DRAFT_STREAM, Chooser, Draft
from ds4.sampling import Sampler, SamplingParams, filtered_probs

emulated = pytest.mark.skipif(missing() is not None, reason=str(missing()))
VOCAB = 50


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.3, 0.7, 1.0, 1.5, 4.0]),
        top_k=rng.choice([0, 0, 2, 5, 40]),
        top_p=rng.choice([1.0, 1.0, 0.5, 0.9, 0.95]),
        min_p=rng.choice([0.0, 0.0, 0.01, 0.3]),
        seed=rng.getrandbits(63),
    )


def verified(seed: int) -> tuple[Inputs, Accepted]:
    """A draft of 0 to 7 tokens from logits that are more or less the verifier's: inputs, and what the host keeps."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    params, k = random_params(rng), rng.randrange(8)
    sampler, history = Sampler(params), [1] * rng.choice([1, 5, 300])
    logits = torch.randn(k + 1, VOCAB, generator=generator) * 2
    close = logits[:k] + rng.choice([0.1, 0.5, 2.0]) * torch.randn(k, VOCAB, generator=generator)
    chooser = Chooser(sampler, history)
    for row in close:
        chooser.choose(row)
    want = accept(Draft(chooser.tokens, chooser.probs), logits, history, sampler)
    q = torch.full((MOST_DRAFTED, VOCAB + 2), torch.nan)
    for i, row in enumerate(chooser.probs):
        q[i, :VOCAB] = row
    numbers = sample_params(temperature=1.0, seed=params.seed or 0)
    inputs: Inputs = {
        "p": torch.stack([filtered_probs(row, params) for row in logits]),
        "q": q,
        "token": torch.tensor([sampler.sample(row, [0] * (len(history) + i)) for i, row in enumerate(logits)]).int(),
        "status": torch.zeros(k + 1, dtype=torch.int32),
        "params": numbers,
        "words": words_of(len(history) - 1, [history[-1], *chooser.tokens]),
    }
    return inputs, want


def kept(words: Tensor, position: int) -> Accepted:
    assert int(words[at.POS]) == position + int(words[at.ACCEPTED]) + 1
    return Accepted(int(words[at.ACCEPTED]), int(words[at.TOKENS]))


def compared(seeds: range, run: Callable[[Inputs], Outputs]) -> tuple[list[int], set[int]]:
    """Seeds whose draft is kept otherwise than on the host, and how many tokens were kept."""
    wrong, lengths = [], set()
    for seed in seeds:
        inputs, want = verified(seed)
        position = int(inputs["words"][at.POS])
        if kept(run(inputs)["words"], position) != want:
            wrong.append(seed)
        lengths.add(want.n)
    return wrong, lengths


def test_the_reference_keeps_what_the_host_keeps() -> None:
    """Sums of integers differ from FP64's in their last places: another token is chosen too rarely to be seen."""
    assert compared(range(800), ACCEPT_DRAWN.reference) == ([], set(range(8)))


@emulated
def test_the_kernels_keep_what_the_host_keeps() -> None:
    wrong, lengths = compared(range(40), lambda inputs: run_kernels(ACCEPT_DRAWN, inputs, CpuBackend()))
    assert wrong == []
    assert len(lengths) > 4


def first_two(seed: int, target: Tensor, draft: Tensor, believed: float) -> tuple[int, int]:
    """Two tokens behind token 0 of a model of logits f32 ``[vocab, vocab]`` by previous token, as the device's steps
    make them: the first from a draft of one by another model, whose distribution is ``believed`` times what it is; the
    second behind a kept draft, or a step's own."""
    words, numbers = words_of(0, [0]), sample_params(temperature=1.0, seed=seed)
    drawn = sample(
        draft[:1], words[:1], numbers, drafted=torch.zeros(1, dtype=torch.int32), stream=DRAFT_STREAM, probs=True
    )
    words[at.TOKENS + 1] = drawn["token"][0]
    q = torch.zeros(MOST_DRAFTED, len(target))
    q[0] = drawn["probs"][0] * believed
    rows = sample(target[[0, int(drawn["token"][0])]], words[:1], numbers, probs=True)
    inputs = {"p": rows["probs"], "q": q, "token": rows["token"], "status": rows["status"], "params": numbers}
    words = ACCEPT_DRAWN.reference(inputs | {"words": words})["words"]
    if int(words[at.ACCEPTED]):
        return int(words[at.TOKENS + 1]), int(words[at.TOKENS])
    first = int(words[at.TOKENS])
    return first, int(sample(target[first][None], words[:1], numbers)["token"])


def p_value(seen: Tensor, wanted: Tensor) -> float:
    """Of a chi-square test of counts f64 against those expected, all of them above 5."""
    assert wanted.min() > 4
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2, dtype=torch.float64), statistic / 2))


def test_the_distribution_is_that_of_plain_sampling() -> None:
    """Of two tokens, over 1500 seeds; a right rule fails with probability 1e-5, once and for all. One that takes the
    draft for less likely than it was fails."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(4, 4, generator=generator)
    draft = target + 0.7 * torch.randn(4, 4, generator=generator)
    p = torch.softmax(target.double(), dim=1)

    def value(n: int, believed: float) -> float:
        pairs = [first_two(seed, target, draft, believed) for seed in range(n)]
        seen = torch.bincount(torch.tensor([4 * a + b for a, b in pairs]), minlength=16).double()
        return p_value(seen, (p[0][:, None] * p).flatten() * n)

    assert value(1500, 1.0) > 1e-5
    assert value(1000, 0.6) < 1e-5


def test_arguments_that_do_not_fit() -> None:
    inputs, _ = verified(2)
    k = len(inputs["token"]) - 1
    assert k
    for name, value, message in (
        ("token", torch.zeros(k, dtype=torch.int32), rf"token is \[{k}\], not \[{k + 1}\]"),
        ("params", torch.zeros(5, dtype=torch.int64), r"params is \[5\], not \[6\]"),
        ("q", torch.zeros(k - 1, VOCAB), "up to 8 rows, and one less"),
        ("q", torch.zeros(7, VOCAB - 1), "up to 8 rows, and one less"),
    ):
        changed = inputs | {name: value}
        with pytest.raises(ValueError, match=message):
            ACCEPT_DRAWN.calls(changed, ACCEPT_DRAWN.outputs(changed))
