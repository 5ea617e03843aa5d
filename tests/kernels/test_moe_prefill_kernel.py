"""The experts' prefill kernels: rows in any chunk and tile, against the decode form, mistakes in copies of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cuemu.backend import CpuBackend, missing
from test_moe_kernel import Layer, case_of, changed, rel_rms
from torch import Tensor

from ds4.kernels.cases import Inputs, bits
from ds4.kernels.moe.cases import matrix
from ds4.kernels.moe.op import MOE_COMBINE, MOE_DOWN, MOE_DOWN_GEMM, MOE_GROUP, MOE_UP, MOE_UP_GEMM
from ds4.kernels.registry import Operation, run_kernels
from ds4.kernels.verify import CPU, check_launches

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@dataclass(frozen=True, eq=False)
class Prompt:
    """Tokens of a prompt: x bf16 [n, d], ids i32 and weights f32 [n, top_k]."""

    x: Tensor
    ids: Tensor
    weights: Tensor

    def take(self, tokens: list[int]) -> Prompt:
        """These tokens; -1 is a row without one, whose values are nonsense."""
        at, dead = torch.tensor(tokens), torch.tensor(tokens) < 0
        return Prompt(
            self.x[at].masked_fill(dead[:, None], torch.nan),
            self.ids[at].masked_fill(dead[:, None], 2**30),
            self.weights[at].masked_fill(dead[:, None], torch.nan),
        )


def prompt(n: int, d: int, n_experts: int, top_k: int) -> Prompt:
    rng = torch.Generator().manual_seed(7)
    ids = torch.stack([torch.randperm(n_experts, generator=rng)[:top_k] for _ in range(n)])
    ids[3] = ids[3, 0]  # an expert in all slots
    x = torch.randn(n, d, generator=rng).bfloat16()
    return Prompt(x, ids.to(torch.int32), torch.rand(n, top_k, generator=rng) + 0.1)


def layer(matrices: Inputs, tokens: Prompt, tile: int, count: int | None = None, order: str = "forward") -> Inputs:
    """mid, parts and y of the live rows, by the kernels one after another."""
    backend, n = CpuBackend(order=order), len(tokens.x) if count is None else count
    common: Inputs = {"tile": tile, "count": None if count is None else torch.tensor([count], dtype=torch.int32)}
    n_experts = matrices["w1_scale"].shape[0]
    grouped = run_kernels(MOE_GROUP, common | {"ids": tokens.ids, "n_experts": n_experts}, backend)
    common |= matrices | grouped
    up = run_kernels(MOE_UP_GEMM, common | {"x": tokens.x, "weights": tokens.weights, "limit": 10.0}, backend)
    down = run_kernels(MOE_DOWN_GEMM, common | up, backend)
    y = run_kernels(MOE_COMBINE, common | down, backend)
    return {name: value[:n] for name, value in (up | down | y).items()}


def matrices_of(formats: tuple[str, ...], d: int, inter: int, n_experts: int) -> Inputs:
    """Of w1, w3, w2 and of the shared three."""
    rng, made = torch.Generator().manual_seed(3), {}
    for name, fmt in zip(("w1", "w3", "w2", "sw1", "sw3", "sw2"), formats, strict=True):
        rows, cols = (d, inter) if name.endswith("w2") else (inter, d)
        made |= matrix(rng, name, fmt, rows, cols, None if name.startswith("s") else n_experts)
    return made


@pytest.mark.parametrize("formats", [("nvfp4", "mxfp4", "q2_k"), ("iq2_xxs", "q6_k", "q4_k")], ids="-".join)
def test_a_row_does_not_depend_on_its_chunk(formats: tuple[str, ...]) -> None:
    """Nor on its place there, the tile, the shared expert's tile, dead rows, or the tokens beside it, bit for bit."""
    tokens, matrices = prompt(45, 256, 5, 2), matrices_of(formats * 2, 256, 256, 5)
    whole = layer(matrices, tokens, 128)
    assert all(not value.isnan().any() for value in whole.values())

    def check(chosen: list[int], tile: int, count: int | None = None, order: str = "forward") -> None:
        part = layer(matrices, tokens.take(chosen), tile, count, order)
        live = [t for t in chosen if t >= 0]
        for name, value in part.items():
            assert torch.equal(bits(value), bits(whole[name][live])), f"{name}, tiles of {tile}"

    check(list(reversed(range(45))), 16, order="lifo")
    check([3, 44, 7, 0, 20, -1, -1, -1, -1], 8, count=5)
    check([44], 8)
    check([-1] * 9, 8, count=0)


