"""The plan and the dispatch table of real step lists, on torch's meta device: launches, bytes, order."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds4.cli_bench import plan
from ds4.demo import bundled_model_path
from ds4.kernels.packing import packing_of
from ds4.model.steps import DecodeStep
from ds4.profiling import tables
from ds4.profiling.dispatch import dispatch_record, kernels_of, planned
from ds4.profiling.plan import StepPlan, in_order, plan_record, plan_step
from ds4.profiling.shapes import shape_model
from ds4.profiling.traffic import Where, expected_distinct, part_traffic
from ds4.weights import open_checkpoint
from ds4.weights.describe import describe

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import fabricate


@pytest.fixture(scope="module")
def demo():
    """The bundled model's shapes: checkpoint, model, a cache of 4096 tokens, and a step for 1, 2 and 8 tokens."""
    checkpoint = open_checkpoint(bundled_model_path())
    model = shape_model(checkpoint)
    cache = model.new_cache(4096)
    steps = {n: DecodeStep(model, cache, n) for n in (1, 2, 8)}
    return SimpleNamespace(checkpoint=checkpoint, model=model, cache=cache, steps=steps)


def plan_at(demo, n_tok: int, position: int) -> StepPlan:
    return plan_step(demo.model, demo.cache, demo.steps[n_tok], demo.checkpoint, position)


def cache_bytes(demo, operation: str, kind: str, n_tok: int, position: int) -> float:
    """Of the only layer of this kind that the bundled model has."""
    (part,) = (p for p in plan_at(demo, n_tok, position).parts if p.kind == kind and p.operation.startswith(operation))
    return part.traffic.cache


def test_expected_number_of_distinct_experts():
    pairs = list(itertools.combinations(range(4), 2))
    unions = [len({*a, *b}) for a, b in itertools.product(pairs, pairs)]
    assert expected_distinct(4, 2, 2) == pytest.approx(sum(unions) / len(unions))
    assert expected_distinct(256, 6, 1) == pytest.approx(6)
    assert expected_distinct(256, 6, 2) == pytest.approx(11.86, abs=0.005)  # spec kernels.md a.2


def test_plan_has_every_launch_and_sums_to_the_step(demo):
    record = plan_record(plan_at(demo, 1, 100))
    for what in ("calls", "launches", "weight_bytes", "floor_bytes", "cache_bytes", "activation_bytes", "bytes"):
        for rows in (record["operations"], record["layers"]):
            # each row is rounded to bytes by itself
            assert sum(row[what] for row in rows) == pytest.approx(record["step"][what], abs=len(rows)), what
    assert record["step"]["launches"] == len(demo.steps[1].calls)
    assert record["step"]["calls"] == len(demo.steps[1].parts)
    names = [row["operation"] for row in record["operations"]]
    assert names.index("proj_in") < names.index("kv_publish_hca") < names.index("proj_q") < names.index("attn_decode")
    assert (names[0], names[-1]) == ("embed", "lm_head")
    assert {row["kind"]: row["layers"] for row in record["layers"]} == {"-": 0, "swa": 1, "csa": 1, "hca": 1}


def test_floor_of_one_token_is_what_inspect_says(demo):
    total = describe(demo.checkpoint, tensors=False)["bytes_per_token"]["total"]
    assert plan_record(plan_at(demo, 1, 0))["step"]["floor_bytes"] == pytest.approx(total, abs=20)


def test_weight_bytes_are_the_planes(demo):
    def planes(name: str) -> int:
        tensor = demo.checkpoint.tensor(name)
        return packing_of(tensor).nbytes(*tensor.shape)

    config, found = demo.checkpoint.config, plan_at(demo, 1, 0)
    rows = {(part.operation, part.layer): found.weight_bytes(part) for part in found.parts}
    assert rows["lm_head", None] == planes("head.weight")
    assert rows["proj_oa", 1] == planes("layers.1.attn.wo_a.weight")
    index = [planes(f"layers.1.attn.{name}.weight") for name in ("wq_b", "indexer.wq_b")]
    assert rows["proj_q", 1] == sum(index)
    up = [planes(f"layers.2.ffn.experts.3.{w}.weight") for w in ("w1", "w3")]
    shared = [planes(f"layers.2.ffn.shared_experts.{w}.weight") for w in ("w1", "w3")]
    assert rows["moe_up", 2] == pytest.approx(config.num_experts_per_tok * sum(up) + sum(shared))
    gate = {part.layer: found.weight_bytes(part) for part in found.parts if part.operation == "route"}
    hashed = config.num_experts_per_tok * config.hidden_size * 4  # rows of the gate, where the table picks
    assert gate[0] == pytest.approx(hashed + config.num_experts_per_tok * 4)  # and the table's row
    assert gate[2] >= config.n_routed_experts * config.hidden_size * 4


