"""Projections against the unit goldens, and the two forms against each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from unit_data import assert_close, decode_fp8, decode_mxfp4, load_unit, seeded

from ds4.kernels.numerics import Numerics
from ds4.kernels.proj import matmul_rows, proj, proj_grouped, proj_in
from ds4.weights.dense_cache import dense
from ds4.weights.formats import FORMATS, block_scale
from ds4.weights.tensor import PackedTensor

EXACT = Numerics()
ACT_FP8 = Numerics(act_fp8=True)
BF16 = Numerics(bf16=True)


def activations(g: dict[str, Tensor]) -> Tensor:
    """f32 values of the golden's FP8 activations; their scales are not powers of two, so only values are compared."""
    return block_scale.e4m3_to_f32(g["A_fp8"]) * g["a_s"].repeat_interleave(128, 1)


@pytest.mark.parametrize("rows", [None, tuple(range(48))], ids=["prefill", "decode"])
def test_fp8_gemm(golden: Path, rows: tuple[int, ...] | None) -> None:
    g = load_unit(golden, "fp8_gemm")
    weight = decode_fp8(g["B_fp8"], g["b_s"])
    assert_close(matmul_rows(activations(g), weight, rows), g["C_ref"])
    with pytest.raises(AssertionError):  # scale blocks of the weight taken in the wrong order
        assert_close(matmul_rows(activations(g), decode_fp8(g["B_fp8"], g["b_s"].flip(1)), rows), g["C_ref"])


@pytest.mark.parametrize("rows", [None, tuple(range(32))], ids=["prefill", "decode"])
def test_fp4_gemm(golden: Path, rows: tuple[int, ...] | None) -> None:
    g = load_unit(golden, "fp4_gemm")
    assert_close(matmul_rows(activations(g), decode_mxfp4(g["B_fp4"], g["b_s"]), rows), g["C_ref"])
    wrong = decode_mxfp4(g["B_fp4"], g["b_s"], high_nibble_first=True)
    with pytest.raises(AssertionError):
        assert_close(matmul_rows(activations(g), wrong, rows), g["C_ref"])


def test_decode_form_leaves_other_rows_zero() -> None:
    x, w = seeded(8, 64), seeded(16, 64, seed=1)
    out = matmul_rows(x, w, (2, 5))
    assert_close(out[[2, 5]], (x @ w.T)[[2, 5]])
    assert out[[0, 1, 3, 4, 6, 7]].abs().max() == 0


def test_activation_rounding() -> None:
    """Blocks of 128, only with the switch on, and only where the official code has FP8 activations."""
    x, w = seeded(8, 256), seeded(16, 256, seed=1)
    x[:, 128:] *= 1e-5  # with one scale for both blocks these would all be rounded to zero
    w[:, 128:] *= 1e5
    rounded = block_scale.round_e4m3(x, 128)
    assert_close(proj(x, w, ACT_FP8), rounded @ w.T)
    assert_close(proj(x, w, ACT_FP8, act_fp8=False), x @ w.T)
    assert_close(proj(x, w, EXACT), x @ w.T)
    with pytest.raises(AssertionError):
        assert_close(proj(x, w, EXACT), rounded @ w.T)
    with pytest.raises(AssertionError):
        assert_close(proj(x, w, ACT_FP8), block_scale.round_e4m3(x, 256) @ w.T)
    halves = torch.ones(256)
    halves[64:128] = 1e-5  # a block of 128 rounds these to zero, one of 64 keeps them
    with pytest.raises(AssertionError):
        assert_close(proj(x * halves, w / halves, ACT_FP8), block_scale.round_e4m3(x * halves, 64) @ (w / halves).T)
    assert_close(proj(x * halves, w / halves, ACT_FP8), block_scale.round_e4m3(x * halves, 128) @ (w / halves).T)


