"""Everything a GPU machine can say about this version of ds4, in less than nine minutes: see docs/gpu.md.

Runs the stages of gpu_stages.py one after another, each in a process of its own with its own time limit; one that
fails, dies or hangs does not keep the next from running. Prints a table last and writes the results as JSON after
every stage. Without a GPU it does what can be done there and says what was not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GPU_LOST = 4  # of gpu_stages.py, which this module does not import: it imports torch
MOST_RESTARTS = 6
TOTAL_S = 525.0

Needs = Literal["", "gpu", "no gpu"]


@dataclass(frozen=True)
class Stage:
    """A stage of gpu_stages.py and the seconds it may take; ``needs`` says on which machines it runs."""

    name: str
    limit_s: float
    needs: Needs = ""


# In the order of how much later stages depend on them. The limits together stay under TOTAL_S where there is a GPU.
STAGES = (
    Stage("machine", 35),
    Stage("doctor", 40),
    Stage("compile", 80, "gpu"),
    Stage("compile", 900, "no gpu"),
    Stage("emulation", 300, "no gpu"),
    Stage("kernels", 100, "gpu"),
    Stage("bench", 50, "gpu"),
    Stage("moe", 40, "gpu"),
    Stage("sanitizer", 35, "gpu"),
    Stage("model", 50, "gpu"),
    Stage("replay", 30, "gpu"),
    Stage("prefill", 65, "gpu"),
)


@dataclass
class Outcome:
    """What became of a stage; ``items`` are the reports of gpu_stages.py."""

    stage: str
    seconds: float = 0.0
    items: list[dict[str, Any]] = field(default_factory=list)

    def count(self, status: str) -> int:
        """How many items ended so: ok, failed or skipped."""
        return sum(item["status"] == status for item in self.items)


def item(name: str, status: str, text: str, data: Any = None) -> dict[str, Any]:
    """A report as gpu_stages.py writes them."""
    return {"item": name, "status": status, "text": text, "data": data}


class Runner:
    """Runs stages. ``log`` gets all they print; ``command`` is what starts a stage, for tests."""

    def __init__(self, log: Path, quick: bool, total_s: float = TOTAL_S, command: list[str] | None = None) -> None:
        self.log, self.quick = log, quick
        self.command = command or [sys.executable, str(ROOT / "scripts" / "gpu_stages.py")]
        self.end = time.monotonic() + total_s

    def run(self, stage: Stage, gpu: bool) -> Outcome:
        """Run a stage to its end or limit, starting it again behind an item that brought its process down."""
        outcome, began = Outcome(stage.name), time.monotonic()
        end = min(began + stage.limit_s, self.end) if gpu else began + stage.limit_s
        first = 0
        for _ in range(MOST_RESTARTS + 1):
            left = end - time.monotonic()
            if left < 1:
                outcome.items.append(item(stage.name, "failed", "no time left"))
                break
            lines, code = self._process(stage, gpu, first, left)
            ended = [line for line in lines if "ends" in line]
            outcome.items += [item(line["item"], line["status"], line["text"], line["data"]) for line in ended]
            if code in (0, 1):
                break
            begun = [line for line in lines if "begins" in line]
            under_way = begun[-1] if len(begun) > len(ended) else {"item": stage.name}
            if code is None:
                outcome.items.append(item(under_way["item"], "failed", f"no end within {stage.limit_s:.0f} s"))
                break
            if code != GPU_LOST or not ended:
                outcome.items.append(item(under_way["item"], "failed", f"exit code {code}: {self._last_words()}"))
            if not begun:
                break
            first = begun[-1]["begins"] + 1
        else:
            outcome.items.append(item(stage.name, "failed", f"given up after {MOST_RESTARTS} restarts"))
        outcome.seconds = time.monotonic() - began
        return outcome

    def _process(self, stage: Stage, gpu: bool, first: int, limit_s: float) -> tuple[list[dict[str, Any]], int | None]:
        """One process: its report's lines and exit code, None where it had to be killed."""
        with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as folder:
            report = Path(folder, "report")
            report.touch()
            command = [*self.command, stage.name, "--report", str(report), "--first", str(first)]
            command += [
                "--seconds",
                f"{limit_s:.0f}",
                *(["--gpu"] if gpu else []),
                *(["--quick"] if self.quick else []),
            ]
            environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": _python_path()}
            with self.log.open("a") as log:
                print(f"$ {' '.join(command)}", file=log, flush=True)
                child = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True,
                )  # fmt: skip
                try:
                    code: int | None = child.wait(limit_s)
                except subprocess.TimeoutExpired:
                    code = None
                finally:  # what the stage started goes with it, also at Ctrl-C
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(child.pid, signal.SIGKILL)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(5)  # a process that hangs inside the driver cannot be killed
            return _lines(report.read_text(errors="replace")), code

    def _last_words(self) -> str:
        """The last line of the log."""
        return (self.log.read_text(errors="replace").strip().splitlines() or ["nothing printed"])[-1][:300]


def _python_path() -> str:
    return os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH", "")) if path)


