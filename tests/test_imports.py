"""Imports go one way, and ``import ds4`` stays light.

    cli -> bench -> engine -> {graph -> mtp, fit -> profiling} -> model -> kernels -> kv -> weights -> config

text, sampling and demo stand apart. The source is parsed, not run, so an import inside a function or under
TYPE_CHECKING counts like any other.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Unit -> units it may import. A unit is a package or module directly under ds4; "root" is ds4/__init__.py.
# Every unit may import errors. kernels take sizes from their tensors: neither kv's nor the model's configuration.
ALLOWED = {
    "errors": set(),
    "config": set(),
    "weights": {"config"},
    "kv": {"weights", "config"},
    "kernels": {"kv", "weights"},
    "model": {"kernels", "kv", "weights", "config"},
    "mtp": {"model", "kernels", "kv", "weights", "config", "sampling"},
    "graph": {"mtp", "model", "kernels", "kv", "weights", "config"},
    "profiling": {"model", "kernels", "kv", "weights", "config"},
    "text": set(),
    "sampling": set(),
    "demo": set(),
    "hub": set(),
    "replacing": set(),
    "fit": {"profiling", "model", "kernels", "kv", "weights", "config"},
    "doctor": {"engine", "kernels"},
    "engine": {
        *("fit", "profiling", "graph", "mtp", "model", "kernels", "kv", "weights", "config"),
        *("text", "sampling", "demo", "hub", "replacing"),
    },
    "bench": {
        *("root", "engine", "doctor", "fit", "profiling", "model", "kernels", "kv", "weights", "config", "sampling"),
    },
    "root": {"engine", "config", "sampling", "weights", "text"},
    "cli": {
        "root",
        "bench",
        "engine",
        "profiling",
        "graph",
        "mtp",
        "model",
        "kernels",
        "kv",
        "weights",
        "config",
        "text",
        "sampling",
        "demo",
        "hub",
        "replacing",
        "fit",
        "doctor",
    },
}
SAME_UNIT = {
    "cli_answer": "cli",
    "cli_bench": "cli",
    "cli_chat": "cli",
    "cli_common": "cli",
    "cli_convert": "cli",
    "cli_doctor": "cli",
    "cli_errors": "cli",
    "cli_inspect": "cli",
    "cli_pull": "cli",
    "cli_verify": "cli",
    "cli_session": "cli",
    "cli_throughput": "cli",
    "__main__": "cli",
    "ahead": "engine",
    "config_keys": "config",
    "draft_length": "engine",
    "generation": "engine",
    "one_answer": "engine",
    "one_answer_matrix": "engine",
    "session": "engine",
    "speculation": "engine",
    "store": "engine",
}


def unit_of(module: str) -> str:
    """The unit of a dotted module name: ds4.kv.rows -> kv, ds4 -> root."""
    parts = module.split(".")
    return "root" if len(parts) == 1 else SAME_UNIT.get(parts[1], parts[1])


def imported(tree: ast.AST, package: str, units: set[str]) -> list[tuple[int, str]]:
    """(line, dotted name) of everything of ds4 that a module imports; ``package`` resolves relative imports."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            # "from ds4 import kv" imports ds4.kv; "from ds4 import LLM" imports ds4 itself
            submodules = [a.name for a in node.names if base == "ds4" and (a.name in units or a.name in SAME_UNIT)]
            found += [(node.lineno, f"ds4.{name}") for name in submodules]
            if len(submodules) < len(node.names):
                found.append((node.lineno, base))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.append((node.lineno, node.args[0].value))
    return [(line, name) for line, name in found if name.split(".")[0] == "ds4"]


