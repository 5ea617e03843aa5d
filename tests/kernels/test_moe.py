"""Expert layer against the unit golden and against a plain restatement (spec model.md 2.7)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from unit_data import assert_close, decode_fp8, decode_mxfp4, load_unit, seeded

from ds4.kernels.moe import EXPERT_ROWS, Expert, moe, moe_tiles, ref, swiglu
from ds4.kernels.numerics import Numerics
from ds4.kernels.route.ref import route
from ds4.weights import dense_cache
from ds4.weights.dense_cache import dense
from ds4.weights.formats import FORMATS
from ds4.weights.tensor import PackedTensor

OFFICIAL = Numerics(act_fp8=True)
"""What the golden has: activations rounded to FP8 in front of every linear, FP32 between the operations."""

FORMS = pytest.mark.parametrize("rows", [None, tuple(range(8))], ids=["prefill", "decode"])


class Case:
    """unit_moe with its weights decoded from their bytes."""

    def __init__(self, golden: Path, **decode: bool) -> None:
        g = load_unit(golden, "moe")
        self.x, self.expected, self.limit = g["x"], g["y_ref"], g["lim"].item()

        def expert(e: int) -> Expert:
            w1, w3, w2 = (decode_mxfp4(g[w][e], g[f"{w}s"][e], **decode) for w in ("w1", "w3", "w2"))
            return Expert(w1, w3, w2)

        self.experts = [expert(e) for e in range(8)]
        shared = (decode_fp8(g[w], g[f"{w}s"]) for w in ("sw1", "sw3", "sw2"))
        self.shared = Expert(*shared)
        self.ids, self.weights = route(
            self.x, g["gate_w"], bias=g["bias"], hash_ids=None, top_k=2, route_scale=g["rs"].item()
        )

    def run(
        self,
        rows: tuple[int, ...] | None,
        *,
        numerics: Numerics = OFFICIAL,
        weights: Tensor | None = None,
        experts: list[Expert] | None = None,
    ) -> Tensor:
        weights = self.weights if weights is None else weights
        experts = experts or self.experts
        return moe(self.x, self.ids, weights, experts, self.shared, limit=self.limit, numerics=numerics, rows=rows)


@pytest.fixture(scope="module")
def case(golden: Path) -> Case:
    return Case(golden)


@FORMS
def test_golden(case: Case, rows: tuple[int, ...] | None) -> None:
    assert_close(case.run(rows), case.expected)


@FORMS
def test_mistakes_are_seen(golden: Path, case: Case, rows: tuple[int, ...] | None) -> None:
    swapped = [Expert(e.w3, e.w1, e.w2) for e in case.experts]
    for y in (
        Case(golden, high_nibble_first=True).run(rows),
        case.run(rows, numerics=Numerics()),
        case.run(rows, weights=case.weights.flip(1)),
        case.run(rows, weights=case.weights / 1.5),
        case.run(rows, experts=swapped),
    ):
        with pytest.raises(AssertionError):
            assert_close(y, case.expected)


@FORMS
def test_routing_weight_enters_before_w2(case: Case, rows: tuple[int, ...] | None) -> None:
    """Only the FP8 rounding of w2's input can tell: weights applied afterwards give another result."""

    def weighted_after(numerics: Numerics) -> Tensor:
        one = torch.ones_like(case.weights)
        shared = case.run(rows, weights=torch.zeros_like(one), numerics=numerics)
        total = shared
        for slot in range(2):
            only = torch.zeros_like(one)
            only[:, slot] = 1
            total = total + case.weights[:, slot : slot + 1] * (
                case.run(rows, weights=only, numerics=numerics) - shared
            )
        return total

    assert_close(weighted_after(Numerics()), case.run(rows, numerics=Numerics()))
    with pytest.raises(AssertionError):
        assert_close(weighted_after(OFFICIAL), case.expected)


def test_swiglu_clamps() -> None:
    """Up on both sides, the gate from above only, both before the activation. The golden never reaches its limit."""
    gate = torch.tensor([-30.0, -3.0, 12.0, 2.0, 2.0])
    up = torch.tensor([1.0, 2.0, 3.0, 25.0, -25.0])
    clamped = torch.tensor([-30.0, -3.0, 10.0, 2.0, 2.0]).double()
    expected = clamped / (1 + torch.exp(-clamped)) * torch.tensor([1.0, 2.0, 3.0, 10.0, -10.0])
    assert_close(swiglu(gate, up, 10.0), expected.float(), 1e-6)
    assert swiglu(gate, up, 10.0)[0] != swiglu(gate.clamp(min=-10), up, 10.0)[0]