@pytest.mark.parametrize("operation", [MOE_UP_GEMM, MOE_DOWN_GEMM], ids=lambda operation: operation.name)
def test_roundings_seldom_differ_from_the_reference(operation: Operation) -> None:
    """FP32 results that differ by 1e-6 of them round to other BF16 numbers in one of some 2,000 cases."""
    for case in operation.cases():
        if case.group != "smoke":
            continue
        inputs = case.make(2, CPU)
        (name,) = case.compare
        got, want = run_kernels(operation, inputs, CpuBackend())[name], operation.reference(inputs)[name]
        assert (bits(got) != bits(want)).float().mean() < 0.01, case.name


# Against the decode form


def test_bundled_model_in_both_forms() -> None:
    """Only the roundings to BF16 stand between them: of the input, which both have here, mid and the parts."""
    model = Layer()
    tokens = prompt(8, model.d, model.n_experts, model.top_k)
    grouped = run_kernels(
        MOE_GROUP, {"ids": tokens.ids, "count": None, "tile": 8, "n_experts": model.n_experts}, CpuBackend()
    )
    inputs = model.inputs | grouped | {"tile": 8, "count": None, "limit": model.limit}
    mid = run_kernels(MOE_UP_GEMM, inputs | {"x": tokens.x, "weights": tokens.weights}, CpuBackend())["mid"]
    parts = run_kernels(MOE_DOWN_GEMM, inputs | {"mid": mid}, CpuBackend())["parts"]
    y = run_kernels(MOE_COMBINE, {"parts": parts, "count": None}, CpuBackend())["y"]
    decode = inputs | {"x": tokens.x.float(), "ids": tokens.ids, "weights": tokens.weights}
    exact = run_kernels(MOE_UP, decode, CpuBackend())["mid"]
    want = run_kernels(MOE_DOWN, decode | {"mid": exact}, CpuBackend())["y"]
    assert (bits(mid) != bits(exact.bfloat16())).float().mean() < 0.01
    assert rel_rms(y, want) < 2.0**-8
    down = run_kernels(MOE_DOWN, decode | {"mid": mid.float()}, CpuBackend())["y"]
    assert rel_rms(y, down) < 2.0**-9 < rel_rms(y, down.roll(1, 0))


@pytest.mark.parametrize("name", ["mxfp4 and fp8", "q4_k and q6_k"])
def test_up_is_the_decode_form_rounded(name: str) -> None:
    inputs = case_of(MOE_UP_GEMM, name).make(0, CPU)
    mid = run_kernels(MOE_UP_GEMM, inputs, CpuBackend())["mid"]
    tiles, ids = inputs["tiles"][: int(inputs["n_tiles"])], torch.zeros(6, dtype=torch.int32)
    ids[inputs["order"].long()] = tiles[:, 0].repeat_interleave(tiles[:, 2])
    decode = inputs | {"x": inputs["x"].float(), "ids": ids.view(3, 2)}
    exact = run_kernels(MOE_UP, decode, CpuBackend())["mid"]
    assert (bits(mid) != bits(exact.bfloat16())).float().mean() < 0.01


# Mistakes in copies of the kernels


