"""Final collapse and logits against their definition (spec model.md 2.0, 2.2): there is no unit golden of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from unit_data import assert_close, seeded

from ds4.kernels.head import hc_head, head
from ds4.kernels.numerics import Numerics
from ds4.weights.dense_cache import dense
from ds4.weights.formats import FORMATS
from ds4.weights.tensor import PackedTensor

EPS = 1e-6
STREAMS = seeded(5, 4, 64)
FN, SCALE, BASE = seeded(4, 256, seed=1) / 8, torch.tensor([0.7]), seeded(4, seed=2)


def collapsed(*, factor: float = 1.0, hc_eps: float = EPS) -> Tensor:
    h = STREAMS.double()
    flat = h.flatten(1)
    inv = 1 / (flat.square().mean(1, keepdim=True) + EPS).sqrt()
    w = factor * torch.sigmoid(flat @ FN.double().T * inv * SCALE + BASE) + hc_eps
    return torch.einsum("nm,nmd->nd", w, h).float()


@pytest.mark.parametrize("rows", [None, (0, 1, 2, 3, 4)], ids=["prefill", "decode"])
def test_hc_head(rows: tuple[int, ...] | None) -> None:
    def run(hc_eps: float = EPS) -> Tensor:
        return hc_head(STREAMS, FN, SCALE, BASE, hc_eps=hc_eps, norm_eps=EPS, numerics=Numerics(), rows=rows)

    assert_close(run(), collapsed())
    assert_close(run(0.1), collapsed(hc_eps=0.1))
    for wrong in (collapsed(factor=2.0), STREAMS.mean(1), collapsed(hc_eps=1e-3)):
        with pytest.raises(AssertionError):
            assert_close(run(), wrong)


@pytest.mark.parametrize("rows", [None, (0, 1, 2, 3, 4)], ids=["prefill", "decode"])
def test_logits(rows: tuple[int, ...] | None) -> None:
    x, norm, weight = seeded(5, 64, seed=3), seeded(64, seed=4), seeded(96, 64, seed=5)
    d = x.double()
    normed = d / (d.square().mean(1, keepdim=True) + EPS).sqrt() * norm
    out = head(x, norm, weight, norm_eps=EPS, numerics=Numerics(), rows=rows)
    assert_close(out, (normed @ weight.double().T).float())
    with pytest.raises(AssertionError):
        assert_close(out, x @ weight.T)


def test_logits_are_fp32_in_the_official_numerics() -> None:
    """The norm is rounded to bf16, the product is not."""
    x, norm, weight = seeded(5, 64, seed=3), seeded(64, seed=4), seeded(96, 64, seed=5)
    out = head(x, norm, weight, norm_eps=EPS, numerics=Numerics(bf16=True))
    normed = (x * torch.rsqrt(x.square().mean(1, keepdim=True) + EPS) * norm).bfloat16().float()
    assert_close(out, normed @ weight.T)
    assert not torch.equal(out, out.bfloat16().float())


@pytest.mark.parametrize("rows", [None, (0, 1, 2, 3, 4)], ids=["prefill", "decode"])
def test_logits_of_a_head_too_large_to_be_dense(rows: tuple[int, ...] | None) -> None:
    x, norm = seeded(5, 128, seed=3), seeded(128, seed=4)
    data = FORMATS["q8_0"].quantize(seeded(101, 128, seed=5)).repeat(400, 1)
    weight = PackedTensor("head.weight", "q8_0", (40400, 128), data)
    assert dense((weight,)) is None
    out = head(x, norm, weight, norm_eps=EPS, numerics=Numerics(), rows=rows)
    assert_close(out, head(x, norm, weight.dequantize(), norm_eps=EPS, numerics=Numerics(), rows=rows))
    if rows:
        alone = head(x, norm, weight, norm_eps=EPS, numerics=Numerics(), rows=(3,))
        assert torch.equal(alone[3], out[3])
