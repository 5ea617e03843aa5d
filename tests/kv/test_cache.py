"""Rings addressed by absolute position, pools that grow, and the live state of a session (design: undoing is a smaller
position)."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4.errors import Ds4Error
from ds4.kv import cache as cache_module
from ds4.kv.cache import KVCache
from ds4.kv.ring import ring_read, ring_write
from ds4.kv.rows import PackedKey, PackedRow
from ds4.kv.spec import MAX_UNDONE, RowFormats
from ds4.weights.published import FLASH

PROPERTY = settings(derandomize=True, deadline=None, max_examples=200)

CONFIG = replace(FLASH, num_hidden_layers=3, compress_ratios=(0, 4, 128), head_dim=128, index_head_dim=128)
FORMATS = RowFormats(PackedRow(64, 64), PackedKey(128))
CTX = 1024


def positions(start: int, n: int) -> torch.Tensor:
    """Rows that tell their position: [p, -p]."""
    p = torch.arange(start, start + n, dtype=torch.float32)
    return torch.stack((p, -p), dim=1)


@PROPERTY
@given(
    slots=st.integers(1, 12),
    start=st.integers(0, 40),
    chunks=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    data=st.data(),
)
def test_ring_holds_the_last_slots(slots: int, start: int, chunks: list[int], data: st.DataObject) -> None:
    """Whatever the chunks (one longer than the ring included), the last ``slots`` positions can be read, in order."""
    ring = torch.full((slots, 2), torch.nan)
    end = start
    for n in chunks:
        ring_write(ring, end, positions(end, n))
        end += n
    first = data.draw(st.integers(max(start, end - slots), end))
    last = data.draw(st.integers(first, end))
    assert torch.equal(ring_read(ring, first, last), positions(first, last - first))
    for p in range(max(start, end - slots), end):
        assert torch.equal(ring[p % slots], positions(p, 1)[0])


@PROPERTY
@given(slots=st.integers(1, 12), start=st.integers(0, 40), n=st.integers(1, 30))
def test_ring_write_touches_no_other_slot(slots: int, start: int, n: int) -> None:
    ring = torch.full((slots, 2), torch.nan)
    ring_write(ring, start, positions(start, n))
    written = {p % slots for p in range(start, start + n)}
    assert {s for s in range(slots) if not ring[s].isnan().any()} == written


def test_ring_read_refuses_more_than_it_holds() -> None:
    ring = torch.zeros(4, 2)
    assert ring_read(ring, 3, 7).shape == (4, 2)
    with pytest.raises(ValueError, match="4 slots"):
        ring_read(ring, 3, 8)


def advance(cache: KVCache, start: int, end: int, seed: int) -> None:
    """Write the whole state of positions ``start .. end - 1``, as a forward pass does; contents from the seed."""
    generator = torch.Generator().manual_seed(seed)

    def random_bytes(n: int, width: int) -> torch.Tensor:
        return torch.randint(0, 256, (n, width), generator=generator, dtype=torch.uint8)

    for layer in cache.layers:
        ring_write(layer.ring, start, random_bytes(end - start, layer.ring.shape[1]))
        if layer.pool is not None and layer.state is not None:
            first, last = start // layer.spec.ratio, end // layer.spec.ratio
            ring_write(layer.state, start, torch.randn(end - start, *layer.state.shape[1:], generator=generator))
            layer.pool[first:last] = random_bytes(last - first, layer.pool.shape[1])
            if layer.keys is not None and layer.key_state is not None:
                ring_write(layer.key_state, start, torch.randn(end - start, 2, 256, generator=generator))
                layer.keys[first:last] = random_bytes(last - first, layer.keys.shape[1])


def snapshot(cache: KVCache, position: int) -> dict[str, torch.Tensor]:
    return {name: part.clone() for name, part in cache.live(position).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_parts_by_kind_of_layer() -> None:
    cache = KVCache(CONFIG, FORMATS, CTX)
    shapes = {name: tuple(part.shape) for name, part in cache.live(300).items()}
    assert shapes == {
        "layers.0.ring": (128, 200),
        "layers.1.ring": (128, 200),
        "layers.1.pool": (75, 200),
        "layers.1.state": (8, 2, 256),
        "layers.1.keys": (75, 68),
        "layers.1.key_state": (8, 2, 256),
        "layers.2.ring": (128, 200),
        "layers.2.pool": (2, 200),
        "layers.2.state": (128, 2, 128),
    }
    assert all(part.shape[0] == 0 for part in cache.live(0).values())


@settings(PROPERTY, max_examples=60)
@given(position=st.integers(0, 600), n_undone=st.integers(1, MAX_UNDONE))
def test_undoing_is_a_smaller_position(position: int, n_undone: int) -> None:
    """Up to MAX_UNDONE tokens written ahead leave everything that a session at ``position`` can see untouched."""
    cache = KVCache(CONFIG, FORMATS, CTX)
    if position:
        advance(cache, 0, position, seed=1)
    before = snapshot(cache, position)
    advance(cache, position, position + n_undone, seed=2)
    assert same(cache.live(position), before)


def test_undoing_more_than_allowed_is_seen() -> None:
    """The control of the test above: one token more overwrites a live row."""
    cache = KVCache(CONFIG, FORMATS, CTX)
    advance(cache, 0, 300, seed=1)
    before = snapshot(cache, 300)
    advance(cache, 300, 300 + MAX_UNDONE + 1, seed=2)
    after = cache.live(300)
    assert [name for name in before if not torch.equal(after[name], before[name])] == [
        "layers.0.ring",
        "layers.1.ring",
        "layers.1.state",
        "layers.1.key_state",
        "layers.2.ring",
        "layers.2.state",
    ]


@settings(PROPERTY, max_examples=30)
@given(position=st.integers(1, 600), n_undone=st.integers(1, MAX_UNDONE))
def test_stale_slots_are_not_live(position: int, n_undone: int) -> None:
    """Two caches with different pasts ahead of ``position`` have equal live state, in order of position."""
    plain, undone = KVCache(CONFIG, FORMATS, CTX), KVCache(CONFIG, FORMATS, CTX)
    advance(plain, 0, position, seed=1)
    advance(undone, 0, position, seed=1)
    advance(undone, position, position + n_undone, seed=3)
    assert same(plain.live(position), undone.live(position))
    advance(plain, position, position + 50, seed=4)
    advance(undone, position, position + 50, seed=4)
    assert same(plain.live(position + 50), undone.live(position + 50))


# Pools that grow


class Lists:
    """A holder of launches: the pools that they point to."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self.told = 0
        self.read()
        cache.holders.add(self)

    def read(self) -> None:
        self.pools = [layer.pool for layer in self._cache.layers]

    def forget(self) -> None:
        self.told += 1
        self.pools = []


