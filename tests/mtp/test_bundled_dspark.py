"""The bundled DSpark head, trained: the answer is the plain one, most drafts are right, and its confidence means it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from acceptance import KINDS, Tally, measure

from ds4 import LLM, SamplingParams, Statistics, one_answer, one_answer_matrix
from ds4.cli import main
from ds4.demo import bundled_draft_path
from ds4.mtp.dspark import DSparkDrafter
from ds4.one_answer_matrix import RESUMES, Mode

QUESTIONS = ("Tell me a short story about a robot learning to paint.", "What is 23 plus 48?")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(draft_model=bundled_draft_path(), ctx=512)


@pytest.fixture(scope="module")
def tally(llm: LLM) -> Tally:
    """A handful of held-out conversations of each kind."""
    with torch.inference_mode():
        tallies = measure(llm, dict.fromkeys(KINDS, 2), 5, 78_000_001, 60)
    return sum(tallies.values(), Tally.empty(5))


def test_the_file_is_small_and_goes_with_the_bundled_model(llm: LLM) -> None:
    assert bundled_draft_path().stat().st_size < 6e6
    assert llm.checkpoint.warnings == ()
    drafter = llm.session().drafter
    assert isinstance(drafter, DSparkDrafter)
    assert drafter.max_tokens == 5


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("draft", [1, 5, "auto"])
def test_the_answer_is_the_plain_one(llm: LLM, question: str, draft: int | str) -> None:
    prompt = llm.encode_prompt(question)

    def answer(draft: int | str) -> Statistics:
        *_, statistics = llm.generate(prompt, SamplingParams(max_tokens=60), draft=draft)
        assert isinstance(statistics, Statistics)
        return statistics

    s = answer(draft)
    assert s.token_ids == answer(0).token_ids
    assert s.draft is not None
    if draft != "auto" and len(s.token_ids) > 10:  # a short answer may end before anything is drafted
        assert s.draft.accepted > 0
        assert draft == 1 or s.draft.accepted < s.draft.drafted


def test_generate_with_the_file() -> None:
    """``ds4 generate --draft-model``: the text without drafts, from drafts of which some are right and some are not."""

    def run(*options: str) -> dict:
        arguments = ["generate", QUESTIONS[0], "--max-tokens", "60", "--json", *options]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    drafted, plain = run("--draft", "5", "--draft-model", str(bundled_draft_path())), run("--draft", "off")
    assert (drafted["text"], drafted["token_ids"]) == (plain["text"], plain["token_ids"])
    draft = drafted["statistics"]["draft"]
    assert 0 < draft["accepted"] < draft["drafted"]


def test_most_drafts_are_right(tally: Tally) -> None:
    """86% of first tokens, and 2.8 tokens of a block; docs/demo-model.md has the figures of many conversations."""
    assert tally.tried[0] > 120
    assert tally.kept[0] >= 0.75 * tally.tried[0]
    assert sum(tally.kept) >= 2.2 * tally.tried[0]


def test_confidence_is_what_it_says(tally: Tally) -> None:
    """Its mean over the tokens that count is near their share of accepted ones: within 0.04 for the first three."""
    for place in range(3):
        assert abs(tally.guessed[place] - tally.kept[place]) <= 0.1 * tally.tried[place]


def test_one_answer(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """``ds4 verify --one-answer`` with few tokens and ways: blocks kept whole and cut, chunked, rewound, restored."""
    monkeypatch.setattr(one_answer, "_RUN_TOKENS", 30)
    monkeypatch.setattr(one_answer_matrix, "LENGTHS", (3, 5))
    monkeypatch.setattr(one_answer, "modes", lambda llm: [Mode("k = 5", 5), Mode("auto", "auto")])
    report = one_answer.verify_one_answer(llm, 120)
    assert report.mismatches == 0
    assert report.tokens >= 120
    assert {cell.resume for cell in report.cells} == set(RESUMES)
    assert sum(cell.accepted for cell in report.cells) > 0
    assert sum(cell.rejected for cell in report.cells) > 0
