"""scripts/bench_moe.py without a GPU: its bytes, experts, memory and table; its launches on the emulation."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import bench_moe
import gpu_check
import gpu_stages
import moe_layers
from cuemu.backend import CpuBackend, missing
from moe_layers import MIXTURES, Plan
from test_gpu_check import Event, Graph

from ds4.errors import Ds4Error
from ds4.kernels.moe.op import MOE_DOWN, MOE_UP
from ds4.kernels.packing import PACKINGS, Planes

CPU = torch.device("cpu")
TINY = Plan(d=64, inter=32, top_k=2, layers=2, experts=6, n_toks=(1, 2), turns=3, repeats=2)
# Rows of w1 or w3 have 64 codes and 4 bytes of scales, rows of w2 32 and 2: codes take 64 bytes, a chunk, scales 16.
UP, DOWN = 2 * 32 * (64 + 16), 64 * (64 + 16)
SHARED_UP, SHARED_DOWN = 2 * 32 * (64 + 16), 64 * (32 + 16)  # a byte a weight, and 2 or 1 scales of two
GB = 10**9
needs_emulation = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture
def no_cuda(monkeypatch):
    """The emulation in the GPU's place, with a clock that says 1 ms for every replay."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (1 << 30, 1 << 30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(bench_moe, "CudaGraph", Graph)
    monkeypatch.setattr(bench_moe, "flush_buffer", lambda l2, device: torch.ones(1))
    backend = CpuBackend()
    object.__setattr__(backend, "facts", SimpleNamespace(l2=1 << 10))
    return backend


@needs_emulation
def test_rows_of_a_tiny_layer(no_cuda):
    rows = bench_moe.measure("nvfp4", TINY, no_cuda, CPU, copy_gb_s=2.0)
    keys = [(row["n_tok"], row["routing"], row["part"]) for row in rows]
    wanted = [(1, "uniform"), (2, "uniform"), (2, "same")]
    assert keys == [(*one, part) for one in wanted for part in ("up", "down", "up+down")]
    for row in rows:
        assert (row["layers"], row["experts"], row["note"]) == (2, 6, "")
        assert (row["launches"], row["repeats"], row["spread_percent"]) == (6, 2, 0)  # 3 turns through 2 layers
        assert row["us"] == pytest.approx(1e3 / 6)
        assert row["percent_of_copy"] == pytest.approx(100 * row["bytes"] * 6 / 1e-3 / 2e9)
        assert row["time_ratio"] == pytest.approx(1)
        assert set(row["errors"]) == {"mid", "y"}
        assert 0 < max(row["errors"].values()) < 1e-5
    by_key = dict(zip(keys, rows, strict=True))
    # x, ids and weights, mid; mid, ids, y
    one_up, one_down = 4 * (64 + 2 * 2 + 3 * 32), 4 * (3 * 32 + 2 + 64)
    for key, n in (((1, "uniform"), 1), ((2, "same"), 2)):  # two experts, whatever the routing says
        assert by_key[*key, "up"]["distinct_experts"] == 2
        assert by_key[*key, "up"]["bytes"] == 2 * UP + SHARED_UP + n * one_up
        assert by_key[*key, "down"]["bytes"] == 2 * DOWN + SHARED_DOWN + n * one_down
    both = by_key[2, "uniform", "up+down"]
    assert 2 < both["distinct_experts"] <= 4
    expert = UP + DOWN
    assert both["bytes"] == pytest.approx(
        both["distinct_experts"] * expert + SHARED_UP + SHARED_DOWN + 2 * (one_up + one_down)
    )
    first = by_key[1, "uniform", "up+down"]
    assert both["byte_ratio"] == pytest.approx(both["bytes"] / first["bytes"])
    assert bench_moe.table(rows).count("nvfp4 ") == len(rows)


@needs_emulation
def test_launches_go_through_layers_and_compute_the_layer(no_cuda):
    bench = bench_moe.Bench("nvfp4", TINY, 2, 6, CPU)
    calls, distinct = bench.launches("up+down", "uniform", 2)
    assert len(calls) == 2 * len(distinct) == 12
    weights = [layer["w1_codes"].data_ptr() for layer in bench.layers]
    used = [{t.data_ptr() for t in call.args.tensors} & set(weights) for call in calls[::2]]
    assert used == [{pointer} for pointer in weights * 3]
    assert {(call.entry, call.constants) for call in calls} <= set(TINY.kernels("nvfp4"))
    ids = [next(t for t in call.args.tensors if t.shape == (2, 2) and t.dtype == torch.int32) for call in calls]
    assert [one.unique().numel() for one in ids[::2]] == distinct
    assert all(torch.equal(a, b) for a, b in zip(ids[::2], ids[1::2], strict=True))
    no_cuda.run(calls)
    inputs, outputs = bench.activations(2)
    last = {**bench.layers[1], **inputs, "ids": ids[-1]}
    mid = MOE_UP.reference(last)["mid"]
    torch.testing.assert_close(outputs["mid"], mid, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs["y"], MOE_DOWN.reference(last | {"mid": mid})["y"], rtol=1e-4, atol=1e-4)


