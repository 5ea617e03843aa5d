"""A run of ``ds4 bench`` as one JSON-able record: what was asked for, on which machine, and what came out.

benchmarks/schema/bench.schema.json describes it; ``csv_text`` gives its figures, one row a frontier.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ds4.bench.energy import meter_for
from ds4.bench.figures import Decode, Frontier
from ds4.bench.machine import describe
from ds4.bench.prompts import Prompt
from ds4.bench.synthetic import Synthetic
from ds4.bench.walk import Plan, frontiers, warm_up
from ds4.errors import Ds4Error
from ds4.model.steps import DecodeStep
from ds4.profiling.host import copy_speed
from ds4.profiling.plan import plan_record, plan_step
from ds4.profiling.shapes import shape_model
from ds4.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from ds4.engine import LLM

SCHEMA = 1
Progress = Callable[[int, int], None]


def measure(
    llm: LLM,
    plan: Plan,
    *,
    synthetic: Synthetic | None = None,
    progress: Progress | None = None,
    breakdown: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Run everything. ``progress(tokens done, tokens in all)``; ``breakdown(copy)`` measures the parts of a step.

    Raises Ds4Error for a text that the model has no tokenizer for, and where drafts change the tokens.
    """
    copy, meter = copy_bandwidth(llm), meter_for(llm.device)
    moved = step_bytes(llm.checkpoint, plan)
    total, done = len(plan.prompts) * plan.work, 0

    def count(n: int) -> None:
        nonlocal done
        done += n
        if progress is not None:
            progress(done, total)

    rows: list[dict[str, Any]] = []
    for kind in plan.prompts:
        text = Prompt(llm, kind, plan.ctx)
        warm_up(llm, plan, text)
        for found in frontiers(llm, plan, text, meter, count):
            rows.append(row(found, moved[found.ctx]["step"] if moved else None, copy["copy_gb_s"]))
    parts = breakdown(copy) if breakdown is not None else None
    return {
        "schema": SCHEMA,
        "machine": describe(llm.device),
        "model": model_facts(llm),
        "settings": {
            "frontiers": list(plan.frontiers),
            "prompts": list(plan.prompts),
            **{name: getattr(plan, name) for name in ("tokens", "repeats", "chunk", "draft", "accept")},
        },
        "synthetic": asdict(synthetic) | {"layers": llm.config.num_hidden_layers} if synthetic else None,
        "memory": llm.memory.to_dict(),
        "copy": copy,
        "energy_source": meter.source,
        "rows": rows,
        "bytes_per_token": moved[plan.frontiers[0]] if moved else None,
        "breakdown": parts,
        "extrapolation": extrapolation(synthetic.checkpoint(), moved, rows, parts, plan) if synthetic else None,
    }


HEAD = {"head", "embed", "hc_head", "lm_head"}  # parts of a breakdown that lie outside the layers


