"""Dense forms of packed weights: what is kept, what is decoded tile by tile, and how much memory either takes."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ds4.engine import LLM
from ds4.weights import dense_cache
from ds4.weights import tensor as tensor_module
from ds4.weights.dense_cache import TILED_BYTES, DenseCache, dense, dense_bytes, tiles
from ds4.weights.formats import FORMATS
from ds4.weights.tensor import PackedTensor


def weight(n_rows: int, n_cols: int, seed: int = 0) -> PackedTensor:
    """A Q8_0 matrix; beyond 64 rows they repeat, without taking memory for it if there are very many."""
    x = torch.randn(min(n_rows, 64), n_cols, generator=torch.Generator().manual_seed(seed))
    data = FORMATS["q8_0"].quantize(x)
    if n_rows > 100_000:
        data = data[:1].expand(n_rows, -1)
    elif n_rows > 64:
        data = data.repeat(-(-n_rows // 64), 1)[:n_rows]
    return PackedTensor(f"w{seed}", "q8_0", (n_rows, n_cols), data)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> DenseCache:
    cache = DenseCache()
    monkeypatch.setattr(dense_cache, "CACHE", cache)
    return cache


def test_dense_is_the_stack_of_its_weights(cache: DenseCache) -> None:
    a, b = weight(64, 128), weight(32, 128, seed=1)
    made = dense((a, b))
    assert made is not None
    assert torch.equal(made, torch.cat((a.dequantize(), b.dequantize())))
    assert dense((a, b)) is made
    assert dense((b, a)) is not made
    assert cache.used_bytes == 2 * dense_bytes((a, b))


def test_torch_tensors_are_taken_as_they_are(cache: DenseCache) -> None:
    a, b = torch.ones(2, 3), torch.zeros(4, 3)
    assert dense((a,)) is a
    assert torch.equal(dense((a, b)), torch.cat((a, b)))
    assert cache.used_bytes == 0
    with pytest.raises(ValueError, match="all packed or all torch"):
        dense((torch.ones(4, 128), weight(4, 128)))


@pytest.mark.parametrize("budget", [0, 1 << 20, 1 << 30])
def test_the_way_depends_on_the_shape_alone(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_cache, "CACHE", DenseCache(budget))
    limit = TILED_BYTES // 4 // 1024  # rows of 1024 weights
    for _ in range(2):  # the second time the cache holds what it may
        assert dense((weight(limit, 1024),)) is not None
        assert dense((weight(limit + 1, 1024),)) is None
        assert dense((weight(limit - 10, 1024), weight(10, 1024))) is not None
        assert dense((weight(limit - 10, 1024), weight(11, 1024))) is None


def test_experts_beyond_the_budget_stay_within_it(cache: DenseCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """256 experts of two sizes, of which a third fits: old copies go before a new one is made, oldest first."""
    experts = [weight(64 if e % 2 else 96, 128, seed=e % 8) for e in range(256)]
    cache.budget_bytes = sum(dense_bytes((w,)) for w in experts) // 3
    making, transposed = [], dense_cache._transposed

    def watched(weights):
        held = sum(t.nbytes for t in cache._entries.values())
        assert held == cache.used_bytes
        making.append(held + dense_bytes(weights))
        return transposed(weights)

    monkeypatch.setattr(dense_cache, "_transposed", watched)
    order = random.Random(1)
    for _ in range(2000):
        w = experts[order.randrange(256)]
        assert dense((w,)) is dense((w,))
    assert 1000 < len(making) < 1700  # a third of the accesses find their copy
    assert max(making) <= cache.budget_bytes
    assert max(making) > 0.98 * cache.budget_bytes
    held = list(cache._entries)
    dense(held[0])
    assert next(iter(cache._entries)) == held[1]
    assert next(reversed(cache._entries)) == held[0]


def test_a_copy_beyond_the_budget_is_not_kept(cache: DenseCache) -> None:
    cache.budget_bytes = 100_000
    kept = dense((weight(64, 128),))
    assert cache.used_bytes == kept.nbytes
    assert dense((weight(256, 128),)) is not None
    assert cache.used_bytes == kept.nbytes


@pytest.mark.parametrize(("first", "last"), [(0, None), (3, 90), (64, 65), (70, 96)])
def test_tiles_of_a_stack(first: int, last: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_module, "_TILE", 10 * 128)
    stack = (weight(64, 128), weight(32, 128, seed=1))
    whole = torch.cat([w.dequantize() for w in stack])
    found = list(tiles(stack, first, last))
    assert [rows.start for rows, _ in found] == [first, *(rows.stop for rows, _ in found[:-1])]
    assert found[-1][0].stop == (last or 96)
    assert torch.equal(torch.cat([tile for _, tile in found]), whole[first:last])
    assert all(rows.start >= 64 or rows.stop <= 64 for rows, _ in found)


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_large_head_is_never_dense() -> None:
    """A quarter of V4-Flash's width: 529 MB in FP32, of which a few at a time."""
    head = weight(129280, 1024)
    assert dense((head,)) is None
    for _ in head.tiles(0, 1000):  # what the first decoding allocates for good
        pass
    before, n_rows, peak = anonymous_bytes(), 0, 0
    for rows, tile in tiles((head,)):
        n_rows += rows.stop - rows.start
        peak = max(peak, anonymous_bytes() - before)
        assert tile.nbytes <= 4 << 20
    assert n_rows == 129280
    assert peak < 32e6  # measured: below 4 MB


