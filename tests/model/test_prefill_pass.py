"""Prompts through kernels, on the CPU's emulation: any cutting gives the same bits, and the torch form agrees.

The kernels' prefill form rounds activations to BF16 in front of every product, as the official code does, so that rows
differ from the torch form's by some 2^-9 of their norm, and where codes of the cache fall differently by more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cuemu.backend import CpuBackend, missing
from pair import CTX, Pair
from torch import Tensor

from ds4.demo import bundled_model_path
from ds4.kernels import picks
from ds4.kernels.launch import Launch
from ds4.kernels.moe import prefill_plan
from ds4.kv.cache import KVCache
from ds4.model import prefill_pass
from ds4.model.prefill_pass import Prefiller, capacity_for
from ds4.model.prefill_state import PassState, scored_rows

N, FIRST = 136, 120
MEDIAN = 0.01  # of a row's norm: BF16 activations, 2^-9 each, and codes that fall differently; 5.1e-3 measured
MEDIAN_RANDOM = 0.08  # 4.3e-2 measured

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def tiny(golden: Path) -> Pair:
    return Pair(golden / "tiny")


@pytest.fixture(scope="module")
def demo() -> Pair:
    return Pair(bundled_model_path())


@contextmanager
def short_lists() -> Iterator[None]:
    """Capacities and tiles that cost the emulation less; tests/kernels shows that no result depends on the tile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill_pass, "CAPACITIES", (8, 16, 64, 136))
        for module in (picks, prefill_plan):
            patch.setattr(module, "default_pick", lambda *_: picks.Pick(16, 2))
        yield


@pytest.fixture(autouse=True)
def _short_lists() -> Iterator[None]:
    with torch.inference_mode(), short_lists():
        yield


def prefiller(pair: Pair, cache: KVCache) -> Prefiller:
    return Prefiller(pair.model, cache, CpuBackend())


def assert_same(n: int, one: tuple[Tensor, KVCache], other: tuple[Tensor, KVCache]) -> None:
    assert torch.equal(one[0], other[0])
    a, b = one[1].live(n), other[1].live(n)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture(scope="module")
def whole(demo: Pair) -> tuple[Tensor, KVCache]:
    """All rows of a one-shot prompt of N tokens, and the cache behind it."""
    cache = demo.cache()
    with torch.inference_mode(), short_lists():
        return prefiller(demo, cache).prefill(demo.ids(N), 0, all_logits=True), cache


@pytest.fixture(scope="module")
def begun(demo: Pair) -> KVCache:
    """The cache behind the first FIRST tokens, in two chunks."""
    cache = demo.cache()
    with torch.inference_mode(), short_lists():
        one, ids = prefiller(demo, cache), demo.ids(N)
        one.prefill(ids[:64], 0)
        one.prefill(ids[64:FIRST], 64)
    return cache


def copied(pair: Pair, cache: KVCache) -> KVCache:
    """A cache of its own with the same bytes."""
    new = pair.cache()
    for mine, theirs in zip(new.layers, cache.layers, strict=True):
        for name in ("ring", "pool", "state", "keys", "key_state"):
            if (part := getattr(theirs, name)) is not None:
                getattr(mine, name).copy_(part)
    return new


@pytest.mark.parametrize("chunk", [1, 3, 7, 8, 9])
def test_short_chunks_change_no_bit(demo: Pair, whole: tuple[Tensor, KVCache], begun: KVCache, chunk: int) -> None:
    """Where windows of 4 and of 128 close, behind chunks of 64 and 56 tokens."""
    cache, ids, logits = copied(demo, begun), demo.ids(N), torch.empty(0)
    one = prefiller(demo, cache)
    for start in range(FIRST, N, chunk):
        logits = one.prefill(ids[start : min(N, start + chunk)], start)
    assert_same(N, (whole[0][-1], whole[1]), (logits, cache))


@pytest.mark.parametrize("chunk", [127, 128, 129])
def test_long_chunks_change_no_bit(demo: Pair, whole: tuple[Tensor, KVCache], chunk: int) -> None:
    """Rows of a list without tokens hold what an earlier, longer run left there: here that of other tokens."""
    cache, ids = demo.cache(), demo.ids(N)
    one = prefiller(demo, cache)
    if chunk == 128:
        one.prefill(list(reversed(ids)), 0)
    one.prefill(ids[:chunk], 0)
    assert_same(N, (whole[0][-1], whole[1]), (one.prefill(ids[chunk:], chunk), cache))


