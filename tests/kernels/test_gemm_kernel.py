"""gemm_tiles.cuh in every format and gemm.cu: against FP64, what may not change a bit, mistakes in copies of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from cuemu.backend import CpuBackend, missing
from cuemu.calls import FIXTURES, kernel_call
from cuemu.errors import KernelError
from torch import Tensor
from unit_data import seeded

from ds4.kernels.cases import Inputs, bits
from ds4.kernels.entry import INCLUDE_DIR
from ds4.kernels.gemm.cases import make_inputs
from ds4.kernels.gemm.op import GEMM
from ds4.kernels.moe.cases import random_planes, spread
from ds4.kernels.moe.matrices import TEMPLATES
from ds4.kernels.packing import PACKINGS, Planes
from ds4.kernels.picks import TOKENS, Pick, shared_bytes
from ds4.kernels.proj.cases import ALL
from ds4.kernels.registry import run_kernels
from ds4.weights.formats.iq2_xxs import patterns

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

CPU = torch.device("cpu")
HEADER = INCLUDE_DIR / "gemm_tiles.cuh"
ROWS, N_TOK = 19, 41  # more than a block and less than two of either plan
PLANS = {0: (Pick(8, 3), 1, 8), 1: (Pick(32, 2), 2, 32)}  # by `wide`: pick, warps, rows of each matrix in a block
# Formats of top and bottom, and columns: all of gemm_tiles.cuh's ways, partial chunks, and formats that differ.
PAIRS = (
    ("nvfp4", "nvfp4", 416),
    ("iq2_xxs", "iq2_xxs", 512),
    ("q2_k", "q4_k", 512),
    ("q6_k", "q4_k", 256),
    ("mxfp4", "fp8_block", 160),
    ("bf16", "f32", 96),
    ("f16", "q8_0", 1056),
)


def planes_of(fmt: str, k: int, seed: int) -> Planes:
    """A random matrix [ROWS, k]."""
    rng = torch.Generator().manual_seed(seed)
    return Planes(PACKINGS[fmt], ROWS, k, random_planes(rng, fmt, ROWS, k))


def tile_product(x: Tensor, top: Planes, bottom: Planes, wide: int, backend: CpuBackend, source: Path) -> Tensor:
    """f32 [n_tok, 2, ROWS] by the fixture."""
    n_tok, k = x.shape
    pick, warps, rows = PLANS[wide]
    formats = [planes.packing.format for planes in (top, bottom)]
    table = None
    if "iq2_xxs" in formats:
        table = patterns(CPU).view(torch.int8).view(256, 8).to(torch.bfloat16).view(torch.int64)
    args = [x]
    for planes in (top, bottom):
        tensors = [tensor.view(torch.uint8) for tensor in planes.tensors.values()]
        args += [*tensors, *[None] * (4 - len(tensors))]
    y = torch.full((n_tok, 2, ROWS), torch.nan)
    call = kernel_call(
        source,
        "gemm_tile_of",
        (-(-ROWS // rows), -(-n_tok // pick.tokens), 1),
        (32 * warps, 1, 1),
        *(*args, table, y, ROWS, n_tok, wide),
        shared_bytes=shared_bytes(pick, formats),
        constants={
            "TOP": TEMPLATES[formats[0]],
            "BOTTOM": TEMPLATES[formats[1]],
            "K": k,
            "PATTERNS": int(table is not None),
        },
    )
    backend.run([call])
    return y


def wanted(x: Tensor, top: Planes, bottom: Planes) -> tuple[Tensor, Tensor]:
    """FP64 products, and the spread of each matrix's."""
    weights = torch.stack([planes.decode().double() for planes in (top, bottom)])
    sizes = [spread(p.packing.format, dict(p.tensors), p.n_cols) * p.n_cols**0.5 for p in (top, bottom)]
    return torch.einsum("tk,mrk->tmr", x.double(), weights), torch.tensor(sizes).view(1, 2, 1)


