"""Compressors against the unit goldens (spec model.md 3). The rings are tested in tests/kv."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from unit_data import assert_close, half_split_rope, load_unit, seeded

from ds4.kernels.common import rms_norm
from ds4.kernels.kv_publish import finish_entry, pool_csa, pool_hca
from ds4.kernels.numerics import Numerics
from ds4.weights.formats import block_scale

EPS = 1e-6


def with_window_before(rows: Tensor) -> Tensor:
    """Raw rows with the (absent) window in front of entry 0."""
    return F.pad(rows, (0, 0, 4, 0))


def raw(g: dict[str, Tensor], ape: Tensor) -> tuple[Tensor, Tensor]:
    return g["x"] @ g["wkv"].T, g["x"] @ g["wgate"].T + ape.repeat(2, 1)


def test_plain_pooling(golden: Path) -> None:
    g = load_unit(golden, "compressor")
    kv, score = raw(g, g["ape"])
    assert_close(pool_hca(kv, score, 4), g["pooled"])
    with pytest.raises(AssertionError):
        assert_close(pool_hca(*raw(g, torch.zeros_like(g["ape"])), 4), g["pooled"])
    with pytest.raises(AssertionError):  # one window later
        assert_close(pool_hca(kv.roll(4, 0), score.roll(4, 0), 4), g["pooled"])
    with pytest.raises(AssertionError):  # a mean instead of the gate
        assert_close(pool_hca(kv, torch.zeros_like(score), 4), g["pooled"])


def test_overlapping_pooling(golden: Path) -> None:
    g = load_unit(golden, "compressor_overlap")
    kv, score = with_window_before(g["kv"]), with_window_before(g["score"] + g["ape"].repeat(2, 1))
    assert_close(pool_csa(kv, score, 0), g["pooled"])
    with pytest.raises(AssertionError):  # ape dropped
        assert_close(pool_csa(kv, with_window_before(g["score"]), 0), g["pooled"])
    with pytest.raises(AssertionError):  # the two series exchanged
        assert_close(pool_csa(kv.roll(64, 1), score.roll(64, 1), 0), g["pooled"])
    with pytest.raises(AssertionError):  # a window of zero scores in front of the text is given weight
        assert_close(pool_csa(kv, score, 1), g["pooled"])


def test_overlapping_pooling_entry_by_entry(golden: Path) -> None:
    """Entry 1 alone, from the window before it and its own, is the second row of both together, bit for bit."""
    g = load_unit(golden, "compressor_overlap")
    score = g["score"] + g["ape"].repeat(2, 1)
    both = pool_csa(with_window_before(g["kv"]), with_window_before(score), 0)
    assert torch.equal(pool_csa(g["kv"], score, 1)[0], both[1])


@pytest.mark.parametrize("rotate", [False, True], ids=["kv", "key"])
def test_whole_compressor(golden: Path, rotate: bool) -> None:
    """Pooling, norm, rope and the rounding of the row (FP8 of the leading values) or of the key (Hadamard, FP4).

    The key comes out bit for bit: FP4 rounding swallows the last bits of the sums before it.
    """
    g = load_unit(golden, "compressor_full_rotate" if rotate else "compressor_full")
    cis = torch.complex(g["cos"], g["sin"])

    def pooled(ape: Tensor) -> Tensor:
        kv, score = raw(g, ape)
        return pool_csa(with_window_before(kv), with_window_before(score), 0)

    def stored(entry: Tensor) -> Tensor:
        if rotate:
            return block_scale.round_e2m1(entry, 32)
        return torch.cat((block_scale.round_e4m3(entry[:, :64], 64), entry[:, 64:]), dim=1)

    def finish(ape: Tensor, angles: Tensor, index_rotate: bool = True) -> Tensor:
        numerics = Numerics(index_rotate=index_rotate)
        return finish_entry(pooled(ape), g["norm_w"], angles, EPS, numerics, indexer=rotate)

    def check(value: Tensor) -> None:
        assert_close(value, g["out"])

    check(stored(finish(g["ape"], cis)))
    with pytest.raises(AssertionError):
        check(stored(finish(torch.zeros_like(g["ape"]), cis)))
    with pytest.raises(AssertionError):  # row not rounded
        check(finish(g["ape"], cis))
    with pytest.raises(AssertionError):  # angles of the other entry
        check(stored(finish(g["ape"], cis.flip(0))))
    with pytest.raises(AssertionError):  # no rope
        check(stored(finish(g["ape"], torch.ones_like(cis))))
    if rotate:
        with pytest.raises(AssertionError):
            check(stored(finish(g["ape"], cis, index_rotate=False)))
    else:
        with pytest.raises(AssertionError):
            check(stored(half_split_rope(rms_norm(pooled(g["ape"]), g["norm_w"], EPS), cis)))


def test_finish_rotates_indexer_keys_only() -> None:
    pooled, norm = seeded(3, 128), seeded(128, seed=1)
    cis = torch.polar(torch.ones(3, 32), seeded(3, 32, seed=2))
    plain = finish_entry(pooled, norm, cis, EPS, Numerics())
    assert torch.equal(finish_entry(pooled, norm, cis, EPS, Numerics(index_rotate=True)), plain)
    assert torch.equal(finish_entry(pooled, norm, cis, EPS, Numerics(), indexer=True), plain)


def test_finish_rounding_points() -> None:
    """Spec model.md 3: to bf16 before the norm, after it, and after the rope."""
    pooled, norm = seeded(3, 128), seeded(128, seed=1)
    cis = torch.polar(torch.ones(3, 32), seeded(3, 32, seed=2))

    def rd(x: Tensor) -> Tensor:
        return x.bfloat16().float()

    expected = rd(rms_norm(rd(pooled), norm, EPS))
    turned = torch.view_as_complex(expected[:, 64:].unflatten(1, (32, 2)).contiguous()) * cis
    expected = torch.cat((expected[:, :64], rd(torch.view_as_real(turned).flatten(1))), dim=1)
    assert torch.equal(finish_entry(pooled, norm, cis, EPS, Numerics(bf16=True)), expected)
