"""The projections' kernel: what weights decode to, goldens, a real checkpoint, FP64, and what may not change a bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cuemu.backend import CpuBackend, missing
from cuemu.calls import kernel_call
from torch import Tensor
from unit_data import assert_close, load_unit, seeded

from ds4.kernels.cases import Inputs, bits
from ds4.kernels.entry import KERNEL_ROOT
from ds4.kernels.packing import PACKINGS, Planes, pack_rows, packing_of
from ds4.kernels.packing.fp8_block import F32_SCALES
from ds4.kernels.proj.cases import ALL, RECIPES, make_inputs, random_planes
from ds4.kernels.proj.op import FORMATS, PROJ_IN, PROJ_OA, PROJ_OB, PROJ_Q, project, segment_inputs
from ds4.kernels.proj.plan import THREADS, rows_plan
from ds4.kernels.registry import Operation, run_kernels
from ds4.weights import open_checkpoint

CPU = torch.device("cpu")
DEMO = Path(__file__).resolve().parents[2] / "ds4" / "demo" / "demo.gguf"
OPERATIONS = {"proj_in": PROJ_IN, "proj_q": PROJ_Q, "proj_oa": PROJ_OA, "proj_ob": PROJ_OB}
emulated = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def planes_of(name: str, n_rows: int, k: int, seed: int = 0) -> Planes:
    packing = PACKINGS[name]
    parts = random_planes(torch.Generator().manual_seed(seed), name, n_rows, k)
    return Planes(packing, n_rows, k, {plane.name: part for plane, part in zip(packing.planes, parts, strict=False)})


def product(operation: Operation, x: Tensor, *weights: Planes) -> list[Tensor]:
    """By the kernel on the emulation."""
    results = run_kernels(operation, {"x": x, **segment_inputs(weights)}, CpuBackend())
    return [results[f"y{i}"] for i in range(len(weights))]


def without_last_bits(values: Tensor) -> Tensor:
    """-0 as 0 and every NaN as the same one, which a sum does not keep apart."""
    return bits((values + 0.0).nan_to_num(nan=12345.0))


@emulated
@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_what_the_planes_decode_to(name: str) -> None:
    """Eight columns a launch, each picked by a token that is zero but there: all values bit for bit, all codes of FP8
    under scales that are no powers of two."""
    planes = planes_of(name, 16, 32)
    if name == "fp8_block":
        codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
        codes[codes % 128 == 127] = 0
        planes.tensors["codes"][:] = codes.repeat(2).view(16, 32)
    columns = [product(PROJ_OB, torch.eye(32)[first : first + 8].clone(), planes)[0] for first in range(0, 32, 8)]
    assert torch.equal(without_last_bits(torch.cat(columns).T), without_last_bits(planes.decode()))


@emulated
@pytest.mark.parametrize("name", FORMATS)
def test_every_activation_counts_in_full(name: str) -> None:
    """A row whose weights are zero but one, a power of two, gives the activation back bit for bit: the three parts of
    an activation are all of it, from 2^-100 to 2^100."""
    one = torch.zeros(16, 32)
    one.fill_diagonal_(2.0)
    parts = [one]
    if name == "q8_0":
        parts = [one.to(torch.int8), torch.ones(16, 8, dtype=torch.float16)]
    elif name == "fp8_block":
        parts = [one.to(torch.float8_e4m3fn).view(torch.uint8), torch.ones(1, 4)]
    packing = PACKINGS[name]
    planes = {p.name: part.to(p.dtype) for p, part in zip(packing.planes, parts, strict=True)}
    x = seeded(8, 32) * torch.exp2(torch.linspace(-100, 100, 8)).unsqueeze(1)
    assert torch.equal(bits(product(PROJ_OB, x, Planes(packing, 16, 32, planes))[0]), bits(2 * x[:, :16]))


@emulated
def test_not_a_number_in_fp8_counts_480() -> None:
    planes = planes_of("fp8_block", 16, 32)
    planes.tensors["codes"][:] = torch.tensor([0x7F, 0xFF], dtype=torch.uint8).repeat(8).unsqueeze(1)
    planes.tensors["scales"][:] = 1.0
    want = torch.tensor([32 * 480.0, -32 * 480.0]).repeat(8, 8)
    assert torch.equal(product(PROJ_OB, torch.ones(8, 32), planes)[0], want)


SHAPES = ((32, 3), (256, 1), (992, 4), (1024, 8), (1056, 2), (4096, 1), (4128, 5), (8192, 2))  # (k, n_tok)
PLANS = """
#include "%s"
template <class Plan>
__device__ int* store(int* out) {
  out[0] = Plan::kUnitRows, out[1] = Plan::kBlocks, out[2] = Plan::kSharedBytes, out[3] = Plan::kThreads;
  return out + 4;
}
extern "C" __global__ void plans(int* out) {
  %s
}
"""


@emulated
def test_the_plan_of_a_launch_is_that_of_the_kernel(tmp_path: Path) -> None:
    source, out = tmp_path / "plans.cu", torch.zeros(len(SHAPES), 4, dtype=torch.int32)
    stores = "\n  ".join(f"out = store<RowsPlan<{k}, {n_tok}>>(out);" for k, n_tok in SHAPES)
    source.write_text(PLANS % (KERNEL_ROOT / "proj" / "dense_rows.cuh", stores), encoding="utf-8")
    CpuBackend().run([kernel_call(source, "plans", (1, 1, 1), (1, 1, 1), out)])
    for (k, n_tok), found in zip(SHAPES, out.tolist(), strict=True):
        plan = rows_plan(k, n_tok)
        assert found == [plan.unit_rows, plan.per_sm, plan.shared_bytes, THREADS], (k, n_tok)


def test_every_launch_fits_into_shared_memory() -> None:
    """Of a multiprocessor with 100 KB, 1 KB of it a block's own: as many blocks at once as there should be."""
    for k in (32, 256, 1024, 1056, 2048, 4096, 4128, 8192):
        for n_tok in range(1, 9):
            plan = rows_plan(k, n_tok)
            assert plan.per_sm * (plan.shared_bytes + 1024) <= 100 * 1024, (k, n_tok)


