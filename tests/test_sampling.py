"""Sampling: parameter validation, the filters one by one, greedy ties, seeded reproducibility."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4.errors import Ds4Error
from ds4.sampling import (
    MAX_SEED,
    Sampler,
    SamplingParams,
    _splitmix64,
    draw,
    filtered_probs,
    greedy_token,
    uniform,
)

LOGITS = torch.tensor([1.0, 3.0, 2.0, 3.0, -1.0, 0.0])  # ids 1 and 3 tie for first


def softmax(values: list[float]) -> list[float]:
    """Plain Python softmax, so that the expectation shares no code with the module."""
    top = max(values)
    weights = [math.exp(v - top) for v in values]
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -2.0),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", "1"),
        ("stop_token_ids", 1),
    ],
)
def test_bad_value_names_the_option(field, value):
    with pytest.raises(Ds4Error, match=rf"^{field} must be .*, got ") as caught:
        SamplingParams(**{field: value})
    assert "\n" not in str(caught.value)


def test_good_values():
    params = SamplingParams(max_tokens=1, temperature=2, top_p=1.0, min_p=1.0, seed=MAX_SEED, stop_token_ids=[3, 4])
    assert params.stop_token_ids == (3, 4)
    assert hash(params) == hash(params)


def test_greedy_takes_the_lowest_id_of_a_tie():
    assert Sampler(SamplingParams()).sample(LOGITS, []) == 1
    assert greedy_token(torch.zeros(130_000)) == 0
    assert greedy_token(torch.tensor([-0.0, 0.0])) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_output_that_is_not_finite_is_an_error(bad, temperature):
    logits = LOGITS.clone()
    logits[4] = bad
    with pytest.raises(Ds4Error, match="not finite"):
        Sampler(SamplingParams(temperature=temperature)).sample(logits, [])


def test_greedy_with_repetition_penalty():
    sampler = Sampler(SamplingParams(repetition_penalty=2.0))
    assert sampler.sample(LOGITS, [1]) == 3
    assert sampler.sample(LOGITS, [1, 3]) == 2
    assert sampler.sample(LOGITS, [1, 1, 1]) == 3  # once per distinct id


def test_temperature_zero_is_one_hot():
    assert filtered_probs(LOGITS, SamplingParams()).tolist() == [0, 1, 0, 0, 0, 0]


def test_temperature_divides():
    got = filtered_probs(LOGITS, SamplingParams(temperature=0.5))
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx(softmax([v / 0.5 for v in LOGITS.tolist()]), rel=1e-6)


def test_tiny_temperature_does_not_overflow():
    got = filtered_probs(torch.tensor([1e4, -1e4, 0.0]), SamplingParams(temperature=1e-30))
    assert got.tolist() == [1, 0, 0]


def test_repetition_penalty_divides_positive_and_multiplies_negative():
    got = filtered_probs(LOGITS, SamplingParams(temperature=1.0, repetition_penalty=2.0), [1, 4, 4])
    assert got.tolist() == pytest.approx(softmax([1.0, 1.5, 2.0, 3.0, -2.0, 0.0]), rel=1e-6)
    assert LOGITS.tolist() == [1.0, 3.0, 2.0, 3.0, -1.0, 0.0]  # the caller's tensor is untouched


@pytest.mark.parametrize(
    ("top_k", "kept"), [(1, {1}), (2, {1, 3}), (3, {1, 2, 3}), (6, set(range(6))), (99, set(range(6)))]
)
def test_top_k_keeps_lower_ids_on_ties(top_k, kept):
    got = filtered_probs(LOGITS, SamplingParams(temperature=1.0, top_k=top_k))
    assert set(got.nonzero().flatten().tolist()) == kept
    expected = softmax([LOGITS[i].item() for i in sorted(kept)])
    assert got[sorted(kept)].tolist() == pytest.approx(expected, rel=1e-6)


def test_top_p_keeps_the_token_that_crosses():
    logits = torch.log(torch.tensor([0.1, 0.4, 0.3, 0.2]))
    for top_p, kept in [(0.3, [1]), (0.45, [1, 2]), (0.69, [1, 2]), (0.75, [1, 2, 3]), (0.95, [0, 1, 2, 3])]:
        got = filtered_probs(logits, SamplingParams(temperature=1.0, top_p=top_p))
        assert got.nonzero().flatten().tolist() == kept, top_p
        assert got.sum().item() == pytest.approx(1.0)


def test_top_p_counts_after_top_k():
    logits = torch.log(torch.tensor([0.5, 0.25, 0.125, 0.125]))
    # of the two kept by top-k, the first holds 2/3: enough for 0.6, not enough without renormalising
    got = filtered_probs(logits, SamplingParams(temperature=1.0, top_k=2, top_p=0.6))
    assert got.tolist() == [1, 0, 0, 0]


def test_min_p_is_relative_to_the_likeliest():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    got = filtered_probs(logits, SamplingParams(temperature=1.0, min_p=0.29))
    assert got.tolist() == pytest.approx([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], abs=1e-6)
    tied = filtered_probs(LOGITS, SamplingParams(temperature=1.0, min_p=1.0))
    assert tied.tolist() == [0, 0.5, 0, 0.5, 0, 0]


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    seed=st.integers(0, MAX_SEED),
)
def test_any_filters_leave_a_distribution(logits, temperature, top_k, top_p, min_p, seed):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    tensor = torch.tensor(logits)
    probs = filtered_probs(tensor, params)
    assert probs.sum().item() == pytest.approx(1, abs=1e-5)
    assert probs[greedy_token(tensor)] > 0
    if top_k:
        assert (probs > 0).sum() <= top_k
    token = Sampler(params).sample(tensor, [0, 1])
    assert probs[token] > 0
    assert token == Sampler(params).sample(tensor, [5, 6])  # the position decides, not the tokens before it


def test_draw_edges():
    probs = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0])
    assert [draw(probs, u) for u in (0.0, 0.2499, 0.25, 0.9999999999999999)] == [1, 1, 3, 3]
    assert draw(probs, 1.0) == 3  # never a token of probability zero


def test_uniform_is_the_same_everywhere_and_even():
    assert uniform(1234, 56) == uniform(1234, 56)
    numbers = [uniform(7, position) for position in range(20_000)]
    assert all(0 <= number < 1 for number in numbers)
    counts = torch.histc(torch.tensor(numbers), bins=20, min=0, max=1)
    assert ((counts - 1000).abs() < 5 * math.sqrt(1000)).all()
    assert len(set(numbers)) == len(numbers)
    assert uniform(1, 2) != uniform(2, 1)
    assert uniform(1, 2, stream=1) != uniform(1, 2)


def test_uniform_is_pinned():
    """The published first output of splitmix64 for state 0, and one value of ours: a change would change every seed."""
    assert _splitmix64(0) == 0xE220A8397B1DCDAF
    assert uniform(0, 0) == 0.13870941014555427
    assert uniform(1234, 56) == 0.36972386334037155


def test_replay_gives_the_same_tokens():
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(40, 100, generator=generator)
    params = SamplingParams(temperature=1.0, top_k=30, seed=11)

    def run(sampler: Sampler, history: list[int], until: int) -> list[int]:
        while len(history) < until:
            history.append(sampler.sample(rows[len(history)], history))
        return history

    whole = run(Sampler(params), [0], 40)
    sampler = Sampler(params)
    history = run(sampler, [0], 30)
    del history[12:]  # rewind and go again with the same sampler
    assert run(sampler, history, 40) == whole
    assert run(Sampler(SamplingParams(temperature=1.0, top_k=30, seed=12)), [0], 40) != whole


def test_draws_follow_the_distribution():
    params = SamplingParams(temperature=1.0, seed=5)
    logits = torch.log(torch.tensor([0.1, 0.6, 0.3]))
    sampler = Sampler(params)
    counts = [0, 0, 0]
    for position in range(3000):
        counts[sampler.sample(logits, range(position))] += 1
    for count, share in zip(counts, [0.1, 0.6, 0.3], strict=True):
        assert abs(count - 3000 * share) < 5 * math.sqrt(3000 * share * (1 - share))


def test_without_a_seed_each_sampler_differs():
    seeds = {Sampler(SamplingParams(temperature=1.0)).seed for _ in range(8)}
    assert len(seeds) == 8
    assert all(0 <= seed <= MAX_SEED for seed in seeds)
