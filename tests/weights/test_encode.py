"""One tensor into another format: tiles make no difference, recipes choose what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weights.builders import random_tensors, small_config

from ds4.errors import Ds4Error
from ds4.weights import encode
from ds4.weights.encode import Outcome
from ds4.weights.formats import FORMATS
from ds4.weights.recipes import DENSE, EXPERTS, Recipe, group_of, target_format
from ds4.weights.tensor import PackedTensor


def packed(values: torch.Tensor, fmt: str = "f32") -> PackedTensor:
    form = FORMATS[fmt]
    multiplier = form.multiplier(values) if form.multiplier else 1.0
    data, *scales = form.encode(values / multiplier)
    return PackedTensor("x", fmt, tuple(values.shape), data, multiplier, dict(zip(form.parts, scales, strict=True)))


def encoded(tensor: PackedTensor, target: str, **options: bool) -> tuple[PackedTensor, Outcome]:
    """The tensor that the written pieces make together; every byte is written once."""
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    outcome = encode.encode(
        tensor, target, lambda role, row, rows: pieces.setdefault(role, []).append((row, rows)), **options
    )
    whole = {}
    for role, tiles in pieces.items():
        assert [row for row, _ in tiles] == [0, *np.cumsum([len(rows) for _, rows in tiles])[:-1]]
        whole[role] = torch.cat([rows for _, rows in tiles])
        assert whole[role].dtype == torch.uint8
    return PackedTensor("x", target, tensor.shape, whole.pop(""), outcome.multiplier, whole), outcome


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["f32", "bf16", "q8_0", "nvfp4", "mxfp4", "fp8_block", "nvfp4_modelopt", "mxfp4_official"]),
    st.sampled_from(["f32", "bf16", "f16", "q8_0", "nvfp4", "mxfp4", "fp8_block", "nvfp4_modelopt", "mxfp4_official"]),
    st.integers(1, 300),
    st.integers(1, 3),
    st.integers(1, 1 << 14),
)
def test_tiles_make_no_difference(source: str, target: str, n_rows: int, blocks: int, tile: int) -> None:
    values = torch.randn(n_rows, 64 * blocks, generator=torch.Generator().manual_seed(n_rows)) * 0.05
    tensor = packed(values, source)
    whole, outcome = encoded(tensor, target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "_TILE", tile)
        patch.setattr(encode, "_TILE_BYTES", tile)
        tiled, again = encoded(tensor, target)
    assert torch.equal(whole.data, tiled.data)
    assert all(torch.equal(part, tiled.parts[role]) for role, part in whole.parts.items())
    assert (outcome.exact, outcome.multiplier) == (again.exact, again.multiplier)
    assert outcome.error == pytest.approx(again.error, rel=1e-6)
    before, after = tensor.dequantize(), whole.dequantize()
    assert outcome.exact == torch.equal(before, after)
    assert outcome.error == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-3, abs=1e-7)


def test_a_column_slice_and_a_vector_are_copied() -> None:
    wide = packed(torch.randn(8, 128), "q8_0")
    half = PackedTensor("x", "q8_0", (8, 64), wide.data[:, 68:])
    got, outcome = encoded(half, "q8_0")
    assert outcome == Outcome(True, 0.0, 1.0)
    assert torch.equal(got.data, half.data)
    vector = PackedTensor("x", "bf16", (5,), torch.arange(5).to(torch.bfloat16).view(torch.uint8).view(1, -1))
    got, outcome = encoded(vector, "f32")
    assert outcome.exact
    assert torch.equal(got.dequantize(), torch.arange(5.0))


def test_multipliers() -> None:
    values = torch.randn(4, 64) * 0.01
    plain, _ = encoded(packed(values), "nvfp4", with_multiplier=False)
    scaled, _ = encoded(packed(values), "nvfp4")
    assert plain.scale == 1.0
    assert scaled.scale == FORMATS["nvfp4"].multiplier(values)  # type: ignore[misc]
    assert float((scaled.dequantize() - values).norm()) < float((plain.dequantize() - values).norm())


@pytest.mark.parametrize(
    ("values", "target", "problem"),
    [
        (torch.tensor([[1.0, float("inf")]]), "bf16", r"x \(f32\) holds infinities"),
        (torch.tensor([[1.0, 1e5]]), "f16", "x holds 100000, which f16 cannot hold; use bf16"),
    ],
)
def test_refusals(values: torch.Tensor, target: str, problem: str) -> None:
    with pytest.raises(Ds4Error, match=problem):
        encoded(PackedTensor("x", "f32", (1, 2), values.view(torch.uint8)), target)


# Recipes


def test_groups() -> None:
    """Of every kind of tensor one example."""
    dense = {"attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_a", "attn.wo_b", "attn.indexer.wq_b", "e_proj", "h_proj"}
    dense |= {f"ffn.shared_experts.w{n}" for n in (1, 2, 3)}
    for name in random_tensors(small_config()):
        suffix = name.partition(".")[2].partition(".")[2].removesuffix(".weight")
        wanted = "experts" if ".experts." in name else "LM head" if name == "head.weight" else "other"
        assert group_of(name) == ("dense" if suffix in dense else wanted), name
    assert group_of("mtp.0.main_proj.weight") == "dense"
    assert group_of("mtp.2.markov_head.markov_w1.weight") == "other"


@pytest.mark.parametrize("container", ["gguf", "safetensors"])
def test_every_recipe_gives_formats_that_the_container_has(container) -> None:
    stored = ["f32", "f16", "bf16", "q8_0", "nvfp4", "mxfp4", "q4_k", "fp8_block", "nvfp4_modelopt", "mxfp4_official"]
    allowed = 0
    for recipe in (Recipe(experts, dense) for experts in EXPERTS for dense in DENSE):
        try:
            recipe.check(container)
        except Ds4Error:
            continue
        allowed += 1
        for name in ("layers.0.ffn.experts.0.w1.weight", "layers.0.attn.wkv.weight", "head.weight", "embed.weight"):
            for source in stored:
                form = FORMATS[target_format(name, source, (256, 256), recipe, container)]
                writable = ("f32", "f16", "bf16", "fp8_block", "nvfp4_modelopt", "mxfp4_official")
                assert form.ggml_type is not None if container == "gguf" else form.name in writable
    assert allowed == {"gguf": 5 * 4, "safetensors": 4 * 4}[container]


def test_fp8_leaves_the_lm_head() -> None:
    """No release has it in FP8."""
    assert target_format("head.weight", "bf16", (64, 64), Recipe(dense="fp8"), "safetensors") == "bf16"
    assert target_format("head.weight", "bf16", (64, 64), Recipe(dense="q8_0"), "gguf") == "q8_0"


def test_unknown_choice_is_a_bug() -> None:
    with pytest.raises(ValueError, match="--experts is one of"):
        Recipe("q4_k").check("gguf")
