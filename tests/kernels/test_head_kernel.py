"""Sampling on the device against ds4/sampling.py, and what lm_head's planes and counters have to be."""

from __future__ import annotations

import math
import random

import pytest
import torch
from cuemu.backend import CpuBackend, missing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds4.errors import Ds4Error
from ds4.kernels.cases import Inputs
from ds4.kernels.head import sample_ref
from ds4.kernels.head.cases import packed
from ds4.kernels.head.op import LM_HEAD, lm_head, sample, sample_params
from ds4.kernels.head.sample_cases import NEVER, make_inputs
from ds4.kernels.head.sample_op import SAMPLE
from ds4.kernels.packing import PACKINGS, Planes
from ds4.kernels.registry import Operation, run_kernels
from ds4.sampling import Sampler, SamplingParams, draw, filtered_probs, penalised_logits, uniform

CPU = torch.device("cpu")
emulated = pytest.mark.skipif(missing() is not None, reason=str(missing()))
VOCAB = 300


def random_params(rng: random.Random) -> SamplingParams:
    """Parameters of all kinds, ordinary and at their limits."""
    return SamplingParams(
        temperature=rng.choice([0.0, 0.01, 0.3, 0.7, 1.0, 1.5, 4.0, 100.0]),
        top_k=rng.choice([0, 0, 1, 2, 5, 40, 150, VOCAB, 1000]),
        top_p=rng.choice([1.0, 1.0, 1e-9, 0.1, 0.5, 0.9, 0.95, 0.999, rng.random() or 0.5]),
        min_p=rng.choice([0.0, 0.0, 1e-6, 0.01, 0.05, 0.3, 1.0, rng.random()]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.1, 1.3, 0.7, 10.0]),
        seed=rng.getrandbits(63),
    )


def random_logits(rng: random.Random, generator: torch.Generator) -> Tensor:
    """Flat, peaked or full of ties."""
    x = torch.randn(VOCAB, generator=generator) * rng.choice([0.01, 1.0, 3.0, 10.0])
    if rng.random() < 0.4:
        x = (x * rng.choice([0.5, 2.0])).round() / 2  # halves: ties, and -0 beside 0
    return x


def device_params(params: SamplingParams) -> Tensor:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return sample_params(**{name: getattr(params, name) for name in names})


def first_seen(history: list[int]) -> Tensor:
    out = torch.full((VOCAB,), NEVER, dtype=torch.int32)
    for i in reversed(range(len(history))):
        out[history[i]] = i
    return out


def top_p_is_on_a_boundary(params: SamplingParams, history: list[int], logits: Tensor) -> bool:
    """Whether top_p keeps a whole number of tokens to within the rounding of FP64 sums, whose order then decides."""
    if params.temperature == 0 or params.top_p == 1:
        return False
    x = penalised_logits(logits, params.repetition_penalty, history).double().sort(descending=True).values
    ranked = torch.softmax(x / params.temperature, dim=0)[: params.top_k or None]
    sums = ranked.cumsum(0) / ranked.sum()
    return bool(((sums - params.top_p).abs() < 1e-12).any())


