"""Runs cases of registered operations under a sanitizer: for the tests, and by hand while writing a kernel.

python -m tests.cuemu.sanitize --mode tsan --op mhc_boundary --case smoke_2
"""

from __future__ import annotations

import argparse
import sys

import torch

from ds4.kernels import registry
from ds4.kernels.cases import Case
from ds4.kernels.registry import Operation
from ds4.kernels.verify import check_launches

from .backend import CpuBackend, missing
from .builder import MODES, Mode
from .errors import CuemuError
from .module import ORDERS

CPU = torch.device("cpu")


def sanitized(operation: Operation, case: Case, mode: Mode, order: str = "warps", seed: int = 0) -> list[str]:
    """What is wrong with ``operation`` on ``case`` in this mode and thread order, one line a finding; empty where all
    is well: findings of the sanitizer or the scheduler, else differences from the reference."""
    try:
        return check_launches(operation, case, CpuBackend(mode, order, seed), CPU, seed)
    except CuemuError as error:
        return [f"{operation.name}/{case.name} under {mode}, order {order}, seed {seed}: {error}"]


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 where nothing was found, 1 with the findings printed, 2 for a wrong name or a missing tool."""
    parser = argparse.ArgumentParser(prog="python -m tests.cuemu.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--op", required=True, help="name of a registered operation")
    parser.add_argument("--case", help="name of one of its cases; all of group smoke and edges without")
    parser.add_argument("--order", choices=ORDERS, default="warps")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    lacking = missing(options.mode)
    if lacking:
        print(lacking, file=sys.stderr)
        return 2
    try:
        operation = registry.get(options.op)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    cases = operation.cases()
    chosen = [c for c in cases if (c.name == options.case if options.case else c.group in ("smoke", "edges"))]
    if not chosen:
        print(f"{options.op} has no such case; there are: {', '.join(c.name for c in cases)}", file=sys.stderr)
        return 2
    findings = []
    for case in chosen:
        findings += sanitized(operation, case, options.mode, options.order, options.seed)
    print("\n".join(findings) if findings else f"{len(chosen)} cases under {options.mode}: nothing found")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