def restated(
    x: Tensor, ids: Tensor, weights: Tensor, experts: list[Expert], shared: Expert, limit: float, *, clamp_shared: bool
) -> Tensor:
    """Spec model.md 2.7 token by token in FP64."""

    def ffn(v: Tensor, e: Expert, bound: float) -> Tensor:
        gate, up = (w.double() @ v for w in (e.w1, e.w3))
        gate, up = gate.clamp(max=bound), up.clamp(-bound, bound)
        return e.w2.double() @ (gate * torch.sigmoid(gate) * up)

    rows = []
    for v, chosen, share in zip(x.double(), ids.tolist(), weights.double(), strict=True):
        y = ffn(v, shared, limit if clamp_shared else torch.inf)
        for e, w in zip(chosen, share, strict=True):
            y = y + w * ffn(v, experts[e], limit)
        rows.append(y)
    return torch.stack(rows).float()


def test_many_tokens_with_clamps_acting() -> None:
    """More tokens for one expert than a block of rows holds, an expert with none, clamps reached everywhere."""
    n, d, inter, n_experts, top_k = EXPERT_ROWS * 2 + 6, 64, 32, 6, 2
    x = seeded(n, d) * 4
    weights = seeded(n, top_k, seed=1).abs()

    def expert(seed: int) -> Expert:
        return Expert(seeded(inter, d, seed=seed), seeded(inter, d, seed=seed + 1), seeded(d, inter, seed=seed + 2))

    experts, shared = [expert(10 * e + 10) for e in range(n_experts)], expert(5)
    ids = torch.stack((torch.zeros(n, dtype=torch.int64), 1 + torch.arange(n) % (n_experts - 2)), dim=1)
    assert (ids != n_experts - 1).all()
    expected = restated(x, ids, weights, experts, shared, 10.0, clamp_shared=True)
    args = (x, ids, weights, experts, shared)
    prefill = moe(*args, limit=10.0, numerics=Numerics())
    assert_close(prefill, expected)
    assert_close(moe(*args, limit=10.0, numerics=Numerics(), rows=tuple(range(n))), expected)
    live = slice(3, 40)
    assert torch.equal(moe(*args, limit=10.0, numerics=Numerics(), live=live)[live], prefill[live])
    with pytest.raises(AssertionError):
        assert_close(prefill, restated(x, ids, weights, experts, shared, 10.0, clamp_shared=False))
    with pytest.raises(AssertionError):
        assert_close(moe(*args, limit=1e9, numerics=Numerics()), expected)


@pytest.mark.parametrize(("d", "inter"), [(256, 256), (64, 96), (1024, 512)])
def test_a_tokens_row_in_an_experts_block_does_not_matter(d: int, inter: int) -> None:
    """Prefill form: which row of a block a token gets depends on its neighbours, so every row must compute alike.

    The one place where bit-identity rests on the BLAS library (``ds4/kernels/launch.py``): a library that failed
    here would break "any chunking = one-shot".
    """
    n, n_experts, top_k = 128, 8, 3
    x, weights = seeded(n, d), seeded(n, top_k, seed=1).abs()
    ids = torch.stack([torch.randperm(n_experts, generator=torch.Generator().manual_seed(t))[:top_k] for t in range(n)])

    def expert(seed: int) -> Expert:
        return Expert(seeded(inter, d, seed=seed), seeded(inter, d, seed=seed + 1), seeded(d, inter, seed=seed + 2))

    args = (x, ids, weights, [expert(10 * e + 10) for e in range(n_experts)], expert(5))
    together = moe(*args, limit=10.0, numerics=Numerics())
    for t in range(0, n, 3):
        alone = moe(*args, limit=10.0, numerics=Numerics(), live=slice(t, t + 1))
        assert torch.equal(alone[t], together[t]), f"token {t}"