def draws(n: int, seed: int) -> list[tuple[SamplingParams, list[int], Tensor]]:
    """``n`` random draws, without those that rounding decides: a few with ties in all that is kept."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    histories = ([rng.randrange(VOCAB) for _ in range(rng.choice([0, 1, 7, 200]))] for _ in range(n))
    drawn = [(random_params(rng), history, random_logits(rng, generator)) for history in histories]
    clear = [one for one in drawn if not top_p_is_on_a_boundary(*one)]
    assert len(clear) > 0.9 * n
    return clear


def behind(history: list[int]) -> Tensor:
    """Position of the last token."""
    return torch.tensor([len(history) - 1], dtype=torch.int32)


def on_device(operation: Operation, params: SamplingParams, history: list[int], logits: Tensor) -> int:
    inputs = {
        "logits": logits[None],
        "pos": behind(history),
        "params": device_params(params),
        "first_seen": first_seen(history),
        "drafted": None,
        "stream": 0,
    }
    return int(run_kernels(operation, inputs, CpuBackend())["token"])


def test_the_reference_draws_what_the_sampler_draws() -> None:
    """The sums differ in their last places, so another token has a chance of about 1e-8 a draw: none here."""
    for params, history, logits in draws(3000, seed=1):
        got = sample(logits[None], behind(history), device_params(params), first_seen(history))
        assert got["status"].tolist() == [0]
        assert got["token"].tolist() == [Sampler(params).sample(logits, history)], (params, len(history))


@emulated
def test_the_kernels_draw_what_the_sampler_draws() -> None:
    wrong = [
        (params, len(history))
        for params, history, logits in draws(40, seed=2)
        if on_device(SAMPLE, params, history, logits) != Sampler(params).sample(logits, history)
    ]
    assert not wrong


def test_the_reference_filters_like_the_sampler() -> None:
    """Probabilities agree to a rounding of f32, and to E's 2^-46 where they are small; the same tokens are kept."""
    for params, history, logits in draws(300, seed=3):
        want = filtered_probs(logits, params, history)
        arguments = (behind(history), device_params(params), first_seen(history))
        got = sample(logits[None], *arguments, probs=True)["probs"][0]
        torch.testing.assert_close(got, want, rtol=2.0**-22, atol=2.0**-45)
        assert torch.equal(got > 2.0**-40, want > 2.0**-40), params


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_of_drafts_see_the_drafts_before_them(temperature: float) -> None:
    """One first_seen for all rows gives each row the history up to its own position."""
    history, drafts = [3, 5, 3, 8], [8, 2, 9]
    params = SamplingParams(temperature=temperature, repetition_penalty=5.0, seed=1)
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[:, [2, 9]] += 4
    got = sample(logits, behind(history), device_params(params), first_seen(history + drafts))["token"].tolist()
    want = [Sampler(params).sample(logits[i], history + drafts[:i]) for i in range(4)]
    assert got == want
    assert got != [Sampler(params).sample(logits[i], history + drafts) for i in range(4)]


@settings(deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1), st.integers(0, 2))
def test_random_numbers_are_the_samplers(seed: int, position: int, stream: int) -> None:
    assert sample_ref.uniform(seed, position, stream) == uniform(seed, position, stream)


@emulated
def test_a_draft_has_its_own_position_and_numbers() -> None:
    """Token 2 of a draft, of another stream: the text in front of it is two tokens longer than the step's."""
    logits, params = torch.zeros(1, VOCAB), device_params(SamplingParams(temperature=1.0, seed=5))
    inputs = {"logits": logits, "pos": behind([0] * 30), "params": params, "first_seen": None}
    got = [
        int(
            run_kernels(SAMPLE, {**inputs, "drafted": torch.tensor([n], dtype=torch.int32), "stream": 2}, CpuBackend())[
                "token"
            ]
        )
        for n in (0, 2)
    ]
    assert got == [draw(torch.ones(VOCAB), uniform(5, at, 2)) for at in (30, 32)]
    assert got[0] != draw(torch.ones(VOCAB), uniform(5, 30))


def test_tokens_follow_the_distribution() -> None:
    """2000 draws from four probabilities: each frequency within 5 standard deviations."""
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    params = sample_params(temperature=1.0, seed=7)
    n = 2000
    tokens = torch.cat([sample(logits, torch.tensor([i], dtype=torch.int32), params)["token"] for i in range(n)])
    for token, p in enumerate((0.1, 0.2, 0.3, 0.4)):
        assert abs(int((tokens == token).sum()) / n - p) < 5 * math.sqrt(p * (1 - p) / n)