def test_more_tokens_read_more_experts_and_nothing_else_twice(demo):
    one, eight = ({(p.operation, p.layer): (p, f) for p in f.parts} for f in (plan_at(demo, 1, 0), plan_at(demo, 8, 0)))
    config = demo.checkpoint.config
    distinct = expected_distinct(config.n_routed_experts, config.num_experts_per_tok, 8)
    for place in (("moe_down", 2), ("moe_up", 1)):
        part, found = eight[place]
        before = one[place][0].traffic
        assert (part.traffic.fixed, part.traffic.expert) == (before.fixed, before.expert)
        assert found.weight_bytes(part) == pytest.approx(part.traffic.fixed + distinct * part.traffic.expert)
    for place in (("proj_in", 1), ("lm_head", None), ("kv_publish_csa", 1)):
        assert eight[place][1].weight_bytes(eight[place][0]) == one[place][1].weight_bytes(one[place][0])


ROW, KEY = 584, 68


@pytest.mark.parametrize(
    ("n_tok", "position", "rows"), [(1, 0, 1), (1, 5, 6), (8, 5, 13), (1, 500, 128), (8, 500, 135)]
)
def test_window_rows(demo, n_tok, position, rows):
    assert demo.checkpoint.config.sliding_window == 128
    assert cache_bytes(demo, "attn_decode", "swa", n_tok, position) == rows * ROW


@pytest.mark.parametrize(("n_tok", "position", "entries"), [(1, 126, 0), (1, 127, 1), (2, 126, 1), (1, 1000, 7)])
def test_rows_of_the_pool(demo, n_tok, position, entries):
    window = min(position + n_tok, 128 + n_tok - 1)
    assert cache_bytes(demo, "attn_decode", "hca", n_tok, position) == (window + entries) * ROW


def test_selected_rows_and_scored_keys(demo):
    top_k = demo.checkpoint.config.index_topk
    few, many = 4 * top_k - 1, 4 * top_k + 3  # the last positions with top_k and with top_k + 1 visible entries
    assert cache_bytes(demo, "attn_decode", "csa", 1, few) == (128 + top_k) * ROW
    assert cache_bytes(demo, "attn_decode", "csa", 1, many) == (128 + top_k) * ROW
    assert cache_bytes(demo, "attn_decode", "csa", 2, 4000) == (129 + min(1000, 2 * top_k)) * ROW
    assert cache_bytes(demo, "index_score", "csa", 1, few) == 0  # all are selected: none is scored
    assert cache_bytes(demo, "index_score", "csa", 1, many) == (top_k + 1) * KEY


@pytest.mark.parametrize(("n_tok", "position", "closed"), [(1, 2, 0), (1, 3, 1), (8, 0, 2), (8, 3, 2)])
def test_published_bytes(demo, n_tok, position, closed):
    raw = n_tok * (ROW + 2 * 4 * (1024 + 256))
    emitted = closed * (8 * 2 * 4 * (512 + 128) + ROW + KEY)  # two windows of 4, of each row one half
    assert cache_bytes(demo, "kv_publish", "csa", n_tok, position) == raw + emitted


def test_published_bytes_of_a_long_window(demo):
    at = {position: cache_bytes(demo, "kv_publish", "hca", 1, position) for position in (126, 127)}
    assert at[127] - at[126] == 128 * 2 * 4 * 512 + ROW