def violations(package_dir: Path) -> tuple[list[str], int]:
    """Forbidden imports below ``package_dir`` (a directory called ds4), one line each, and how many files were read."""
    bad, files = [], sorted(package_dir.rglob("*.py"))
    for path in files:
        parts = ["ds4", *path.relative_to(package_dir).with_suffix("").parts]
        package = ".".join(parts[:-1])  # of __init__.py and of a plain module alike
        importer = unit_of(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
        if importer not in ALLOWED:
            bad.append(f"{path.relative_to(package_dir)}: unit {importer} is not in the table of {Path(__file__).name}")
            continue
        may = ALLOWED[importer] | {importer, "errors"}
        for line, name in imported(ast.parse(path.read_text(encoding="utf-8")), package, set(ALLOWED)):
            if unit_of(name) not in may:
                bad.append(f"{path.relative_to(package_dir)}:{line}: {importer} may not import {name}")
    return bad, len(files)


def test_table_has_no_cycle():
    order = list(TopologicalSorter(ALLOWED).static_order())
    for lower, upper in [("weights", "kernels"), ("model", "engine"), ("engine", "cli"), ("kv", "model")]:
        assert order.index(lower) < order.index(upper)


def test_imports_go_one_way():
    bad, n_files = violations(ROOT / "ds4")
    assert n_files > 20
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("where", "code"),
    [
        ("kernels/moe/ref.py", "from ds4.model import moe"),
        ("kernels/moe/ref.py", "import ds4.config"),
        ("kernels/moe/ref.py", "from ...engine import LLM"),
        ("kernels/moe/__init__.py", "from ... import engine"),
        ("kernels/__init__.py", "from ..model.block import Block"),
        ("kv/rows.py", "def f():\n    import ds4.kernels.launch as launch"),
        ("weights/gguf.py", "from ds4 import kv"),
        ("weights/gguf.py", "from ds4 import LLM"),
        ("weights/gguf.py", "import importlib\nimportlib.import_module('ds4.kv.rows')"),
        ("config.py", "from ds4.weights import names"),
        ("mtp/draft.py", "from ds4.graph import capture"),
        ("model/block.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ds4.engine import LLM"),
        ("text/chat.py", "from ds4.config import ModelConfig"),
        ("text/chat.py", "from .. import config"),
        ("sampling.py", "from . import text"),
        ("engine.py", "import ds4.cli_chat"),
        ("errors.py", "import ds4.config"),
        ("new_thing.py", ""),
    ],
)
def test_a_planted_violation_is_found(tmp_path, where, code):
    path = tmp_path / "ds4" / where
    path.parent.mkdir(parents=True)
    path.write_text(code)
    bad, n_files = violations(tmp_path / "ds4")
    assert n_files == 1
    assert len(bad) == 1, bad
    assert bad[0].startswith(where)


@pytest.mark.parametrize(
    ("where", "code"),
    [
        ("kernels/moe/ref.py", "from ds4.weights.formats import nvfp4\nfrom ..proj import ref\nimport torch"),
        ("kernels/moe/__init__.py", "from .ref import moe\nfrom ..errors import x\nfrom ... import errors"),
        ("graph/capture.py", "from ds4.mtp import draft"),
        ("sampling.py", "from ds4.errors import Ds4Error"),
        ("cli_chat.py", "from ds4.cli_common import Options\nfrom ds4 import LLM"),
        ("__main__.py", "from ds4.cli import main"),
    ],
)
def test_allowed_imports_pass(tmp_path, where, code):
    path = tmp_path / "ds4" / where
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert violations(tmp_path / "ds4")[0] == []


def modules_after(code: str) -> set[str]:
    """Names in sys.modules after running ``code`` in a fresh interpreter with this clone's ds4."""
    code += "\nimport sys; print(*sys.modules, sep='\\n')"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    return set(result.stdout.split())


def test_import_ds4_is_light():
    heavy = {"gguf", "safetensors", "tokenizers", "huggingface_hub", "rich", "click", "transformers", "sentencepiece"}
    loaded = modules_after("import ds4")
    assert "ds4" in loaded
    assert not loaded & heavy


def test_import_of_the_command_line_is_light():
    assert not modules_after("import ds4.cli") & {"torch", "numpy", "rich", "gguf", "tokenizers", "ds4.engine"}