def test_one_answer_on_the_tiled_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled model with every packed matrix decoded in several tiles: chunks and steps change no bit (2 s)."""
    torch.set_num_threads(1)
    ids = torch.randint(1024, (139,), generator=torch.Generator().manual_seed(3)).tolist()

    def run(chunks: tuple[int, ...], steps: tuple[int, ...]) -> torch.Tensor:
        session = llm.session()
        for n in chunks:
            prefill = session.prefill(ids[session.position : session.position + n])
        rows = [session.decode(ids[session.position : session.position + n]) for n in steps]
        return torch.cat((prefill.unsqueeze(0), *rows))

    llm = LLM(ctx=160)
    cached = run((131,), (1,) * 8)
    monkeypatch.setattr(dense_cache, "CACHE", DenseCache())
    monkeypatch.setattr(dense_cache, "TILED_BYTES", 0)
    monkeypatch.setattr(tensor_module, "_TILE", 1 << 15)
    plain = run((131,), (1,) * 8)
    assert dense_cache.CACHE.used_bytes == 0
    # Products of other shapes add in another order; measured 7e-6 for four texts. Where such a difference turns the
    # rounding of a cached row, which no text so far does, it could be 1e-3; weights taken wrongly give above 0.1.
    assert 0 < (plain - cached).abs().max() < 2e-3 * cached.abs().max()
    for chunks, steps in (((5, 120, 6), (1, 2, 3, 2)), ((127, 4), (8,))):
        assert torch.equal(run(chunks, steps), plain), (chunks, steps)


def test_a_prompt_pushes_nothing_out(cache: DenseCache) -> None:
    """Without ``evict`` a copy is kept where there is room beside the others, and made for once where there is none."""
    old, small, large = weight(64, 128), weight(32, 128, seed=1), weight(48, 128, seed=2)
    cache.budget_bytes = dense_bytes((old,)) + dense_bytes((small,))
    first = dense((old,))
    assert dense((large,), evict=False) is not dense((large,), evict=False)
    assert dense((small,), evict=False) is dense((small,), evict=False)
    assert dense((old,), evict=False) is first
    assert cache.used_bytes == cache.budget_bytes
    assert dense((large,)) is dense((large,))  # which makes room for itself
    assert cache.used_bytes <= cache.budget_bytes


def test_threads_share_the_budget(cache: DenseCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies in the making count: two threads at once cannot exceed the budget, nor count one copy twice."""
    a, b = weight(64, 128), weight(64, 128, seed=1)
    cache.budget_bytes = dense_bytes((a,))
    transposed, both = dense_cache._transposed, threading.Barrier(2)

    def waiting(weights):
        both.wait(10)
        return transposed(weights)

    monkeypatch.setattr(dense_cache, "_transposed", waiting)
    with ThreadPoolExecutor(2) as pool:
        for pair in ((a, b), (a, a)):
            made = list(pool.map(lambda w: dense((w,), evict=False), pair))
            assert all(torch.equal(m, w.dequantize()) for m, w in zip(made, pair, strict=True) if m is not None)
            assert sum(t.nbytes for t in cache._entries.values()) == cache.used_bytes == dense_bytes((a,))
            cache._entries.clear()
            cache.used_bytes, cache.budget_bytes = 0, 2 * dense_bytes((a,))
