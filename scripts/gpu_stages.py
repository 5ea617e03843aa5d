"""The stages of scripts/gpu_check.py, each in a process of its own: python scripts/gpu_stages.py STAGE --report FILE.

A stage is a list of items. The report gets a JSON object a line: {"begins": i, "item": name}, then {"ends": i, "item",
"status", "text", "data"}, so that a process that dies or hangs has said where. After an error of the CUDA driver,
which leaves its process useless, it ends with code GPU_LOST; --first goes on with a later item.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench_moe
import gpu_checks
import gpu_compile
import gpu_machine
import gpu_prefill
import gpu_replay
import moe_layers
import torch
from gpu_checks import CPU, GROUPS, cases_of

from ds4.errors import CudaError, Ds4Error
from ds4.kernels.arch import device_facts
from ds4.kernels.cases import Case
from ds4.kernels.cuda_backend import CudaBackend
from ds4.kernels.probe import run_probe
from ds4.kernels.registry import Operation, all_operations
from ds4.kernels.verify import check_launches, check_tokens

GPU_LOST = 4
GPU = torch.device("cuda", 0)
MOE = ("moe_up", "moe_down")  # what the stage "moe" measures
MOE_S = 6  # seconds that a mixture takes there, generously


class Skip(Exception):
    """An item cannot be done here; the text says why."""


@dataclass(frozen=True)
class Item:
    """One thing to do: ``run`` returns (text, data), or raises: Skip, or anything else for a failure."""

    name: str
    run: Callable[[], tuple[str, Any]]


@dataclass(frozen=True)
class Options:
    """``gpu``: there is one. ``quick``: the least that shows that the stage works. ``end``: of the time, monotonic."""

    gpu: bool
    quick: bool
    end: float = field(default=math.inf)


def findings(check: Callable[[], list[str]]) -> tuple[str, Any]:
    """The outcome of a check of gpu_checks or verify. Raises AssertionError with what it found."""
    found = check()
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise AssertionError(found[0] + more)
    return "", None


def compile_items(options: Options) -> Iterator[Item]:
    """One item a source file and architecture: all of them, or this GPU's with what the small cases launch besides."""
    found = gpu_compile.for_gpu(device_facts(0).architecture) if options.gpu else gpu_compile.for_all()
    for name, jobs in list(found.items())[: 2 if options.quick else None]:
        yield Item(f"compile: {name}", partial(gpu_compile.compile_many, jobs[: 1 if options.quick else None]))


# Kernels on the GPU, or on the CPU's emulation


@cache
def backend(synchronous: bool) -> CudaBackend:
    return CudaBackend(0, synchronous=synchronous)


def kernel_items(options: Options) -> Iterator[Item]:
    """Three items a case: against the reference, one token against many, graph replay against eager launches."""
    for operation in all_operations():
        for case in cases_of(operation, GROUPS[:1] if options.quick else GROUPS):
            made = gpu_checks.remembered(case)
            name = f"{operation.name}/{case.name}"
            yield Item(f"references: {name}", partial(_on_gpu, check_launches, operation, made, True))
            if operation.token_inputs:
                yield Item(f"n_tok: {name}", partial(_on_gpu, check_tokens, operation, made, True))
            yield Item(f"graphs: {name}", partial(_on_gpu, gpu_checks.check_graph, operation, made, False))


def _on_gpu(check: Callable[..., list[str]], operation: Operation, case: Case, synchronous: bool) -> tuple[str, Any]:
    if check is check_tokens and gpu_checks.has_tokens(operation, case) < 2:
        raise Skip("one token")
    return findings(partial(check, operation, case, backend(synchronous), GPU))


def probe() -> tuple[str, Any]:
    """The probe kernel alone."""
    run_probe(backend(True), GPU)
    return "", None


def smoke_items(options: Options) -> Iterator[Item]:
    """What compute-sanitizer watches: the probe kernel, or (not ``quick``) every smoke case."""
    if options.quick:
        yield Item("probe", probe)
        return
    for operation in all_operations():
        for case in cases_of(operation, ("smoke",)):
            yield Item(f"{operation.name}/{case.name}", partial(_on_gpu, check_launches, operation, case, True))


def emulation_items(options: Options) -> Iterator[Item]:
    """Smoke cases of every operation on the CPU's emulation, for machines without a GPU; the tests do far more."""
    try:
        from tests.cuemu.backend import CpuBackend, missing
    except ImportError as error:
        raise Skip(f"the tests are not here: {error}") from None
    if lacking := missing():
        raise Skip(lacking)
    for operation in all_operations()[: 1 if options.quick else None]:
        for case in cases_of(operation, ("smoke",))[: 1 if options.quick else 2]:
            for order in ("forward", "warps"):
                check = partial(check_launches, operation, case, CpuBackend(order=order), CPU)
                yield Item(f"emulation: {operation.name}/{case.name} {order}", partial(findings, check))


# compute-sanitizer


def sanitizer_items(options: Options) -> Iterator[Item]:
    """memcheck and racecheck on the smoke cases, where the tool works at all."""
    tool = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    if tool is None:
        raise Skip("there is no compute-sanitizer")
    for name in ("memcheck", "racecheck"):
        yield Item(f"sanitizer: {name}", partial(sanitize, tool, name, options))


