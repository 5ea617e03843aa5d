"""The record of ``ds4 bench``: against its JSON schema, as tables, CSV and pictures; as a command."""

from __future__ import annotations

import copy
import csv
import io
import json
import re
import struct
from pathlib import Path

import jsonschema
import pytest
from click.testing import CliRunner

from ds4.bench import plots
from ds4.bench.breakdown import device_breakdown
from ds4.bench.record import CSV_COLUMNS, csv_text
from ds4.bench.text import bench_text
from ds4.cli import main
from ds4.errors import Ds4Error

SCHEMA = json.loads((Path(__file__).parents[2] / "benchmarks/schema/bench.schema.json").read_text())
SHORT = ("--ctx", "128,256", "--tokens", "4", "--repeats", "2", "--chunk", "128", "--prompts", "chat,random")


def run(*arguments: str):
    return CliRunner().invoke(main, ["bench", *arguments])


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A short run of the bundled model, with its files beside it."""
    folder = tmp_path_factory.mktemp("bench")
    result = run(*SHORT, "--json", "--csv", str(folder / "x.csv"), "--plots", str(folder / "plots"))
    assert result.exit_code == 0, result.output
    return {**json.loads(result.stdout), "folder": folder}


@pytest.fixture
def plain(record):
    return {key: value for key, value in copy.deepcopy(record).items() if key != "folder"}


def test_json_follows_the_schema(plain):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(plain, SCHEMA)
    assert [(row["prompt"], row["ctx"]) for row in plain["rows"]] == [
        (prompt, ctx) for prompt in ("chat", "random") for ctx in (128, 256)
    ]
    assert plain["copy"]["copy_gb_s"] > 0
    assert plain["settings"]["draft"] == "auto"


@pytest.mark.parametrize(
    "damage",
    [
        lambda r: r["rows"][0].pop("plain"),
        lambda r: r["rows"][0]["plain"]["tokens_per_second"].update(median=0),
        lambda r: r["rows"][0].update(extra=1),
        lambda r: r.pop("copy"),
        lambda r: r["bytes_per_token"]["step"].update(bytes=1.5),
        lambda r: r["settings"].update(draft="often"),
        lambda r: r["memory"].update(fits=False),
    ],
)
def test_the_schema_refuses(plain, damage):
    damage(plain)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(plain, SCHEMA)


def test_figures_follow_from_each_other(plain):
    for row in plain["rows"]:
        roof, rate = row["roofline"], row["plain"]["tokens_per_second"]["median"]
        assert roof["bytes"] == roof["weight_bytes"] + roof["cache_bytes"] + roof["activation_bytes"]
        assert roof["gb_s"] == pytest.approx(roof["bytes"] * rate / 1e9)
        assert roof["percent"] == pytest.approx(100 * rate / roof["tokens_per_second"])
        assert row["speedup"] == pytest.approx(row["draft"]["tokens_per_second"]["median"] / rate)
    parts = plain["breakdown"]["parts"]
    assert sum(part["us"] for part in parts) == pytest.approx(plain["breakdown"]["step_us"], rel=1e-6)
    assert {part["name"] for part in parts} == {
        *("attention swa", "attention csa", "attention hca", "experts", "hyper-connections", "head", "rest")
    }


def test_bytes_are_those_of_the_plan(plain):
    for row in plain["rows"]:
        planned = json.loads(run("--plan", "--ctx", str(row["ctx"]), "--json").stdout)
        assert row["roofline"]["bytes"] == planned["step"]["bytes"]
        if row["ctx"] == 128:
            assert plain["bytes_per_token"] == planned


def test_tables_fit_narrow_terminals(plain):
    text = bench_text(plain)
    assert max(map(len, text.splitlines())) <= 60
    words = " ".join(text.split())
    for said in (
        "tokens/s ctx prefill",
        "a token ctx",
        "lm_head",
        "a step at 128",
        "hyper-connections",
        "The roofline",
    ):
        assert said in words
    long = copy.deepcopy(plain)
    for row in long["rows"]:
        row["ctx"] = 131072
        for way in ("prefill", "plain", "draft"):
            row[way]["tokens_per_second"] = {"median": 12345.6, "min": 9000.0, "max": 16000.0, "n": 3}
        row["plain"]["joules_per_token"] = 12.25
    assert max(map(len, bench_text(long).splitlines())) <= 60
    assert re.search(r"chat +128K +12346 +28 +12346 +28 +12346 +28 ", bench_text(long))


def test_what_was_not_measured_leaves_gaps(plain):
    plain |= {"bytes_per_token": None, "breakdown": None}
    for row in plain["rows"]:
        row |= {"draft": None, "speedup": None, "roofline": None}
    jsonschema.validate(plain, SCHEMA)
    text = bench_text(plain)
    assert "No bytes and no roofline" in text
    rows = list(csv.DictReader(io.StringIO(csv_text(plain))))
    assert [row["draft_median"] for row in rows] == [""] * 4


def test_notes_of_an_extrapolation_and_of_a_gpu(plain):
    rows = [{"prompt": "random", "ctx": 2048, "bytes": 5, "tokens_per_second": 123.4}]
    plain["extrapolation"] = {"layers": 30, "of": 43, "outside_percent": 5.0, "rows": rows}
    plain["breakdown"] |= {"idle_percent": 12.5, "how": "events on the device"}
    jsonschema.validate(plain, SCHEMA)
    words = " ".join(bench_text(plain).split())
    assert "30 of 43 layers were measured" in words
    assert "2K 123.4" in words
    assert "The GPU waits 12.5% of a plain step." in words


def test_breakdown_of_a_gpu_is_its_profile():
    rows = [
        {"operation": "embed", "us": 2.0, "percent": 20.0, "percent_of_copy": 50.0, "gb_s": 1},
        {"operation": "lm_head", "us": 8.0, "percent": 80.0, "percent_of_copy": 60.0, "gb_s": 1},
    ]
    found = device_breakdown({"position": 7, "operations": rows, "step": {"parts_us": 10.0, "eager_us": 12.5}})
    assert found["idle_percent"] == pytest.approx(20)
    assert (found["step_us"], found["position"]) == (12.5, 7)
    assert found["parts"][1] == {"name": "lm_head", "us": 8.0, "percent": 80.0, "percent_of_copy": 60.0}


def test_csv(record):
    rows = list(csv.DictReader((record["folder"] / "x.csv").open()))
    assert list(rows[0]) == [name for name, _ in CSV_COLUMNS]
    assert [float(row["plain_median"]) for row in rows] == [
        row["plain"]["tokens_per_second"]["median"] for row in record["rows"]
    ]
    assert all(float(row["percent_of_roofline"]) > 0 for row in rows)


def test_plots(record):
    files = {path.name: path for path in (record["folder"] / "plots").iterdir()}
    assert set(files) == {f"{name}.{suffix}" for name in ("context", "step", "roofline") for suffix in ("png", "svg")}
    for name in ("context", "step", "roofline"):
        data = files[f"{name}.png"].read_bytes()
        assert struct.unpack(">II", data[16:24]) == (1040, 585)
        assert len(data) > 10_000
        assert "<svg" in files[f"{name}.svg"].read_text()


def test_plots_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    result = run(*SHORT, "--plots", str(tmp_path / "p"))
    assert result.exit_code == 2
    assert result.stderr == "ds4: error: --plots: matplotlib is not installed; pip install 'ds4[plots]'\n"
    with pytest.raises(Ds4Error):
        plots.draw({}, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--ctx", "2k,1k"), "'2k,1k': each length has to be above the one before"),
        (("--ctx", "2x"), "'2x' is not a number of tokens"),
        (("--prompts", "chat,poem"), "'poem' is not among chat, code, random"),
        (("--ctx", "128,130"), "put these further apart"),
        (("--ctx", "2000000"), "the model's context ends at 1048576"),
        (("--accept", "0.7", "--draft", "off"), "--accept needs drafts"),
        (("--accept", "1.5"), "--accept"),
        (("--layers", "3"), "--layers belongs to --synthetic"),
        (("--skew", "1"), "--skew belongs to --synthetic"),
        (("--synthetic", "q2", "-m", "x.gguf"), "choose one of --model and --synthetic"),
        (("--synthetic", "q3"), "--synthetic q3: no such recipe; there are q2, q4"),
        (("--synthetic", "q2", "--layers", "44"), "--layers 44 is outside 1 to 43"),
        (("--synthetic", "q2", "--layers", "2", "--experts", "5"), "--experts 5 is outside 6 to 256"),
        (("--csv", "no/such/folder/x.csv"), "is no folder; make it first"),
        (("-m", "nowhere.gguf"), "nowhere.gguf"),
        (("--steps", "3"), "--steps belongs to --profile"),
        (("--n-tok", "2"), "--n-tok belongs to --plan and --profile"),
        (("--plan", "--plots", "x"), "--plots does not go with --plan"),
        (("--plan", "--ctx", "1k,2k"), "--ctx: --plan takes one length"),
    ],
)
def test_what_it_refuses(arguments, said):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1
    assert said in result.stderr