def test_activations(demo):
    """Results once written and, where a later operation takes them, once read; no workspaces."""
    config, n = demo.checkpoint.config, 2
    found = {(p.operation, p.layer): p.traffic.activations for p in plan_at(demo, n, 1000).parts}
    heads, width = config.num_attention_heads, config.head_dim
    cis, selected = 4 * n * config.qk_rope_head_dim, 4 * n * config.index_topk
    assert found["attn_decode", 1] == 4 * n * 2 * heads * width + cis + selected  # q and o
    chosen = 2 * 4 * n * config.num_experts_per_tok  # ids and weights
    assert found["route", 1] == 4 * n * config.hidden_size + chosen
    mid = 4 * n * (config.num_experts_per_tok + 1) * config.moe_intermediate_size
    assert found["moe_up", 1] == 4 * n * config.hidden_size + chosen + mid
    scores = 4 * n * (1002 // 4)  # as many as there are keys, not as the cache has room for
    assert found["index_topk", 1] == scores + selected


def test_a_weight_that_two_operations_read_counts_twice():
    def part(given: torch.Tensor, made: torch.Tensor) -> Any:
        operation = SimpleNamespace(name="toy", outputs=lambda inputs: {"y": made}, workspaces=())
        call = SimpleNamespace(args=SimpleNamespace(tensors=(given, made)))
        return SimpleNamespace(operation=operation, layer=None, inputs={"w": given, "scale": 1.0}, calls=[call])

    weight, first, second, third = (torch.empty(n, device="meta") for n in (10, 1, 2, 3))
    parts = [part(weight, first), part(weight[:5], second), part(first, third)]
    model: Any = SimpleNamespace(config=SimpleNamespace(num_experts_per_tok=1))
    cache: Any = SimpleNamespace(layers=[])
    found = list(part_traffic(model, cache, parts, Where(1, 0)))
    assert [(one.fixed, one.activations) for one in found] == [(40, 4), (20, 8), (0, 4 + 12)]


def test_positions_outside_the_cache(demo):
    assert plan_at(demo, 8, 4088).position == 4088
    with pytest.raises(ValueError, match="tokens 4089 to 4096 do not fit a context of 4096"):
        plan_at(demo, 8, 4089)


def test_shapes_need_no_memory(demo):
    tensors = [tensor for call in demo.steps[2].calls for tensor in call.args.tensors]
    assert tensors
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_order_of_operations():
    parts = [("a", None), ("p", 0), ("x", 0), ("z", 0), ("p", 1), ("y", 1), ("z", 1), ("end", None)]
    order = in_order(parts)
    assert sorted(order) == ["a", "end", "p", "x", "y", "z"]
    assert (order[:2], order[-2:]) == (["a", "p"], ["z", "end"])


def test_full_size_plan(tmp_path):
    """The 81 GB recipe from its header: spec kernels.md a.2 says 9.55 GB a token, a.4 at most 16 edges a layer."""
    checkpoint = open_checkpoint(fabricate.write_gguf(tmp_path / "q2.gguf", fabricate.GGUF_RECIPES["q2"]))
    record = plan(checkpoint, 1, 32768)
    step = record["step"]
    assert step["weight_bytes"] == pytest.approx(9.55e9, rel=2e-3)
    assert step["floor_bytes"] == pytest.approx(step["weight_bytes"], rel=1e-3)
    # a.3: 12.5 MB of rows and, as FP4, 11.7 MB of keys
    cache = {row["operation"]: row["cache_bytes"] for row in record["operations"]}
    assert cache["attn_decode"] == pytest.approx(12.5e6, rel=0.02)
    assert cache["index_score"] == pytest.approx(11.7e6, rel=0.02)
    assert [(row["kind"], row["layers"]) for row in record["layers"]] == [
        ("-", 0),
        ("swa", 2),
        ("csa", 21),
        ("hca", 20),
    ]
    assert all(row["launches_each"] <= 16 for row in record["layers"])


# Dispatch


def test_planned_dispatch(demo):
    mix = {1: 256, 2: 64}
    steps = {n: demo.steps[n] for n in mix}
    record = dispatch_record(steps, mix, planned(steps, mix))
    assert record["steps"] == {"1": 256, "2": 64}
    totals = {n: sum(row["launches"].get(n, 0) for row in record["rows"]) for n in ("1", "2")}
    assert totals == {str(n): mix[n] * len(steps[n].calls) for n in mix}
    up = [row for row in record["rows"] if row["operation"] == "moe_up"]
    assert [("N_TOK=1" in row["constants"], row["launches"]) for row in up] == [(True, {"1": 768}), (False, {"2": 192})]
    kernels = {one["operation"]: one["kernels"] for one in record["operations"]}
    assert kernels["moe_up"] == {"1": "own", "2": "own"}
    text = tables.dispatch_text(record)
    assert max(map(len, text.splitlines())) <= 60
    shared = [row for row in record["rows"] if len(row["launches"]) == 2]
    for row in shared:
        assert kernels[row["operation"]] == {"1": "shared", "2": "shared"}
    assert "n_tok = 2: always kernels that no other n_tok hits:" in text


def served(operation: str, entry: str, constants: str, **launches: int) -> dict[str, Any]:
    by_n_tok = {n.removeprefix("n"): count for n, count in launches.items()}
    return {"operation": operation, "entry": entry, "file": "x.cu", "constants": constants, "launches": by_n_tok}


def test_kernels_that_only_some_launches_share():
    rows = [served("a", "k", "N_TOK=1", n1=5), served("a", "all", "", n1=5, n2=2), served("a", "k", "N_TOK=2", n2=2)]
    rows += [served("b", "one", "", n1=7)]
    assert kernels_of("a", rows, ["1", "2"]) == {"1": "shared", "2": "shared"}
    assert kernels_of("a", rows[::2], ["1", "2"]) == {"1": "own", "2": "own"}
    assert kernels_of("b", rows, ["1", "2"]) == {"1": "own"}


def test_kernels_are_told_apart_by_what_differs():
    rows = [
        served("a", "attend", "HEADS=64 RATIO=0", n1=2),
        served("a", "attend", "HEADS=64 RATIO=4", n1=3, n2=1),
        served("a", "merge", "HEADS=64 N_TOK=1 W_FORMAT=q8_0", n1=4),
    ]
    operations = [{"operation": "a", "kernels": {"1": "shared", "2": "shared"}}]
    text = tables.dispatch_text({"steps": {"1": 1, "2": 1}, "rows": rows, "operations": operations})
    assert [line.split() for line in text.splitlines()[3:7]] == [
        ["a"],
        ["attend", "RATIO=0", "2", "never"],
        ["attend", "RATIO=4", "3", "1"],
        ["merge", "N_TOK=1", "W_FORMAT=q8_0", "4", "never"],
    ]
