"""The kernels of ``mhc_boundary`` and ``hc_head`` beyond their cases: unit goldens, FP64, quantised activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cuemu.backend import CpuBackend, missing
from torch import Tensor
from unit_data import SUM_ORDER, assert_close, load_unit, seeded

from ds4.kernels.cases import Exact, Inputs, Outputs, difference
from ds4.kernels.common import rms_norm
from ds4.kernels.head.hc_head_op import HC_HEAD, hc_head
from ds4.kernels.mhc.act import dequantize_int8
from ds4.kernels.mhc.cases import random_inputs
from ds4.kernels.mhc.op import OPERATIONS, Act, mhc_boundary, quantized
from ds4.kernels.mhc.ref import hc_sinkhorn
from ds4.kernels.registry import Operation, run_kernels
from ds4.weights.formats.block_scale import dequantize_e4m3, round_e4m3

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

CPU = torch.device("cpu")
EPS = 1e-6
ITERS = 20


def kernel(streams: Tensor, act: Act = "none", **changes: Any) -> Outputs:
    """The boundary's kernels on ``streams``; without changes nothing is pending and the gates are 1/2 and 1."""
    d = streams.shape[2]
    inputs: Inputs = dict.fromkeys(("y", "prev_post", "prev_comb"))
    inputs |= {
        "streams": streams.clone(),
        "fn": torch.zeros(24, 4 * d),
        "scale": torch.ones(3),
        "base": torch.zeros(24),
    }
    inputs |= {"norm": torch.ones(d), "sinkhorn_iters": ITERS, "hc_eps": EPS, "norm_eps": EPS}
    changes = {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in changes.items()
    }  # aligned
    return run_kernels(OPERATIONS[act], inputs | changes, CpuBackend())


COLUMNS = (torch.arange(64).unsqueeze(1) + torch.arange(4)) % 64  # [token, stream]


def kernel_with_logits(mix: Tensor, **changes: Any) -> Outputs:
    """The kernels' results where the logits are ``mix`` f32 [64, 24]: token i has 2^23 in COLUMNS[i, n] of stream n,
    and of these only stream 0 meets a weight; the mean square is 2^40, so that every step is exact."""
    streams, fn = torch.zeros(64, 4, 64), torch.zeros(24, 4, 64)
    streams[torch.arange(64).unsqueeze(1), torch.arange(4), COLUMNS] = 2.0**23
    fn[:, 0] = mix.T / 8
    return kernel(streams, fn=fn.flatten(1), **changes)


# Unit goldens


def test_unit_hc(golden: Path) -> None:
    g = load_unit(golden, "hc")
    got = kernel(g["x"], fn=g["hc_fn"], scale=g["hc_scale"], base=g["hc_base"])
    assert_close(got["post"], g["post"])
    assert_close(got["comb"], g["comb"])
    assert_close(got["x"], rms_norm(g["y_pre"], None, EPS))
    assert torch.equal(got["streams"], g["x"])
    with pytest.raises(AssertionError):  # a mean over the streams
        assert_close(got["x"], rms_norm(g["x"].mean(1), None, EPS))

    def resolved(comb: Tensor) -> Tensor:
        return kernel(g["x"], y=g["x_new"], prev_post=g["post"], prev_comb=comb)["streams"]

    assert_close(resolved(g["comb"]), g["y_post"])
    with pytest.raises(AssertionError):
        assert_close(resolved(g["comb"].mT.contiguous()), g["y_post"])


def test_unit_hc_sinkhorn(golden: Path) -> None:
    g = load_unit(golden, "hc_sinkhorn")
    got = kernel_with_logits(g["mixes"], scale=g["hc_scale"], base=g["hc_base"])
    assert_close(got["post"], g["post"])
    assert_close(got["comb"], g["comb"])
    assert_close(got["x"].gather(1, COLUMNS), g["pre"] * (g["pre"].square().sum(1, keepdim=True) / 64).rsqrt())
    with pytest.raises(AssertionError):
        assert_close(got["comb"].mT, g["comb"])


def test_unit_rmsnorm(golden: Path) -> None:
    """Four equal streams of half the row and gates of 1/2 collapse to the row itself."""
    g = load_unit(golden, "rmsnorm")
    streams = (g["x"] / 2).unsqueeze(1).repeat(1, 4, 1)
    got = kernel(streams, norm=g["weight"], hc_eps=0.0, norm_eps=g["eps"].item())
    assert_close(got["x"], g["y_w"])
    with pytest.raises(AssertionError):
        assert_close(got["x"], g["y_now"])


# Against FP64


