"""mHC: mixing, Sinkhorn, collapse and expansion against the unit goldens and the formulas of spec model.md 2.2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from unit_data import SUM_ORDER, assert_close, load_unit, seeded

from ds4.kernels.common import rms_norm
from ds4.kernels.mhc import hc_collapse, hc_expand, hc_mix, hc_sinkhorn, mhc_boundary
from ds4.kernels.numerics import Numerics

EPS = 1e-6
ITERS = 20


def test_sinkhorn(golden: Path) -> None:
    g = load_unit(golden, "hc_sinkhorn")
    n, m, iters = g["params"].tolist()
    assert (n, m, iters) == (64, 4, ITERS)

    def check(pre: Tensor, post: Tensor, comb: Tensor) -> None:
        for name, value in (("pre", pre), ("post", post), ("comb", comb)):
            assert_close(value, g[name])

    pre, post, comb = hc_sinkhorn(g["mixes"], g["hc_scale"], g["hc_base"], 4, iters, EPS)
    check(pre, post, comb)
    for wrong in ((pre, post, comb.mT), (pre, post / 2, comb), (pre - 1e-4, post, comb)):
        with pytest.raises(AssertionError):
            check(*wrong)
    with pytest.raises(AssertionError):
        check(*hc_sinkhorn(g["mixes"], g["hc_scale"], g["hc_base"], 4, 2, EPS))


def restated_comb(mix: Tensor, scale: Tensor, base: Tensor, m: int, iters: int) -> Tensor:
    """Spec model.md 2.2 for one token in FP64, element by element."""
    logits = mix.double()[2 * m :] * scale.double()[2] + base.double()[2 * m :]
    c = [[logits[m * j + k].item() for k in range(m)] for j in range(m)]
    for j in range(m):
        e = [pow(2.718281828459045, v - max(c[j])) for v in c[j]]
        c[j] = [v / sum(e) + EPS for v in e]
    for i in range(iters):
        if i > 0:
            c = [[v / (sum(row) + EPS) for v in row] for row in c]
        column = [sum(c[j][k] for j in range(m)) + EPS for k in range(m)]
        c = [[row[k] / column[k] for k in range(m)] for row in c]
    return torch.tensor(c, dtype=torch.float64).float()


@pytest.mark.parametrize("iters", [1, 2, 19, 20])
@pytest.mark.parametrize("m", [2, 4])
def test_sinkhorn_round_count(m: int, iters: int) -> None:
    """The golden has converged before its 20th round and cannot count; wide logits converge slowly and can."""
    mix, base = seeded(8, (2 + m) * m, seed=1) * 8, seeded((2 + m) * m, seed=2)
    scale = torch.tensor([0.5, -0.7, 1.0])
    comb = hc_sinkhorn(mix, scale, base, m, iters, EPS)[2]
    assert_close(comb, torch.stack([restated_comb(row, scale, base, m, iters) for row in mix]))
    with pytest.raises(AssertionError):
        assert_close(comb, torch.stack([restated_comb(row, scale, base, m, iters + 1) for row in mix]))


def test_pre_and_post(golden: Path) -> None:
    g = load_unit(golden, "hc")
    pre, post, comb = hc_sinkhorn(hc_mix(g["x"], g["hc_fn"], EPS), g["hc_scale"], g["hc_base"], 4, ITERS, EPS)
    assert_close(post, g["post"])
    assert_close(comb, g["comb"])
    assert_close(hc_collapse(g["x"], pre), g["y_pre"])
    assert_close(hc_expand(g["x_new"], g["x"], post, comb), g["y_post"])
    with pytest.raises(AssertionError):  # sums over the destination: doubly stochastic too, and wrong
        assert_close(hc_expand(g["x_new"], g["x"], post, comb.mT), g["y_post"])
    with pytest.raises(AssertionError):  # a mean over the streams
        assert_close(g["x"].mean(1), g["y_pre"])
    swapped = hc_mix(g["x"].mT.reshape(g["x"].shape), g["hc_fn"], EPS)  # streams flattened feature-major
    with pytest.raises(AssertionError):
        assert_close(hc_sinkhorn(swapped, g["hc_scale"], g["hc_base"], 4, ITERS, EPS)[2], g["comb"])


def test_mix_in_the_decode_form(golden: Path) -> None:
    g = load_unit(golden, "hc")
    rows = (1, 4, 7)
    mix = hc_mix(g["x"], g["hc_fn"], EPS, rows)
    assert_close(mix[list(rows)], hc_mix(g["x"], g["hc_fn"], EPS)[list(rows)])
    assert mix[0].abs().max() == 0


def test_boundary_is_the_chain_of_its_parts(golden: Path) -> None:
    """Expand, mix the NEW streams, collapse, norm; with nothing pending the streams stay as they are."""
    g = load_unit(golden, "hc")
    norm = seeded(64, seed=3)
    exact = Numerics()

    def boundary(y: Tensor | None, post: Tensor | None, comb: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return mhc_boundary(
            y,
            g["x"],
            post,
            comb,
            fn=g["hc_fn"],
            scale=g["hc_scale"],
            base=g["hc_base"],
            norm=norm,
            sinkhorn_iters=ITERS,
            hc_eps=EPS,
            norm_eps=EPS,
            numerics=exact,
        )

    streams, x, post, comb = boundary(None, None, None)
    assert torch.equal(streams, g["x"])
    assert_close(x, rms_norm(g["y_pre"], norm, EPS))
    assert_close(post, g["post"])
    assert_close(comb, g["comb"])

    streams, x, post, comb = boundary(g["x_new"], g["post"], g["comb"])
    assert_close(streams, g["y_post"])
    expected = hc_sinkhorn(hc_mix(g["y_post"], g["hc_fn"], EPS), g["hc_scale"], g["hc_base"], 4, ITERS, EPS)
    assert_close(x, rms_norm(hc_collapse(g["y_post"], expected[0]), norm, EPS), 2 * SUM_ORDER)
    assert_close(post, expected[1], 2 * SUM_ORDER)
    assert_close(comb, expected[2], 2 * SUM_ORDER)
