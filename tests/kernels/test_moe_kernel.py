"""The experts' kernels on the bundled model's weights, every format with 1 to 8 tokens, mistakes in copies of them."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuemu.backend import CpuBackend, missing
from cuemu.errors import SanitizerError
from torch import Tensor
from unit_data import assert_close, seeded

from ds4.demo import bundled_model_path
from ds4.kernels.cases import Case, Inputs
from ds4.kernels.entry import KERNEL_ROOT, KernelCall
from ds4.kernels.moe import Expert, moe
from ds4.kernels.moe.cases import Shape, down_inputs, random_planes, up_inputs
from ds4.kernels.moe.matrices import FORMATS, matrix_inputs
from ds4.kernels.moe.op import MOE_DOWN, MOE_UP, moe_down, moe_up
from ds4.kernels.numerics import Numerics
from ds4.kernels.packing import PACKINGS, Planes, pack_rows, packing_of
from ds4.kernels.registry import Operation, run_kernels
from ds4.kernels.verify import CPU, check_launches, take_tokens
from ds4.weights import open_checkpoint
from ds4.weights.tensor import PackedTensor

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def rel_rms(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).square().sum().sqrt() / want.double().square().sum().sqrt())


def cosine(got: Tensor, want: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(got.double().flatten(), want.double().flatten(), dim=0))


# The bundled model: NVFP4 experts, here with multipliers that tell them apart, and a Q8_0 shared expert


class Layer:
    """The expert layer 1 of the bundled model, for the kernels and for the reference."""

    def __init__(self) -> None:
        checkpoint = open_checkpoint(bundled_model_path())
        config = checkpoint.config
        self.d, self.inter, self.limit = config.hidden_size, config.moe_intermediate_size, config.swiglu_limit
        self.n_experts, self.top_k = checkpoint.n_experts("layers.1"), config.num_experts_per_tok
        shapes = {"w1": (self.inter, self.d), "w3": (self.inter, self.d), "w2": (self.d, self.inter)}

        def expert(where: str) -> list[PackedTensor]:
            return [checkpoint.expect(f"layers.1.ffn.{where}.{w}.weight", shapes[w]) for w in ("w1", "w3", "w2")]

        self.experts = [
            Expert(*(replace(t, scale=t.scale * (1 + e / 16)) for t in expert(f"experts.{e}")))
            for e in range(self.n_experts)
        ]
        self.shared = Expert(*expert("shared_experts"))
        self.inputs: Inputs = {}
        for w, (rows, cols) in shapes.items():
            routed = [getattr(e, w) for e in self.experts]
            arena = Planes.allocate(packing_of(routed[0]), self.n_experts * rows, cols)
            for e, tensor in enumerate(routed):
                pack_rows(tensor, arena, at=e * rows)
            alone = Planes.allocate(packing_of(getattr(self.shared, w)), rows, cols)
            pack_rows(getattr(self.shared, w), alone)
            self.inputs |= matrix_inputs(w, arena) | matrix_inputs(f"s{w}", alone)
            self.inputs[f"{w}_scale"] = torch.tensor([t.scale for t in routed])
            self.inputs[f"s{w}_scale"] = getattr(self.shared, w).scale


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer()


def test_bundled_model(layer: Layer) -> None:
    assert layer.inputs["w1_format"] == "nvfp4"
    assert layer.inputs["sw1_format"] == "q8_0"
    x = seeded(8, layer.d)
    rng = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(layer.n_experts, generator=rng)[: layer.top_k] for _ in range(8)])
    weights = torch.rand(8, layer.top_k, generator=rng)
    want = moe(
        *(x, ids, weights, layer.experts, layer.shared), limit=layer.limit, numerics=Numerics(), rows=tuple(range(8))
    )
    inputs = layer.inputs | {"x": x, "ids": ids.to(torch.int32), "weights": weights, "limit": layer.limit}
    mid = run_kernels(MOE_UP, inputs, CpuBackend())["mid"]
    got = run_kernels(MOE_DOWN, inputs | {"mid": mid}, CpuBackend(order="warps", seed=1))["y"]
    assert rel_rms(got, want) < 2e-6
    assert cosine(got, want) > 0.99999
    unscaled = run_kernels(MOE_UP, inputs | {"w1_scale": None}, CpuBackend())["mid"]
    with pytest.raises(AssertionError):
        assert_close(unscaled, mid, 1e-3)


# Every format with every number of tokens

UP_MIXTURES = (
    ("nvfp4", "mxfp4", "q8_0", "fp8_block"),
    ("q4_k", "q2_k", "q6_k", "iq2_xxs"),
    ("bf16", "f16", "f32", "nvfp4_modelopt"),
    ("nvfp4_sleepy", "mxfp4_official", "nvfp4_sleepy", "mxfp4_official"),
)
DOWN_MIXTURES = (("nvfp4", "q8_0"), ("mxfp4", "fp8_block"), ("q2_k", "q6_k"), ("q4_k", "iq2_xxs"), ("bf16", "f32"))


def test_every_format_is_there() -> None:
    assert {fmt for mixture in UP_MIXTURES for fmt in mixture} == set(FORMATS)


def check_counts(operation: Operation, inputs: Inputs, counts: tuple[int, ...]) -> None:
    """Against the reference, and the rows of fewer tokens against those of all, bit for bit."""
    (name,) = operation.token_outputs
    want, whole = operation.reference(inputs)[name], run_kernels(operation, inputs, CpuBackend())[name]
    assert rel_rms(whole, want) < 1e-5
    assert cosine(whole, want) >= 0.99999
    for n in counts:
        part = run_kernels(operation, take_tokens(operation, inputs, 0, n), CpuBackend(order="lifo"))[name]
        assert torch.equal(part, whole[:n]), f"{n} tokens"


@pytest.mark.parametrize("formats", UP_MIXTURES[:3], ids="-".join)
def test_up_with_every_number_of_tokens(formats: tuple[str, ...]) -> None:
    check_counts(MOE_UP, up_inputs(3, CPU, Shape(8, 256, 128, 3, 2, formats)), tuple(range(1, 8)))


@pytest.mark.parametrize("formats", UP_MIXTURES[3:], ids="-".join)
def test_other_layouts_have_the_same_kernels(formats: tuple[str, ...]) -> None:
    """So one number of tokens will do."""
    check_counts(MOE_UP, up_inputs(3, CPU, Shape(8, 256, 128, 3, 2, formats)), ())


@pytest.mark.parametrize("formats", DOWN_MIXTURES, ids="-".join)
def test_down(formats: tuple[str, ...]) -> None:
    check_counts(MOE_DOWN, down_inputs(3, CPU, Shape(8, 128, 256, 3, 2, formats)), (1,))


def test_down_with_every_number_of_tokens() -> None:
    check_counts(MOE_DOWN, down_inputs(3, CPU, Shape(8, 32, 256, 3, 2, ("nvfp4", "q8_0"))), tuple(range(1, 8)))


# Mistakes in copies of the kernels


def changed(operation: Operation, folder: Path, header: str, old: str, new: str) -> Operation:
    """``operation`` with a copy of its family's kernels in which ``old`` is ``new``."""
    family = folder / "moe"
    shutil.copytree(KERNEL_ROOT / "moe", family, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    text = (family / header).read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{header} has {text.count(old)} of {old}"
    (family / header).write_text(text.replace(old, new), encoding="utf-8")

    def moved(call: KernelCall) -> KernelCall:
        pack = copy.copy(call.args)
        pack.entry = replace(call.entry, file=str(family / call.entry.path.name))
        return replace(call, entry=pack.entry, args=pack)

    return replace(operation, calls=lambda inputs, outputs: [moved(call) for call in operation.calls(inputs, outputs)])


def case_of(operation: Operation, name: str) -> Case:
    (case,) = [case for case in operation.cases() if case.name == name]
    return case


@pytest.mark.parametrize(
    ("operation", "name", "header", "old", "new"),
    [
        # only the first of the tokens with an expert is served
        (MOE_UP, "all experts common", "members.cuh", "return __popc(tokens);", "return 1;"),
        # a token's first rank with the expert, whichever is meant
        (
            MOE_UP,
            "an expert twice",
            "members.cuh",
            "if (same && seen == earlier) rank = i;",
            "if (same && rank < 0) rank = i;",
        ),
        # the neighbour's routing weight, its results, its activations
        (MOE_UP, "all experts common", "moe_up.cu", "weights[to / kSlots * TOP_K + to % kSlots]", "weights[0]"),
        (MOE_DOWN, "all experts common", "members.cuh", "lane * kSlots + rank;", "lane * kSlots;"),
        (MOE_UP, "all experts common", "expert_tiles.cuh", "from.member[t]", "from.member[0]"),
    ],
)
def test_wrong_merging_is_noticed(
    operation: Operation, name: str, header: str, old: str, new: str, tmp_path: Path
) -> None:
    broken = changed(operation, tmp_path, header, old, new)
    assert check_launches(broken, case_of(operation, name), CpuBackend(), CPU) != []


def bits_in_orders(operation: Operation, inputs: Inputs) -> list[Tensor]:
    backends = [CpuBackend(order=order, seed=seed) for order, seed in (("forward", 0), ("lifo", 0), ("random", 1))]
    (name,) = operation.token_outputs
    return [run_kernels(operation, inputs, backend)[name] for backend in backends]


def test_sums_do_not_depend_on_the_order_of_arrival(tmp_path: Path) -> None:
    """A copy whose last block adds what it has made itself last has other bits in other orders."""
    inputs = case_of(MOE_DOWN, "nvfp4 8 tokens").make(0, CPU)
    first, *others = bits_in_orders(MOE_DOWN, inputs)
    assert all(torch.equal(first, other) for other in others)
    old = "const float* part = parts + static_cast<size_t>(token) * kSlots * HIDDEN + column;"
    rotated = "static_cast<size_t>((slot + blockIdx.y) % kSlots) * HIDDEN"
    broken = changed(MOE_DOWN, tmp_path, "moe_down.cu", old, old)
    source = tmp_path / "moe" / "moe_down.cu"
    text = source.read_text(encoding="utf-8")
    assert text.count("static_cast<size_t>(slot) * HIDDEN") == 1
    text = text.replace("static_cast<size_t>(slot) * HIDDEN", rotated)
    text = text.replace("__ldcg(part);", "__ldcg(part + static_cast<size_t>(blockIdx.y % kSlots) * HIDDEN);")
    source.write_text(text, encoding="utf-8")
    first, *others = bits_in_orders(broken, inputs)
    assert_close(first, MOE_DOWN.reference(inputs)["y"])
    assert not all(torch.equal(first, other) for other in others)


def test_a_token_served_twice_is_a_race(tmp_path: Path) -> None:
    """Blocks of later tokens that stay write the same values once more: only ThreadSanitizer can tell."""
    if missing("tsan"):
        pytest.skip(str(missing("tsan")))
    case = case_of(MOE_UP, "all experts common")
    assert check_launches(MOE_UP, case, CpuBackend("tsan"), CPU) == []
    broken = changed(MOE_UP, tmp_path, "members.cuh", "if (tokens & ((1u << token) - 1u)) return 0;", "")
    with pytest.raises(SanitizerError, match="race"):
        check_launches(broken, case, CpuBackend("tsan"), CPU)


# What the operations do with values and arguments


def small_up() -> Inputs:
    return up_inputs(0, CPU, Shape(8, 256, 32, 6, 2, ("nvfp4", "nvfp4", "q8_0", "q8_0")))


def test_a_token_that_is_not_a_number_keeps_to_itself() -> None:
    inputs = small_up()
    clean = run_kernels(MOE_UP, inputs, CpuBackend())["mid"]
    inputs["x"][3, 100] = torch.nan
    mid = run_kernels(MOE_UP, inputs, CpuBackend())["mid"]
    assert mid[3].isnan().all()
    others = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(mid[others], clean[others])


def test_cpu_tensors_go_through_the_reference() -> None:
    rng = torch.Generator().manual_seed(0)
    shape = {
        "w1": (3 * 32, 64),
        "w3": (3 * 32, 64),
        "sw1": (32, 64),
        "sw3": (32, 64),
        "w2": (3 * 64, 32),
        "sw2": (64, 32),
    }
    planes = {
        name: Planes(PACKINGS["bf16"], rows, cols, random_planes(rng, "bf16", rows, cols))
        for name, (rows, cols) in shape.items()
    }
    x, ids, weights = (
        seeded(2, 64) / 8,
        torch.tensor([[0, 2], [2, 1]], dtype=torch.int32),
        torch.rand(2, 2, generator=rng),
    )
    mid = moe_up(x, ids, weights, limit=7.0, w1=planes["w1"], w3=planes["w3"], sw1=planes["sw1"], sw3=planes["sw3"])
    y = moe_down(mid, ids, w2=planes["w2"], sw2=planes["sw2"])

    def rows(name: str, e: int) -> Tensor:
        return planes[name].decode().view(-1, *shape[f"s{name}"])[e]

    experts = [Expert(*(rows(name, e) for name in ("w1", "w3", "w2"))) for e in range(3)]
    shared = Expert(*(planes[name].decode() for name in ("sw1", "sw3", "sw2")))
    want = moe(x, ids.long(), weights, experts, shared, limit=7.0, numerics=Numerics(), rows=(0, 1))
    assert_close(y, want, 2e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w1_format": "iq4_nl"}, "w1: no kernel for iq4_nl"),
        (
            {"w3_codes": torch.zeros(6 * 32, 64, dtype=torch.uint8)},
            r"w3_codes is torch.uint8 \[192, 64\], not \[192, 128\]",
        ),
        ({"w1_codes": torch.zeros(6 * 32 + 1, 128, dtype=torch.uint8)}, "w1, nvfp4 with 193 rows"),
        ({"w1_scale": torch.ones(5)}, r"w1_scale is \[5\], not \[6\]"),
        ({"ids": torch.zeros(7, 2, dtype=torch.int32)}, r"ids \[7, 2\] instead of \[8, 2\]"),
        ({"x": torch.zeros(9, 256), "ids": torch.zeros(9, 2, dtype=torch.int32)}, "9 tokens"),
    ],
    ids=["format", "columns", "rows", "multipliers", "ids", "tokens"],
)
def test_arguments_that_do_not_fit(change: Inputs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_kernels(MOE_UP, small_up() | change, CpuBackend())