def sanitize(tool: str, name: str, options: Options) -> tuple[str, Any]:
    """Watch the probe kernel, which shows whether the tool works here, then the smoke cases."""
    for what, quick in (("probe", True), ("smoke cases", False)):
        command = [tool, "--tool", name, "--error-exitcode", "9", "--print-limit", "20", sys.executable, __file__]
        # Without torch's cache every tensor is an allocation of its own, and a step beyond it is seen.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command += ["smoke", "--gpu", "--report", os.devnull, *(["--quick"] if quick else [])]
        left = max(1.0, options.end - time.monotonic()) if options.end < math.inf else None
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=left, check=False)
        print(done.stdout[-20000:], done.stderr[-5000:], flush=True)
        said = [line.strip("= ") for line in done.stdout.splitlines() if line.startswith("=========")]
        telling = next((line for line in said if "rror" in line or "azard" in line or "upported" in line), "no report")
        if done.returncode and quick:
            raise Skip(f"{name} does not work here: {telling}")
        if done.returncode:
            raise AssertionError(f"{name}, {what}: {telling}")
    return said[-1] if said else "", {"command": " ".join(command)}


# Figures


@cache
def copy_bandwidth() -> dict[str, Any]:
    from ds4.kernels.bandwidth import measure, open_gpu

    return measure(*open_gpu())


def bandwidth() -> tuple[str, Any]:
    """Copy and read bandwidth."""
    found = copy_bandwidth()
    return f"copy {found['copy_gb_s']:.0f} GB/s, read {found['read_gb_s']:.0f} GB/s", found


def benchmark(operation: Operation) -> tuple[str, Any]:
    """The rows of one operation."""
    import bench_kernels

    rows = list(bench_kernels.measure([operation], backend(False), GPU, copy_bandwidth()["copy_gb_s"]))
    print(bench_kernels.table(rows), flush=True)
    return f"{len(rows)} cases", rows


def bench_items(options: Options) -> Iterator[Item]:
    """The bandwidth, then a table for every operation that has no stage of its own."""
    yield Item("bandwidth: copy and read", bandwidth)
    for operation in all_operations():
        if operation.name not in MOE:
            yield Item(f"bench: {operation.name}", partial(benchmark, operation))


def benchmark_moe(mixture: str, plan: moe_layers.Plan, end: float) -> tuple[str, Any]:
    """The rows of a mixture of formats. Raises Skip where too little time is left."""
    if time.monotonic() > end - MOE_S:
        raise Skip(f"fewer than {MOE_S} s left")
    rows = bench_moe.measure(mixture, plan, backend(False), GPU, copy_bandwidth()["copy_gb_s"])
    print(bench_moe.table(rows), flush=True)
    return bench_moe.table(rows).splitlines()[-1], rows


def moe_items(options: Options) -> Iterator[Item]:
    """The experts of a layer at the dimensions of V4-Flash, a table for every mixture of formats."""
    plan = moe_layers.Plan(experts=16, n_toks=(1, 2)) if options.quick else moe_layers.Plan()
    mixtures = list(moe_layers.MIXTURES)[: 1 if options.quick else None]
    yield Item("compile: moe", partial(bench_moe.compile_kernels, mixtures, plan, device_facts(0).architecture))
    for mixture in mixtures:
        yield Item(f"moe: {mixture}", partial(benchmark_moe, mixture, plan, options.end))


# Everything, by name. gpu_check.py says in which order, with which limits.

STAGES: dict[str, Callable[[Options], Iterator[Item]]] = {
    "machine": lambda options: iter([Item("machine", gpu_machine.describe)]),
    "doctor": lambda options: (Item(f"doctor: {name}", run) for name, run in gpu_machine.doctor(options.gpu, Skip)),
    "compile": compile_items,
    "kernels": kernel_items,
    "smoke": smoke_items,
    "emulation": emulation_items,
    "sanitizer": sanitizer_items,
    "bench": bench_items,
    "moe": moe_items,
    "model": lambda options: (
        Item(f"model: {name}", run) for name, run in gpu_machine.model(Path(__file__).resolve().parents[1], Skip)
    ),
    "replay": lambda options: (Item(f"replay: {name}", run) for name, run in gpu_replay.items(options.quick)),
    "prefill": lambda options: (Item(f"prefill: {name}", run) for name, run in gpu_prefill.items(options.quick)),
}


def outcome(item: Item) -> tuple[dict[str, Any], bool]:
    """Run an item: its report, and whether the GPU is lost to this process."""
    status, lost, data = "ok", False, None
    try:
        text, data = item.run()
    except Skip as reason:
        status, text = "skipped", str(reason)
    except Exception as error:
        traceback.print_exc()
        lost = isinstance(error, CudaError) or "CUDA error" in str(error)
        kind = "" if isinstance(error, AssertionError | Ds4Error | CudaError) else f"{type(error).__name__}: "
        status, text = "failed", kind + " ".join(str(error).split())
    return {"item": item.name, "status": status, "text": text[:2000], "data": data}, lost


def run(stage: str, options: Options, first: int, report: TextIO) -> int:
    """Run the items of a stage from ``first`` on; the exit code: 0, 1 where something failed, or GPU_LOST."""

    def say(**fields: Any) -> None:
        report.write(json.dumps(fields) + "\n")
        report.flush()

    failed = False
    try:
        for i, item in enumerate(STAGES[stage](options)):
            if i < first:
                continue
            say(begins=i, item=item.name)
            fields, lost = outcome(item)
            say(ends=i, **fields)
            if fields["status"] != "ok":
                print(f"{fields['status']}: {item.name}: {fields['text']}", flush=True)
            failed |= fields["status"] == "failed"
            if lost:
                return GPU_LOST
    except Skip as reason:
        say(ends=first, item=stage, status="skipped", text=str(reason), data=None)
    return 1 if failed else 0


def main() -> int:
    """The command, meant for gpu_check.py."""
    parser = argparse.ArgumentParser(description="One stage of gpu_check.py.")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="the time there is")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    options = Options(given.gpu, given.quick, time.monotonic() + given.seconds)
    with given.report.open("a") as report:
        return run(given.stage, options, given.first, report)


if __name__ == "__main__":
    sys.exit(main())