@pytest.mark.parametrize("tiled_bytes", [0, 1 << 30])
def test_tiles_together_are_tiles_alone(tiled_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert takes the tokens of all tiles at once, with copies of its weights or decoding them at every use."""
    monkeypatch.setattr(ref, "TILED_EXPERTS_BYTES", tiled_bytes)
    n, n_tiles, d, inter, n_experts, top_k = 128, 3, 64, 96, 5, 2
    xs = [seeded(n, d, seed=t) for t in range(n_tiles)]
    weights = [seeded(n, top_k, seed=10 + t).abs() for t in range(n_tiles)]
    random = torch.Generator().manual_seed(0)
    ids = [torch.rand(n, n_experts, generator=random).argsort(dim=1)[:, :top_k] for _ in range(n_tiles)]
    lives = [slice(100, 128), slice(0, 128), slice(0, 7)]
    experts, shared = [packed_expert(d, inter, 10 * e) for e in range(n_experts)], packed_expert(d, inter, 5)
    args = (experts, shared)
    together = moe_tiles(xs, ids, weights, lives, *args, limit=10.0, numerics=Numerics())
    for x, i, w, live, y in zip(xs, ids, weights, lives, together, strict=True):
        alone = moe(x, i, w, *args, limit=10.0, numerics=Numerics(), live=live)
        assert torch.equal(alone[live], y[live])
        decoded = moe(x, i, w, *args, limit=10.0, numerics=Numerics(), rows=tuple(range(n)))
        assert_close(y[live], decoded[live])


def packed_expert(d: int, inter: int, seed: int) -> Expert:
    """Three Q8_0 matrices whose rows repeat after 61, which no tile is a multiple of."""

    def matrix(name: str, m: int, k: int, seed: int) -> PackedTensor:
        data = FORMATS["q8_0"].quantize(seeded(61, k, seed=seed) / k**0.5).repeat(-(-m // 61), 1)[:m]
        return PackedTensor(name, "q8_0", (m, k), data)

    return Expert(matrix("w1", inter, d, seed), matrix("w3", inter, d, seed + 1), matrix("w2", d, inter, seed + 2))


class Large:
    """Experts of which every product goes tile by tile, and tokens of which one expert gets more than a block of rows.

    Tiles are as wide as those of V4-Flash (4096 inputs) or half of it; what counts as large is set lower, for speed.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int, d: int = 2080, inter: int = 544) -> None:
        monkeypatch.setattr(dense_cache, "TILED_BYTES", 1 << 20)
        n_experts, top_k = 3, 2
        self.x, weights = seeded(n, d), seeded(n, top_k, seed=1).abs()
        ids = torch.stack((torch.zeros(n, dtype=torch.int64), 1 + torch.arange(n) % (n_experts - 1)), dim=1)
        experts = [packed_expert(d, inter, 10 * e) for e in range(n_experts)]
        shared = packed_expert(d, inter, 5)
        for w in shared:
            assert dense((w,)) is None
            assert len(list(w.tiles())) > 1
        self.args = (self.x, ids, weights, experts, shared)
        dense_experts = [Expert(*(w.dequantize() for w in e)) for e in (*experts, shared)]
        self.dense_args = (self.x, ids, weights, dense_experts[:-1], dense_experts[-1])


LARGE = pytest.mark.parametrize(("d", "inter"), [(2080, 544), (4096, 288)])


@LARGE
def test_tiled_experts_in_prefill(d: int, inter: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Large(monkeypatch, 40, d, inter)
    together = moe(*case.args, limit=10.0, numerics=Numerics())
    assert_close(together, moe(*case.dense_args, limit=10.0, numerics=Numerics()))
    for t in (0, 1, 17, 31, 32, 39):  # other tokens put it on another row of its expert's blocks
        alone = moe(*case.args, limit=10.0, numerics=Numerics(), live=slice(t, t + 1))
        assert torch.equal(alone[t], together[t]), f"token {t}"


@LARGE
def test_tiled_experts_in_decode(d: int, inter: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Large(monkeypatch, 8, d, inter)
    together = moe(*case.args, limit=10.0, numerics=Numerics(), rows=tuple(range(8)))
    assert_close(together, moe(*case.dense_args, limit=10.0, numerics=Numerics(), rows=tuple(range(8))))
    for rows in ((0,), (6,), (1, 2), (7, 0, 1)):
        out = moe(*case.args, limit=10.0, numerics=Numerics(), rows=rows)
        assert torch.equal(out[list(rows)], together[list(rows)])


@FORMS
def test_a_tiled_expert_is_decoded_once_a_call(rows: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once a token: eight tokens that share two experts, and an expert with two blocks of rows."""
    case = Large(monkeypatch, 8 if rows else 40)
    decoded: dict[int, list[int]] = {}

    def counted(self: PackedTensor, first: int = 0, last: int | None = None):
        for rows, tile in plain(self, first, last):
            decoded.setdefault(id(self), []).extend(range(rows.start, rows.stop))
            yield rows, tile

    plain = PackedTensor.tiles
    monkeypatch.setattr(PackedTensor, "tiles", counted)
    moe(*case.args, limit=10.0, numerics=Numerics(), rows=rows)
    matrices = [w for e in (*case.args[3], case.args[4]) for w in e]
    assert len(decoded) == len(matrices) == 3 * 4  # three matrices of three experts and the shared one
    assert all(decoded[id(w)] == list(range(w.shape[0])) for w in matrices)


def test_256_experts_in_a_small_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached ones: what is held stays within the budget, and dropping changes no result."""
    n, d, inter = 128, 64, 64
    experts = [packed_expert(d, inter, 3 * (e % 16)) for e in range(256)]
    ids = torch.stack([torch.randperm(256, generator=torch.Generator().manual_seed(t))[:6] for t in range(n)])
    args = (seeded(n, d), ids, seeded(n, 6, seed=1).abs(), experts, packed_expert(d, inter, 999))
    results = []
    for budget in (1 << 30, 1 << 20):
        cache = dense_cache.DenseCache(budget)
        monkeypatch.setattr(dense_cache, "CACHE", cache)
        for rows in (None, tuple(range(8)), None):
            results.append(moe(*args, limit=10.0, numerics=Numerics(), rows=rows)[:8])
            assert cache.used_bytes == sum(t.nbytes for t in cache._entries.values()) <= budget
    assert cache.used_bytes > budget // 2
    for a, b in zip(results[:3], results[3:], strict=True):
        assert torch.equal(a, b)
