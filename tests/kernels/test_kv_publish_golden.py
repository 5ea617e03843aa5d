"""The cache writers' kernels against the unit goldens, and their bytes against the cache's formats.

The goldens are narrower than our rows and have no norm where we have one: the tests put them into columns, and choose
gains, so that their arithmetic stays as it is.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cuemu.backend import CpuBackend, missing
from torch import Tensor
from unit_data import assert_close, load_unit, seeded

from ds4.kernels.cases import Inputs
from ds4.kernels.kv_publish.cases import random_inputs
from ds4.kernels.kv_publish.op import KV_PUBLISH_CSA, KV_PUBLISH_HCA, KV_PUBLISH_SWA
from ds4.kernels.kv_publish.ref import KEY, ROW
from ds4.kernels.registry import run_kernels

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

CPU = torch.device("cpu")
OPERATIONS = {"hca": KV_PUBLISH_HCA, "csa": KV_PUBLISH_CSA}


def unturned(n: int) -> Tensor:
    """cis that turns nothing."""
    return torch.tensor([1.0, 0.0]).repeat(n, 32, 1)


def rows_as_they_are(rows: Tensor, cis: Tensor) -> Tensor:
    """Rows f32 [n, 512] as the ring stores them without norm: with eps 1 and tiny values the norm divides by 1."""
    stored = []
    for first in range(0, len(rows), 8):
        part = slice(first, first + 8)
        inputs = random_inputs(0, CPU, kind="swa", n_tok=len(rows[part]), pos=0)
        inputs |= {"kv": rows[part] * 2.0**-20, "kv_norm": torch.full((512,), 2.0**20), "eps": 1.0}
        inputs["cis"] = cis[part].contiguous()
        run_kernels(KV_PUBLISH_SWA, inputs, CpuBackend())
        stored.append(ROW.unpack(inputs["ring"][: len(rows[part])]))
    return torch.cat(stored)


def test_golden_act_quant(golden: Path) -> None:
    """Bit for bit, and with the sign of the values turned."""
    g = load_unit(golden, "act_quant")
    for sign in (1, -1):
        got = rows_as_they_are(sign * g["x"], unturned(len(g["x"])))
        assert_close(got[:, :448], sign * g["y_ref"][:, :448], 0)


def test_golden_rope(golden: Path) -> None:
    """Bit for bit after rounding to bf16, in which rows keep what is turned."""
    g = load_unit(golden, "rope")
    rows = torch.cat((seeded(32, 448), g["x"]), dim=1)
    for sign, want in ((1, g["y_fwd"]), (-1, g["y_inv"])):
        got = rows_as_they_are(rows, torch.stack((g["cos"], sign * g["sin"]), dim=2))
        assert_close(got[:, 448:], want.bfloat16().float(), 0)


def test_golden_hadamard(golden: Path) -> None:
    """Through a key: the last token of a window gets all weight, and FP4 rounds what the rotation gives."""
    g = load_unit(golden, "hadamard")
    for x, want in zip(g["x"].split(2), g["y"].split(2), strict=True):
        inputs = random_inputs(0, CPU, kind="csa", n_tok=8, pos=0)
        inputs |= {"idx_norm": torch.full((128,), 2.0**20), "eps": 1.0, "entry_cis": unturned(8)}
        inputs["idx_kv"][3::4, 128:] = x * 2.0**-20
        inputs["idx_gate"][3::4, 128:] = 1e4
        run_kernels(KV_PUBLISH_CSA, inputs, CpuBackend())
        assert torch.equal(inputs["keys"], KEY.pack(want))


def compressor_inputs(kind: str, prefix: str, g: dict[str, Tensor], raw: tuple[Tensor, Tensor], at: int) -> Inputs:
    """8 tokens whose raw rows are the golden's (kv, gate), in columns ``at ..`` of each series, zeros elsewhere."""
    inputs = random_inputs(0, CPU, kind=kind, n_tok=8, pos=0, ratio=4)
    series = 2 if kind == "csa" else 1
    ape = {"comp": "ape", "idx": "idx_ape"}[prefix]
    for name, value in ((f"{prefix}_kv", raw[0]), (f"{prefix}_gate", raw[1]), (ape, g["ape"])):
        width = value.shape[1] // series
        inputs[name] = torch.zeros(len(value), inputs[name].shape[1])
        inputs[name].unflatten(1, (series, -1))[:, :, at : at + width] = value.unflatten(1, (series, -1))
    return inputs


