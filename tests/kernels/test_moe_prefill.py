"""The references of the experts' prefill form: grouping by hand, products against the layer of the torch model."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from unit_data import assert_close, seeded

from ds4.kernels.moe import Expert, moe, swiglu
from ds4.kernels.moe.cases import random_planes
from ds4.kernels.moe.group_op import moe_combine, moe_group
from ds4.kernels.moe.matrices import FORMATS
from ds4.kernels.moe.prefill_cases import IDS, Chunk, group_inputs
from ds4.kernels.moe.prefill_op import expert_tile, moe_down_gemm, moe_up_gemm
from ds4.kernels.moe.prefill_plan import ExpertPlan
from ds4.kernels.moe.prefill_ref import max_tiles
from ds4.kernels.numerics import Numerics
from ds4.kernels.packing import PACKINGS, Planes
from ds4.kernels.picks import TOKENS, Pick, candidates
from ds4.kernels.verify import CPU


def test_grouping_by_hand() -> None:
    ids = torch.tensor([[2, 0], [2, 2], [0, 2], [7, -9]], dtype=torch.int32)
    order, tiles, n_tiles = moe_group(ids, n_experts=4, tile=3, count=torch.tensor([3], dtype=torch.int32))
    assert order.tolist() == [1, 4, 0, 2, 3, 5, 0, 0]
    assert tiles.tolist() == [[0, 0, 2, 0], [2, 2, 3, 0], [2, 5, 1, 0], *[[0] * 4] * 3]
    assert n_tiles.tolist() == [3]


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize(("live", "tile"), [(None, 8), (45, 16), (0, 8)])
def test_every_pair_is_in_one_tile_of_its_expert(ids: str, live: int | None, tile: int) -> None:
    inputs = group_inputs(0, CPU, Chunk(50, 7, 3, tile, live, ids))
    order, tiles, n_tiles = moe_group(inputs["ids"], n_experts=7, tile=tile, count=inputs["count"])
    n_pairs, flat = 3 * (50 if live is None else live), inputs["ids"].flatten()
    assert sorted(order[:n_pairs].tolist()) == list(range(n_pairs))
    at, experts = 0, []
    for expert, first, n, rest in tiles[: int(n_tiles)].tolist():
        pairs = order[first : first + n].tolist()
        assert (first, rest) == (at, 0)
        assert 1 <= n <= tile
        assert pairs == sorted(pairs)
        assert set(flat[pairs].tolist()) == {expert}
        at, experts = at + n, [*experts, expert]
    assert at == n_pairs
    assert experts == sorted(experts)
    assert int(n_tiles) <= len(tiles) == max_tiles(150, 7, tile)


class Layer:
    """Four experts and a shared one in BF16, and a chunk of tokens."""

    n_rows, d, inter, n_experts, top_k, limit = 19, 96, 64, 4, 2, 4.0

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(0)
        self.x = seeded(self.n_rows, self.d).bfloat16()
        self.ids = torch.stack(
            [torch.randperm(self.n_experts, generator=rng)[: self.top_k] for _ in range(self.n_rows)]
        )
        self.weights = torch.rand(self.n_rows, self.top_k, generator=rng)
        sizes = {"w1": (self.inter, self.d), "w3": (self.inter, self.d), "w2": (self.d, self.inter)}
        self.planes = {}
        for name, (rows, cols) in sizes.items():
            for key, n in ((name, self.n_experts), (f"s{name}", 1)):
                tensors = {"values": random_planes(rng, "bf16", n * rows, cols)["values"] / 8}
                self.planes[key] = Planes(PACKINGS["bf16"], n * rows, cols, tensors)
        self.scale = {name: torch.rand(self.n_experts, generator=rng) + 0.5 for name in sizes}

    def run(self, tile: int, count: Tensor | None = None, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """mid and y."""
        grouped = moe_group(self.ids.to(torch.int32), n_experts=self.n_experts, tile=tile, count=count)
        p, s = self.planes, self.scale
        mid = moe_up_gemm(
            *(self.x, self.weights if weights is None else weights, *grouped),
            **{name: p[name] for name in ("w1", "w3", "sw1", "sw3")},
            **{"w1_scale": s["w1"], "w3_scale": s["w3"], "sw1_scale": 2.0},
            **{"tile": tile, "limit": self.limit, "count": count},
        )
        parts = moe_down_gemm(
            mid, *grouped, w2=p["w2"], sw2=p["sw2"], w2_scale=s["w2"], sw2_scale=0.5, tile=tile, count=count
        )
        return mid, moe_combine(parts, count=count)

    def expert(self, e: int | None) -> Expert:
        """As the torch model has it, multipliers in the weights."""

        def matrix(name: str, shared: float) -> Tensor:
            if e is None:
                return self.planes[f"s{name}"].decode() * shared
            rows = self.planes[name].n_rows // self.n_experts
            return self.planes[name].rows(e * rows, (e + 1) * rows).decode() * self.scale[name][e]

        return Expert(matrix("w1", 2.0), matrix("w3", 1.0), matrix("w2", 0.5))


def test_against_the_torch_model() -> None:
    """BF16 between the operations: of y a few parts in a thousand; the model without roundings is the other side."""
    layer = Layer()
    experts = [layer.expert(e) for e in range(layer.n_experts)]
    args = (layer.x.float(), layer.ids, layer.weights, experts, layer.expert(None))
    want = moe(*args, limit=layer.limit, numerics=Numerics())
    _, y = layer.run(8)
    assert y.dtype == torch.float32
    assert_close(y, want, 4e-3)
    assert torch.equal(y, layer.run(64)[1])
    with pytest.raises(AssertionError):
        assert_close(layer.run(8, weights=layer.weights.flip(1))[1], want, 4e-3)


def test_rows_without_tokens_are_left_out() -> None:
    layer = Layer()
    mid, y = layer.run(8)
    layer.x[11:] = torch.nan
    layer.ids[11:] = 99
    some_mid, some = layer.run(8, count=torch.tensor([11], dtype=torch.int32))
    assert torch.equal(some[:11], y[:11])
    assert torch.equal(some_mid[:11], mid[:11])


def test_one_rounding_of_the_activation() -> None:
    """mid is the BF16 number nearest to the FP64 value, but for values close to the middle of two."""
    layer = Layer()
    mid, _ = layer.run(8)
    assert mid.dtype == torch.bfloat16
    for t in range(layer.n_rows):
        for slot, e in enumerate((*layer.ids[t].tolist(), None)):
            w1, w3, _ = (w.double() for w in layer.expert(e))
            weight = 1.0 if e is None else float(layer.weights[t, slot])
            exact = swiglu(w1 @ layer.x[t].double(), w3 @ layer.x[t].double(), layer.limit) * weight
            error = (mid[t, slot].double() - exact).abs()
            assert (error <= 2.0**-8 * 1.001 * exact.abs() + 1e-6).all()


def test_the_tile_covers_an_experts_share() -> None:
    flash = {"d": 4096, "inter": 2048, "n_experts": 256, "device": CPU}
    for n_rows, tile in ((8, 8), (64, 8), (512, 16), (4096, 128)):
        assert expert_tile(("nvfp4", "nvfp4"), "nvfp4", n_pairs=6 * n_rows, **flash) == tile
    assert expert_tile(("iq2_xxs", "iq2_xxs"), "q2_k", n_pairs=6 * 4096, **flash) == 128
    assert expert_tile(("iq2_xxs", "q2_k"), "q2_k", n_pairs=6 * 4096, **flash) == 64  # patterns and minima


def test_every_plan_fits_into_shared_memory() -> None:
    """Of 99 KB, the least of all architectures, with the lists that expert_gemm.cuh declares: three words a pair."""
    for formats in product(FORMATS, FORMATS):
        for pick in candidates(formats):
            assert ExpertPlan(pick, formats).shared_bytes + 12 * pick.tokens <= 99 * 1024
            assert 32 * ExpertPlan(pick, formats).warps >= pick.tokens
    for fmt in FORMATS:
        assert {pick.tokens for pick in candidates((fmt,))} == set(TOKENS)
        for pick in candidates((fmt,)):
            assert ExpertPlan(pick, (fmt,)).shared_bytes + 12 * pick.tokens <= 99 * 1024
    with pytest.raises(ValueError, match="tiles of 12 in 2 stages with q8_0: there is no such launch"):
        ExpertPlan(Pick(12, 2), ("q8_0",))