@needs_emulation
def test_a_result_that_is_not_finite_is_no_figure(no_cuda):
    bench = bench_moe.Bench("nvfp4", TINY, 1, 6, CPU)
    bench.layers[0]["w2_scale"].fill_(torch.inf)
    with pytest.raises(Ds4Error, match="moe down: a result for 1 tokens is not finite"):
        list(bench.prepare(no_cuda))


@needs_emulation
@pytest.mark.parametrize(("name", "factor"), [("mid", 1.001), ("y", 1.001), ("y", float("nan"))])
def test_wrong_results_are_no_figures(no_cuda, name, factor):
    bench = bench_moe.Bench("nvfp4", TINY, 1, 6, CPU)

    class Wrong:
        def run(self, calls):
            no_cuda.run(calls)
            bench.activations(2)[1][name].mul_(factor)

    with pytest.raises(Ds4Error, match=rf"moe: {name} of 2 tokens has a relative RMS error of (1\.0e-03|nan)"):
        bench.check(Wrong())


def test_bytes_at_real_dimensions():
    """Six experts' gate and up in NVFP4 are 56.6 MB (spec kernels.md b.8), and Q8_0 has 34 bytes for 32 weights."""
    plan = Plan()
    shared = 2 * 2048 * 4096 * 34 / 32
    assert plan.weight_bytes("nvfp4", "up", 6) == 56_623_104 + shared
    assert plan.weight_bytes("nvfp4", "up+down", 6) == 1.5 * (56_623_104 + shared)
    assert plan.weight_bytes("iq2_xxs", "up", 1) - shared == 2 * 2048 * 4096 * 66 / 256
    assert plan.activation_bytes("down", 2) == 2 * 4 * (7 * 2048 + 6 + 4096)


