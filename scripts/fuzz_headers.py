"""Open thousands of damaged checkpoints: each must open or be refused in one line; no crash, hang or large allocation.

    python scripts/fuzz_headers.py            20,000 inputs; exit code 1 if one crashed
    python scripts/fuzz_headers.py --first 7 --count 1     one input again

Memory is limited, so that a length that is believed instead of checked ends in a MemoryError, which counts as a crash.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from weights import fuzzing


def main() -> int:
    parser = argparse.ArgumentParser(description="Open damaged checkpoints and count what becomes of them.")
    parser.add_argument("--count", type=int, default=20_000, help="inputs (20000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first input (0)")
    parser.add_argument("--memory", type=int, default=4, help="limit of address space in GiB (4)")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (args.memory << 30, args.memory << 30))
    console = Console(stderr=True)
    columns = (TextColumn("inputs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task("", total=args.count)
        numbers = range(args.first, args.first + args.count)
        tally = fuzzing.run(Path(folder), numbers, lambda t: bar.update(task, completed=t.inputs))
    for crash in tally.crashes[:20]:
        print(crash)
    print(f"{tally.inputs:,} inputs: {tally.opened:,} opened, {tally.rejected:,} refused, {len(tally.crashes)} crashes")
    print(f"{len(tally.messages)} different messages; the commonest:")
    for message, count in tally.messages.most_common(5):
        print(f"  {count:6,}  {message}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory {peak / 1e6:.0f} MB")
    return int(bool(tally.crashes))


if __name__ == "__main__":
    sys.exit(main())
