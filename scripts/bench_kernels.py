"""How long every operation takes at the dimensions of V4-Flash, and how much of the copy bandwidth that is.

A case ("decode" group) is launched on many copies of its tensors, once on each, in one CUDA graph. Before a replay the
L2 cache is filled with something else by reading it, so every launch finds its weights in memory, as in a decode step,
and no write-back is left to disturb. The time is that of the replay by the launches in it. All cases of an operation
are measured in turn, and that several times.

    python scripts/bench_kernels.py [--op NAME] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_checks import cases_of, copy_to

from ds4.errors import CudaError, Ds4Error
from ds4.graph.capture import CudaGraph
from ds4.kernels.bandwidth import measure as measure_copy
from ds4.kernels.bandwidth import open_gpu, seconds
from ds4.kernels.cases import Case, Inputs
from ds4.kernels.cuda_backend import CudaBackend
from ds4.kernels.entry import KernelCall
from ds4.kernels.registry import Operation, all_operations

REPEATS = 5
LAUNCHES = 32  # in a graph, where memory allows: enough that the start of a replay does not count
BUDGET = 8 << 30  # bytes of tensors in a graph


@dataclass
class Prepared:
    """A case as a graph of ``n`` launches; ``calls`` keep the tensors alive."""

    operation: Operation
    case: Case
    graph: CudaGraph
    calls: Sequence[KernelCall]
    n: int


def copies_for(set_bytes: int, free_bytes: int) -> int:
    """How many sets of tensors of this size a graph gets: LAUNCHES, less where they would take too much memory."""
    return max(1, min(LAUNCHES, min(BUDGET, free_bytes // 4) // max(1, set_bytes)))


def tensor_bytes(inputs: Inputs) -> int:
    """Bytes of all tensors."""
    return sum(v.numel() * v.element_size() for v in inputs.values() if isinstance(v, Tensor))


def prepare(operation: Operation, case: Case, backend: CudaBackend, device: torch.device) -> Prepared:
    """Make the tensors, launch once on each set, capture."""
    base = copy_to(case.make(0, torch.device("cpu")), device)
    free, _total = torch.cuda.mem_get_info(device)
    sets = [base, *(copy_to(base, device) for _ in range(copies_for(tensor_bytes(base), free) - 1))]
    calls = [call for inputs in sets for call in operation.calls(inputs, operation.outputs(inputs))]
    backend.run(calls)
    return Prepared(operation, case, CudaGraph(backend, calls), calls, len(sets))


def flush_buffer(l2_bytes: int, device: torch.device) -> Tensor:
    """A tensor whose reading leaves nothing else in the L2 cache and lasts until a replay is enqueued."""
    return torch.ones(max(1 << 30, 8 * l2_bytes) // 4, device=device)


def measure(
    operations: Sequence[Operation],
    backend: CudaBackend,
    device: torch.device,
    copy_gb_s: float,
    deadline: float = math.inf,
    repeats: int = REPEATS,
) -> Iterator[dict[str, Any]]:
    """A row for every decode case, as soon as its operation is through; none begin after ``deadline`` (monotonic).

    us: median of the repeats, spread_percent: their range by it; bytes as the case counts them; percent: of the copy.
    """
    flush = flush_buffer(backend.facts.l2, device)
    for operation in operations:
        if time.monotonic() > deadline:
            raise Ds4Error(f"no time left for {operation.name} and what follows")
        cases = cases_of(operation, ("decode",))
        for batch in (cases[i : i + 8] for i in range(0, len(cases), 8)):  # what is in memory at a time
            prepared = [prepare(operation, case, backend, device) for case in batch]
            times: list[list[float]] = [[] for _ in batch]
            for repeat in range(repeats + 1):  # the first round uploads the graphs
                for one, into in zip(prepared, times, strict=True):
                    flush.sum()
                    took = seconds(one.graph.replay) / one.n
                    if repeat:
                        into.append(took)
            for one, values in zip(prepared, times, strict=True):
                yield row(one.operation.name, one.case, values, one.n, copy_gb_s)
            del prepared
            torch.cuda.empty_cache()


def row(operation: str, case: Case, times: Sequence[float], launches: int, copy_gb_s: float) -> dict[str, Any]:
    """One line of the table, from times in seconds."""
    median = statistics.median(times)
    rate = case.bytes_moved / median / 1e9
    return {
        "operation": operation,
        "case": case.name,
        "us": median * 1e6,
        "spread_percent": 100 * (max(times) - min(times)) / median,
        "bytes": case.bytes_moved,
        "gb_s": rate,
        "percent_of_copy": 100 * rate / copy_gb_s,
        "tflop_s": case.flops / median / 1e12,
        "launches": launches,
        "repeats": len(times),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    width = max((len(f"{one['operation']} {one['case']}") for one in rows), default=0)
    lines = [f"{'':{width}} {'us':>9} {'+-%':>5} {'MB':>9} {'GB/s':>7} {'%copy':>6}"]
    for one in rows:
        name = f"{one['operation']} {one['case']}"
        figures = f"{one['us']:9.2f} {one['spread_percent']:5.1f} {one['bytes'] / 1e6:9.3f} {one['gb_s']:7.1f}"
        lines.append(f"{name:{width}} {figures} {one['percent_of_copy']:6.1f}")
    return "\n".join(lines)


def main() -> int:
    """The command; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description="Times of all operations at the dimensions of V4-Flash.")
    parser.add_argument("--op", action="append", help="only this operation; may be given several times")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    operations = [op for op in all_operations() if not options.op or op.name in options.op]
    if unknown := set(options.op or ()) - {op.name for op in operations}:
        parser.error(f"--op: no operation {', '.join(sorted(unknown))}")
    try:
        backend, device = open_gpu()
        copy = measure_copy(backend, device)
        rows = list(measure(operations, backend, device, copy["copy_gb_s"]))
    except (Ds4Error, CudaError) as error:
        print(f"bench_kernels: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    print(f"copy {copy['copy_gb_s']:.1f} GB/s")
    if options.json:
        options.json.write_text(json.dumps({"copy": copy, "kernels": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
