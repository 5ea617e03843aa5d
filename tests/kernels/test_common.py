"""Rounding, norm, rotary angles and Hadamard rotation against the unit goldens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from unit_data import assert_close, half_split_rope, load_unit

from ds4.kernels.common import apply_rope, hadamard, rms_norm, rope_angles, rope_frequencies
from ds4.weights.formats import block_scale

YARN = (160000.0, 16.0, 65536, 32.0, 1.0)
PLAIN = (10000.0, 1.0, 0, 32.0, 1.0)


def test_act_quant(golden: Path) -> None:
    """Bit for bit.

    The golden cannot tell the block size: a power-of-two scale matters only for values below 2^-6 of the largest, and
    its blocks are alike. tests/weights/test_block_scale.py tests blocks.
    """
    g = load_unit(golden, "act_quant")
    assert_close(block_scale.round_e4m3(g["x"], 64), g["y_ref"], 0)
    with pytest.raises(AssertionError):
        assert_close(g["x"], g["y_ref"], 0)
    with pytest.raises(AssertionError):  # no scale
        assert_close(g["x"].to(torch.float8_e4m3fn).float(), g["y_ref"], 0)
    blocks = g["x"].unflatten(1, (-1, 64))
    scale = blocks.abs().amax(-1, keepdim=True) / 448  # the full range, but no power of two
    with pytest.raises(AssertionError):
        assert_close(((blocks / scale).to(torch.float8_e4m3fn).float() * scale).flatten(1), g["y_ref"], 0)


def test_act_quant_fp4(golden: Path) -> None:
    """Bit for bit: there are no ties in the golden, which its maker breaks downwards and we to the even code."""
    g = load_unit(golden, "act_quant_fp4")
    assert_close(block_scale.round_e2m1(g["x"], 32), g["y_ref"], 0)
    with pytest.raises(AssertionError):
        assert_close(block_scale.round_e2m1(g["x"], 64), g["y_ref"], 0)


def test_hadamard(golden: Path) -> None:
    g = load_unit(golden, "hadamard")
    assert_close(hadamard(g["x"]), g["y"])
    assert_close(hadamard(hadamard(g["x"])), g["x"])  # it is its own inverse
    with pytest.raises(AssertionError):
        assert_close(hadamard(g["x"].flip(-1)), g["y"])
    with pytest.raises(AssertionError):
        assert_close(hadamard(g["x"]) * 128**0.5, g["y"])


def test_rope(golden: Path) -> None:
    """Bit for bit: two products and a sum each, in the same order."""
    g = load_unit(golden, "rope")
    cis = torch.complex(g["cos"], g["sin"])
    assert_close(apply_rope(g["x"], cis), g["y_fwd"], 0)
    assert_close(apply_rope(g["x"], cis, inverse=True), g["y_inv"], 0)
    with pytest.raises(AssertionError):
        assert_close(apply_rope(g["x"], cis), g["y_inv"], 0)
    with pytest.raises(AssertionError):
        assert_close(half_split_rope(g["x"], cis), g["y_fwd"])


def test_rope_turns_the_last_dimensions_only(golden: Path) -> None:
    g = load_unit(golden, "rope")
    cis = torch.complex(g["cos"], g["sin"])
    wide = torch.cat((g["x"].flip(1), g["x"]), dim=1)
    assert_close(apply_rope(wide, cis), torch.cat((g["x"].flip(1), g["y_fwd"]), dim=1), 0)


@pytest.mark.parametrize(("kind", "parameters"), [("yarn", YARN), ("off", PLAIN)])
def test_rope_tables(golden: Path, kind: str, parameters: tuple[float, ...]) -> None:
    """One ulp of 1: libraries differ in the last bit of sine and cosine."""
    g = load_unit(golden, "yarn")

    def check(frequencies: torch.Tensor, factor: float = 1.0) -> None:
        table = rope_angles(torch.arange(64), frequencies) * factor
        assert_close(table.real, g[f"cos_{kind}"], 2**-23)
        assert_close(table.imag, g[f"sin_{kind}"], 2**-23)

    check(rope_frequencies(64, *parameters))
    with pytest.raises(AssertionError):  # the attention factor that libraries put into YaRN tables
        check(rope_frequencies(64, *parameters), 1.277)
    with pytest.raises(AssertionError):  # the other kind of layer
        check(rope_frequencies(64, *(PLAIN if kind == "yarn" else YARN)))
    with pytest.raises(AssertionError):  # base right, YaRN the wrong way round
        check(rope_frequencies(64, parameters[0], 16.0, 0 if kind == "yarn" else 65536, 32.0, 1.0))


def test_rms_norm(golden: Path) -> None:
    g = load_unit(golden, "rmsnorm")
    eps = g["eps"].item()
    assert_close(rms_norm(g["x"], g["weight"], eps), g["y_w"])
    assert_close(rms_norm(g["x"], None, eps), g["y_now"])
    with pytest.raises(AssertionError):  # other models' convention
        assert_close(rms_norm(g["x"], 1 + g["weight"], eps), g["y_w"])
    tiny = g["x"] * 1e-4  # mean square well below the golden's: here eps decides
    with pytest.raises(AssertionError):
        assert_close(rms_norm(tiny, None, eps), g["y_now"])
    assert_close(rms_norm(tiny, None, eps * 1e-8), g["y_now"])
