"""scripts/acceptance.py: what it counts, and a short run on the bundled model."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import acceptance
from acceptance import Tally

from ds4.demo import bundled_draft_path
from ds4.mtp.drafter import Draft


def test_tally() -> None:
    tally = Tally.empty(2)
    tally.add([Draft(tokens) for tokens in ([1, 2], [2, 9], [8, 4], [4, 5])], [1, 2, 3, 4])
    # Right and right; right and wrong; wrong, so its second token is not looked at; right, and the text ends behind it.
    assert (tally.tried, tally.kept) == ([4, 2], [3, 1])
    twice = tally + tally
    assert twice.summary() == {"drafts": 8, "draft": [0.75, 0.5], "accepted": 1.0}
    sure = Tally.empty(2)
    sure.add([Draft([1, 2], [], [math.log(3), 0.0]), Draft([9, 3], [], [0.0, 50.0])], [1, 2, 3])
    assert sure.summary()["guessed"] == [pytest.approx(0.625), 0.5]  # what comes behind a wrong token is not looked at
    assert Tally.empty(1).summary() == {"drafts": 0, "draft": [None], "accepted": 0.0}


def test_heldout_prompts_are_not_those_of_the_training() -> None:
    from train_demo import SEED

    assert acceptance.SEED != SEED


def test_run_on_the_bundled_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--conversations", "4", "--limit", "30", "--k", "2", "--json"]
    monkeypatch.setattr(sys, "argv", ["acceptance.py", *arguments])
    acceptance.main()
    report = json.loads(capsys.readouterr().out)
    assert set(report["conversations"]) == set(acceptance.KINDS)
    rows = report["acceptance"]
    assert rows["all"]["drafts"] == sum(rows[kind]["drafts"] for kind in acceptance.KINDS) > 20
    assert rows["all"]["draft"][0] >= 0.7


def test_a_head_in_a_file_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--conversations", "4", "--limit", "20", "--k", "5", "--draft-model", str(bundled_draft_path())]
    monkeypatch.setattr(sys, "argv", ["acceptance.py", *arguments])
    acceptance.main()
    lines = capsys.readouterr().out.splitlines()
    assert "dspark.gguf" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == [*acceptance.KINDS, "all", "guessed"]
    assert len(lines[-1].split()) == 1 + 5


def test_more_drafts_than_the_head_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["acceptance.py", "--k", "8"])
    with pytest.raises(SystemExit, match="at most 7 tokens"):
        acceptance.main()
