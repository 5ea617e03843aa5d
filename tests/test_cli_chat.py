"""``ds4 chat`` with a fake engine: history, commands, interruptions, saving."""

from __future__ import annotations

import json
import stat
import sys

import fake_engine
import pytest
from click.testing import CliRunner
from fake_engine import EOS

from ds4.cli import main
from ds4.cli_answer import Printer
from ds4.cli_chat import HELP, write_atomically
from ds4.errors import Ds4Error


@pytest.fixture
def talk(monkeypatch):
    """Run ``ds4 chat`` on lines of input; returns click's result and the fake LLM."""

    def run(*lines: str, script=None, options: tuple[str, ...] = ()):
        module = fake_engine.module(script)
        monkeypatch.setitem(sys.modules, "ds4.engine", module)
        result = CliRunner().invoke(main, ["chat", *options], input="".join(line + "\n" for line in lines))
        llm = module.LLM.made[0]
        for call in llm.calls:
            call["prompt"] = llm.decoded(call["prompt"])
        return result, llm

    return run


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: str) -> dict[str, str]:
    return {"role": "assistant", "content": text, **more}


def test_history_grows_in_one_session(talk):
    result, llm = talk("one", "", "two")
    assert result.exit_code == 0
    assert result.stdout == "Paris\nParis\n"
    # the second prompt holds the tokens of the first answer as they were, closed with EOS, not its text encoded again
    assert [call["prompt"] for call in llm.calls] == [[user("one")], [user("one"), 100, 101, EOS, user("two")]]
    assert len(llm.sessions) == 1
    assert all(call["session"] is llm.sessions[0] for call in llm.calls)
    assert result.stderr.count("tokens/s") == 4


def test_eos_is_not_doubled(talk):
    _, llm = talk("one", "two", script=["Paris", "<eos>"])
    assert llm.calls[1]["prompt"] == [user("one"), 100, EOS, user("two")]


def test_reasoning_changes_the_text_before_it(talk):
    """Dropped reasoning and other modes need the whole conversation encoded again."""
    _, llm = talk("a", "/think", "b", "/nothink", "c", "d", script=["Hm.</think>Paris"])
    said = assistant("Paris", reasoning_content="Hm.")
    plain = assistant("Hm.</think>Paris")
    assert [call["prompt"] for call in llm.calls] == [
        [user("a")],
        [user("a"), plain, user("b")],
        [user("a"), plain, user("b"), said, user("c")],
        [user("a"), plain, user("b"), said, user("c"), 100, EOS, user("d")],
    ]


def test_options_reach_the_engine(talk):
    options = ("--system", "Rhyme.", "--think", "--effort", "high", "-n", "9", "-m", "x.gguf")
    _, llm = talk("one", options=options)
    [call] = llm.calls
    assert call["prompt"] == [{"role": "system", "content": "Rhyme."}, user("one")]
    assert (call["thinking"], call["effort"], call["params"].max_tokens) == (True, "high", 9)
    assert llm.options["path"] == "x.gguf"


def test_help_and_unknown_commands(talk):
    result, llm = talk("/help", "/wat now", "/quit", "never read")
    assert result.exit_code == 0
    assert result.stdout == HELP + "\n"
    assert result.stderr == "ds4: error: unknown command /wat; /help lists the commands\n"
    assert llm.calls == []
    for name in ("/help", "/think", "/nothink", "/reset", "/save", "/quit"):
        assert name in HELP


def test_think_and_nothink(talk):
    script = ["Hm.</think>Paris"]
    result, llm = talk("/think", "a", "/think max", "b", "/think silly", "/nothink", "c", script=script)
    assert [(call["thinking"], call["effort"]) for call in llm.calls] == [(True, None), (True, "max"), (False, None)]
    assert llm.calls[1]["prompt"][1] == assistant("Paris", reasoning_content="Hm.")
    assert "/think takes low, high or max, not silly" in result.stderr
    assert result.stdout.startswith("Hm.\n\nParis\n")


def test_reset_keeps_the_system_message(talk):
    _, llm = talk("one", "/reset", "two", options=("--system", "S"))
    assert llm.calls[1]["prompt"] == [{"role": "system", "content": "S"}, user("two")]
    assert llm.calls[1]["session"] is not llm.calls[0]["session"]
    assert len(llm.sessions) == 2


