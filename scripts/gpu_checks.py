"""Checks of every operation beyond ds4.kernels.verify: whether its cases reach everything, and CUDA graphs.

The tests run them on the CPU's emulation of the kernels, scripts/gpu_check.py on a GPU. Each returns a list of what is
wrong, one line a finding, empty where all is well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor

from ds4.graph.capture import CudaGraph
from ds4.kernels.cases import Case, Group, Inputs, Outputs
from ds4.kernels.entry import Backend, Entry
from ds4.kernels.registry import Operation, results_of
from ds4.kernels.verify import CPU, TOKEN_COUNTS, compared, copy_to, n_tokens, restore

GROUPS: tuple[Group, ...] = get_args(Group)
SMALL: tuple[Group, ...] = ("smoke", "edges", "golden")  # what the emulation can do in reasonable time


def cases_of(operation: Operation, groups: Sequence[Group]) -> list[Case]:
    """The operation's cases of these groups, in their order."""
    return [case for case in operation.cases() if case.group in groups]


def has_tokens(operation: Operation, case: Case) -> int:
    """The number of tokens of a case; 0 where the operation has none."""
    return n_tokens(operation, case.make(0, CPU)) if operation.token_inputs else 0


def launched(operation: Operation, cases: Sequence[Case]) -> set[Entry]:
    """The entries that the cases launch, without launching them."""
    found: set[Entry] = set()
    for case in cases:
        inputs = case.make(0, CPU)
        found |= {call.entry for call in operation.calls(inputs, operation.outputs(inputs))}
    return found


def check_complete(operation: Operation) -> list[str]:
    """Whether the cases reach everything: smoke cases are there, every entry is launched, and a case that the
    emulation runs has as many tokens as the checks of single tokens want."""
    small = cases_of(operation, SMALL)
    if "smoke" not in {case.group for case in small}:
        return [f"{operation.name}: there are no smoke cases"]
    found = []
    missing = set(operation.entries) - launched(operation, small)
    for case in cases_of(operation, ("decode",)):  # large: only where something is missing
        missing = missing and missing - launched(operation, [case])
    found += [f"{operation.name}: no case launches {entry.name}" for entry in sorted(missing, key=lambda e: e.name)]
    most = max(has_tokens(operation, case) for case in small)
    if operation.token_inputs and most < TOKEN_COUNTS[-1]:
        found.append(f"{operation.name}: no smoke or edges case has {TOKEN_COUNTS[-1]} tokens")
    return found


def check_graph(operation: Operation, case: Case, backend: Backend, device: torch.device) -> list[str]:
    """Replays of a captured launch equal eager launches bit for bit: twice on the inputs of the capture, and once on
    others put into the same tensors, so that a value baked into the graph shows. Needs a GPU."""
    where = f"{operation.name}/{case.name} graph"
    fresh, other = case.make(0, CPU), case.make(1, CPU)
    eager = [_eager(operation, values, backend, device) for values in (fresh, other)]
    inputs = copy_to(fresh, device)
    outputs = operation.outputs(inputs)
    calls = operation.calls(inputs, outputs)
    results = results_of(operation, inputs, outputs)
    graph = CudaGraph(backend, calls)
    found = []
    rounds = [("first replay", fresh, eager[0]), ("second replay", fresh, eager[0])]
    if _same_form(fresh, other):
        rounds.append(("replay with other inputs", other, eager[1]))
    for what, values, want in rounds:
        restore(operation, inputs, values, outputs)
        graph.replay()
        torch.cuda.synchronize(device)
        found += [f"{where}: {what}: {line}" for line in compared(results, want)]
    return found


def _eager(operation: Operation, values: Inputs, backend: Backend, device: torch.device) -> Outputs:
    """Results of a launch that finds the same in them as the replays do: elements may be left as they are."""
    inputs = copy_to(values, device)
    outputs = operation.outputs(inputs)
    restore(operation, inputs, values, outputs)
    backend.run(operation.calls(inputs, outputs))
    return results_of(operation, inputs, outputs)


def _same_form(one: Inputs, other: Inputs) -> bool:
    """Whether two sets of inputs differ in the values of tensors only."""

    def form(value: object) -> object:
        return (value.shape, value.dtype) if isinstance(value, Tensor) else value

    return {k: form(v) for k, v in one.items()} == {k: form(v) for k, v in other.items()}


def remembered(case: Case) -> Case:
    """``case`` with inputs that are made once a seed and device and copied from then on; made on the CPU."""
    made: dict[tuple[int, torch.device], Inputs] = {}

    def make(seed: int, device: torch.device) -> Inputs:
        if (seed, device) not in made:
            made[seed, device] = case.make(seed, CPU) if device == CPU else copy_to(make(seed, CPU), device)
        return copy_to(made[seed, device], device)

    return replace(case, make=make)
