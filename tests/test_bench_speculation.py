"""scripts/bench_speculation.py: both ways of decoding in one run, and a text that differs is no benchmark."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import bench_speculation

from ds4.demo import bundled_draft_path
from ds4.engine import Statistics


def test_a_short_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--answers", "1", "--limit", "12", "--draft", "1", "--json"]
    monkeypatch.setattr(sys, "argv", ["bench_speculation.py", *arguments])
    bench_speculation.main()
    record = json.loads(capsys.readouterr().out)
    assert (record["answers"], record["tokens"], record["kind"], record["draft"]) == (1, 11, "story", "1")
    assert record["speedup"] == record["draft_tokens_per_second"] / record["plain_tokens_per_second"]
    assert 0 < record["mean_accepted"] <= 1


def test_a_head_of_its_own_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    head = str(bundled_draft_path())
    arguments = ["--answers", "1", "--limit", "12", "--draft", "3", "--draft-model", head, "--json"]
    monkeypatch.setattr(sys, "argv", ["bench_speculation.py", *arguments])
    bench_speculation.main()
    record = json.loads(capsys.readouterr().out)
    assert record["draft_model"] == head
    assert 0 < record["mean_accepted"] <= 3


def test_texts_that_differ_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"off": [1, 2], "auto": [1, 3]}
    monkeypatch.setattr(bench_speculation, "decode", lambda llm, p, draft, n: Statistics(token_ids=made[draft]))
    with pytest.raises(SystemExit, match="differ"):
        bench_speculation.both(None, [1], "auto", 2, plain_first=True)  # type: ignore[arg-type]
