"""``ds4 verify``: its options, its table in narrow terminals, its exit code."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from ds4 import engine, one_answer, one_answer_matrix
from ds4.cli import main
from ds4.one_answer import Cell, Mismatch, Report


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Report:
    """What the comparison will report; the arguments it was called with are in ``calls``."""
    cells = [
        Cell("off", None, "live", 2, 200),
        Cell("k = 7", 64, "live", 2, 12_345, 6_000, 20_000),
        Cell("k = 7", 3, "restored", 2, 200, 100, 50),
    ]
    report = Report(cells=cells, prompts=2, seconds=61.4)
    monkeypatch.setattr(engine, "LLM", lambda *args, **options: calls.append((args, options)))
    monkeypatch.setattr(one_answer, "verify_one_answer", lambda llm, n, progress: calls.append(n) or report)
    calls.clear()
    return report


calls: list = []


def run(*arguments: str):
    return CliRunner(env={"COLUMNS": "60"}).invoke(main, ["verify", *arguments])


def test_the_table_fits_60_columns(found: Report) -> None:
    result = run("--one-answer", "-m", "x.gguf", "--draft-model", "y.gguf", "--tokens", "77")
    assert result.exit_code == 0, result.output
    (where, options), n = calls
    assert (where, n) == (("x.gguf",), 77)
    assert options == {"device": "auto", "draft_model": "y.gguf", "on_load": options["on_load"], "sessions": 3}
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 60
    assert lines[0].split() == ["draft", "resumed", "tokens", "accepted", "rejected", "differ"]
    assert lines[1].split() == ["off", "live", "200", "-", "-", "0"]
    assert lines[2].split() == ["k", "=", "7", "live", "12,345", "6,000", "20,000", "0"]
    assert lines[3].split() == ["restored", "200", "100", "50", "0"]
    text = " ".join(result.stdout.split())
    assert "12,745 tokens compared in 3 cells, 2 prompts, chunks whole, 3, 64; 0 runs differ; 61 s" in text
    assert "One answer:" in text


def test_a_mismatch_is_shown_with_both_rows_and_fails(found: Report) -> None:
    found.cells[1].mismatches = 1
    where = ("k = 7", 64, "live", "story", 129, 140)
    found.first_mismatch = Mismatch(*where, 2, 1, [0.0, 1.5, 2.0], [0.0, 1.5, 1.25])
    found.problems = ["draft k = 7: differs"] * 9
    result = run("--one-answer")
    assert result.exit_code == 1
    assert calls[-1] == 50_000
    text = " ".join(result.stdout.split())
    assert "draft k = 7, chunk 64, live, story prompt of 129 tokens, position 140: token 2, plain 1" in text
    assert "1 of 3 logits differ, by up to 0.75" in text
    assert "logits: 2: 2, 1: 1.5, 0: 0 plain: 1: 1.5, 2: 1.25, 0: 0" in text
    assert "and 4 more problems" in text
    assert text.endswith("FAILED")
    found.first_mismatch = Mismatch(*where, 2, 1, [], [0.0, 1.5, 1.25])
    result = run("--one-answer", "--device", "cuda")
    assert calls[-2][1]["device"] == "cuda"
    text = " ".join(result.stdout.split())
    assert "position 140: token 2, plain 1 draft k = 7: differs" in text
    found.first_mismatch = Mismatch(*where, 2, 1, [0.0, 1.5, 2.0], [0.0, 1.5, 1.25])
    result = run("--one-answer", "--json")
    assert result.exit_code == 1
    record = json.loads(result.stdout)
    assert record["first_mismatch"]["expected_logits"] == [0.0, 1.5, 1.25]
    assert record["mismatches"] == 1
    assert len(record["problems"]) == 9


def test_errors_are_one_line() -> None:
    for arguments, words in (
        ([], "choose what to verify: --one-answer"),
        (["--one-answer", "--tokens", "0"], "--tokens"),
        (["--one-answer", "-m", "no.gguf"], "no.gguf: no such file or directory"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
        assert words in result.stderr


def test_a_small_run_of_the_real_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_answer_matrix, "LENGTHS", (5,))
    result = run("--one-answer", "--tokens", "100", "--json")
    record = json.loads(result.stdout)
    assert record["mismatches"] == 0
    assert record["tokens"] >= 100
    assert result.exit_code == (1 if record["problems"] else 0)