def extrapolation(
    whole: Checkpoint,
    moved: Mapping[int, Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    parts: Mapping[str, Any] | None,
    plan: Plan,
) -> dict[str, Any] | None:
    """What all layers would give: the share of time outside the layers (of the breakdown) stays, the rest grows as the
    bytes of the layers do. None where all layers were there, or where either is not known."""
    full = step_bytes(whole, plan)
    if parts is None or not moved or moved[plan.frontiers[0]]["step"] == full[plan.frontiers[0]]["step"]:
        return None
    outside = sum(part["us"] for part in parts["parts"] if part["name"] in HEAD) / parts["step_us"]
    found = []
    for one in rows:
        growth = layer_bytes(full[one["ctx"]]) / layer_bytes(moved[one["ctx"]])
        rate = one["plain"]["tokens_per_second"]["median"] / (outside + (1 - outside) * growth)
        n_bytes = full[one["ctx"]]["step"]["bytes"]
        found.append({"prompt": one["prompt"], "ctx": one["ctx"], "bytes": n_bytes, "tokens_per_second": rate})
    layers = [sum(row["layers"] for row in one[plan.frontiers[0]]["layers"]) for one in (moved, full)]
    return {"layers": layers[0], "of": layers[1], "outside_percent": 100 * outside, "rows": found}


def layer_bytes(record: Mapping[str, Any]) -> int:
    """Bytes of a ``plan_record``'s step that belong to layers."""
    return sum(row["bytes"] for row in record["layers"] if row["layers"])


def copy_bandwidth(llm: LLM) -> dict[str, Any]:
    """What figures are percentages of: the GPU's, or the CPU's with torch's threads."""
    if llm.backend is None:
        return copy_speed()
    from ds4.kernels.bandwidth import measure as measure_gpu
    from ds4.kernels.cuda_backend import CudaBackend

    assert isinstance(llm.backend, CudaBackend)
    return measure_gpu(llm.backend, llm.model.device)


def step_bytes(checkpoint: Checkpoint, plan: Plan) -> dict[int, dict[str, Any]]:
    """The plan (ds4.profiling.plan) of a step of one token at every frontier; empty where there are no kernels.

    It counts packed weights and rows on the CPU too, though the references there compute with FP32 copies.
    """
    try:
        model = shape_model(checkpoint)
        cache = model.new_cache(plan.ctx)
        step = DecodeStep(model, cache, 1)
    except (Ds4Error, ValueError):
        return {}
    return {ctx: plan_record(plan_step(model, cache, step, checkpoint, ctx)) for ctx in plan.frontiers}


def model_facts(llm: LLM) -> dict[str, Any]:
    """Which model it was, and where it ran."""
    return {
        "path": str(llm.path),
        "weights_bytes": llm.checkpoint.total_bytes,
        "layers": llm.config.num_hidden_layers,
        "experts": llm.config.n_routed_experts,
        "hidden_size": llm.config.hidden_size,
        "device": llm.device,
        "draft_head": llm.config.n_mtp_layers > 0,
    }


def row(found: Frontier, moved: Mapping[str, Any] | None, copy_gb_s: float) -> dict[str, Any]:
    """One frontier. ``moved``: the sums of a step's plan."""
    made = {"prompt": found.prompt, "ctx": found.ctx, "prefill": asdict(found.prefill)}
    made |= {"plain": _decode(found.plain), "draft": _decode(found.draft) if found.draft else None}
    made["speedup"] = _rate(found.draft) / _rate(found.plain) if found.draft else None
    made["roofline"] = None
    if moved is not None:
        gb_s = moved["bytes"] * _rate(found.plain) / 1e9
        made["roofline"] = {
            **{name: moved[name] for name in ("weight_bytes", "cache_bytes", "activation_bytes", "bytes")},
            "tokens_per_second": copy_gb_s * 1e9 / moved["bytes"],
            "gb_s": gb_s,
            "percent": 100 * gb_s / copy_gb_s,
        }
    return made


def _rate(one: Decode) -> float:
    return one.tokens_per_second.median


def _decode(one: Decode) -> dict[str, Any]:
    return asdict(one) | {"tokens_per_step": one.tokens_per_step}


CSV_COLUMNS = (
    ("prompt", "prompt"),
    ("ctx", "ctx"),
    *(
        (f"{way}_{name}", f"{way}.tokens_per_second.{name}")
        for way in ("prefill", "plain", "draft")
        for name in ("median", "min", "max")
    ),
    ("speedup", "speedup"),
    ("tokens_per_step", "draft.tokens_per_step"),
    ("drafted", "draft.drafted"),
    ("accepted", "draft.accepted"),
    ("bytes_per_token", "roofline.bytes"),
    ("gb_s", "roofline.gb_s"),
    ("percent_of_roofline", "roofline.percent"),
    ("joules_per_token", "plain.joules_per_token"),
)


def csv_text(record: Mapping[str, Any]) -> str:
    """The rows as comma-separated values, tokens/s in columns; empty where a figure does not exist."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(name for name, _ in CSV_COLUMNS)
    for one in record["rows"]:
        writer.writerow(_at(one, path) for _, path in CSV_COLUMNS)
    return out.getvalue()


def _at(one: Any, path: str) -> Any:
    """The value behind a path of keys; empty where there is none on the way."""
    for key in path.split("."):
        if one is None:
            return ""
        one = one[key]
    return "" if one is None else one