def sinkhorn64(logits: Tensor, iters: int) -> Tensor:
    """Spec model.md 2.2 entry by entry in FP64: f32 [n, 16] -> f64 [n, 4, 4]."""
    eps = float(torch.tensor(EPS))
    c = logits.double().view(-1, 4, 4).softmax(-1) + eps
    for i in range(iters):
        if i > 0:
            c = c / (c.sum(2, keepdim=True) + eps)
        c = c / (c.sum(1, keepdim=True) + eps)
    return c


@pytest.mark.parametrize("iters", [1, 2, 19, 20])
def test_sinkhorn_in_fp64(iters: int) -> None:
    """Wide logits converge slowly: rounds count, and errors could pile up. The factors are as good as entries."""
    mix = seeded(64, 24, seed=iters) * 6
    got = kernel_with_logits(mix, sinkhorn_iters=iters)["comb"]
    entrywise = hc_sinkhorn(mix, torch.ones(3), torch.zeros(24), 4, iters, EPS)[2]
    want = sinkhorn64(mix[:, 8:], iters)
    error, reference_error = ((c - want).abs().max().item() for c in (got, entrywise))
    print(f"{iters} rounds: off by {error:.1e}, entry by entry {reference_error:.1e}")
    assert error <= max(2 * reference_error, 4 * 2.0**-24)
    assert (got - sinkhorn64(mix[:, 8:], iters + 1)).abs().max() > 100 * error


@pytest.mark.parametrize(
    ("name", "opposite"),
    [("independent", 0.0), ("alike", -1.0), ("cancelling to a tenth", 1.1), ("to a hundredth", 1.01)],
)
def test_the_norm_out_of_the_gram_matrix_in_fp64(name: str, opposite: float) -> None:
    """Its error is some 2^-24 of sum p_a p_b |G_ab|, which is more of the result where streams cancel."""
    d = 4096
    base = torch.zeros(24)
    base[:4] = torch.tensor([0.3, -0.2, 0.1, 0.4])
    streams = seeded(2, 4, d, seed=5)
    p = torch.sigmoid(base[:4].double()) + EPS
    if opposite:  # streams 1 and 3 are what is left of 0 and 2 under the weights, but for a part of their own
        for a, b in ((0, 1), (2, 3)):
            streams[:, b] = streams[:, a] * (-opposite * p[a] / p[b]).float()
    x = torch.einsum("n,tnd->td", p, streams.double())
    want = x * (x.square().mean(1, keepdim=True) + EPS).rsqrt()
    gram = torch.einsum("tad,tbd->tab", streams.double(), streams.double()).abs()
    condition = (torch.einsum("a,tab,b->t", p, gram, p) / x.square().sum(1)).max().item()
    got = kernel(streams, base=base)["x"]
    size = (got.double() * want).sum(1) / want.square().sum(1)  # what the norm is off by, free of x's own rounding
    error = (size - 1).abs().max().item()
    print(f"{name}: condition {condition:.1f}, norm off by {error:.1e}")
    assert error <= 2.0**-23 * (1 + condition / 2)


# Quantised activations


def chosen_x(values: Tensor, act: Act) -> Outputs:
    """The kernels' results where x has to be ``values`` f32 [d]: they are the weights of the norm, of a row of ones."""
    got = kernel(torch.full((1, 4, len(values)), 0.5), act, norm=values, hc_eps=0.0, norm_eps=0.0)
    assert difference(got["x"][0], values, Exact()) is None
    return got


def activations() -> Tensor:
    """Blocks of 128: normal, ties of both grids, largest values at and beside 448 * 2^k, tiny, denormal, zero, huge."""
    ties = torch.arange(-64, 64) + 0.5
    ties[0] = 127.0
    ties[32::32] = 127.0
    blocks = [seeded(128), ties, ties * 2.0**-3, torch.cat((torch.full((64,), 17.0), torch.full((64,), 448.0)))]
    blocks += [ties * float(odd) for odd in range(3, 49, 2)]  # ties as far as 127 / amax is the right quotient
    for top in (448.0, 448.0 * (1 + 2.0**-23), 448.0 * (1 - 2.0**-24)):
        blocks += [torch.cat((seeded(127, seed=2), torch.tensor([top * scale]))) for scale in (1.0, 2.0**-9, 2.0**30)]
    blocks += [seeded(128, seed=3) * scale for scale in (1e-5, 2.0**-100, 1e-38, 1e-44, 0.0, 1e30)]
    return torch.cat(blocks)


