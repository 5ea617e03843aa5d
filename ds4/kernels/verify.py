"""Checks that hold for every operation, on any backend: against the reference, twice, and a token alone against many.

Tests run them on the CPU's emulation of the kernels, a GPU machine on the kernels themselves; each returns a list of
what is wrong, one line a finding, empty where all is well.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ds4.kernels.cases import Case, Exact, Inputs, Outputs, difference
from ds4.kernels.entry import Backend
from ds4.kernels.registry import Operation, results_of, run_kernels

CPU = torch.device("cpu")
TOKEN_COUNTS = (1, 2, 3, 8)  # launches whose rows must agree; 8 is the most that a decode step has
# Workspaces of these types may be counters, which start at zero by contract and are set back by the kernels.
_COUNTERS = (torch.int32, torch.int64, torch.uint32, torch.uint64)


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


def compared(results: Outputs, want: Outputs) -> list[str]:
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
        given, named = sorted(results), sorted(case.compare)
        return [f"{where}: kernels give {given}, the reference {sorted(want)}, compared {named}"]
    poison_outputs(operation, outputs)
    calls = operation.calls(inputs, outputs)
    backend.run(calls)
    texts = {name: difference(results[name], want[name], compare) for name, compare in case.compare.items()}
    found = [f"{where}: {name}: {text}" for name, text in texts.items() if text]
    kept = [k for k, v in fresh.items() if isinstance(v, Tensor) and k not in operation.mutates]
    changed = compared({name: inputs[name] for name in kept}, {name: fresh[name] for name in kept})
    found += [f"{where}: input changed: {line}" for line in changed]
    first = {name: value.clone() for name, value in results.items()}
    restore(operation, inputs, fresh, outputs)
    backend.run(calls)
    return found + [f"{where}: second launch: {line}" for line in compared(results, first)]


def restore(operation: Operation, inputs: Inputs, fresh: Inputs, outputs: Outputs) -> None:
    """Make the tensors of a finished launch ready for another: inputs as in ``fresh``, results poisoned."""
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value.copy_(fresh[name])
    poison(value for name, value in outputs.items() if name not in operation.workspaces)


def take_tokens(operation: Operation, inputs: Inputs, first: int, last: int) -> Inputs:
    """``inputs`` with tokens ``first`` to ``last`` - 1 only; token inputs are copied, so that they stay contiguous.

    An input ``pos`` is the position of the first token, and moves with it.
    """
    taken = dict(inputs)
    if first and isinstance(inputs.get("pos"), Tensor):
        taken["pos"] = inputs["pos"] + first
    for name, dim in operation.token_inputs.items():
        if inputs[name] is not None:
            part = inputs[name].narrow(dim, first, last - first)
            taken[name] = part.clone(memory_format=torch.contiguous_format)
    return taken


def n_tokens(operation: Operation, inputs: Inputs) -> int:
    """How many tokens ``inputs`` have; a token input may be None. Raises ValueError where they disagree."""
    counts = {inputs[name].shape[dim] for name, dim in operation.token_inputs.items() if inputs[name] is not None}
    if len(counts) != 1:
        raise ValueError(f"{operation.name}: the token inputs have {sorted(counts)} tokens")
    return counts.pop()


def check_tokens(operation: Operation, case: Case, backend: Backend, device: torch.device, seed: int = 0) -> list[str]:
    """Compare a launch of all tokens of ``case`` with launches of its first 1, 2, 3, ... tokens, bit for bit.

    Where the operation keeps no state (``mutates`` is empty), each token alone is compared as well. An input ``count``
    i32 [1] says how many of the tokens are there; rows behind them are not compared.
    """
    inputs = case.make(seed, device)
    n_tok, count = n_tokens(operation, inputs), inputs.get("count")
    n_live = n_tok if count is None else min(int(count), n_tok)
    whole = run_kernels(operation, inputs, backend)
    spans = [(0, n) for n in TOKEN_COUNTS if n < n_tok]
    if not operation.mutates:
        spans += [(i, i + 1) for i in range(1, n_live)]
    found = []
    for first, last in spans:
        inputs = take_tokens(operation, case.make(seed, device), first, last)
        part = run_kernels(operation, inputs, backend)
        where = f"{operation.name}/{case.name} seed {seed}: tokens {first} to {last - 1} of {n_tok}"
        found += [f"{where}: {line}" for line in _rows_differ(operation, part, whole, first, min(last, n_live))]
    return found


def _rows_differ(operation: Operation, part: Outputs, whole: Outputs, first: int, last: int) -> Iterable[str]:
    """One line for each token output whose rows ``first`` to ``last`` - 1 are not those of the launch of all tokens."""
    for name, dim in operation.token_outputs.items():
        if name not in whole:
            continue  # this case has none
        n = last - first
        text = difference(part[name].narrow(dim, 0, n), whole[name].narrow(dim, first, n), Exact())
        if text:
            yield f"{name}: {text}"