def test_rows_are_those_of_prompts_that_end_there(demo: Pair, whole: tuple[Tensor, KVCache], begun: KVCache) -> None:
    ids = demo.ids(N)
    assert whole[0].shape == (N, demo.config.vocab_size)
    assert torch.equal(whole[0][129], prefiller(demo, copied(demo, begun)).prefill(ids[FIRST:130], FIRST))


def relative(got: Tensor, want: Tensor) -> Tensor:
    return (got - want).norm(dim=-1) / want.norm(dim=-1)


def test_the_torch_form_agrees(demo: Pair, whole: tuple[Tensor, KVCache]) -> None:
    off = relative(whole[0], demo.torch_model.prefill(demo.ids(N), 0, demo.torch_model.new_cache(CTX), all_logits=True))
    print(f"rows off by {off.median():.1e} in the median, {off.max():.1e} at most")
    assert off.median() < MEDIAN


def test_hash_routing_and_more_layers_agree(tiny: Pair) -> None:
    """golden/tiny, whose random weights carry a difference further than trained ones."""
    ids = tiny.ids(64)
    got = prefiller(tiny, tiny.cache()).prefill(ids, 0, all_logits=True)
    want = tiny.torch_model.prefill(ids, 0, tiny.torch_model.new_cache(CTX), all_logits=True)
    off = relative(got, want)
    print(f"rows off by {off.median():.1e} in the median, {off.max():.1e} at most")
    assert off.median() < MEDIAN_RANDOM


def test_a_state_that_is_lost_is_noticed(demo: Pair, whole: tuple[Tensor, KVCache], begun: KVCache) -> None:
    """Without the raw rows of the chunk before, a window that began there pools something else."""
    cache, ids = copied(demo, begun), demo.ids(N)
    for layer in cache.layers:
        if layer.state is not None:
            layer.state.zero_()
    logits = prefiller(demo, cache).prefill(ids[FIRST:], FIRST)
    assert not torch.equal(logits, whole[0][-1])
    a, b = cache.live(N), whole[1].live(N)
    assert not torch.equal(a["layers.2.pool"], b["layers.2.pool"])


def test_streams_of_the_layers_are_those_that_were_tapped(demo: Pair, begun: KVCache) -> None:
    """What a draft head is shown: of each layer what the torch form makes, tile by tile."""

    class Observer:
        layers = (0, 2)

        def __init__(self) -> None:
            self.shown: list[tuple[Launch, Tensor, Sequence[Tensor]]] = []

        def observe(self, launch: Launch, ids: Tensor, streams: Sequence[Tensor]) -> None:
            self.shown.append((launch, ids, [s.clone() for s in streams]))

    got, want, ids = Observer(), Observer(), demo.ids(N)
    theirs = demo.torch_model.new_cache(CTX)
    demo.torch_model.prefill(ids[:FIRST], 0, theirs)
    demo.torch_model.prefill(ids[FIRST:], FIRST, theirs, observer=want)
    prefiller(demo, copied(demo, begun)).prefill(ids[FIRST:], FIRST, observer=got)
    assert (
        [one[0].rows for one in got.shown]
        == [one[0].rows for one in want.shown]
        == [tuple(range(FIRST, 128)), tuple(range(8))]
    )
    for (launch, mine, streams), (_, other, wanted) in zip(got.shown, want.shown, strict=True):
        rows = launch.row_slice
        assert mine[rows].tolist() == other[rows].tolist() == ids[launch.start : launch.end]
        for a, b in zip(streams, wanted, strict=True):
            assert relative(a[rows].flatten(1), b[rows].flatten(1)).median() < MEDIAN


def test_capacities() -> None:
    assert [capacity_for(n) for n in (1, 8, 9, 65, 136, 9999)] == [8, 8, 16, 136, 136, 136]


def test_scores_are_bounded() -> None:
    assert scored_rows(4096, 8192) == 4096
    assert scored_rows(4096, 262144) == 128
    assert scored_rows(8, 1 << 30) == 8


def test_words_of_a_pass() -> None:
    state = PassState(torch.device("cpu"), 64, 16)
    state.begin(1000, [7, 8, 9])
    assert state.word(0).tolist() == [1000]
    assert state.word(4, 64).tolist() == [7, 8, 9] + [0] * 61
    assert state.count.tolist() == [3]
    assert [word.tolist() for word in state.starts] == [[1000], [1016], [1032], [1048]]
    assert all(word.data_ptr() % 16 == 0 for word in (state.count, *state.starts))
    state.begin(1000, [], 2)
    assert state.count.tolist() == [2]
