"""Times of a warm decode step, operation by operation and uninterrupted, and the tables that follow from them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ds4.kernels.entry import Backend, KernelCall
from ds4.model.steps import DecodeStep
from ds4.profiling.clock import Clock, TimedBackend
from ds4.profiling.plan import SCHEMA, PlannedPart, StepPlan

WARM_UP = 3  # steps that do not count: the first one compiles and loads kernels
ROUTED = "moe_up"  # its input ids i32 [n_tok, top_k] are the chosen experts


@dataclass
class Recording:
    """What was measured of steps of ``n_tok`` tokens; a list with one element a step each, times in seconds.

    parts     times of the operations, in the order of the step, each alone: nothing overlaps with what is before it
    eager     the step uninterrupted, launched from the host
    graph     the step uninterrupted, replayed as a CUDA graph; empty where that was not measured
    distinct  layer -> distinct routed experts
    """

    n_tok: int
    parts: list[list[float]] = field(default_factory=list)
    eager: list[float] = field(default_factory=list)
    graph: list[float] = field(default_factory=list)
    distinct: list[dict[int, int]] = field(default_factory=list)


def distinct_experts(ids: Tensor) -> int:
    """How many different experts i32 [n_tok, top_k] has."""
    return ids.unique().numel()


class StepTimer:
    """Times one decode step's operations, and records them with the experts they used."""

    def __init__(self, step: DecodeStep, backend: Backend, clock: Clock) -> None:
        routed = {i: part for i, part in enumerate(step.parts) if part.operation.name == ROUTED}
        self._layers = {i: part.layer for i, part in routed.items()}
        self._step = step
        kept = {i: part.inputs["ids"] for i, part in routed.items()}
        self._timed = TimedBackend(backend, clock, [part.calls for part in step.parts], kept)

    def run(self, ids: Sequence[int], start: int, into: Recording | None) -> None:
        """Run the step on tokens ``ids`` at ``start ..`` and add what it took to ``into``."""
        self._step.run(ids, start, self._timed)
        if into is not None:
            into.parts.append(self._timed.seconds())
            copies = self._timed.copies
            into.distinct.append({layer or 0: distinct_experts(copies[i]) for i, layer in self._layers.items()})


def record_steps(
    step: DecodeStep,
    ids: Sequence[int],
    start: int,
    backend: Backend,
    clock: Clock,
    graph: Callable[[Backend, Sequence[KernelCall]], Backend] | None,
) -> Recording:
    """Run all of ``ids``, step.n_tok at a time, from position ``start``, which the step's cache has reached.

    Every step runs operation by operation, then uninterrupted, then as the graph that ``graph`` makes: state is
    addressed by position, so all three do the same. The first WARM_UP steps do not count.
    Raises ValueError where ``ids`` are too few.
    """
    found, n = Recording(step.n_tok), step.n_tok
    spans = [(i, ids[i : i + n]) for i in range(0, len(ids) - n + 1, n)]
    if len(spans) <= WARM_UP:
        raise ValueError(f"{len(ids)} tokens make {len(spans)} steps of {n}: more than {WARM_UP} are needed")
    timer = StepTimer(step, backend, clock)
    whole: list[tuple[list[float], TimedBackend]] = [(found.eager, TimedBackend(backend, clock, [step.calls]))]
    for number, (offset, tokens) in enumerate(spans):
        counts = number >= WARM_UP
        timer.run(tokens, start + offset, found if counts else None)
        if number == WARM_UP - 1 and graph is not None:
            whole.append((found.graph, TimedBackend(graph(backend, step.calls), clock, [step.calls])))
        for into, timed in whole:
            step.run(tokens, start + offset, timed)
            if counts:
                into += timed.seconds()
    return found