@pytest.mark.parametrize(
    ("operation", "name", "source", "old", "new"),
    [
        # pairs of an expert backward, experts not counted up to its own, a stale place behind the last tile
        (MOE_GROUP, "70 rows", "moe_group.cu", "(1u << lane) - 1u", "~0u << lane << 1"),
        (MOE_GROUP, "70 rows", "moe_group.cu", "make_int4(expert, first + in_expert", "make_int4(expert, in_expert"),
        (MOE_GROUP, "70 rows, 37 live", "moe_group.cu", "order[i] = 0;", ""),
        # rows without tokens are sorted in
        (MOE_GROUP, "70 rows, 37 live", "moe_group.cu", "n_pairs = live_rows(count, n_rows)", "n_pairs = n_rows"),
        # another pair's weight, result or activations; the first expert's multiplier
        (MOE_UP_GEMM, "nvfp4", "expert_gemm.cuh", "weights ? weights[pair]", "weights ? weights[token]"),
        (MOE_UP_GEMM, "nvfp4", "expert_gemm.cuh", "members.slot[i] = pair + token;", "members.slot[i] = pair;"),
        (MOE_UP_GEMM, "nvfp4", "moe_gemm_up.cu", "members.token[t]", "members.token[0]"),
        (MOE_DOWN_GEMM, "nvfp4", "expert_gemm.cuh", "of_expert[expert]", "of_expert[0]"),
        # gate and up exchanged; the shared expert's rows in another slot; a tile's second place
        (MOE_UP_GEMM, "nvfp4", "moe_gemm_up.cu", "swiglu(g, u, limit)", "swiglu(u, g, limit)"),
        (MOE_DOWN_GEMM, "nvfp4", "expert_gemm.cuh", "* (top_k + 1) + top_k;", "* (top_k + 1);"),
        (MOE_DOWN_GEMM, "skewed", "expert_gemm.cuh", "order[entry.y + i]", "order[entry.y]"),
        # slots from the right
        (MOE_COMBINE, "9 rows", "moe_combine.cu", "part[slot][i / 2];", "part[TOP_K - slot][i / 2];"),
    ],
)  # fmt: skip
def test_a_mistake_is_noticed(operation: Operation, name: str, source: str, old: str, new: str, tmp_path: Path) -> None:
    broken = changed(operation, tmp_path, source, old, new)
    assert check_launches(broken, case_of(operation, name), CpuBackend(), CPU) != []


# What the operations do with values and arguments


def test_a_token_that_is_not_a_number_keeps_to_itself() -> None:
    inputs = case_of(MOE_UP_GEMM, "nvfp4").make(0, CPU)
    clean = run_kernels(MOE_UP_GEMM, inputs, CpuBackend())["mid"]
    inputs["x"][4, 100] = torch.nan
    mid = run_kernels(MOE_UP_GEMM, inputs, CpuBackend())["mid"]
    assert mid[4].isnan().all()
    others = [0, 1, 2, 3, 5, 6, 7]
    assert torch.equal(mid[others], clean[others])


@pytest.mark.parametrize(
    ("operation", "change", "message"),
    [
        (MOE_UP_GEMM, {"w1_format": "iq4_nl"}, "w1: no kernel for iq4_nl"),
        (MOE_UP_GEMM, {"w1_scale": torch.ones(4)}, r"w1_scale is \[4\], not \[3\]"),
        (MOE_UP_GEMM, {"x": torch.zeros(8, 256)}, "do not go with torch.float32"),
        (MOE_UP_GEMM, {"tile": 24}, "tiles of 24 in .* there is no such launch"),
        (MOE_DOWN_GEMM, {"order": torch.zeros(15, dtype=torch.int32)}, r"moe_down_gemm: order \[15\] and tiles"),
        (MOE_COMBINE, {"parts": torch.zeros(9, 7, 2056)}, "moe_combine: parts torch.float32"),
        (MOE_GROUP, {"tile": 0}, "tiles of 0"),
    ],
    ids=["format", "multipliers", "dtype", "tile", "order", "parts", "group"],
)
def test_arguments_that_do_not_fit(operation: Operation, change: Inputs, message: str) -> None:
    fitting = operation.cases()[0].make(0, CPU)
    with pytest.raises(ValueError, match=message):
        operation.calls(fitting | change, operation.outputs(fitting))