def test_the_capacity_doubles_when_it_has_to() -> None:
    cache = KVCache(CONFIG, FORMATS, 1000, first=6)
    seen = []
    for n in (0, 5, 6, 7, 12, 30, 48, 49, 999, 1000):
        seen.append((cache.reserve(n), cache.capacity))
    capacities = (6, 6, 6, 12, 12, 48, 48, 96, 1000, 1000)
    assert seen == [(a != b, b) for a, b in zip((6, *capacities), capacities, strict=False)]
    assert cache.nbytes() == KVCache(CONFIG, FORMATS, 1000).nbytes()
    with pytest.raises(ValueError, match="a cache for 1000 tokens is to hold 1001"):
        cache.reserve(1001)
    assert KVCache(CONFIG, FORMATS, 100, first=4096).capacity == 100


@settings(PROPERTY, max_examples=30)
@given(first=st.integers(1, 300), ends=st.lists(st.integers(1, 600), min_size=1, max_size=5, unique=True))
def test_what_was_written_stays(first: int, ends: list[int]) -> None:
    """Growing at any time, a cache has the live state of one that was large from the beginning."""
    whole, growing = KVCache(CONFIG, FORMATS, 600), KVCache(CONFIG, FORMATS, 600, first=first)
    start = 0
    for end in sorted(ends):
        growing.reserve(end)
        for cache in (whole, growing):
            advance(cache, start, end, seed=end)
        start = end
        assert same(whole.live(end), growing.live(end))


def test_one_pool_at_a_time_is_there_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches are forgotten first, and each old pool is gone before the next new one is made."""
    cache = KVCache(CONFIG, FORMATS, CTX, first=128)
    lists, gone = Lists(cache), []
    old = [weakref.ref(t) for layer in cache.layers for t in (layer.pool, layer.keys) if t is not None]
    right = cache_module._resized

    def watched(tensor: torch.Tensor, n: int) -> torch.Tensor:
        gone.append([one() is None for one in old])
        return right(tensor, n)

    monkeypatch.setattr(cache_module, "_resized", watched)
    assert not cache.reserve(128)
    assert lists.told == 0
    assert cache.reserve(129)
    assert lists.told == 1
    assert gone == [[False] * 3, [True, False, False], [True, True, False]]
    assert all(one() is None for one in old)
    del lists
    assert not cache.holders


@pytest.mark.parametrize("failing", [0, 1, 2], ids=["first", "second", "last"])
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), Ds4Error),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), Ds4Error),
        (RuntimeError("CUDA error: an illegal memory access"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["full", "full on the CPU", "broken", "Ctrl-C"],
)
@pytest.mark.parametrize("gives_back", [True, False])
def test_what_cannot_grow_is_as_it_was(
    monkeypatch: pytest.MonkeyPatch, failing: int, error: BaseException, raised: type[BaseException], gives_back: bool
) -> None:
    cache = KVCache(CONFIG, FORMATS, CTX, first=256)
    advance(cache, 0, 250, seed=1)
    before, sizes, right, made = snapshot(cache, 250), cache.nbytes(), cache_module._resized, []

    def full(tensor: torch.Tensor, n: int) -> torch.Tensor:
        made.append(n)
        if len(made) == failing + 1 or (len(made) > failing + 1 and not gives_back):
            raise error if len(made) == failing + 1 else torch.OutOfMemoryError("again")
        return right(tensor, n)

    monkeypatch.setattr(cache_module, "_resized", full)
    with pytest.raises(raised) as caught:
        cache.reserve(257)
    if raised is Ds4Error:
        assert str(caught.value) == (
            "ctx: no memory for more than 256 tokens of context; the next 256 take 17,552 bytes: free some, or end "
            "this text here"
        )
    assert (cache.capacity, cache.nbytes()) == (256, sizes)
    assert same(cache.live(250), before)
    if gives_back:
        pools = [t for layer in cache.layers for t in (layer.pool, layer.keys) if t is not None]
        assert sum(t.untyped_storage().nbytes() for t in pools) == sum(t.numel() for t in pools)
    monkeypatch.undo()
    assert cache.reserve(257)
    assert same(cache.live(250), before)


def test_more_than_this_machine_has() -> None:
    """What torch itself says when there is no memory."""
    cache = KVCache(CONFIG, FORMATS, 1 << 46, first=128)
    with pytest.raises(Ds4Error, match="no memory for more than 128 tokens of context"):
        cache.reserve(1 << 45)
    assert cache.capacity == 128