@emulated
def test_parameters_that_change_between_launches() -> None:
    """The launches of a graph are made once: parameters and positions are read from memory each time, and counters and
    histograms are as the first launch found them."""
    inputs = make_inputs(0, CPU, n_tok=2, vocab=VOCAB, seen=True)
    outputs = SAMPLE.outputs(inputs)
    for name in ("keys", "e", "part", "count", "mass", "state"):
        outputs[name].fill_(-1)  # nothing but the counter has to be zero
    calls = SAMPLE.calls(inputs, outputs)
    rng = random.Random(5)
    for i in range(12):
        inputs["params"].copy_(device_params(random_params(rng)))
        inputs["pos"].fill_(103 - i)
        CpuBackend().run(calls)
        want = SAMPLE.reference(inputs)
        assert torch.equal(outputs["token"], want["token"]), i
        assert not outputs["counter"].any()


@emulated
def test_lm_head_again_with_the_same_workspaces() -> None:
    """The maximum of the first launch is not in the way of the second's, which is smaller."""
    planes = packed(torch.randn(101, 64, generator=torch.Generator().manual_seed(0)), "bf16")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    inputs: Inputs = {"x": x, "format": "bf16", **planes.tensors}
    outputs = LM_HEAD.outputs(inputs)
    calls = LM_HEAD.calls(inputs, outputs)
    for factor in (8.0, -1.0, 0.01):
        x.mul_(factor)
        CpuBackend().run(calls)
        want = LM_HEAD.reference(inputs)
        assert torch.equal(outputs["token"], want["token"])
        assert not outputs["best"].any()
        assert not outputs["counter"].any()


def test_lm_head_of_a_checkpoints_planes() -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    planes = packed(weight, "q8_0")
    result = lm_head(x, planes)
    torch.testing.assert_close(result["logits"], x @ planes.decode().T)
    assert result["token"].tolist() == result["logits"].argmax(1).tolist()
    assert result["status"].tolist() == [0, 0]


def test_status_where_the_sampler_raises() -> None:
    for bad in (math.nan, math.inf):
        logits = torch.zeros(2, 8)
        logits[1, 3] = bad
        result = sample(logits, torch.tensor([3], dtype=torch.int32), sample_params(temperature=1.0))
        assert result["status"].tolist() == [0, 1]
        assert result["token"][1] == 3
        with pytest.raises(Ds4Error, match="not finite"):
            Sampler(SamplingParams(temperature=1.0)).sample(logits[1], [])


def test_arguments_that_do_not_fit() -> None:
    x = torch.zeros(2, 64)

    def head(x: Tensor, name: str, **tensors: Tensor) -> None:
        inputs = {"x": x, "format": name, **tensors}
        LM_HEAD.calls(inputs, LM_HEAD.outputs(inputs))

    planes = Planes.allocate(PACKINGS["q8_0"], 8, 64)
    with pytest.raises(ValueError, match=r"plane d is \[8, 2\], not \[8, 8\]"):
        head(x, "q8_0", codes=planes.tensors["codes"], d=torch.zeros(8, 2, dtype=torch.float16))
    with pytest.raises(ValueError, match="a multiple of 32"):
        head(torch.zeros(2, 40), "f32", values=torch.zeros(8, 40))
    with pytest.raises(ValueError, match="1 to 8 rows"):
        head(torch.zeros(9, 64), "f32", values=torch.zeros(8, 64))
    with pytest.raises(ValueError, match="no kernel for q4_k"):
        head(x, "q4_k", values=torch.zeros(8, 64))
    inputs = make_inputs(0, CPU, n_tok=2, vocab=16)
    for name, value, message in (
        ("pos", torch.zeros(2, dtype=torch.int32), r"pos is \[2\], not \[1\]"),
        ("params", torch.zeros(5, dtype=torch.int64), r"params is \[5\], not \[6\]"),
        ("first_seen", torch.zeros(17, dtype=torch.int32), r"first_seen is \[17\], not \[16\]"),
        ("logits", torch.zeros(2, 2**17 + 1), "rows of 1 to 131072"),
    ):
        with pytest.raises(ValueError, match=message):
            SAMPLE.calls(inputs | {name: value}, SAMPLE.outputs(inputs | {name: value}))