@pytest.mark.parametrize(("top", "bottom", "k"), PAIRS)
def test_every_format_in_two_plans(top: str, bottom: str, k: int) -> None:
    """Against FP64, within FP32's roundings; minima count with 16 bits of the sums of 16 activations. Both plans, and a
    token by itself, give the same bits."""
    x, one, other = seeded(N_TOK, k, seed=5).bfloat16(), planes_of(top, k, 0), planes_of(bottom, k, 1)
    want, size = wanted(x, one, other)
    narrow = tile_product(x, one, other, 0, CpuBackend(), FIXTURES / "gemm_tile.cu")
    error = ((narrow.double() - want) / size).abs().max()
    assert 0 < error < (5e-6 if "q2_k" in (top, bottom) else 2e-6)
    wide = tile_product(x, one, other, 1, CpuBackend("plain", "lifo"), FIXTURES / "gemm_tile.cu")
    assert torch.equal(bits(wide), bits(narrow))
    alone = tile_product(x[7:8].clone(), one, other, 1, CpuBackend("plain", "warps"), FIXTURES / "gemm_tile.cu")
    assert torch.equal(bits(alone), bits(narrow[7:8]))


def test_shared_memory_is_what_the_header_says() -> None:
    out = torch.zeros(4, dtype=torch.int32)
    constants = {"TOP": "Q8Tile", "BOTTOM": "Q8Tile", "K": 32, "PATTERNS": 0}
    call = kernel_call(FIXTURES / "gemm_tile.cu", "plan_bytes", (1, 1, 1), (1, 1, 1), out, constants=constants)
    CpuBackend().run([call])
    assert out.tolist() == [shared_bytes(PLANS[wide][0], (fmt,)) for wide in (0, 1) for fmt in ("q8_0", "q4_k")]
    assert shared_bytes(Pick(8, 3), ("iq2_xxs",)) == out[0] + 32 * 1024


FAULTS = {  # in a copy of the header: what is there, and what instead
    "no barrier when a chunk has come": ("__syncthreads();  // the chunk is there", "// the chunk is there"),
    "no barrier after the sums": ("    __syncthreads();\n#pragma unroll\n      for (int i = 0; i < kTiles", None),
    "no wait for copies": ("cp_async_wait<Plan::kStages - 2>()", "cp_async_wait<Plan::kStages - 1>()"),
    "copies unlike reads": ("(t & 1) << 2", "(t & 1) << 1"),
    "minima without second parts": ("{parts.x, parts.y}", "{parts.x, parts.x}"),
    "the next chunk's weights too early": ("if (span + 1 == kSpans && chunk", "if (span == 0 && chunk"),
}


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_mistakes_are_noticed(fault: str | None, tmp_path: Path) -> None:
    """The comparison with FP64 fails, or the emulation stops, for each; and not for an untouched copy."""
    text = HEADER.read_text(encoding="utf-8")
    if fault is not None:
        old, new = FAULTS[fault]
        assert text.count(old) == 1
        text = text.replace(old, old.split("\n", 1)[1] if new is None else new)
    source = Path(shutil.copy(FIXTURES / "gemm_tile.cu", tmp_path))
    (tmp_path / HEADER.name).write_text(text, encoding="utf-8")
    x, one, other = seeded(N_TOK, 512, seed=5).bfloat16(), planes_of("q4_k", 512, 0), planes_of("q2_k", 512, 1)
    want, size = wanted(x, one, other)
    backend = CpuBackend("plain", "lifo", time_limit_s=20)
    try:
        errors = [(tile_product(x, one, other, wide, backend, source).double() - want) / size for wide in (0, 1)]
    except KernelError:
        errors = [torch.tensor(torch.inf)]
    right = all(bool((error.abs() < 5e-6).all()) for error in errors)
    assert right == (fault is None)


# ---------------------------------------------------------------- gemm.cu


def products(x: Tensor, inputs: Inputs, **options: object) -> list[Tensor]:
    results = run_kernels(GEMM, inputs | {"x": x, "count": None} | options, CpuBackend())
    return [results[f"y{i}"] for i in range(len(results))]


