"""Checks that hold for every operation, on any backend: against the reference, and a token alone against many.

Tests run them on the CPU's emulation of the kernels, a GPU machine on the kernels themselves; each returns a list of
what is wrong, one line a finding, empty where all is well.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ds4.kernels.cases import Case, Exact, Inputs, Outputs, difference
from ds4.kernels.entry import Backend
from ds4.kernels.registry import Operation, run_kernels

TOKEN_COUNTS = (1, 2, 3, 8)  # launches whose rows must agree; 8 is the most that a decode step has


def check_case(operation: Operation, case: Case, backend: Backend, device: torch.device, seed: int = 0) -> list[str]:
    """Compare the kernels' results on ``backend``, tensors on ``device``, with those of the reference on the CPU."""
    want = operation.reference(case.make(seed, torch.device("cpu")))
    got = run_kernels(operation, case.make(seed, device), backend)
    where = f"{operation.name}/{case.name} seed {seed}"
    if not set(got) == set(want) == set(case.compare):
        return [f"{where}: kernels give {sorted(got)}, the reference {sorted(want)}, compared {sorted(case.compare)}"]
    found = {name: difference(got[name], want[name], compare) for name, compare in case.compare.items()}
    return [f"{where}: {name}: {text}" for name, text in found.items() if text]


def take_tokens(operation: Operation, inputs: Inputs, first: int, last: int) -> Inputs:
    """``inputs`` with tokens ``first`` to ``last`` - 1 only; token inputs are copied, so that they stay contiguous."""
    taken = dict(inputs)
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

    Where the operation keeps no state (``mutates`` is empty), each token alone is compared as well.
    """
    n_tok = n_tokens(operation, case.make(seed, device))
    whole = run_kernels(operation, case.make(seed, device), backend)
    spans = [(0, n) for n in TOKEN_COUNTS if n < n_tok]
    if not operation.mutates:
        spans += [(i, i + 1) for i in range(1, n_tok)]
    found = []
    for first, last in spans:
        inputs = take_tokens(operation, case.make(seed, device), first, last)
        part = run_kernels(operation, inputs, backend)
        where = f"{operation.name}/{case.name} seed {seed}: tokens {first} to {last - 1} of {n_tok}"
        found += [f"{where}: {line}" for line in _rows_differ(operation, part, whole, first, last)]
    return found


def _rows_differ(operation: Operation, part: Outputs, whole: Outputs, first: int, last: int) -> Iterable[str]:
    """One line for each token output whose rows are not those of the launch of all tokens."""
    for name, dim in operation.token_outputs.items():
        text = difference(part[name], whole[name].narrow(dim, first, last - first), Exact())
        if text:
            yield f"{name}: {text}"


def check_repeatable(operation: Operation, case: Case, backend: Backend, device: torch.device) -> list[str]:
    """Compare two runs of the same case, bit for bit."""
    first, second = (run_kernels(operation, case.make(0, device), backend) for _ in range(2))
    found = {name: difference(second[name], first[name], Exact()) for name in first}
    return [f"{operation.name}/{case.name}: second run: {name}: {text}" for name, text in found.items() if text]
