"""Every mistake a user can make is one line on standard error and exit code 2 (with a fake engine)."""

from __future__ import annotations

import sys

import fake_engine
import pytest
from click.testing import CliRunner

from ds4.cli import main
from ds4.errors import Ds4Error


@pytest.fixture
def engine(monkeypatch):
    """Install a fake engine; call it with a script to choose the answer."""

    def install(script=None, load_error=None):
        module = fake_engine.module(script, load_error)
        monkeypatch.setitem(sys.modules, "ds4.engine", module)
        return module.LLM

    install()
    return install


def run(*arguments: str, stdin: str | bytes | None = None):
    return CliRunner().invoke(main, arguments, input=stdin)


def fails(result, *words: str) -> None:
    """One clear line on standard error, exit code 2, nothing on standard output."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("ds4: error: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("\n")
    for word in words:
        assert word in result.stderr, result.stderr


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("-n", "0"),
        ("--max-tokens", "-3"),
        ("--max-tokens", "many"),
        ("--ctx", "0"),
        ("--ctx", "1.5"),
        ("--temp", "-0.1"),
        ("--temp", "nan"),
        ("--temp", "inf"),
        ("--top-k", "-1"),
        ("--top-p", "0"),
        ("--top-p", "1.1"),
        ("--top-p", "nan"),
        ("--min-p", "-0.1"),
        ("--min-p", "2"),
        ("--repeat-penalty", "0"),
        ("--repeat-penalty", "nan"),
        ("--seed", "-1"),
        ("--seed", "abc"),
        ("--device", "tpu"),
        ("--numerics", "fast"),
        ("--effort", "some"),
    ],
)
def test_bad_option_value(engine, command, option, value):
    llm = engine()
    arguments = [command, "hi"] if command == "generate" else [command]
    name = "--max-tokens" if option == "-n" else option
    fails(run(*arguments, option, value), name)
    assert llm.made == []  # nothing was loaded


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["generate", "hi", "--wat"], "--wat"),
        (["generate", "hi", "there"], "there"),
        (["generate", "hi", "--temp"], "--temp"),
        (["generate", "hi", "--seed", str(1 << 63)], "seed"),
        (["generate", "hi", "--effort", "max"], "--effort needs --think"),
        (["generate", "hi", "--raw", "--think"], "--think"),
        (["generate", "hi", "--raw", "--system", "x"], "--system"),
        (["generate", ""], "the prompt is empty"),
        (["generate"], "the prompt is empty"),
        (["generate", "a\udcffb"], "not UTF-8"),
        (["generate", "a", "--system", "\udcff"], "not UTF-8"),
        (["paint"], "paint"),
        (["inspect"], "PATH"),
        (["--wat"], "--wat"),
    ],
)
def test_bad_usage(engine, arguments, word):
    llm = engine()
    fails(run(*arguments), word)
    assert llm.made == []


@pytest.mark.parametrize(("option", "kind"), [("--temp", "number"), ("--seed", "whole number")])
def test_bad_numbers_are_called_by_a_name_people_use(engine, option, kind):
    fails(run("generate", "hi", option, "x"), f"'{option}': 'x' is not a valid {kind}.")


def test_standard_input_that_is_no_text(engine):
    fails(run("generate", stdin=b"abc\xff"), "standard input is not UTF-8 text (byte 3)")


def test_no_prompt_on_a_terminal(engine, monkeypatch):
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True, raising=False)
    fails(run("generate"), "no prompt")


@pytest.mark.parametrize("command", [["generate", "hi"], ["chat"]])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (Ds4Error("m.gguf: tensor 'a\nb'\x1b[31m is missing"), ["m.gguf: tensor 'a b' [31m is missing"]),
        (FileNotFoundError(2, "No such file or directory", "no.gguf"), ["no.gguf: No such file or directory"]),
        (PermissionError(13, "Permission denied", "m.gguf"), ["m.gguf: Permission denied"]),
    ],
)
def test_checkpoint_errors_are_one_line(engine, command, error, words):
    engine(load_error=error)
    fails(run(*command), *words)


def test_error_of_the_engine_is_one_line(engine):
    engine([Ds4Error("the prompt has 9000 tokens, the context 8192: shorten it or raise --ctx")])
    fails(run("generate", "hi"), "9000 tokens")


def test_a_bug_is_not_hidden(engine):
    engine([ZeroDivisionError("bug")])
    assert isinstance(run("generate", "hi").exception, ZeroDivisionError)
