"""Which kernel serves which operation, and how often: from the launch lists, or counted while they run.

A launch list is made once for a number of tokens, so what a step of so many tokens launches is known without running
it; counting confirms it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ds4.kernels.entry import Backend, KernelCall, macro_definitions
from ds4.model.steps import DecodeStep
from ds4.profiling.plan import SCHEMA, in_order

Counts = Counter[KernelCall]  # launches are told apart by identity


class CountingBackend:
    """Runs launches on ``backend`` and counts them."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.counts: Counts = Counter()

    def run(self, calls: Sequence[KernelCall]) -> None:
        """Run ``calls``; those that ran count, should one fail."""
        for call in calls:
            self.backend.run([call])
            self.counts[call] += 1


def planned(steps: Mapping[int, DecodeStep], mix: Mapping[int, int]) -> Counts:
    """The launches of a run of ``mix[n]`` steps of n tokens."""
    return Counter({call: times for n_tok, times in mix.items() for call in steps[n_tok].calls})


def dispatch_record(steps: Mapping[int, DecodeStep], mix: Mapping[int, int], counts: Counts) -> dict[str, Any]:
    """Launches by operation, kernel and n_tok as a JSON-able dictionary.

    returns  schema, steps (how many, by n_tok), rows (operation, entry, file, constants, launches by n_tok: only those
             n_tok that have any) in the order of the step, operations (for each and n_tok, whether all its launches
             went to kernels that no other n_tok of the mix uses: "own", or "shared")
    """
    found: dict[tuple[str, str, str, str], Counter[int]] = {}
    for n_tok in mix:
        for part in steps[n_tok].parts:
            for call in part.calls:
                constants = " ".join(macro_definitions(call.constants))
                key = (part.operation.name, call.entry.name, call.entry.file, constants)
                found.setdefault(key, Counter())[n_tok] += counts[call]
    order = in_order([(part.operation.name, part.layer) for step in steps.values() for part in step.parts])
    fields = ("operation", "entry", "file", "constants")
    rows: list[dict[str, Any]] = [
        {**dict(zip(fields, key, strict=True)), "launches": {str(n): by[n] for n in sorted(by) if by[n]}}
        for key, by in sorted(found.items(), key=lambda one: order.index(one[0][0]))
    ]
    return {
        "schema": SCHEMA,
        "steps": {str(n_tok): times for n_tok, times in mix.items()},
        "rows": rows,
        "operations": [{"operation": name, "kernels": kernels_of(name, rows, [str(n) for n in mix])} for name in order],
    }


def kernels_of(name: str, rows: Sequence[Mapping[str, Any]], n_toks: Sequence[str]) -> dict[str, str]:
    """Of each n_tok that launches the operation, whether only it launches these kernels ("own") or not ("shared")."""
    users = [set(row["launches"]) for row in rows if row["operation"] == name]
    return {
        n: "own" if all(used == {n} for used in users if n in used) else "shared"
        for n in n_toks
        if any(n in used for used in users)
    }
