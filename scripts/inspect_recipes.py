"""``ds4 inspect`` on a full-size header of every public recipe: does its table match, how long, how much memory.

    python scripts/inspect_recipes.py

The files are sparse (scripts/fabricate.py). Expected figures: spec weights.md 6, MB of weights read per token.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import fabricate

COMPONENTS = (
    "attention projections",
    "shared expert",
    "routed gate+up",
    "routed down",
    "compressors",
    "indexer",
    "hyper-connections",
    "router",
    "LM head",
)
# Recipe -> MB per component, in the order above; total of the components.
EXPECTED: dict[str, tuple[tuple[float, ...] | None, int]] = {
    "q2": ((4886.5, 1149.8, 1115.9, 710.1, 520.1, 451.4, 67.8, 90.2, 562.6), 9554),
    "q4": ((4886.5, 1149.8, 2434.8, 1217.4, 520.1, 451.4, 67.8, 90.2, 562.6), 11380),
    "q2-37-42-q4": (None, 9809),  # 9554 + 6/43 of the q4 column's surplus
    "mxfp4-moe": ((4886.5, 1149.8, 2299.5, 1149.8, 520.1, 286.3, 135.5, 90.2, 1059.1), 11577),
    "k128": (None, 10831),
    "k150": (None, 10839),
    "k180": ((4886.5, 1149.8, 2434.8, 710.1, 520.1, 451.4, 67.8, 65.3, 562.6), 10848),
    "official-preview": ((4599.3, 1082.2, 2299.5, 1149.8, 520.1, 275.3, 135.5, 90.2, 1059.1), 11211),
    "official-0731": ((4599.3, 1082.2, 2299.5, 1149.8, 520.1, 275.3, 135.5, 90.2, 1059.1), 11211),
    "modelopt-nvfp4-0731": ((4599.3, 1082.2, 2434.8, 1217.4, 520.1, 275.3, 135.5, 90.2, 1059.1), 11414),
    "0731-reap-k160": ((4599.3, 1082.2, 2299.5, 1149.8, 520.1, 275.3, 135.5, 56.4, 1059.1), 11177),
}


@dataclass(frozen=True)
class Inspected:
    """One run of ``ds4 inspect --json``: its record, seconds from start to end and of CPU, peak resident bytes."""

    record: dict[str, Any]
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def fabricated(recipe: str, directory: Path) -> Path:
    """The recipe's file or folder, made in ``directory``."""
    if recipe in fabricate.GGUF_RECIPES:
        return fabricate.write_gguf(directory / f"{recipe}.gguf", fabricate.GGUF_RECIPES[recipe])
    return fabricate.write_safetensors(directory / recipe, fabricate.SAFETENSORS_RECIPES[recipe])


# Runs the command and then says, on standard error, how much memory the process ever held. Its parent could only ask
# for ru_maxrss, which begins at the parent's own size.
_MEASURED = """
import sys, time
from ds4.cli import main
try:
    main(sys.argv[1:])
finally:
    status = open("/proc/self/status").read()
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    print(time.process_time(), peak, file=sys.stderr)
"""


def inspected(path: Path) -> Inspected:
    """Run the command in a process of its own and measure it; RuntimeError with its message if it fails."""
    command = [sys.executable, "-c", _MEASURED, "inspect", "--json", str(path)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{path}: {done.stderr.strip()}")
    cpu, peak = done.stderr.split()[-2:]
    return Inspected(json.loads(done.stdout), seconds, float(cpu), int(peak) * 1024)


def mismatches(recipe: str, traffic: dict[str, int]) -> list[str]:
    """Where bytes per token differ from the document by more than its last digit."""
    figures, total = EXPECTED[recipe]
    found = {name: traffic[name] / 1e6 for name in COMPONENTS}
    wrong = [] if abs(sum(found.values()) - total) <= 1 else [f"total {sum(found.values()):.1f}, not {total}"]
    for name, figure in zip(COMPONENTS, figures or (), strict=False):
        if abs(found[name] - figure) > 0.06:
            wrong.append(f"{name} {found[name]:.1f}, not {figure}")
    return wrong


def main() -> int:
    failed = 0
    print(
        f"{'recipe':<20} {'file':>9} {'tensors':>8} {'seconds':>8} {'CPU s':>6} {'peak MB':>8} {'MB/token':>9}  table"
    )
    with tempfile.TemporaryDirectory() as folder:
        for recipe in EXPECTED:
            run = inspected(fabricated(recipe, Path(folder)))
            traffic = run.record["bytes_per_token"]
            wrong = mismatches(recipe, traffic)
            slow = run.seconds >= 2 or run.peak_bytes >= 300e6
            failed += bool(wrong or slow)
            tensors = sum(row["count"] for row in run.record["types"])
            total = sum(traffic[name] for name in COMPONENTS) / 1e6
            size, verdict = run.record["total_bytes"] / 1e9, "; ".join(wrong) or "matches"
            used = f"{run.seconds:8.2f} {run.cpu_seconds:6.2f} {run.peak_bytes / 1e6:5.0f}"
            print(f"{recipe:<20} {size:6.1f} GB {tensors:8,} {used} {total:9,.0f}  {verdict}{' TOO MUCH' * slow}")
            print(f"{'':<20} {run.record['generation']}; {run.record['recipe']}")
    print(f"{len(EXPECTED) - failed} of {len(EXPECTED)} recipes in order")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