@emulated
def test_golden_fp8_gemm(golden: Path) -> None:
    """The golden's 48 tokens as launches of 8; its activations' scales are no powers of two and stay outside."""
    g = load_unit(golden, "fp8_gemm")
    x = g["A_fp8"].float() * g["a_s"].repeat_interleave(128, 1)
    planes = Planes.allocate(F32_SCALES, 256, 512)
    planes.write(g["B_fp8"].view(torch.uint8), g["b_s"])
    got = torch.cat([product(PROJ_OB, x[first : first + 8].clone(), planes)[0] for first in range(0, 48, 8)])
    assert_close(got, g["C_ref"])


@emulated
def test_golden_grouped(golden: Path) -> None:
    g = load_unit(golden, "ogroup_gemm")
    planes = Planes(PACKINGS["f32"], 32, 128, {"values": g["wo_a"].flatten(0, 1).clone()})
    assert_close(product(PROJ_OA, g["o"].clone(), planes)[0], g["out_ref"].flatten(1))


@emulated
@pytest.mark.parametrize("n_tok", [1, 8])
def test_a_real_checkpoint(n_tok: int) -> None:
    """Q8_0 matrices of the bundled model, packed as for a GPU: three of one input in a launch, and the grouped one."""
    checkpoint, packed = open_checkpoint(DEMO), []
    for name in ("attn.wq_a", "attn.wkv", "ffn.gate", "attn.wo_a"):
        tensor = checkpoint.tensor(f"layers.0.{name}.weight")
        planes = Planes.allocate(packing_of(tensor), *tensor.shape)
        pack_rows(tensor, planes)
        packed.append((planes, tensor.dequantize()))
    assert {planes.packing.format for planes, _ in packed} == {"q8_0", "f32"}
    x = seeded(n_tok, 256)
    got = product(PROJ_IN, x, *(planes for planes, _ in packed[:3]))
    for y, (_, weight) in zip(got, packed, strict=False):
        assert_close(y, x @ weight.T)
    planes, weight = packed[3]
    o = seeded(n_tok, planes.n_rows // 64, planes.n_cols)
    want = torch.einsum("ngk,gmk->ngm", o, weight.unflatten(0, (-1, 64))).flatten(1)
    assert_close(product(PROJ_OA, o, planes)[0], want)


@emulated
@pytest.mark.parametrize("name", FORMATS)
def test_error_against_fp64(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """At K = 4096, where a lane adds 128 products: below 3e-6 of the spread of the results."""
    planes, x = planes_of(name, 64, 4096), seeded(2, 4096, seed=1)
    want = x.double() @ planes.decode().double().T
    error = float(
        (product(PROJ_OA, x.unsqueeze(1), planes)[0].double() - want).abs().max() / want.square().mean().sqrt()
    )
    with capsys.disabled():
        print(f" {name}: largest error {error:.1e} of the spread ")
    assert 0 < error < 3e-6


@emulated
@pytest.mark.parametrize("n_tok", [1, 2, 3, 8])
def test_neither_blocks_nor_other_matrices_change_a_bit(n_tok: int) -> None:
    """The last matrix has several units, which one block takes one after the other, and several blocks at once."""
    inputs = make_inputs(0, CPU, n_tok=n_tok, k=1056, segments=(*ALL, ("q8_0", 130)))
    want = run_kernels(PROJ_IN, inputs, CpuBackend())
    for blocks in (1, 3):
        got = run_kernels(PROJ_IN, inputs | {"blocks": blocks}, CpuBackend("plain", "warps", 1))
        assert all(torch.equal(bits(got[name]), bits(want[name])) for name in want)
    alone: Inputs = {"x": inputs["x"], "formats": ("fp8_block",), "w0": inputs["w4"], "s0": inputs["s4"]}
    assert torch.equal(bits(run_kernels(PROJ_OB, alone, CpuBackend())["y0"]), bits(want["y4"]))


BLOCKS = {  # by rows: of launches of 1, 2 and 8 tokens on 132 multiprocessors, as the head of proj.cu has them
    4160: {1: 260, 2: 260, 8: 130},
    2560: {1: 160, 2: 160, 8: 80},
    1536: {1: 96, 2: 96, 8: 48},
    40960: {1: 264, 2: 264, 8: 132},
    32768: {1: 264, 2: 264, 8: 132},
    8192: {1: 264, 2: 264, 8: 132},
    4096: {1: 256, 2: 256, 8: 128},
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_launches_at_the_dimensions_of_flash(name: str) -> None:
    """On tensors that nobody fills: the constants are those that resources.json lists, the blocks those of proj.cu."""
    operation, launched = OPERATIONS[name], []
    for recipe in RECIPES[name]:
        weights = []
        for format_name, n_rows in recipe.segments:
            planes = PACKINGS[format_name].planes
            shapes = [(plane.n_rows(n_rows), plane.row_bytes(recipe.k) // plane.dtype.itemsize) for plane in planes]
            empty = [torch.empty(shape, dtype=plane.dtype) for shape, plane in zip(shapes, planes, strict=True)]
            named = {plane.name: tensor for plane, tensor in zip(planes, empty, strict=True)}
            weights.append(Planes(PACKINGS[format_name], n_rows, recipe.k, named))
        for n_tok in recipe.n_tok:
            shape = (n_tok, recipe.groups, recipe.k) if recipe.groups > 1 else (n_tok, recipe.k)
            inputs = {"x": torch.empty(shape), **segment_inputs(weights)}
            (call,) = operation.calls(inputs, operation.outputs(inputs))
            assert call.pdl
            assert call.grid == (BLOCKS[sum(planes.n_rows for planes in weights)][n_tok], 1, 1)
            launched.append((call.entry, call.constants))
    assert set(launched) == set(operation.variants)
    assert len(operation.variants) <= 12


def test_cpu_tensors_go_through_the_reference() -> None:
    weights = [planes_of(name, 7, 64, seed) for seed, name in enumerate(FORMATS)]
    x = seeded(3, 64)
    for y, planes in zip(project(PROJ_IN, x, weights), weights, strict=True):
        assert_close(y, x @ planes.decode().T)
    o = seeded(3, 2, 64)
    (y,) = project(PROJ_OA, o, [planes_of("q8_0", 6, 64)])
    assert_close(y, torch.einsum("ngk,gmk->ngm", o, planes_of("q8_0", 6, 64).decode().view(2, 3, 64)).flatten(1))


def test_what_does_not_fit() -> None:
    x, planes = seeded(2, 64), planes_of("q8_0", 6, 64)
    with pytest.raises(ValueError, match="no kernel for q4_k; there are: f32, f16, bf16, q8_0, fp8_block"):
        segment_inputs([Planes.allocate(PACKINGS["q4_k"], 2, 256)])
    with pytest.raises(ValueError, match="9 matrices; a launch takes 1 to 8"):
        segment_inputs([planes] * 9)
    with pytest.raises(ValueError, match="rows of 64, 32"):
        segment_inputs([planes, planes_of("f32", 4, 32)])
    with pytest.raises(ValueError, match=r"matrix 0, q8_0: codes is torch.int8 \[6, 64\], not torch.int8 \[6, 32\]"):
        product(PROJ_OB, seeded(2, 32), planes)
    with pytest.raises(ValueError, match="matrix 0, q8_0: d is missing"):
        run_kernels(PROJ_OB, {"x": x, **segment_inputs([planes]), "s0": None}, CpuBackend())
    with pytest.raises(ValueError, match="no kernel for iq2_xxs"):
        run_kernels(PROJ_OB, {"x": x, **segment_inputs([planes]), "formats": ("iq2_xxs",)}, CpuBackend())
    for wrong in (seeded(9, 64), seeded(2, 48), seeded(2, 1, 64)):
        with pytest.raises(ValueError, match=r"n_tok 1 to 8 and k a multiple of 32 is needed"):
            product(PROJ_OB, wrong, planes)
    with pytest.raises(ValueError, match="4 groups of one matrix's rows are needed"):
        product(PROJ_OA, seeded(2, 4, 64), planes)
    gaps = torch.zeros(6, 128, dtype=torch.int8)[:, :64]
    with pytest.raises(ValueError, match="not contiguous"):
        run_kernels(PROJ_OB, {"x": x, **segment_inputs([planes]), "w0": gaps}, CpuBackend())
