"""``ds4 generate --session`` and ``/save``, ``/load`` of ``ds4 chat``, on the bundled model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from ds4 import store
from ds4.cli import main
from ds4.cli_chat import HELP
from ds4.demo import bundled_model_path
from ds4.engine import LLM
from ds4.sampling import SamplingParams

TALE = "Once upon a time there was a robot who wanted to learn to paint."


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.ds4"


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [*arguments, "--ctx", "512"], input=stdin)


def generated(prompt: str, path: Path, *more: str, n: int = 8) -> dict[str, Any]:
    result = run("generate", prompt, "--session", str(path), "--json", "-n", str(n), *more)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return json.loads(result.stdout)


def fails(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("ds4: error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr, result.stderr


# ds4 generate --session


def test_a_text_goes_on(path: Path) -> None:
    """The second call processes what is new, and says what it would say if the session had stayed in memory."""
    first = generated(TALE, path, "--raw", n=20)
    assert first["statistics"]["cached_tokens"] == 0
    kept = store.Saved(path).record.tokens
    assert kept == first["statistics"]["prompt_tokens"] + len(first["token_ids"]) - 1
    longer = TALE + first["text"] + " Then the robot"
    second = generated(longer, path, "--raw")
    llm = LLM(ctx=512)
    session = llm.session()
    for prompt, n, answer in ((TALE, 20, first), (longer, 8, second)):
        *_, statistics = llm.generate(prompt, SamplingParams(max_tokens=n), raw=True, session=session)
        assert statistics.token_ids == answer["token_ids"]
        assert statistics.cached_tokens == answer["statistics"]["cached_tokens"]
    assert second["statistics"]["cached_tokens"] == kept
    assert session.ids == store.Saved(path).session(llm).ids


def test_the_last_tokens_may_be_other_ones(path: Path) -> None:
    """A question asked again in another way: what came after the common beginning is undone."""
    first = generated(TALE, path, "--raw", n=2)
    ids = LLM().encode_prompt(TALE, raw=True)
    again = generated(TALE, path, "--raw", n=2)
    assert again["statistics"]["cached_tokens"] == len(ids) - 1
    # The prompt's last token comes from the prefill form both times, so the answer is the same bit for bit.
    assert again["token_ids"] == first["token_ids"]


def test_a_prompt_that_begins_otherwise_starts_anew(path: Path) -> None:
    generated(TALE, path, "--raw", n=20)
    result = run("generate", "What is 2+2? One word.", "--session", str(path), "-n", "4")
    assert result.exit_code == 0
    assert result.stdout.startswith("Four")
    assert re.match(rf"{path}: only [01] of its 3\d tokens begin this prompt, so it starts anew\n", result.stderr)
    assert f"tokens saved to {path}, " in result.stderr
    assert store.Saved(path).record.tokens < 30


def test_the_summary_says_how_many_were_cached(path: Path) -> None:
    generated(TALE, path, "--raw", n=3)
    n = store.common_beginning(LLM().load_session(path), LLM().encode_prompt(TALE + " And", raw=True))
    assert n > 10
    result = run("generate", TALE + " And", "--raw", "--session", str(path), "-n", "3")
    assert f"prompt tokens ({n} cached), " in result.stderr


def test_a_session_of_another_model_is_refused(path: Path, golden: Path) -> None:
    session = LLM(golden / "tiny", ctx=64).session()
    session.prefill([5, 6, 7])
    session.save(path)
    before = path.read_bytes()
    fails(run("generate", "hi", "--session", str(path)), str(path), "belongs to another checkpoint (tiny)")
    assert path.read_bytes() == before


def test_other_refusals(path: Path, tmp_path: Path) -> None:
    fails(run("generate", "hi", "--session", str(tmp_path)), "is a directory")
    fails(run("generate", "hi", "--session", str(tmp_path / "no" / "a")), "there is no directory")
    path.write_text("text")
    fails(run("generate", "hi", "--session", str(path)), "no session file")
    assert path.read_text() == "text"


def test_a_session_larger_than_the_context(path: Path) -> None:
    generated(TALE, path, "--raw", n=20)
    result = CliRunner().invoke(main, ["generate", "hi", "--session", str(path), "--ctx", "16"])
    fails(result, "ctx: ", "raise --ctx above")


def test_ctrl_c_in_the_prompt_leaves_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generated(TALE, path, "--raw", n=2)
    before = path.read_bytes()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ds4.model.transformer.Transformer.prefill", interrupted)
    result = run("generate", TALE + " And", "--raw", "--session", str(path))
    assert result.exit_code == 130
    assert path.read_bytes() == before


def test_help_at_60_columns() -> None:
    text = CliRunner().invoke(main, ["generate", "--help"], terminal_width=60).stdout
    assert "--session FILE" in text
    assert "ds4 generate --raw --session tale.ds4 < tale.txt" in text
    assert max(len(line) for line in HELP.splitlines() if "/save" in line or "/load" in line or "json" in line) <= 60


# ds4 chat


def chat(*lines: str) -> Result:
    result = run("chat", "-n", "24", stdin="".join(line + "\n" for line in lines))
    assert result.exit_code == 0, result.output
    return result


def test_a_conversation_goes_on_as_if_it_had_not_stopped(path: Path) -> None:
    questions = ["What is 2+2? One word.", "What is the capital of France? One word.", "What is 3+4? One word."]
    whole = chat(*questions)
    first = chat(*questions[:2], f"/save {path}")
    second = chat(f"/load {path}", questions[2])
    assert first.stdout + second.stdout == whole.stdout
    assert f"4 messages saved to {path}, " in first.stderr
    assert f"4 messages loaded from {path}, " in second.stderr
    cached = [line.split("(")[1].split(" cached")[0] for line in second.stderr.splitlines() if "cached" in line]
    assert [f"({n} cached)" in whole.stderr for n in cached] == [True]  # the same number as without a break
    assert store.Saved(path).record.notes["messages"][0] == {"role": "user", "content": questions[0]}


def test_a_conversation_with_reasoning(path: Path) -> None:
    chat("/think high", "What is 2+2?", f"/save {path}")
    result = chat(f"/load {path}", "/save " + str(path.with_suffix(".json")))
    messages = json.loads(path.with_suffix(".json").read_text())["messages"]
    assert messages == store.Saved(path).record.notes["messages"]
    assert store.Saved(path).record.notes["effort"] == "high"
    assert "2 messages loaded" in result.stderr


def test_what_chat_refuses(path: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.ds4"
    generated(TALE, text, "--raw", n=2)
    damaged = tmp_path / "damaged"
    damaged.write_bytes(text.read_bytes()[:-1])
    lines = ["/load", f"/load {path}", f"/load {text}", f"/load {damaged}", f"/load {tmp_path}/a.json"]
    result = chat("What is 2+2? One word.", *lines, "What is 3+4? One word.")
    errors = [line for line in result.stderr.splitlines() if line.startswith("ds4: error: ")]
    assert len(errors) == len(lines)
    words = ["needs the name", "no such file", "holds no conversation", "damaged", "under a name without .json"]
    assert all(word in error for word, error in zip(words, errors, strict=True)), errors
    assert " cached)" in result.stderr  # the conversation went on where it was


def test_a_conversation_is_not_overwritten_by_generate(path: Path) -> None:
    chat("What is 2+2? One word.", f"/save {path}")
    before = path.read_bytes()
    fails(run("generate", "hi", "--session", str(path)), "holds a conversation; /load it in ds4 chat")
    assert path.read_bytes() == before


def test_nothing_of_a_forgotten_conversation_is_saved(path: Path) -> None:
    chat("What is 2+2? One word.", "/reset", f"/save {path}")
    record = store.Saved(path).record
    assert (record.tokens, record.notes["messages"]) == (0, [])
    assert bundled_model_path().name == record.model
    assert chat(f"/load {path}", "What is 2+2? One word.").stdout.startswith("Four")
