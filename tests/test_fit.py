"""The memory planner: its parts against what is really allocated, the longest context, the refusal before loading."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner
from weights.builders import small_config

from ds4 import engine
from ds4.cli import main
from ds4.demo import bundled_model_path
from ds4.engine import LLM
from ds4.errors import Ds4Error
from ds4.fit import GRAPH_BYTES_PER_LAUNCH, RESERVE_BYTES, Fit, Planner, free_bytes, weight_storages
from ds4.kernels.numerics import resolve
from ds4.model.device_params import DeviceParams
from ds4.model.prefill_pass import CAPACITIES, PrefillPass
from ds4.model.steps import DecodeStep
from ds4.model.transformer import Transformer
from ds4.profiling.shapes import shape_model
from ds4.weights import open_checkpoint
from ds4.weights.published import FLASH, recipe, shrunk, without_file

GIB = 1 << 30


@pytest.fixture(scope="module")
def demo():
    return open_checkpoint(bundled_model_path())


@pytest.fixture(scope="module")
def q2():
    return Planner(without_file(FLASH, recipe("q2"), "q2"), n_toks=(1, 2))


def test_cache_of_the_real_model(q2):
    """Spec model.md 6.3: 3514.25 bytes a token, 3.43 GiB at 1M; 3.07 MiB of windows and 11.6 MiB of compressor state,
    to which rings of 16 slots more add some."""
    fits = {ctx: q2.fit(ctx, 200 * GIB).cache_bytes for ctx in (0, 8192, 1 << 20)}
    assert fits[1 << 20] - fits[0] == 3514.25 * (1 << 20)
    assert (fits[1 << 20] - fits[0]) / GIB == pytest.approx(3.43, abs=0.005)
    assert 3_214_336 + 12_206_080 < fits[0] < 1.4 * (3_214_336 + 12_206_080)
    assert q2.fit(8192, 200 * GIB).fits


def test_longest_context_of_the_real_model(q2):
    """What fits at the longest context does, and one token more does not."""
    memory = 86 * GIB
    found = q2.fit(1 << 20, memory)
    assert not found.fits
    assert 0 < found.max_ctx < 1 << 20
    assert q2.fit(found.max_ctx, memory).fits
    step = 128  # of the window of an HCA layer, with which the cache grows
    assert not q2.fit(found.max_ctx + step, memory).fits
    missing = found.total_bytes - memory
    with pytest.raises(Ds4Error, match=rf"\({missing} bytes\) are missing at a context of 1048576 .*{found.max_ctx}"):
        found.check()


def test_weights_that_do_not_fit(q2):
    found = q2.fit(1024, 80 * GIB)
    assert (found.fits, found.max_ctx) == (False, 0)
    with pytest.raises(Ds4Error, match="no context fits"):
        found.check()


def test_everything_counts():
    found = Fit(1, 200, 1, 2, 4, 8, 16, 32, 64, 5)
    assert found.total_bytes == 127
    assert found.fits
    assert Fit(1, 126, 1, 2, 4, 8, 16, 32, 64, 5).fits is False
    in_file = Fit(1, 126, 1, 2, 4, 8, 16, 32, 64, 5, mapped=True)
    assert (in_file.total_bytes, in_file.fits) == (126, True)
    assert "weights" not in in_file.line()


def test_weights_are_those_on_the_device(demo):
    """The planner counts on the meta device; here the network is built as for a GPU, its memory counted for real."""
    model = Transformer(demo.config, DeviceParams(demo, "cpu"), resolve(None))
    planned = Planner(demo).fit(1024, GIB)
    assert planned.weights_bytes == sum(weight_storages(model).values())
    head = sum(n_bytes for name, _, _, n_bytes in demo.stored_groups() if name.startswith("mtp."))
    assert Planner(demo, n_toks=(1, 2)).fit(1024, GIB).weights_bytes == planned.weights_bytes + head
    assert planned.reserve_bytes == RESERVE_BYTES["cuda"]


@pytest.mark.parametrize("ctx", [1, 1000, 300_000])
def test_cache_is_what_a_session_allocates(demo, ctx):
    model = shape_model(demo)
    assert Planner(demo).fit(ctx, GIB).cache_bytes == model.new_cache(ctx, decoded=False).nbytes()
    cache = model.new_cache(ctx)
    decoded = sum(layer.ring_f32.nbytes for layer in cache.layers)
    assert Planner(demo, "cpu", sessions=3).fit(ctx, GIB).cache_bytes == 3 * (cache.nbytes() + decoded)


@pytest.mark.parametrize(("ctx", "counted"), [(100, 4096), (5000, 8192), (1 << 18, 1 << 18)])
def test_workspaces_are_those_of_the_lists(demo, ctx, counted):
    """Counted at a power of two; what a list of launches really has."""
    model = shape_model(demo)
    cache, n_toks = model.new_cache(counted), (1, 2, 8)
    steps = [DecodeStep(model, cache, n) for n in n_toks]
    real, launches = sum(step.workspace_bytes for step in steps), sum(len(step.calls) for step in steps)
    prompts = sum(PrefillPass(model, cache, n).workspace_bytes for n in CAPACITIES)
    for sessions in (1, 2):
        planned = Planner(demo, n_toks=n_toks, sessions=sessions).fit(ctx, GIB)
        assert planned.steps_bytes == sessions * real
        assert planned.prompts_bytes == sessions * prompts
        assert planned.graphs_bytes == sessions * launches * GRAPH_BYTES_PER_LAUNCH


def test_a_prompt_of_the_real_model_takes_less_than_2_gib():
    """Of all capacities together, and at the longest context not much more: scores are made for fewer tokens."""
    planner = Planner(without_file(FLASH, recipe("q2"), "q2"))
    short, longest = (planner.fit(ctx, 200 * GIB).prompts_bytes for ctx in (8192, 1 << 20))
    print(f"prompts: {short / GIB:.2f} GiB at 8192, {longest / GIB:.2f} GiB at 1M")
    assert GIB < short <= longest < 2 * GIB


def test_lists_of_the_real_model_from_one_layer_of_each_kind():
    """Layers that occur several times, all built: what one of each says."""
    checkpoint = without_file(shrunk(FLASH, 9, 256, 1), recipe("q2"), "q2")
    model = shape_model(checkpoint)
    step = DecodeStep(model, model.new_cache(4096), 1)
    one = Planner(checkpoint).fit(4096, GIB)
    assert one.steps_bytes == step.workspace_bytes
    assert one.graphs_bytes == len(step.calls) * GRAPH_BYTES_PER_LAUNCH


def test_formats_without_kernels_count_as_stored():
    checkpoint = without_file(small_config(), recipe("official-0731"), "small")
    found = Planner(checkpoint).fit(4096, GIB)
    assert found.steps_bytes == found.prompts_bytes == found.graphs_bytes == 0  # no kernel has these sizes
    assert found.weights_bytes > 0


def test_the_cpu_has_no_lists_and_maps_its_weights(demo):
    found = Planner(demo, "cpu").fit(1024, GIB)
    assert found.mapped
    assert found.steps_bytes == found.graphs_bytes == found.parts["weights"] == 0
    assert found.copies_bytes > 4 * 10**6  # FP32 forms of its matrices
    assert not Planner(demo, "cpu", in_file=False).fit(1024, GIB).mapped


def test_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(engine, "free_bytes", lambda device: 600 << 20)
    monkeypatch.setattr(engine, "Transformer", None)  # calling it would fail otherwise
    told = []
    with pytest.raises(Ds4Error, match=r"memory: .* are missing at a context of 1048576 tokens: .* --ctx \d+"):
        LLM(ctx=1 << 20, on_plan=told.append)
    assert (told[0].ctx, told[0].memory_bytes) == (1 << 20, 600 << 20)
    for command in (("generate", "hi"), ("chat",), ("bench",)):
        result = CliRunner().invoke(main, [*command, "--ctx", "1000000"])
        assert result.exit_code == 2, result.output
        assert result.stderr.splitlines()[-1].startswith("ds4: error: memory: ")


def test_free_memory_of_this_machine():
    assert 64 << 20 < free_bytes(torch.device("cpu")) < 1 << 50
