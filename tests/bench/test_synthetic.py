"""Models of random weights: every recipe decodes finite logits, reads what the plan says, and routes as it should."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from ds4.bench.record import step_bytes
from ds4.bench.synthetic import Synthetic, SyntheticLLM, SyntheticParams
from ds4.bench.walk import Plan
from ds4.cli_throughput import Throughput, load
from ds4.engine import LLM
from ds4.kernels.packing import PlaneMatrix
from ds4.kernels.route.ref import route
from ds4.model.steps import DecodeStep
from ds4.profiling.plan import plan_record, plan_step
from ds4.weights.describe import describe
from ds4.weights.published import FLASH, GGUF_RECIPES, RECIPES, recipe, without_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from inspect_recipes import COMPONENTS, EXPECTED, fabricated

from ds4.weights import open_checkpoint

SMALL = {"layers": 4, "experts": 8, "shrink": 8}  # both window layers, one CSA and one HCA layer


@pytest.fixture(scope="module", params=["q2", "q4", "k180", "mxfp4-moe", "official-0731", "modelopt-nvfp4-0731"])
def llm(request) -> LLM:
    return SyntheticLLM(Synthetic(request.param, **SMALL).fitting("cpu", 300, 1), device="cpu", ctx=300)


def test_finite_logits_of_the_right_size(llm):
    """Logits are products of a normed vector and a matrix of spread 1 / sqrt(K): of spread 1, give or take what two
    octaves of scales in a block and rounding to powers of two make of it."""
    session = llm.session()
    first = session.prefill(list(range(5, 140)))  # closes windows of 4 and of 128
    rows = session.decode([7, 8, 9])
    for logits in (first, *rows):
        assert logits.isfinite().all()
        assert 0.4 < logits.std().item() < 2.5
    assert len({int(row.argmax()) for row in (first, *rows)}) > 1


def test_matrices_have_the_spread_that_products_need(llm):
    matrices = [w for block in llm.model.blocks for w in vars(block.attn).values() if isinstance(w, PlaneMatrix)]
    matrices += [getattr(one, w) for one in llm.model.blocks[2].moe.experts[:2] for w in ("w1", "w2", "w3")]
    assert len(matrices) > 20
    for matrix in matrices:
        values = matrix.dequantize()
        spread = values.std().item() * matrix.shape[1] ** 0.5
        assert 0.5 < spread < 2, matrix.name
        assert values.mean().abs() < 0.1 * values.std(), matrix.name


def test_bytes_of_the_model_are_those_of_the_plan(llm):
    """The planes that were filled, counted by the plan, and the plan that ``ds4 bench`` prints, made without values.

    Tables that the CPU holds in FP32, a GPU as stored, are left out.
    """
    wanted = Plan((100,), ("random",), 1, 1, 128)
    printed = step_bytes(llm.checkpoint, wanted)[100]
    cache = llm.model.new_cache(wanted.ctx, decoded=False)
    real = plan_record(plan_step(llm.model, cache, DecodeStep(llm.model, cache, 1), llm.checkpoint, 100))
    tables = ("mhc_boundary", "route", "hc_head")
    read = [[row for row in one["operations"] if row["operation"] not in tables] for one in (real, printed)]
    assert read[0] == read[1]
    assert len(read[0]) > 12
    assert printed["step"]["floor_bytes"] == pytest.approx(describe(llm.checkpoint)["bytes_per_token"]["total"], abs=20)


@pytest.mark.parametrize("name", EXPECTED)
def test_tables_are_those_of_the_published_checkpoints(name):
    """Spec weights.md 6, to the megabyte's tenth that it gives."""
    found = describe(without_file(FLASH, recipe(name), name), tensors=False)
    expected, total = EXPECTED[name]
    traffic = found["bytes_per_token"]
    if expected is not None:
        for component, megabytes in zip(COMPONENTS, expected, strict=True):
            assert traffic[component] / 1e6 == pytest.approx(megabytes, abs=0.06), component
    assert sum(traffic[component] for component in COMPONENTS) / 1e6 == pytest.approx(total, abs=0.6)
    assert set(EXPECTED) == set(RECIPES)