def pooled_by_kernel(kind: str, g: dict[str, Tensor], raw: tuple[Tensor, Tensor]) -> Tensor:
    """Two entries f32 [2, 64] of at most 64 channels, in bf16 and divided by the root of their mean square over 512."""
    inputs = compressor_inputs(kind, "comp", g, raw, 448)
    inputs |= {"comp_norm": torch.ones(512), "eps": 0.0, "entry_cis": unturned(8)}
    run_kernels(OPERATIONS[kind], inputs, CpuBackend())
    return ROW.unpack(inputs["pool"])[:, 448:]


def test_golden_pooling(golden: Path) -> None:
    """Both forms, at the precision of bf16."""
    g = load_unit(golden, "compressor_overlap")
    got = pooled_by_kernel("csa", g, (g["kv"], g["score"]))
    assert_close(got, g["pooled"] * (g["pooled"].square().sum(1, keepdim=True) / 512).rsqrt(), 2**-8)
    with pytest.raises(AssertionError):
        assert_close(got, pooled_by_kernel("csa", g, (g["kv"], g["score"].roll(1, 0))), 2**-8)
    g = load_unit(golden, "compressor")
    for half in (slice(0, 64), slice(64, 128)):
        part = {"ape": g["ape"][:, half]}
        got = pooled_by_kernel("hca", part, ((g["x"] @ g["wkv"].T)[:, half], (g["x"] @ g["wgate"].T)[:, half]))
        want = g["pooled"][:, half]
        assert_close(got, want * (want.square().sum(1, keepdim=True) / 512).rsqrt(), 2**-8)


def golden_cis(g: dict[str, Tensor]) -> Tensor:
    """f32 [8, 32, 2]: the golden's angles of two entries, at the tokens that close them."""
    cis = torch.zeros(8, 32, 2)
    cis[3::4] = torch.stack((g["cos"], g["sin"]), dim=2)
    return cis


def test_golden_whole_key(golden: Path) -> None:
    """The golden's key compressor is the kernel's: bit for bit."""
    g = load_unit(golden, "compressor_full_rotate")
    inputs = compressor_inputs("csa", "idx", g, (g["x"] @ g["wkv"].T, g["x"] @ g["wgate"].T), 0)
    inputs |= {"idx_norm": g["norm_w"], "entry_cis": golden_cis(g)}
    run_kernels(KV_PUBLISH_CSA, inputs, CpuBackend())
    assert_close(KEY.unpack(inputs["keys"]), g["out"], 0)


def test_golden_whole_row(golden: Path) -> None:
    """The golden's rows are a quarter as wide: the last columns of ours, with the norm's mean and eps to match."""
    g = load_unit(golden, "compressor_full")
    inputs = compressor_inputs("csa", "comp", g, (g["x"] @ g["wkv"].T, g["x"] @ g["wgate"].T), 384)
    inputs |= {"comp_norm": F.pad(g["norm_w"] / 2, (384, 0)), "entry_cis": golden_cis(g), "eps": 1e-6 / 4}
    run_kernels(KV_PUBLISH_CSA, inputs, CpuBackend())
    got = ROW.unpack(inputs["pool"])
    assert_close(got[:, 384:448], g["out"][:, :64], 0)
    assert_close(got[:, 448:], g["out"][:, 64:], 2**-8)
    assert not got[:, :384].any()
