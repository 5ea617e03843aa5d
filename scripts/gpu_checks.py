"""Checks of every operation's kernels beyond ds4.kernels.verify: what a launch may touch, and CUDA graphs.

The tests run them on the CPU's emulation of the kernels, scripts/gpu_check.py on a GPU. Each returns a list of what is
wrong, one line a finding, empty where all is well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor

from ds4.kernels.cases import Case, Exact, Group, Inputs, Outputs, difference
from ds4.kernels.entry import Backend, Entry, KernelCall
from ds4.kernels.registry import Operation
from ds4.kernels.verify import TOKEN_COUNTS, n_tokens

CPU = torch.device("cpu")
GROUPS: tuple[Group, ...] = get_args(Group)
SMALL: tuple[Group, ...] = ("smoke", "edges", "golden")  # what the emulation can do in reasonable time
# Workspaces of these types may be counters, which start at zero by contract and are set back by the kernels.
_COUNTERS = (torch.int32, torch.int64, torch.uint32, torch.uint64)


def cases_of(operation: Operation, groups: Sequence[Group]) -> list[Case]:
    """The operation's cases of these groups, in their order."""
    return [case for case in operation.cases() if case.group in groups]


def copy_to(inputs: Inputs, device: torch.device) -> Inputs:
    """``inputs`` with every tensor copied to ``device``, also where it is there already."""
    return {k: v.to(device, copy=True) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def poison(tensors: Iterable[Tensor]) -> None:
    """Fill with bytes 0xFF: NaN in every floating type down to e4m3 and e8m0, -1 in integers."""
    for tensor in tensors:
        tensor.view(-1).view(torch.uint8).fill_(0xFF)


def poison_outputs(operation: Operation, outputs: Outputs) -> None:
    """Poison all results, and the workspaces but those that may be counters."""
    poison(v for k, v in outputs.items() if k not in operation.workspaces or v.dtype not in _COUNTERS)


def results_of(operation: Operation, inputs: Inputs, outputs: Outputs) -> Outputs:
    """The results among ``outputs`` and the inputs that the operation updates; not copied."""
    results = {name: value for name, value in outputs.items() if name not in operation.workspaces}
    return results | {name: inputs[name] for name in operation.mutates}


def _compared(results: Outputs, want: Outputs) -> list[str]:
    """One line for each result that is not ``want`` bit for bit."""
    found = {name: difference(results[name], want[name], Exact()) for name in want}
    return [f"{name}: {text}" for name, text in found.items() if text]


def check_launches(
    operation: Operation, case: Case, backend: Backend, device: torch.device, seed: int = 0
) -> list[str]:
    """Launch a case twice on the same tensors of ``device``.

    The results are the reference's (on the CPU) under the case's comparison, also where results and workspaces held
    NaN before; inputs that are not in ``mutates`` stay as they were; the second launch finds what the first one left
    in the workspaces (counters that count on, say) and gives the same bits.
    """
    fresh = case.make(seed, CPU)
    want = operation.reference(copy_to(fresh, CPU))
    inputs = copy_to(fresh, device)
    outputs = operation.outputs(inputs)
    results = results_of(operation, inputs, outputs)
    where = f"{operation.name}/{case.name} seed {seed}"
    if not set(results) == set(want) == set(case.compare):
        return [f"{where}: kernels give {sorted(results)}, reference {sorted(want)}, compared {sorted(case.compare)}"]
    poison_outputs(operation, outputs)
    calls = operation.calls(inputs, outputs)
    backend.run(calls)
    compared = {name: difference(results[name], want[name], compare) for name, compare in case.compare.items()}
    found = [f"{where}: {name}: {text}" for name, text in compared.items() if text]
    kept = [k for k, v in fresh.items() if isinstance(v, Tensor) and k not in operation.mutates]
    changed = _compared({name: inputs[name] for name in kept}, {name: fresh[name] for name in kept})
    found += [f"{where}: input changed: {line}" for line in changed]
    first = {name: value.clone() for name, value in results.items()}
    restore(operation, inputs, fresh, outputs)
    backend.run(calls)
    return found + [f"{where}: second launch: {line}" for line in _compared(results, first)]


def restore(operation: Operation, inputs: Inputs, fresh: Inputs, outputs: Outputs) -> None:
    """Make the tensors of a finished launch ready for another: inputs as in ``fresh``, results poisoned."""
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value.copy_(fresh[name])
    poison(value for name, value in outputs.items() if name not in operation.workspaces)


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


def capture(backend: Backend, calls: Sequence[KernelCall]) -> torch.cuda.CUDAGraph:
    """``calls``, which ran before, as a CUDA graph; it writes to the tensors of ``calls``, which the caller keeps."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.run(calls)
    return graph


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
    graph = capture(backend, calls)
    found = []
    rounds = [("first replay", fresh, eager[0]), ("second replay", fresh, eager[0])]
    if _same_form(fresh, other):
        rounds.append(("replay with other inputs", other, eager[1]))
    for what, values, want in rounds:
        restore(operation, inputs, values, outputs)
        graph.replay()
        torch.cuda.synchronize(device)
        found += [f"{where}: {what}: {line}" for line in _compared(results, want)]
    return found


def _same_form(one: Inputs, other: Inputs) -> bool:
    """Whether two sets of inputs differ in the values of tensors only."""

    def form(value: object) -> object:
        return (value.shape, value.dtype) if isinstance(value, Tensor) else value

    return {k: form(v) for k, v in one.items()} == {k: form(v) for k, v in other.items()}


def _eager(operation: Operation, fresh: Inputs, backend: Backend, device: torch.device) -> Outputs:
    """The results of a plain launch."""
    inputs = copy_to(fresh, device)
    outputs = operation.outputs(inputs)
    backend.run(operation.calls(inputs, outputs))
    return {name: value.clone() for name, value in results_of(operation, inputs, outputs).items()}


def remembered(case: Case) -> Case:
    """``case`` with inputs that are made once a seed and device and copied from then on; made on the CPU."""
    made: dict[tuple[int, torch.device], Inputs] = {}

    def make(seed: int, device: torch.device) -> Inputs:
        if (seed, device) not in made:
            made[seed, device] = case.make(seed, CPU) if device == CPU else copy_to(make(seed, CPU), device)
        return copy_to(made[seed, device], device)

    return replace(case, make=make)