@pytest.mark.parametrize("act", ["fp8", "int8"])
def test_activations_follow_from_x_bit_for_bit(act: Act) -> None:
    got = chosen_x(activations(), act)
    for name, want in quantized(got["x"], act).items():
        assert difference(got[name], want, Exact()) is None, name
    if act == "fp8":
        value, want = dequantize_e4m3(got["codes"], got["exponents"], 128), round_e4m3(got["x"], 128)
        assert difference(value, want, Exact()) is None
    else:
        value = dequantize_int8(got["codes"], got["scales"])
        # half a step, and the roundings of 127 / amax, of amax / 127 and of the products
        step = got["scales"].repeat_interleave(32, -1).clamp_min(2.0**-100)
        assert bool(((value - got["x"]).abs() <= 0.5001 * step).all())
        assert int(got["codes"].min()) >= -127


# State


@pytest.mark.parametrize("operation", [OPERATIONS["int8"], HC_HEAD], ids=lambda operation: operation.name)
def test_nothing_depends_on_what_a_workspace_held(operation: Operation) -> None:
    """Three chunks of columns leave a gap in the partials; a second run of the same launches is a replay of a graph."""

    def fresh() -> Inputs:
        return random_inputs(0, CPU, site="head" if operation is HC_HEAD else "boundary", n_tok=2, d=96, fn="f32")

    inputs = fresh()
    first = operation.outputs(inputs)
    for value in first.values():
        value.view(torch.uint8).fill_(0xFF)
    calls = operation.calls(inputs, first)
    CpuBackend().run(calls)
    kept = {name: value.clone() for name, value in first.items() if name not in operation.workspaces}
    assert all(bool(value.isfinite().all()) for value in kept.values() if value.is_floating_point())
    streams = inputs["streams"].clone()
    inputs["streams"].copy_(fresh()["streams"])
    CpuBackend().run(calls)
    assert difference(inputs["streams"], streams, Exact()) is None
    for name, value in kept.items():
        assert difference(first[name], value, Exact()) is None, name


def test_post_and_comb_may_be_replaced_in_place() -> None:
    operation = OPERATIONS["none"]
    inputs, same = (random_inputs(1, CPU, site="boundary", n_tok=2, d=96, fn="f32") for _ in range(2))
    want = run_kernels(operation, inputs, CpuBackend())
    outputs = operation.outputs(same) | {"post": same["prev_post"], "comb": same["prev_comb"]}
    CpuBackend().run(operation.calls(same, outputs))
    for name in ("x", "post", "comb"):
        assert difference(outputs[name], want[name], Exact()) is None, name


# The public functions


def test_the_public_functions_update_streams_in_place() -> None:
    inputs = random_inputs(2, CPU, site="boundary", n_tok=3, d=128, fn="f16")
    want = OPERATIONS["fp8"].reference(inputs)
    streams, post, comb = inputs.pop("streams").clone(), inputs.pop("prev_post"), inputs.pop("prev_comb")
    got = mhc_boundary(inputs.pop("y"), streams, post, comb, act="fp8", **inputs)
    assert got.streams is streams
    for value, name in zip((*got[:4], *got.act), ("streams", "x", "post", "comb", "codes", "exponents"), strict=True):
        assert difference(value, want[name], Exact()) is None, name

    inputs = random_inputs(2, CPU, site="head", n_tok=3, d=128, fn="f32")
    want = HC_HEAD.reference(inputs)
    streams, post, comb = inputs.pop("streams").clone(), inputs.pop("prev_post"), inputs.pop("prev_comb")
    new, x = hc_head(inputs.pop("y"), streams, post, comb, **inputs)
    assert new is streams
    assert difference(streams, want["streams"], Exact()) is None
    assert_close(x, want["x"], SUM_ORDER)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fn": torch.zeros(24, 128)}, r"fn has shape \[24, 128\] instead of \[24, 384\]"),
        ({"y": None}, "of y, prev_post and prev_comb only prev_post, prev_comb given"),
        ({"prev_comb": torch.zeros(1, 4, 4)}, r"prev_comb has shape \[1, 4, 4\] instead of \[2, 4, 4\]"),
        ({"fn": torch.zeros(24, 384, dtype=torch.bfloat16)}, "not F32 or F16"),
    ],
)
def test_what_does_not_fit_is_refused(changes: Inputs, message: str) -> None:
    inputs = random_inputs(0, CPU, site="boundary", n_tok=2, d=96, fn="f32") | changes
    with pytest.raises(ValueError, match=message):
        run_kernels(OPERATIONS["none"], inputs, CpuBackend())


def test_fp8_needs_whole_blocks() -> None:
    inputs = random_inputs(0, CPU, site="boundary", n_tok=2, d=96, fn="f32")
    with pytest.raises(ValueError, match="no multiple of 128"):
        OPERATIONS["fp8"].calls(inputs, {})