def profile_record(found: Recording, plan: StepPlan, copy_gb_s: float) -> dict[str, Any]:
    """A table of the step as a JSON-able dictionary: medians over the steps, in us.

    returns  schema, n_tok, position (of the plan, for the bytes), steps, copy_gb_s; operations (calls, launches, us:
             the sum of its parts' medians, percent of all parts, bytes, gb_s, percent_of_copy); step with parts_us (the
             sum of the rows), eager_us and graph_us (None where not measured), bytes, gb_s and percent_of_copy of the
             fastest of the three
    """
    medians = _medians(found)
    n_bytes = [_bytes(part, plan, found) for part in plan.parts]
    total = sum(medians)
    rows = []
    for name in plan.operations():
        chosen = [i for i, part in enumerate(plan.parts) if part.operation == name]
        us = sum(medians[i] for i in chosen)
        about = {
            "operation": name,
            "calls": len(chosen),
            "launches": sum(plan.parts[i].launches for i in chosen),
            "us": us,
            "percent": 100 * us / total,
        }
        rows.append(about | rate(sum(n_bytes[i] for i in chosen), us, copy_gb_s))
    whole = {name: statistics.median(times) * 1e6 if times else None for name, times in _uninterrupted(found)}
    fastest = min(us for us in (total, *whole.values()) if us is not None)
    step = {"parts_us": total, **whole, **rate(sum(n_bytes), fastest, copy_gb_s)}
    return _head(found, plan, copy_gb_s) | {"operations": rows, "step": step}


def moe_record(found: Recording, plan: StepPlan, copy_gb_s: float) -> dict[str, Any]:
    """The experts' table as a JSON-able dictionary: medians over the steps, in us.

    returns  schema, n_tok, position, steps, copy_gb_s; layers (layer, kind, gate_up_us, down_us, bytes of both, gb_s,
             percent_of_copy, distinct_experts); all (the sums, the rate of the sums, mean of distinct_experts)
    """
    medians = _medians(found)
    rows: list[dict[str, Any]] = []
    for layer in sorted({part.layer for part in plan.parts if part.traffic.expert and part.layer is not None}):
        chosen = {part.operation: i for i, part in enumerate(plan.parts) if part.layer == layer and part.traffic.expert}
        up, down = (medians[chosen[name]] for name in ("moe_up", "moe_down"))
        n_bytes = sum(_bytes(plan.parts[i], plan, found) for i in chosen.values())
        row: dict[str, Any] = {
            "layer": layer,
            "kind": plan.parts[chosen[ROUTED]].kind,
            "gate_up_us": up,
            "down_us": down,
        }
        row |= rate(n_bytes, up + down, copy_gb_s)
        rows.append(row | {"distinct_experts": _distinct(found, layer)})
    sums = {name: sum(row[name] for row in rows) for name in ("gate_up_us", "down_us")}
    everything: dict[str, Any] = {**sums, **rate(sum(row["bytes"] for row in rows), sum(sums.values()), copy_gb_s)}
    everything["distinct_experts"] = statistics.mean(row["distinct_experts"] for row in rows)
    return _head(found, plan, copy_gb_s) | {"layers": rows, "all": everything}


def rate(n_bytes: float, us: float, copy_gb_s: float) -> dict[str, float]:
    """bytes, GB/s and percent of the copy bandwidth of something that took ``us``."""
    gb_s = n_bytes / us / 1e3 if us else 0.0
    return {"bytes": round(n_bytes), "gb_s": gb_s, "percent_of_copy": 100 * gb_s / copy_gb_s}


def _head(found: Recording, plan: StepPlan, copy_gb_s: float) -> dict[str, Any]:
    about = {"schema": SCHEMA, "n_tok": found.n_tok, "position": plan.position}
    return about | {"steps": len(found.parts), "copy_gb_s": copy_gb_s}


def _medians(found: Recording) -> list[float]:
    """Each part's median over the steps, in us."""
    return [statistics.median(times) * 1e6 for times in zip(*found.parts, strict=True)]


def _uninterrupted(found: Recording) -> Iterator[tuple[str, list[float]]]:
    yield "eager_us", found.eager
    yield "graph_us", found.graph


def _distinct(found: Recording, layer: int) -> float:
    return statistics.median(one[layer] for one in found.distinct)


def _bytes(part: PlannedPart, plan: StepPlan, found: Recording) -> float:
    """Bytes of an operation, with the experts that were used instead of those expected."""
    traffic = part.traffic
    if traffic.expert and part.layer is not None:
        return traffic.weights(_distinct(found, part.layer)) + traffic.cache + traffic.activations
    return plan.weight_bytes(part) + traffic.cache + traffic.activations