@pytest.mark.parametrize(("end", "sessions"), [(KeyboardInterrupt(), 2), ("<interrupted>", 1)])
def test_ctrl_c_stops_the_answer_and_not_the_program(talk, end, sessions):
    result, llm = talk("one", "two", script=["Once", " upon", end])
    assert result.exit_code == 0
    assert result.stdout == "Once upon\nOnce upon\n"
    parts = [assistant("Once upon")] if isinstance(end, KeyboardInterrupt) else [100, 101, EOS]
    assert llm.calls[1]["prompt"] == [user("one"), *parts, user("two")]
    assert len(llm.sessions) == sessions  # a step that was broken off leaves a session that nobody should use


def test_ctrl_c_while_printing_keeps_statistics_and_session(talk, monkeypatch):
    """Half of the time a Ctrl-C does not come while the engine computes."""
    show, shown = Printer.show, []

    def once(self, kind, text):
        shown.append(text)
        if len(shown) == 2:
            raise KeyboardInterrupt
        show(self, kind, text)

    monkeypatch.setattr(Printer, "show", once)
    result, llm = talk("one", "two", script=["Once", " upon", " a time"])
    assert result.exit_code == 0
    assert result.stderr.count("(interrupted)") == 1
    assert llm.calls[1]["prompt"] == [user("one"), 100, 101, EOS, user("two")]
    assert len(llm.sessions) == 1


def test_ctrl_c_before_the_first_word_takes_the_question_back(talk):
    _, llm = talk("one", "two", script=[KeyboardInterrupt()])
    assert llm.calls[1]["prompt"] == [user("two")]


def test_ctrl_c_at_the_prompt_drops_the_line(talk, monkeypatch):
    steps = iter([KeyboardInterrupt(), "one", EOFError()])

    def fake_input(_prompt=""):
        step = next(steps)
        if isinstance(step, BaseException):
            raise step
        return step

    monkeypatch.setattr("builtins.input", fake_input)
    result, llm = talk()
    assert result.exit_code == 0
    assert llm.calls[0]["prompt"] == [user("one")]


def test_error_in_a_turn_keeps_the_conversation(talk):
    result, llm = talk("one", "two", script=[Ds4Error("the context is full:\nuse /reset")])
    assert result.exit_code == 0
    assert result.stderr == "ds4: error: the context is full: use /reset\n" * 2
    assert llm.calls[1]["prompt"] == [user("two")]


def test_an_empty_answer_takes_its_question_back(talk):
    _, llm = talk("one", "two", script=["<eos>"])
    assert llm.calls[1]["prompt"] == [user("two")]


def test_a_conversation_that_has_outgrown_the_context(talk):
    result, llm = talk("one", "two", "/reset", "three", options=("--ctx", "4"))
    assert len(llm.calls) == 2
    assert "the conversation has grown to 6 tokens, the context holds 4; /reset starts a new one" in result.stderr


def test_a_checkpoint_without_a_tokenizer_cannot_chat(talk, monkeypatch):
    monkeypatch.setattr(fake_engine.LLM, "tokenizer", None)
    result, _ = talk("one")
    assert result.exit_code == 2
    assert result.stderr == "ds4: error: bundled.gguf: the checkpoint has no tokenizer, so it cannot chat\n"


def test_commands_say_what_they_did(talk):
    result, _ = talk("/think", "/think max", "/nothink", "/reset")
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "reasoning is on",
        "reasoning is on, effort max",
        "reasoning is off",
        "the conversation is forgotten",
    ]


def test_save(talk, tmp_path):
    path = tmp_path / "talk.json"
    path.write_text("old")
    result, _ = talk("héllo", f"/save {path}")
    assert "2 messages saved" in result.stderr
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "model": "bundled.gguf",
        "messages": [user("héllo"), assistant("Paris")],
    }
    assert [p.name for p in tmp_path.iterdir()] == ["talk.json"]


def test_save_errors(talk, tmp_path):
    result, _ = talk("/save", f"/save {tmp_path}/no/where.json", f"/save {tmp_path}")
    lines = result.stderr.splitlines()
    assert result.exit_code == 0
    assert "needs the name of a file" in lines[0]
    assert "No such file or directory" in lines[1]
    assert "directory" in lines[2]
    assert len(lines) == 3
    assert list(tmp_path.iterdir()) == []


def test_half_written_files_do_not_appear(tmp_path, monkeypatch):
    path = tmp_path / "talk.json"
    path.write_text("old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["talk.json"]
    monkeypatch.undo()
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) & 0o400


def test_a_greeting_on_a_terminal(talk, monkeypatch):
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True, raising=False)
    result, _ = talk("/quit")
    assert result.exit_code == 0
    assert "/help" in result.stderr
