"""``ds4 bench`` as a command: tables and JSON of the bundled model, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from ds4 import cli_bench
from ds4.cli import main
from ds4.errors import Ds4Error


def run(*arguments: str):
    return CliRunner().invoke(main, ["bench", *arguments])


def test_plan_as_a_table():
    result = run("--plan", "--ctx", "1k")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 60
    assert lines[0] == "One step of 1 token at position 1024, in MB."
    launches = next(line.split()[1] for line in lines if line.startswith("step"))
    assert f"launches: {launches} a step, {launches} a token" in lines
    assert any(line.startswith("lm_head") for line in lines)


def test_plan_as_json():
    record = json.loads(run("--plan", "--n-tok", "2", "--json").stdout)
    assert set(record) == {"schema", "n_tok", "position", "distinct_experts", "operations", "layers", "step"}
    assert (record["schema"], record["n_tok"], record["position"]) == (1, 2, 4096)
    amounts = {"calls", "launches", "weight_bytes", "floor_bytes", "cache_bytes", "activation_bytes", "bytes"}
    assert all(set(row) == amounts | {"operation"} for row in record["operations"])
    assert all(set(row) == amounts | {"kind", "layers", "operations_each", "launches_each"} for row in record["layers"])
    assert set(record["step"]) == amounts


def test_dispatch():
    result = run("--dispatch", "--mix", "1:10,2:3")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 60
    assert "Launches in these steps: 10 of 1 token, 3 of 2 tokens." in result.stdout
    record = json.loads(run("--dispatch", "--json").stdout)
    assert set(record) == {"schema", "steps", "rows", "operations"}
    assert record["steps"] == {"1": 1, "2": 1}
    assert all(set(row) == {"operation", "entry", "file", "constants", "launches"} for row in record["rows"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--plan", "--profile"), "choose one of"),
        (("--plan", "--mix", "1:2"), "--mix belongs to --dispatch"),
        (("--profile", "moe", "--run"), "--run belongs to --dispatch"),
        (("--dispatch", "--mix", "1:2,9:1"), "'1:2,9:1' is not a list of tokens:steps"),
        (("--dispatch", "--mix", "1:2,1:3"), "each once"),
        (("--dispatch", "--mix", ""), "is not a list"),
        (("--plan", "--n-tok", "9"), "--n-tok"),
        (("--plan", "--ctx", "1000M"), "have to end within the model's"),
        (("--plan", "-m", "nowhere.gguf"), "nowhere.gguf"),
    ],
)
def test_what_it_refuses(arguments, said):
    result = run(*arguments)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert said in result.stderr


@pytest.mark.parametrize("arguments", [("--profile",), ("--profile", "moe"), ("--dispatch", "--run")])
def test_without_a_gpu(arguments, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "ds4: error: bench: torch finds no GPU to measure on (ds4 doctor says why); --plan and --dispatch need none"
    ]


def test_profile_takes_a_value_or_none(monkeypatch):
    asked = []

    def profiled(wanted):
        asked.append((wanted.profile, wanted.model, wanted.steps))
        raise Ds4Error("seen")

    monkeypatch.setattr(cli_bench, "_profile", profiled)
    for arguments in (("--profile", "-m", "x"), ("--profile", "moe", "--steps", "7"), ("--profile", "step")):
        assert run(*arguments).exit_code == 2
    assert asked == [("step", "x", 50), ("moe", None, 7), ("step", None, 50)]


def test_help_has_examples():
    text = run("--help").stdout
    for example in ("ds4 bench --plan -m", "ds4 bench --dispatch --mix", "ds4 bench --profile moe", "DS4_PROFILE"):
        assert example in text
