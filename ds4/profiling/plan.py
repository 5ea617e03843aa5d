"""The plan of a decode step: its operations, launches and bytes, by operation and by layer kind; no GPU is needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Any

from ds4.kv.cache import KVCache
from ds4.model.steps import DecodeStep, Part
from ds4.model.transformer import Transformer
from ds4.profiling.floor import stored_bytes
from ds4.profiling.traffic import Traffic, Where, expected_distinct, part_traffic
from ds4.weights.checkpoint import Checkpoint

SCHEMA = 1  # of the JSON that the functions here and in the modules beside it return


@dataclass(frozen=True)
class PlannedPart:
    """One operation of a step: where it is, its launches and what it moves.

    kind   "swa", "csa" or "hca", the layer's; "-" outside the layers
    floor  bytes that the checkpoint stores for the weights it reads; a layer's two boundaries share theirs evenly
    """

    operation: str
    layer: int | None
    kind: str
    launches: int
    traffic: Traffic
    floor: float


@dataclass(frozen=True)
class StepPlan:
    """All operations of a decode step in order, at a position, with the expected number of distinct experts."""

    n_tok: int
    position: int
    top_k: int
    parts: tuple[PlannedPart, ...]

    def distinct(self, part: PlannedPart) -> float:
        """Distinct experts expected in an operation's layer."""
        return expected_distinct(part.traffic.n_experts, self.top_k, self.n_tok)

    def operations(self) -> list[str]:
        """The operations' names, each once, in the order of the step."""
        return in_order([(part.operation, part.layer) for part in self.parts])

    def weight_bytes(self, part: PlannedPart) -> float:
        """Weight bytes of an operation under that expectation."""
        return part.traffic.weights(self.distinct(part)) if part.traffic.expert else part.traffic.fixed


def layer_kind(model: Transformer, layer: int | None) -> str:
    """The kind of a layer, "-" for what lies outside."""
    return "-" if layer is None else model.config.layer_kind(layer)


def plan_step(model: Transformer, cache: KVCache, step: DecodeStep, checkpoint: Checkpoint, position: int) -> StepPlan:
    """The plan of ``step`` on ``model`` and ``cache``, its first token at ``position``.

    Raises ValueError where the position leaves the cache.
    """
    where = Where(step.n_tok, position)
    if position < 0 or where.end > cache.ctx:
        raise ValueError(f"tokens {position} to {where.end - 1} do not fit a context of {cache.ctx}")
    stored = stored_bytes(checkpoint, step.n_tok)
    places = [(_reader(part), part.layer) for part in step.parts]
    shares = Counter(places)
    parts = []
    for part, place, traffic in zip(step.parts, places, part_traffic(model, cache, step.parts, where), strict=True):
        kind = layer_kind(model, part.layer)
        floor = stored.get(place, 0.0) / shares[place]
        parts.append(PlannedPart(part.operation.name, part.layer, kind, len(part.calls), traffic, floor))
    return StepPlan(step.n_tok, position, model.config.num_experts_per_tok, tuple(parts))


def _reader(part: Part) -> str:
    """The operation's name in ds4.profiling.floor."""
    name = part.operation.name
    return "kv_publish" if name.startswith("kv_publish_") else name


_SUMS = ("calls", "launches", "weight_bytes", "floor_bytes", "cache_bytes", "activation_bytes")


def _row(plan: StepPlan, parts: Iterable[PlannedPart]) -> dict[str, Any]:
    """Sums over some operations; bytes as whole numbers."""
    sums = dict.fromkeys(_SUMS, 0.0)
    for part in parts:
        amounts = (1, part.launches, plan.weight_bytes(part), part.floor, part.traffic.cache, part.traffic.activations)
        for name, amount in zip(_SUMS, amounts, strict=True):
            sums[name] += amount
    row: dict[str, Any] = {name: round(amount) for name, amount in sums.items()}
    row["bytes"] = row["weight_bytes"] + row["cache_bytes"] + row["activation_bytes"]
    return row


def in_order(parts: Sequence[tuple[str, int | None]]) -> list[str]:
    """The names among the (operation, layer) of a step, each once, in an order that is the step's in every layer."""
    before: dict[str, set[str]] = {}
    for layer in dict.fromkeys(layer for _, layer in parts):
        chain = list(dict.fromkeys(name for name, its in parts if its in (layer, None)))
        for earlier, name in zip([None, *chain], chain, strict=False):
            before.setdefault(name, set()).update(() if earlier is None else (earlier,))
    return list(TopologicalSorter(before).static_order())


def plan_record(plan: StepPlan) -> dict[str, Any]:
    """The plan as a JSON-able dictionary.

    returns  schema, n_tok, position; distinct_experts expected, by number of experts; operations (one row each: calls,
             launches, weight_bytes, floor_bytes as stored, cache_bytes, activation_bytes, bytes); layers (one row a
             layer kind: layers of it, launches and operations of one, bytes of all); step (the sums)
    """
    rows = [
        {"operation": name, **_row(plan, (p for p in plan.parts if p.operation == name))} for name in plan.operations()
    ]
    return {
        "schema": SCHEMA,
        "n_tok": plan.n_tok,
        "position": plan.position,
        "distinct_experts": {
            str(p.traffic.n_experts): round(plan.distinct(p), 2) for p in plan.parts if p.traffic.expert
        },
        "operations": rows,
        "layers": [_kind_row(plan, kind) for kind in dict.fromkeys(part.kind for part in plan.parts)],
        "step": {**_row(plan, plan.parts)},
    }


def _kind_row(plan: StepPlan, kind: str) -> dict[str, Any]:
    """Sums over the layers of a kind, and what one of them launches."""
    parts = [part for part in plan.parts if part.kind == kind]
    layers = list(dict.fromkeys(part.layer for part in parts))
    one = [part for part in parts if part.layer == layers[0]]
    about = {"kind": kind, "layers": 0 if kind == "-" else len(layers), "operations_each": len(one)}
    return {**about, "launches_each": sum(part.launches for part in one), **_row(plan, parts)}
