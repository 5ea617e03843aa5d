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
from ds4.kernels.packing import PACKINGS, Planes, pack_rows, packing_of
from ds4.kernels.packing.fp8_block import F32_SCALES
from ds4.kernels.proj.cases import ALL, RECIPES, make_inputs, random_planes
from ds4.kernels.proj.op import FORMATS, PROJ_IN, PROJ_OA, PROJ_OB, PROJ_Q, project, segment_inputs
from ds4.kernels.registry import Operation, run_kernels
from ds4.weights import open_checkpoint
from ds4.weights.formats.block_scale import e4m3_table

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


SOURCE = """
#include "gemv.cuh"
extern "C" __global__ void decode(const unsigned* words, float* ours, float* toolkit, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float four[4];
  e4m3x4_weights(words[i], four);
  for (int j = 0; j < 4; ++j) ours[4 * i + j] = four[j];
  for (int j = 0; j < 2; ++j) {
    const __half2 two = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(words[i] >> 16 * j), __NV_E4M3);
    toolkit[4 * i + 2 * j] = __low2float(two), toolkit[4 * i + 2 * j + 1] = __high2float(two);
  }
}
extern "C" __global__ void sums(const float* x, float* y, int* indices, float* want) {
  float v[COUNT];
  for (int i = 0; i < COUNT; ++i) v[i] = x[32 * i + threadIdx.x];
  y[threadIdx.x] = warp_sums(v, threadIdx.x, indices[threadIdx.x]);
  for (int i = 0; i < COUNT; ++i) want[32 * i + threadIdx.x] = warp_sum(v[i]);
}
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "proj_headers.cu"
    path.write_text(SOURCE, encoding="utf-8")
    return path


@emulated
def test_both_ways_of_decoding_fp8_agree(source: Path) -> None:
    """The toolkit's conversion, an instruction from sm_89 on, and the arithmetic before it; both as torch has it."""
    words = torch.randint(-(2**31), 2**31, (20_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    words[:64] = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.int32)
    ours, toolkit = torch.zeros(words.numel(), 4), torch.ones(words.numel(), 4)
    constants = {"COUNT": 1}
    grid = (-(-words.numel() // 256), 1, 1)
    call = kernel_call(source, "decode", grid, (256, 1, 1), words, ours, toolkit, words.numel(), constants=constants)
    CpuBackend().run([call])
    want = e4m3_table(CPU)[words.view(torch.uint8).long()].view(-1, 4)
    assert want.isnan().any()
    for got in (ours, toolkit):
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(bits(got.nan_to_num(500.0)), bits(want.nan_to_num(500.0)))  # -0 too


@emulated
@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 8, 12, 14, 21, 28, 31, 32])
def test_warp_sums_are_those_of_warp_sum(source: Path, count: int) -> None:
    x = seeded(count, 32, seed=count) * torch.exp2(seeded(count, 32) * 8)
    y, want, indices = torch.zeros(32), torch.zeros(count, 32), torch.full((32,), -2, dtype=torch.int32)
    block = (32, 1, 1)
    CpuBackend().run([kernel_call(source, "sums", (1, 1, 1), block, x, y, indices, want, constants={"COUNT": count})])
    lanes = [lane for lane in range(32) if indices[lane] >= 0]
    assert sorted(indices[lanes].tolist()) == list(range(count))
    assert torch.equal(bits(y[lanes]), bits(want[indices[lanes].long(), lanes]))


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
def test_neither_rows_per_warp_nor_other_matrices_change_a_bit(n_tok: int) -> None:
    inputs = make_inputs(0, CPU, n_tok=n_tok, k=1056, segments=ALL)
    want = run_kernels(PROJ_IN, inputs, CpuBackend())
    for per_warp in (2, 4):
        got = run_kernels(PROJ_IN, inputs | {"rows_per_warp": per_warp}, CpuBackend("plain", "warps", 1))
        assert all(torch.equal(bits(got[name]), bits(want[name])) for name in want)
    alone: Inputs = {"x": inputs["x"], "formats": ("fp8_block",), "w0": inputs["w4"], "s0": inputs["s4"]}
    assert torch.equal(bits(run_kernels(PROJ_OB, alone, CpuBackend())["y0"]), bits(want["y4"]))


BLOCKS = {  # by rows: of launches of 1, 2 and 8 tokens, as the head of proj.cu has them
    4160: {1: 520, 2: 260, 8: 130},
    2560: {1: 320, 2: 320, 8: 160},
    1536: {1: 192, 2: 192, 8: 192},
    40960: {1: 1280, 2: 1280, 8: 1280},
    32768: {1: 1024, 2: 1024, 8: 1024},
    8192: {1: 512, 2: 256, 8: 256},
    4096: {1: 512, 2: 256, 8: 128},
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