@pytest.mark.parametrize("name", ["q2", "k180"])
def test_weights_are_those_of_a_file_with_the_same_header(tmp_path, name):
    """Names, formats, shapes and bytes of everything that a plan is made of."""
    opened, made = open_checkpoint(fabricated(name, tmp_path)), Synthetic(name).checkpoint()
    assert sorted(made.stored_groups()) == sorted(opened.stored_groups())
    kept = ("path", "container", "name", "architecture", "generation", "evidence", "warnings", "types", "total_bytes")
    one, other = (describe(checkpoint, tensors=False) for checkpoint in (made, opened))
    assert {k: v for k, v in one.items() if k not in kept} == {k: v for k, v in other.items() if k not in kept}


def chosen(skew: float, name: str = "layers.3.ffn") -> torch.Tensor:
    """How often each of 64 experts is chosen, most often first, by 2,000 random tokens; shares that sum to 1."""
    made = Synthetic("q2", layers=4, experts=64, shrink=8)
    params = SyntheticParams(made.checkpoint(4), "cpu", skew=skew)
    config = params.checkpoint.config
    if name.endswith("tid2eid"):
        ids = params.table(name, (config.vocab_size, config.num_experts_per_tok))
        assert (ids.sort(dim=1).values.diff(dim=1) > 0).all()  # distinct experts for each token
    else:
        gate = params.expect(f"{name}.gate.weight", (64, config.hidden_size)).dequantize()
        bias = params.expect(f"{name}.gate.bias", (64,)).dequantize()
        x = torch.randn(2000, config.hidden_size, generator=torch.Generator().manual_seed(1))
        ids, _ = route(x, gate, bias=bias, hash_ids=None, top_k=6, route_scale=1.5, rows=None)
        assert len({tuple(row) for row in ids.sort(dim=1).values.tolist()}) > 1500  # token-dependent
    return (ids.flatten().bincount(minlength=64) / ids.numel()).sort(descending=True).values


@pytest.mark.parametrize("name", ["layers.3.ffn", "layers.0.ffn.gate.tid2eid"])
def test_routing_is_even_or_skewed(name):
    """Even: no expert has more than twice its share, none less than half of it (12,000 draws; the gate's rows differ a
    little in length). Skewed by 0.5: 64 ranks to the power of -0.5 give the first 16 a share of 0.47."""
    even, skewed, steep = chosen(0, name), chosen(0.5, name), chosen(1.0, name)
    assert 1 / 128 < even[-1] <= even[0] < 2 / 64
    assert even[:16].sum() < 0.35
    assert 0.37 < skewed[:16].sum() < 0.57
    assert steep[:16].sum() > skewed[:16].sum() + 0.08


def test_as_many_layers_as_fit(monkeypatch):
    from ds4.bench import synthetic

    monkeypatch.setattr(synthetic, "free_bytes", lambda device: 20 * 10**9)
    found = Synthetic("q2").fitting("cpu", 512, 1)
    assert 4 < found.config.num_hidden_layers < 12
    assert found.total_bytes < 20 * 10**9 < Synthetic("q2").checkpoint(found.config.num_hidden_layers + 2).total_bytes
    assert Synthetic("q2", layers=2).fitting("cpu", 512, 1).config.num_hidden_layers == 2


def test_loaded_as_asked():
    wanted = Throughput(synthetic="q2", ctx=(32,), tokens=2, repeats=1, accept=0.5, draft="3", **SMALL)
    llm, todo = load(wanted)
    assert isinstance(llm, SyntheticLLM)
    assert (todo.prompts, todo.draft, todo.accept) == (("random",), 3, 0.5)
    assert llm.config.num_hidden_layers == 4
    assert not llm.memory.mapped
    assert set(GGUF_RECIPES) < set(RECIPES)