@pytest.mark.parametrize("rows", [None, (0, 3)], ids=["prefill", "decode"])
@pytest.mark.parametrize("act_fp8", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_proj_in_equals_single_products(rows: tuple[int, ...] | None, act_fp8: bool, bf16: bool) -> None:
    """Joined or not: FP8 activations for the first group only, bf16 results for the first two only."""
    numerics = Numerics(act_fp8=act_fp8, bf16=bf16)
    x = seeded(8, 128)
    w = [seeded(n, 128, seed=n) for n in (16, 24, 8, 32, 40)]
    outs = proj_in(x, w[:2], w[2:3], w[3:], numerics, rows)
    expected = [proj(x, v, numerics, rows) for v in w[:2]]
    expected += [proj(x, w[2], numerics, rows, act_fp8=False)]
    expected += [matmul_rows(x, v, rows) for v in w[3:]]
    assert len(outs) == len(expected)
    for out, reference in zip(outs, expected, strict=True):
        # One product over stacked weights may add in another order, which can turn a bf16 rounding by one ulp.
        assert_close(out, reference, 2**-7 if bf16 else 4e-6)
    for out in outs[:3]:
        assert torch.equal(out, out.bfloat16().float()) == bf16
    for out in outs[3:]:
        assert not torch.equal(out, out.bfloat16().float())


@pytest.mark.parametrize("rows", [None, tuple(range(8))], ids=["prefill", "decode"])
def test_grouped(golden: Path, rows: tuple[int, ...] | None) -> None:
    g = load_unit(golden, "ogroup_gemm")
    expected = g["out_ref"].flatten(1)

    def check(o: Tensor, w: Tensor) -> None:
        assert_close(proj_grouped(o, w.flatten(0, 1), EXACT, rows), expected)

    check(g["o"], g["wo_a"])
    with pytest.raises(AssertionError):  # groups exchanged
        check(g["o"], g["wo_a"].flip(0))
    with pytest.raises(AssertionError):  # weight read rank-major instead of group-major
        check(g["o"], g["wo_a"].transpose(0, 1).reshape(2, 16, 128))


def test_grouped_rounds_its_result_only() -> None:
    o, w = seeded(4, 2, 128), seeded(32, 128, seed=1)
    exact = proj_grouped(o, w, EXACT)
    assert torch.equal(proj_grouped(o, w, BF16), exact.bfloat16().float())
    assert torch.equal(proj_grouped(o, w, ACT_FP8), exact)  # no activation rounding in front of wo_a


def large(m: int, k: int, seed: int = 0) -> PackedTensor:
    """A Q8_0 matrix too large to be made dense; its rows repeat after 61, which no tile is a multiple of."""
    data = FORMATS["q8_0"].quantize(seeded(61, k, seed=seed)).repeat(-(-m // 61), 1)[:m]
    w = PackedTensor("w", "q8_0", (m, k), data)
    assert dense((w,)) is None
    return w


TILED = pytest.mark.parametrize(("m", "k"), [(1030, 4096), (2051, 2080)])


@TILED
def test_a_tiled_weight_gives_the_product(m: int, k: int) -> None:
    w, x = large(m, k), seeded(8, k, seed=1)
    expected = x @ w.dequantize().T
    assert_close(proj(x, w, EXACT), expected)
    assert_close(proj(x, w, EXACT, (0, 1, 2, 3, 4, 5, 6, 7)), expected)
    out = proj(x, w, EXACT, (2, 5))
    assert_close(out[[2, 5]], expected[[2, 5]])
    assert out[[0, 1, 3, 4, 6, 7]].abs().max() == 0
    a, b = proj_in(x, [w], [], [large(m + 1, k, seed=2)], EXACT)
    assert torch.equal(a, proj(x, w, EXACT))
    assert b.shape == (8, m + 1)


@TILED
def test_decode_rows_do_not_see_each_other(m: int, k: int) -> None:
    """On the tiled path: 1, 2, 3 or 8 tokens in a launch, the same bits for each."""
    w, x = large(m, k), seeded(8, k, seed=1)
    together = proj(x, w, EXACT, tuple(range(8)))
    for rows in ((0,), (3,), (7,), (1, 2), (7, 0, 1)):
        other = torch.where(torch.isin(torch.arange(8), torch.tensor(rows)).unsqueeze(1), x, 1e3 * x)
        assert torch.equal(proj(other, w, EXACT, rows)[list(rows)], together[list(rows)])


@pytest.mark.parametrize("rows", [None, (0, 3)], ids=["prefill", "decode"])
def test_grouped_with_a_tiled_weight(rows: tuple[int, ...] | None) -> None:
    """Tiles end where a group ends, here in the middle of what would be a tile of the whole matrix."""
    n_groups, m, k = 3, 700, 2080
    o, w = seeded(4, n_groups, k), large(n_groups * m, k, seed=1)
    out = proj_grouped(o, w, EXACT, rows)
    expected = torch.einsum("ngk,gmk->ngm", o, w.dequantize().unflatten(0, (n_groups, m))).flatten(1)
    chosen = [0, 3] if rows else [0, 1, 2, 3]
    assert_close(out[chosen], expected[chosen])
    assert torch.equal(proj_grouped(o, w, BF16, rows), out.bfloat16().float())
