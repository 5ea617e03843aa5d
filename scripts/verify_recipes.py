"""Convert a model to every recipe of ``ds4 convert``, in both containers, and put each result to verify.sh.

    python scripts/verify_recipes.py                     # the bundled model, all recipes: some minutes
    python scripts/verify_recipes.py --only gguf         # one container
    python scripts/verify_recipes.py -m model.gguf --work /big/disk

Prints a line for each recipe as it is done; exits 0 only if every conversion succeeds and every check passes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ds4.demo import bundled_model_path
from ds4.errors import Ds4Error
from ds4.weights.recipes import DENSE, EXPERTS, Container, Recipe

ROOT = Path(__file__).resolve().parent.parent
_TARGETS: dict[Container, str] = {"gguf": "model.gguf", "safetensors": "model"}


def recipes(container: Container) -> list[Recipe]:
    """Every recipe that the container can hold."""
    found = []
    for recipe in (Recipe(experts, dense) for experts in EXPERTS for dense in DENSE):
        try:
            recipe.check(container)
        except Ds4Error:
            continue
        found.append(recipe)
    return found


def convert(source: Path, target: Path, recipe: Recipe) -> dict[str, Any]:
    """Run ``ds4 convert``; its report, or {"error": its message}."""
    options = ["--experts", recipe.experts, "--dense", recipe.dense, "--json"]
    command = [sys.executable, "-m", "ds4", "convert", str(source), str(target), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    return json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr.strip()}


def verify(model: Path) -> tuple[bool, str]:
    """Run verify.sh on a checkpoint: whether it passed, and its last line."""
    environment = {**_environment(), "MODEL": str(model)}
    done = subprocess.run([str(ROOT / "verify.sh")], capture_output=True, text=True, env=environment)
    return done.returncode == 0, (done.stdout.strip().splitlines() or [done.stderr.strip()])[-1]


def _environment() -> dict[str, str]:
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    return {**os.environ, "PYTHONPATH": path}


def worst(report: dict[str, Any], group: str) -> str:
    """The largest relative error among the tensors of a group: "exact" or "1.2%"."""
    errors = [line["max_relative_error"] for line in report["lines"] if line["group"] == group]
    return f"{max(errors):.2%}" if any(errors) else "exact"


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert a model to every recipe and check the results.")
    parser.add_argument("-m", "--model", type=Path, default=bundled_model_path())
    parser.add_argument("--only", choices=_TARGETS, help="one container (default: both)")
    parser.add_argument("--work", type=Path, help="folder for the results, one at a time (default: a temporary one)")
    args = parser.parse_args()
    head = ("container", "experts", "dense", "MB", "experts", "dense", "s", "verify.sh")
    print("{:<12}{:<9}{:<7}{:>8}  {:<9}{:<9}{:>5}  {}".format(*head), flush=True)
    failed = 0
    for container in [args.only] if args.only else _TARGETS:
        for recipe in recipes(container):
            started = time.monotonic()
            with tempfile.TemporaryDirectory(dir=args.work) as folder:
                target = Path(folder) / _TARGETS[container]
                report = convert(args.model, target, recipe)
                passed, last = (False, report["error"]) if "error" in report else verify(target)
            failed += not passed
            row = f"{container:<12}{recipe.experts:<9}{recipe.dense:<7}"
            if "lines" in report:
                row += f"{report['file_bytes'] / 1e6:8.1f}  {worst(report, 'experts'):<9}{worst(report, 'dense'):<9}"
            print(f"{row}{time.monotonic() - started:5.0f}  {last}", flush=True)
    print("every recipe passes" if not failed else f"{failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