def test_what_fits_the_memory():
    plan = Plan()
    layer = plan.weight_bytes("nvfp4", "up+down", 256)
    assert moe_layers.resident("nvfp4", plan, 100 * GB, 1 << 20) == (3, 256, "")
    down = plan.weight_bytes("nvfp4", "down", 6)
    layers, experts, note = moe_layers.resident("nvfp4", plan, 100 * GB, 100 << 20)
    assert (experts, note) == (256, "")
    assert (layers - 1) * down < 2 * (100 << 20) <= layers * down
    two = int(2.1 * layer / moe_layers.MEMORY)
    assert moe_layers.resident("nvfp4", plan, two, 1) == (2, 256, "2 of 3 layers: no memory for more")
    layers, experts, note = moe_layers.resident("nvfp4", plan, two // 4, 1)
    assert (layers, note) == (1, f"1 of 3 layers, {experts} of 256 experts: no memory for more")
    assert plan.weight_bytes("nvfp4", "up+down", experts) <= moe_layers.MEMORY * (two // 4)
    assert 125 < experts < 140
    with pytest.raises(Ds4Error, match=r"bf16: 0\.1 GB of free memory are too few for 6 experts"):
        moe_layers.resident("bf16", plan, GB // 10, 1)


@pytest.mark.parametrize("routing", moe_layers.ROUTINGS)
def test_routing(routing):
    rng = torch.Generator().manual_seed(3)
    draws = [moe_layers.random_ids(rng, routing, 4, 6, 256) for _ in range(64)]
    assert all(row.unique().numel() == 6 for ids in draws for row in ids)
    assert all(ids.dtype == torch.int32 and ids.min() >= 0 and ids.max() < 256 for ids in draws)
    distinct = sum(ids.unique().numel() for ids in draws) / 64
    expected = 256 * (1 - (1 - 6 / 256) ** 4)
    if routing == "same":
        assert distinct == 6
        assert not torch.equal(draws[0][0], draws[0][1])  # ranks of their own
    elif routing == "uniform":
        assert distinct == pytest.approx(expected, abs=0.5)
    else:
        assert 12 < distinct < expected - 0.3


@pytest.mark.parametrize("fmt", sorted({fmt for formats in MIXTURES.values() for fmt in formats}))
def test_random_weights_have_all_experts_and_no_special_values(fmt, monkeypatch):
    monkeypatch.setattr(moe_layers, "_TILE", 2 * 128 * 256)  # two experts at a time, of five
    found = moe_layers.random_matrix(torch.Generator().manual_seed(0), "w1", fmt, (128, 256), 5)
    assert (found["w1_format"], found["w1_scale"].shape) == (fmt, (5,))
    tensors = {plane.name: found[f"w1_{plane.name}"] for plane in PACKINGS[fmt].planes}
    experts = Planes(PACKINGS[fmt], 5 * 128, 256, tensors).decode().view(5, 128, 256)
    assert experts.isfinite().all()
    spreads = experts.square().mean((1, 2)).sqrt() * found["w1_scale"] * 256**0.5
    assert ((spreads > 0.5) & (spreads < 2)).all()
    assert len({tuple(expert[0, :8].tolist()) for expert in experts}) == 5


def test_command_without_a_gpu(monkeypatch, capsys):
    def refuse():
        raise Ds4Error("no GPU")

    monkeypatch.setattr(bench_moe, "open_gpu", refuse)
    assert bench_moe.main([]) == 2
    assert capsys.readouterr() == ("", "bench_moe: no GPU\n")


@needs_emulation
def test_command(no_cuda, monkeypatch, tmp_path, capsys):
    compiled: list[tuple] = []
    monkeypatch.setattr(bench_moe, "open_gpu", lambda: (no_cuda, CPU))
    monkeypatch.setattr(bench_moe, "measure_copy", lambda backend, device: {"copy_gb_s": 2.0})
    monkeypatch.setattr(bench_moe, "compile_many", compiled.extend)
    monkeypatch.setattr(bench_moe, "Plan", lambda **given: replace(TINY, **given))
    object.__setattr__(no_cuda, "facts", SimpleNamespace(l2=1 << 10, architecture="sm_90a"))
    options = ["--formats", "nvfp4", "--n-tok", "2", "--routings", "skewed", "--layers", "1", "--experts", "4"]
    assert bench_moe.main([*options, "--json", str(tmp_path / "rows.json")]) == 0
    printed = capsys.readouterr().out
    assert "nvfp4: 1 layers of 4 experts, relative errors: mid " in printed
    assert printed.endswith("copy 2.0 GB/s\n")
    assert '"time_ratio": null' in (tmp_path / "rows.json").read_text()
    assert [(entry.name, architecture) for entry, _, architecture in compiled] == [
        ("moe_up", "sm_90a"),
        ("moe_down", "sm_90a"),
    ]


@pytest.mark.parametrize("options", [["--formats", "nvfp5"], ["--n-tok", "9"], ["--experts", "5"], ["--layers", "0"]])
def test_options_that_make_no_sense(options, capsys):
    with pytest.raises(SystemExit):
        bench_moe.parse(options)
    assert options[0] in capsys.readouterr().err


def test_stage(monkeypatch):
    """One mixture with --quick; nothing begins where the time is short; the rows get into the results."""
    row = {"format": "nvfp4", "note": "", "layers": 3, "experts": 16}
    monkeypatch.setattr(gpu_stages, "device_facts", lambda index: SimpleNamespace(architecture="sm_90a"))
    monkeypatch.setattr(gpu_stages, "backend", lambda synchronous: None)
    monkeypatch.setattr(gpu_stages, "copy_bandwidth", lambda: {"copy_gb_s": 2.0})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(bench_moe, "compile_many", lambda jobs: (f"{len(jobs)} cubins", None))
    monkeypatch.setattr(bench_moe, "measure", lambda mixture, plan, *others: [row])
    monkeypatch.setattr(bench_moe, "table", lambda rows: "the table\nits last line")
    outcomes = []
    for end in (float("inf"), 0.0):
        items = list(gpu_stages.moe_items(gpu_stages.Options(gpu=True, quick=True, end=end)))
        outcomes.append([gpu_stages.outcome(item)[0] for item in items])
    assert [(one["item"], one["status"]) for one in outcomes[0]] == [("compile: moe", "ok"), ("moe: nvfp4", "ok")]
    assert [one["text"] for one in outcomes[0]] == ["4 cubins", "its last line"]
    assert outcomes[1][1]["status"] == "skipped"
    found = gpu_check.figures([gpu_check.Outcome("moe", 1.0, outcomes[0])])
    assert (found["moe"], found["kernels"]) == ([row], [])
    full = list(gpu_stages.moe_items(gpu_stages.Options(gpu=True, quick=False)))
    assert [item.name for item in full] == ["compile: moe", *(f"moe: {mixture}" for mixture in MIXTURES)]


def test_the_benchmark_of_all_operations_leaves_the_experts_to_the_stage():
    names = [item.name for item in gpu_stages.bench_items(gpu_stages.Options(gpu=True, quick=False))]
    assert "bench: route" in names
    assert not {"bench: moe_up", "bench: moe_down"} & set(names)