def test_weights_are_what_the_planes_decode_to() -> None:
    """Each activation picks a column: all weights bit for bit, but for the sign of zeros."""
    inputs = make_inputs(0, CPU, n_rows=1, k=32, segments=ALL)
    for i, y in enumerate(products(torch.eye(32).bfloat16(), inputs)):
        tensors = [inputs[f"{name}{i}"] for name in "ws"]
        packing = PACKINGS[inputs["formats"][i]]
        named = {plane.name: tensor for plane, tensor in zip(packing.planes, tensors, strict=False)}
        assert torch.equal(y.T, Planes(packing, y.shape[1], 32, named).decode())


def test_error_against_fp64(capsys: pytest.CaptureFixture[str]) -> None:
    """At K = 4096, where 64 sums of 64 products are added: below 2e-6 of the results' spread, which is about 1."""
    inputs = make_inputs(0, CPU, n_rows=8, k=4096, segments=ALL)
    for i, y in enumerate(products(inputs["x"], inputs)):
        packing = PACKINGS[inputs["formats"][i]]
        tensors = {p.name: inputs[f"{name}{i}"] for p, name in zip(packing.planes, "ws", strict=False)}
        want = inputs["x"].double() @ Planes(packing, y.shape[1], 4096, tensors).decode().double().T
        error = float((y.double() - want).abs().max())
        with capsys.disabled():
            print(f" {packing.format}: largest error {error:.1e} ")
        assert 0 < error < 2e-6


def test_neither_tiles_nor_places_change_a_bit() -> None:
    """Every tile of tokens, the rows in another order, a chunk of fewer rows, and the other matrices left out."""
    segments = (*ALL, ("fp8_block", 300))  # several blocks of rows in the largest tile
    inputs = make_inputs(0, CPU, n_rows=135, k=160, segments=segments, out=("f32",) * 5 + ("bf16",))
    x, places = inputs["x"], torch.randperm(135, generator=torch.Generator().manual_seed(0))
    want = products(x, inputs, pick=Pick(16, 2))
    for tokens in TOKENS:
        got = products(x[places].contiguous(), inputs, pick=Pick(tokens, 2 if tokens > 32 else 3))
        assert all(torch.equal(bits(y), bits(w[places])) for y, w in zip(got, want, strict=True)), tokens
    few = products(x[3:8].contiguous(), inputs)
    assert all(torch.equal(bits(y), bits(w[3:8])) for y, w in zip(few, want, strict=True))
    alone = {"formats": ("q8_0",), "out": ("f32",), "w0": inputs["w3"], "s0": inputs["s3"]}
    assert torch.equal(bits(products(x, alone)[0]), bits(want[3]))


def test_bf16_results_are_the_sums_rounded() -> None:
    inputs = make_inputs(0, CPU, n_rows=9, k=160, segments=(("fp8_block", 33),) * 2, out=("bf16", "f32"))
    rounded, sums = products(inputs["x"], inputs | {name + "0": inputs[name + "1"] for name in "ws"})
    assert torch.equal(bits(rounded), bits(sums.bfloat16()))


@pytest.mark.parametrize("count", [0, 1, 8, 9, 13, 99])
def test_rows_without_tokens_are_left_alone(count: int) -> None:
    """Also where there are fewer rows than the count says; what the x of others holds does not count."""
    inputs = make_inputs(0, CPU, n_rows=13, k=160, segments=ALL, pick=Pick(8, 3))
    want = products(inputs["x"], inputs)
    inputs["x"][count:] = torch.nan
    outputs = GEMM.outputs(inputs)
    for y in outputs.values():
        y.fill_(-1.0)
    inputs["count"] = torch.tensor([count], dtype=torch.int32)
    CpuBackend().run(GEMM.calls(inputs, outputs))
    for y, w in zip(outputs.values(), want, strict=True):
        assert torch.equal(y[:count], w[:count])
        assert (y[count:] == -1).all()