def _lines(report: str) -> list[dict[str, Any]]:
    """The objects of a report; a last line that was cut is left out."""
    found = []
    for line in report.splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def table(outcomes: list[Outcome]) -> str:
    """One row for each kind of item: the part of its name before a colon."""
    lines = [f"{'':12} {'ok':>5} {'failed':>7} {'skipped':>8} {'s':>6}"]
    for outcome in outcomes:
        kinds = Counter((one["item"].split(":")[0], one["status"]) for one in outcome.items)
        names = list(dict.fromkeys(name for name, _ in kinds))
        for i, name in enumerate(names):
            counts = f"{kinds[name, 'ok']:5} {kinds[name, 'failed']:7} {kinds[name, 'skipped']:8}"
            lines.append(f"{name:12} {counts}" + (f" {outcome.seconds:6.1f}" if i == 0 else ""))
    return "\n".join(lines)


def figures(outcomes: list[Outcome]) -> dict[str, Any]:
    """Bandwidth and benchmark rows of the stages' data, those of the experts apart."""
    items = [one for outcome in outcomes for one in outcome.items if one["status"] == "ok"]
    copies = [one["data"] for one in items if one["item"].startswith("bandwidth:")]
    rows = [row for one in items if one["item"].startswith("bench:") for row in one["data"]]
    experts = [row for one in items if one["item"].startswith("moe:") for row in one["data"]]
    return {"bandwidth": copies[0] if copies else None, "kernels": rows, "moe": experts}


def document(machine: dict[str, Any], outcomes: list[Outcome], started: datetime) -> dict[str, Any]:
    """What goes into the file: the machine, a summary of each stage, all that did not end well, all figures."""
    stages = [
        {
            "stage": outcome.stage,
            "seconds": round(outcome.seconds, 1),
            **{status: outcome.count(status) for status in ("ok", "failed", "skipped")},
            "items": [
                one if one["status"] != "ok" else {"item": one["item"], "text": one["text"]} for one in outcome.items
            ],
        }
        for outcome in outcomes
    ]
    return {
        "started": started.isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "machine": machine,
        "stages": stages,
        **figures(outcomes),
    }


def results_file(machine: dict[str, Any], started: datetime) -> Path | None:
    """<card>-<date>.json in $OUT or benchmarks/results; None without both a GPU and $OUT: nothing worth keeping."""
    folder = os.environ.get("OUT")
    card = machine["gpu"]["name"] if machine.get("gpu") else "no-gpu"
    if not folder and not machine.get("gpu"):
        return None
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    return Path(folder or RESULTS) / f"{name}-{started:%Y-%m-%d-%H%M}.json"


def write(path: Path | None, content: dict[str, Any]) -> None:
    """Write the file whole or not at all."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)


def report(outcomes: list[Outcome], machine: dict[str, Any]) -> None:
    """Print the failures, what was skipped, and the table."""
    skipped = dict.fromkeys(
        f"{one['item']}: {one['text']}"
        for outcome in outcomes
        for one in outcome.items
        if one["status"] == "skipped" and not one["item"].startswith("n_tok:")
    )
    failed = [f"FAILED {one['item']}: {one['text']}" for o in outcomes for one in o.items if one["status"] == "failed"]
    print("\n".join([f"skipped {line}" for line in skipped] + failed[:30]))
    if len(failed) > 30:
        print(f"... and {len(failed) - 30} more, in the JSON file")
    print(table(outcomes))
    if not machine.get("gpu"):
        left_out = ", ".join(stage.name for stage in STAGES if stage.needs == "gpu" and stage.name != "compile")
        print(f"no GPU ({machine.get('why', 'see above')}): not done: {left_out}")


def selected(names: list[str] | None, gpu: bool) -> list[Stage]:
    """The stages to run after "machine"."""
    there = [stage for stage in STAGES[1:] if stage.needs in ("", "gpu" if gpu else "no gpu")]
    return [stage for stage in there if not names or stage.name in names]


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 where nothing failed, else 1."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only see whether the stages work, with very few cases")
    parser.add_argument("--stage", action="append", choices=sorted({s.name for s in STAGES[1:]}), help="only this one")
    given = parser.parse_args(arguments)
    started = datetime.now(UTC)
    kept = os.environ.get("OUT")
    folder = Path(kept) if kept else Path(tempfile.mkdtemp(prefix="gpu-check-"))
    folder.mkdir(parents=True, exist_ok=True)
    runner = Runner(folder / "gpu_check.log", given.quick)
    outcomes = [runner.run(STAGES[0], gpu=False)]
    machine = outcomes[0].items[0]["data"] or {"why": outcomes[0].items[0]["text"]}
    gpu = bool(machine.get("gpu"))
    print(outcomes[0].items[0]["text"], flush=True)
    path = results_file(machine, started)
    for stage in selected(given.stage, gpu):
        outcome = runner.run(stage, gpu)
        outcomes.append(outcome)
        counts = ", ".join(f"{outcome.count(status)} {status}" for status in ("ok", "failed", "skipped"))
        print(f"{stage.name}: {counts}, {outcome.seconds:.1f} s", flush=True)
        write(path, document(machine, outcomes, started))
    found = figures(outcomes)
    if found["kernels"]:
        from bench_kernels import table as bench_table

        print(bench_table(found["kernels"]))
    if found["moe"]:
        from bench_moe import table as moe_table

        print(moe_table(found["moe"]))
    report(outcomes, machine)
    print(f"log: {runner.log}" + (f"; results: {path}" if path else ""))
    return 1 if any(outcome.count("failed") for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
