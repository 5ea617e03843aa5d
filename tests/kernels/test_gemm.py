"""``gemm`` on the CPU, its launches at the dimensions of V4-Flash, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from unit_data import assert_close, seeded

from ds4.kernels.cases import Inputs
from ds4.kernels.gemm.cases import LAUNCHES, Launch, make_inputs
from ds4.kernels.gemm.op import GEMM, gemm
from ds4.kernels.packing import PACKINGS, Planes
from ds4.kernels.picks import Pick
from ds4.kernels.proj.cases import random_planes
from ds4.kernels.proj.op import FORMATS, segment_inputs

CPU = torch.device("cpu")


def planes_of(name: str, n_rows: int, k: int, seed: int = 0) -> Planes:
    packing = PACKINGS[name]
    parts = random_planes(torch.Generator().manual_seed(seed), name, n_rows, k)
    return Planes(packing, n_rows, k, {plane.name: part for plane, part in zip(packing.planes, parts, strict=False)})


def test_cpu_tensors_go_through_the_reference() -> None:
    weights = [planes_of(name, 7, 64, seed) for seed, name in enumerate(FORMATS)]
    x, out = seeded(11, 64).bfloat16(), ("f32", "bf16", "f32", "bf16", "f32")
    for y, planes, kind in zip(gemm(x, weights, out), weights, out, strict=True):
        want = x.float() @ planes.decode().T
        assert y.dtype == (torch.float32 if kind == "f32" else torch.bfloat16)
        assert_close(y.float(), want, 2**-8 if kind == "bf16" else 4e-6)
    o = seeded(3, 2, 64).bfloat16()
    planes = planes_of("q8_0", 6, 64)
    (y,) = gemm(o, [planes], ("f32",))
    assert_close(y, torch.einsum("ngk,gmk->ngm", o.float(), planes.decode().view(2, 3, 64)).flatten(1))
    (y,) = gemm(o, [planes], ("bf16",), count=torch.tensor([2], dtype=torch.int32))
    assert y[:2].isfinite().all()
    assert y[2:].isnan().all()


def empty_inputs(one: Launch, n_rows: int) -> Inputs:
    """On tensors that nobody fills."""
    weights = []
    for name, rows in one.segments:
        planes = PACKINGS[name].planes
        shapes = [(plane.n_rows(rows), plane.row_bytes(one.k) // plane.dtype.itemsize) for plane in planes]
        empty = [torch.empty(shape, dtype=plane.dtype) for shape, plane in zip(shapes, planes, strict=True)]
        named = {plane.name: tensor for plane, tensor in zip(planes, empty, strict=True)}
        weights.append(Planes(PACKINGS[name], rows, one.k, named))
    shape = (n_rows, one.groups, one.k) if one.groups > 1 else (n_rows, one.k)
    return {"x": torch.empty(shape, dtype=torch.bfloat16), "count": None, "out": one.out, **segment_inputs(weights)}


def test_launches_at_the_dimensions_of_flash() -> None:
    """The constants are those that resources.json lists, and a launch fills 132 multiprocessors where it can."""
    launched, blocks = set(), {}
    for one in LAUNCHES:
        for n_rows in (8, 64, 512, 4096):
            inputs = empty_inputs(one, n_rows)
            (call,) = GEMM.calls(inputs, GEMM.outputs(inputs))
            assert call.pdl
            launched.add((call.entry, call.constants))
            blocks[one.title, n_rows] = call.grid[0]
    assert set(GEMM.variants) <= launched
    assert len(LAUNCHES) < len(GEMM.variants) <= 16
    # By rows of a block: FP8 and BF16 have 256 and 128 in tiles of 128, all 32 in tiles of 8.
    assert blocks["proj_in native CSA", 4096] == (4 + 2 + 8 + 8 + 2 + 2 + 1) * 32
    assert blocks["proj_in native CSA", 8] == 4160 // 32
    assert blocks["proj_oa native", 4096] == 8 * 4 * 32
    assert blocks["proj_q native CSA", 512] == 160 * 4
    assert blocks["router bf16", 4096] == 2 * 64  # tiles of 64: those of 128 would be 64 blocks
    assert min(n for (_, n_rows), n in blocks.items() if n_rows == 4096) >= 116


def test_what_does_not_fit() -> None:
    inputs = make_inputs(0, CPU, n_rows=2, k=64, segments=(("q8_0", 6), ("f32", 4)))

    def refused(match: str, **changes: object) -> None:
        changed = inputs | changes
        with pytest.raises(ValueError, match=match):
            GEMM.calls(changed, GEMM.outputs(changed))

    form = r"bf16 \[n_rows, k\] or \[n_rows, groups, k\] with k a multiple of 32 is needed"
    refused(rf"gemm: x is torch.float32 \[2, 64\]: {form}", x=seeded(2, 64))
    refused(form, x=seeded(2, 48).bfloat16())
    refused("gemm: 2 groups of one matrix's rows are needed", x=seeded(2, 2, 64).bfloat16())
    refused("one of f32, bf16 for each of 2 matrices is needed", out=("f32",))
    with pytest.raises(ValueError, match="one of f32, bf16 for each of 2 matrices is needed"):
        GEMM.calls(inputs | {"out": ("f32", "f16")}, {})
    refused(r"gemm: count is torch.int64 \[1\], not torch.int32 \[1\]", count=torch.zeros(1, dtype=torch.int64))
    refused("no kernel for iq2_xxs", formats=("iq2_xxs", "f32"))
    one = {"formats": ("q8_0",), "out": ("f32",), "w0": inputs["w0"], "s0": inputs["s0"]}
    refused("4 groups of one matrix's rows are needed", x=seeded(2, 4, 64).bfloat16(), **one)
    assert inputs["pick"] is None
    assert GEMM.calls(inputs | {"pick": Pick(16, 3)}, GEMM.outputs(inputs))[0].shared_bytes == 3 * 16 * 256


def test_every_launch_of_the_network_is_here() -> None:
    titles = [one.title.split()[0] for one in LAUNCHES]
    assert set(titles) == {"proj_in", "proj_q", "proj_oa", "proj_ob", "router"}
