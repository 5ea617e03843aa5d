"""The start of a decode step: its rotary tables against FP64 and the golden, its public function, what it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from cuemu.backend import CpuBackend, missing
from torch import Tensor
from unit_data import assert_close, load_unit, seeded

from ds4.kernels.cases import Inputs
from ds4.kernels.common import rope_angles
from ds4.kernels.embed import embed
from ds4.kernels.embed.cases import frequencies, random_inputs
from ds4.kernels.embed.op import EMBED, FORMATS
from ds4.kernels.packing import PACKINGS, Planes
from ds4.kernels.registry import run_kernels

needs_emulation = pytest.mark.skipif(missing() is not None, reason=str(missing()))

CPU = torch.device("cpu")
PLAIN, COMPRESSED = frequencies()


def step_inputs(pos: int, n_tok: int = 8, plain: Tensor = PLAIN, compressed: Tensor = COMPRESSED) -> Inputs:
    """A step at ``pos`` with a small embedding."""
    inputs = random_inputs(0, CPU, n_tok=n_tok, hidden=32, vocab=9, name="f32", pos=pos)
    return inputs | {"plain": plain, "compressed": compressed}


def tables(pos: int, plain: Tensor = PLAIN, compressed: Tensor = COMPRESSED) -> Tensor:
    """The kernel's f32 [4, 8, 32, 2] of 8 tokens at ``pos``."""
    return run_kernels(EMBED, step_inputs(pos, plain=plain, compressed=compressed), CpuBackend())["cis"]


def last_places(got: Tensor, angle: Tensor) -> float:
    """Largest error of (cos, sin) f32 [..., 2] of FP32 angles, in last places of the exact value."""
    want = torch.stack((angle.double().cos(), angle.double().sin()), dim=-1)
    place = torch.from_numpy(np.spacing(want.abs().float().numpy())).double()
    return ((got.double() - want).abs() / place).max().item()


def hard_frequencies(pos: int) -> Tensor:
    """f32 [32] for which ``pos`` times the frequency comes close to whole quarter turns; the first one is 1."""
    quarters = torch.linspace(1, pos / (math.pi / 2), 32, dtype=torch.float64).floor()
    near = (quarters * (math.pi / 2) / pos).float().clamp_max(1)
    near[0] = 1
    return near


@needs_emulation
@pytest.mark.parametrize("pos", [0, 1, 1000, 65529, 105615, 524287, 2**20 - 8, 2**24 - 8])
def test_angles_are_right_to_the_last_place(pos: int) -> None:
    """Frequencies of the model, random ones up to 1, and such as make the reduction of the angle hard."""
    positions = torch.arange(pos, pos + 8)
    for plain in (PLAIN, torch.rand(32, generator=torch.Generator().manual_seed(pos)), hard_frequencies(pos + 1)):
        got = tables(pos, plain=plain)
        for table, f in ((0, plain), (1, COMPRESSED)):
            assert last_places(got[table], positions.float().unsqueeze(1) * f) < 0.52


def test_last_places_sees_an_error() -> None:
    angle = torch.tensor([1.0, 3.0])
    cis = torch.stack((angle.double().cos(), angle.double().sin()), dim=-1).float()
    assert last_places(cis, angle) <= 0.5
    assert last_places(torch.nextafter(cis, torch.tensor(2.0)), angle) > 0.5
    assert last_places(cis, torch.nextafter(angle, torch.tensor(4.0))) > 1


@needs_emulation
@pytest.mark.parametrize("pos", [0, 1, 3, 121, 127, 4090])
def test_windows_turn_by_their_first_position(pos: int) -> None:
    """Tables 2 and 3 are table 1 at the start of the window that ends with the token, or at 0."""
    got = tables(pos)
    for table, ratio in ((2, 4), (3, 128)):
        first = [max(0, pos + t + 1 - ratio) for t in range(8)]
        assert torch.equal(got[table], torch.stack([tables(p)[1, 0] for p in first]))
        assert not torch.equal(got[table, 7], got[1, 7])


@needs_emulation
@pytest.mark.parametrize(("kind", "table"), [("off", 0), ("yarn", 1)])
def test_golden_tables(golden: Path, kind: str, table: int) -> None:
    """One last place of 1: libraries differ there."""
    g = load_unit(golden, "yarn")
    got = torch.cat([tables(pos)[table] for pos in range(0, 64, 8)])
    assert_close(got[..., 0], g[f"cos_{kind}"], 2**-23)
    assert_close(got[..., 1], g[f"sin_{kind}"], 2**-23)
    with pytest.raises(AssertionError):
        assert_close(got[..., 1], g[f"sin_{'off' if kind == 'yarn' else 'yarn'}"], 2**-23)


@needs_emulation
@pytest.mark.parametrize("name", FORMATS)
def test_every_stream_begins_as_the_row(name: str) -> None:
    inputs = random_inputs(1, CPU, n_tok=5, hidden=96, vocab=11, name=name, pos=7)
    planes = Planes(PACKINGS[name], 11, 96, {p.name: inputs[p.name] for p in PACKINGS[name].planes})
    got = run_kernels(EMBED, inputs, CpuBackend())["streams"]
    rows = planes.decode()[inputs["tokens"].long()]
    assert torch.equal(got, torch.stack([rows] * 4, dim=1))


def test_public_function_on_the_cpu() -> None:
    table = seeded(7, 64)
    planes = Planes(PACKINGS["f32"], 7, 64, {"values": table})
    tokens, pos = torch.tensor([6, 0, 6], dtype=torch.int32), torch.tensor([130], dtype=torch.int32)
    streams, cis = embed(tokens, pos, planes, PLAIN, COMPRESSED)
    assert torch.equal(streams, table[[6, 0, 6]].unsqueeze(1).repeat(1, 4, 1))
    assert torch.equal(cis[0], torch.view_as_real(rope_angles(torch.tensor([130, 131, 132]), PLAIN)))
    assert torch.equal(cis[1], torch.view_as_real(rope_angles(torch.tensor([130, 131, 132]), COMPRESSED)))
    assert torch.equal(cis[2], torch.view_as_real(rope_angles(torch.tensor([127, 128, 129]), COMPRESSED)))
    assert torch.equal(cis[3], torch.view_as_real(rope_angles(torch.tensor([3, 4, 5]), COMPRESSED)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "q4_k"}, "no kernel for q4_k; there are: f32, f16, bf16, q8_0"),
        ({"values": torch.zeros(9, 36)}, "width 36"),
        ({"tokens": torch.zeros(0, dtype=torch.int32)}, "0 tokens"),
        ({"plain": torch.zeros(16)}, r"plain is \[16\], not \[32\]"),
        ({"compressed": torch.zeros(33)}, r"compressed is \[33\], not \[32\]"),
        ({"pos": torch.zeros(8, dtype=torch.int32)}, r"pos is \[8\], not \[1\]"),
    ],
)
def test_what_does_not_fit_is_refused(change: Inputs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_kernels(EMBED, step_inputs(0) | change, CpuBackend())


def test_planes_that_are_not_of_the_format_are_refused() -> None:
    inputs = random_inputs(0, CPU, n_tok=1, hidden=64, vocab=3, name="q8_0", pos=0)
    with pytest.raises(ValueError, match=r"plane d has rows of 2, not 8"):
        run_kernels(EMBED, inputs | {"d": inputs["d"][:, :2].contiguous()}, CpuBackend())
