"""What scripts/gpu_check.py compiles, and compiling it on all cores."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_checks import CPU, SMALL, cases_of, has_tokens

from ds4.kernels.cubin_cache import CubinCache
from ds4.kernels.entry import Constants, Entry, constant_set
from ds4.kernels.registry import Operation, all_operations
from ds4.kernels.resources import shipped
from ds4.kernels.verify import TOKEN_COUNTS, take_tokens

Job = tuple[Entry, Constants, str]  # the last one is the architecture


def launches(operation: Operation) -> set[tuple[Entry, Constants]]:
    """What the checks launch on small cases, all token counts included."""
    found = set()
    for case in cases_of(operation, SMALL):
        inputs = case.make(0, CPU)
        spans = [inputs]
        if operation.token_inputs:
            n_tok = has_tokens(operation, case)
            spans += [take_tokens(operation, inputs, 0, n) for n in TOKEN_COUNTS if n < n_tok]
        for one in spans:
            found |= {(call.entry, call.constants) for call in operation.calls(one, operation.outputs(one))}
    return found


def token_counts(constants: Constants) -> list[Constants]:
    """The same kernel for the other numbers of tokens that the checks launch."""
    if "N_TOK" not in dict(constants):
        return []
    return [constant_set(**(dict(constants) | {"N_TOK": n})) for n in TOKEN_COUNTS]


def for_all() -> dict[str, list[Job]]:
    """The shipped kernels for all architectures, by file and architecture."""
    return _by_file(shipped(all_operations()))


def for_gpu(architecture: str) -> dict[str, list[Job]]:
    """All that the checks launch on a GPU of this architecture, by file and architecture."""
    operations = all_operations()
    jobs = [job for job in shipped(operations) if job[2] == architecture]
    jobs += [(entry, other, architecture) for entry, constants, _ in jobs for other in token_counts(constants)]
    for operation in operations:
        small = launches(operation)
        jobs += [(entry, constants, architecture) for entry, constants in small if architecture in entry.architectures]
    return _by_file(jobs)


def _by_file(jobs: Iterable[Job]) -> dict[str, list[Job]]:
    """The jobs by file and architecture; of those with the same constants one, as a cubin holds all of a file's
    kernels."""
    found: dict[tuple[str, str], dict[Constants, Job]] = {}
    for job in jobs:
        found.setdefault((job[0].file, job[2]), {})[job[1]] = job
    return {" ".join(key): [sets[constants] for constants in sorted(sets)] for key, sets in sorted(found.items())}


def compile_one(entry: Entry, constants: Constants, architecture: str) -> int:
    """Bytes of the cubin, which is in the cache afterwards. Raises as the compiler does."""
    return len(CubinCache().get(entry, constants, architecture).data)


@cache
def _pool() -> ProcessPoolExecutor:
    """Processes that compile; NVRTC gains nothing from threads."""
    return ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=get_context("spawn"))


def compile_many(jobs: list[Job]) -> tuple[str, Any]:
    """Compile all, here where they are few: how many there were, and their size. Raises as the compiler does."""
    if len(jobs) <= 4 or (os.cpu_count() or 1) <= 2:
        sizes = [compile_one(*job) for job in jobs]
    else:
        sizes = list(_pool().map(compile_one, *zip(*jobs, strict=True)))
    return f"{len(sizes)} cubins, {sum(sizes) / 1e6:.1f} MB", {"cubins": len(sizes), "bytes": sum(sizes)}
