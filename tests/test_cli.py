"""The ``ds4`` command with a fake engine: prompts, options, streams, JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import fake_engine
import pytest
from click.testing import CliRunner

import ds4
from ds4 import cli_answer
from ds4.cli import main

ROOT = Path(__file__).resolve().parent.parent
DRAFT = {"draft": "auto", "draft_model": None}


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


# Help and version


def test_help_and_version():
    for arguments in (["--help"], ["-h"], []):
        result = run(*arguments)
        assert result.exit_code == 0
        assert all(
            name in result.stdout for name in ("generate", "chat", "inspect", "convert", "pull", "doctor", "Example")
        )
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout == f"ds4 {ds4.__version__}\n"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == ds4.__version__


@pytest.mark.parametrize("command", ["generate", "chat", "inspect", "convert", "pull"])
def test_every_command_has_an_example_and_helps_with_every_option(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"ds4 {command} " in result.stdout.split("Example")[1]
    assert all(option.help for option in main.commands[command].params if option.param_type_name == "option")


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["generate", "-n", "0", "x"]])
def test_help_and_option_errors_need_no_torch(arguments):
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('torch' in sys.modules, 'rich' in sys.modules))\n"
        "from ds4.cli import main\n"
        f"main({arguments!r})\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert result.stdout.splitlines()[-1] == "False False", result.stderr


# ds4 generate


def test_generate_streams_text_and_prints_statistics(engine):
    llm = engine()
    result = run("generate", "Capital of France?")
    assert result.exit_code == 0
    assert result.stdout == "Paris\n"
    assert len(result.stderr.splitlines()) <= 2
    for word in ("14 prompt tokens, 28.0 tokens/s", "s from the start", "2 tokens generated, 20.0 tokens/s", "300 MiB"):
        assert word in result.stderr
    [made] = llm.made
    assert made.options == {"path": None, "device": "auto", "ctx": 8192, "numerics": None, **DRAFT}
    [call] = made.calls
    assert call["prompt"] == [{"role": "user", "content": "Capital of France?"}]
    assert (call["thinking"], call["raw"], call["effort"], call["session"]) == (False, False, None, None)


def test_generate_passes_every_option_on(engine):
    llm = engine()
    options = "-m some.gguf --ctx 99 --device cpu --numerics exact -n 7 --temp 0.5 --top-k 3 --top-p 0.9 --min-p 0.1"
    options += " --repeat-penalty 1.1 --seed 5 --think --effort max --draft 3 --draft-model head.gguf"
    result = run("generate", "hi", *options.split())
    assert result.exit_code == 0
    [made] = llm.made
    given = {"draft": "3", "draft_model": "head.gguf"}
    assert made.options == {"path": "some.gguf", "device": "cpu", "ctx": 99, "numerics": "exact", **given}
    [call] = made.calls
    p = call["params"]
    assert (p.max_tokens, p.temperature, p.top_k, p.top_p, p.min_p) == (7, 0.5, 3, 0.9, 0.1)
    assert (p.repetition_penalty, p.seed, call["thinking"], call["effort"]) == (1.1, 5, True, "max")


@pytest.mark.parametrize("command", [["generate", "hi"], ["chat"]])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--draft", "8"], "'8' is not auto, off or a number from 0 to 7"),
        (["--draft", "fast"], "'fast' is not auto, off or a number from 0 to 7"),
        (["--draft", "off", "--draft-model", "x"], "--draft-model needs a draft"),
    ],
)
def test_bad_draft_options_are_one_line(engine, command, options, words):
    result = run(*command, *options)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert words in result.stderr


def test_what_drafting_brought_is_one_more_line():
    from ds4.speculation import DraftStatistics

    counts = {"drafts": 90, "drafted": 120, "accepted": 100, "tokens": 200, "steps": {1: 10, 2: 90}}
    d = DraftStatistics("auto", **counts, draft_seconds=1.0, seconds={1: 1.0, 2: 10.0}, plain_seconds=0.1)
    assert cli_answer.draft_line(d) == (
        "draft auto: 100 of 120 drafted tokens accepted, 2.00 tokens a step; estimated 1.67x plain decoding"
    )
    d.plain_seconds, d.stopped_after = None, 30
    assert cli_answer.draft_line(d).endswith("2.00 tokens a step; ended after 30 tokens: it did not pay")
    statistics = fake_engine.Statistics(draft=d)
    assert cli_answer.statistics_lines(statistics)[2:] == [cli_answer.draft_line(d)]
    assert len(cli_answer.statistics_lines(fake_engine.Statistics())) == 2


def test_nothing_is_said_of_drafting_where_nothing_was_drafted():
    from ds4.speculation import DraftStatistics

    short = DraftStatistics("auto", tokens=4, steps={1: 4}, seconds={1: 0.1}, plain_seconds=0.1)
    assert len(cli_answer.statistics_lines(fake_engine.Statistics(draft=short))) == 2
    short.stopped_after = 3
    [*_, line] = cli_answer.statistics_lines(fake_engine.Statistics(draft=short))
    assert line.endswith("ended after 3 tokens: it did not pay")


def test_generate_system_message(engine):
    llm = engine()
    run("generate", "hi", "--system", "Be brief.")
    assert llm.made[0].calls[0]["prompt"][0] == {"role": "system", "content": "Be brief."}


def test_generate_raw(engine):
    llm = engine(["a</think>", "b"])
    result = run("generate", "Once", "--raw")
    assert result.stdout == "a</think>b\n"  # nothing is parsed away
    assert llm.made[0].calls[0]["prompt"] == "Once"
    assert llm.made[0].calls[0]["raw"]


@pytest.mark.parametrize("arguments", [[], ["-"]])
@pytest.mark.parametrize(("stdin", "prompt"), [("héllo\nyou\n", "héllo\nyou"), ("a\r\n", "a"), ("b\n\n", "b\n")])
def test_generate_prompt_from_standard_input(engine, arguments, stdin, prompt):
    llm = engine()
    assert run("generate", *arguments, stdin=stdin).exit_code == 0
    assert llm.made[0].calls[0]["prompt"][-1]["content"] == prompt


def test_generate_thinking_prints_reasoning_first(engine):
    engine(["Let me ", "see.</th", "ink>", "\n\nPa", "ris"])
    result = run("generate", "hi", "--think")
    assert result.stdout == "Let me see.\n\nParis\n"


def test_reasoning_is_dim_on_a_terminal(engine):
    engine(["Hm.</think>Paris"])
    result = CliRunner().invoke(main, ["generate", "hi", "--think"], color=True)
    assert result.stdout == "\x1b[2mHm.\x1b[0m\n\nParis\n"


def test_control_characters_do_not_reach_a_terminal(engine, monkeypatch):
    engine(["a\x1b[2J", "b\tc\n\x07👩‍🎨"])
    assert run("generate", "hi").stdout != "a\ufffd[2Jb\tc\n\ufffd👩‍🎨\n"
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True, raising=False)
    assert run("generate", "hi").stdout == "a\ufffd[2Jb\tc\n\ufffd👩‍🎨\n"


def test_generate_json(engine):
    engine(["Hm.</think>", "Pârís ", "🎨", "<length>"])
    result = run("generate", "hi", "--think", "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    record = json.loads(result.stdout)
    statistics = record.pop("statistics")
    assert record == {
        "model": "bundled.gguf",
        "prompt": "hi",
        "text": "Pârís 🎨",
        "reasoning": "Hm.",
        "token_ids": [100, 101, 102],
        "finish_reason": "length",
    }
    assert "token_ids" not in statistics
    assert 0 < statistics["seconds_to_first_token"] < 3600
    assert statistics["tokens_per_second"] == 30
    assert statistics["prompt_tokens_per_second"] == 28
    assert statistics["peak_memory_bytes"] == 300 * 2**20
    assert statistics["threads"] >= 1
    assert (statistics["device"], statistics["numerics"]) == ("cpu", "serve")


def test_process_age_counts_from_the_start_of_the_process():
    code = "import time; time.sleep(0.3); from ds4.cli_answer import process_age; print(process_age())"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert 0.29 < float(result.stdout) < 60


def test_process_age_without_proc(monkeypatch):
    monkeypatch.delattr("time.CLOCK_BOOTTIME", raising=False)
    assert cli_answer.process_age() >= 0


@pytest.mark.parametrize("end", [KeyboardInterrupt(), "<interrupted>"])
def test_interrupted_generation_keeps_its_text(engine, end):
    engine(["Once upon", " a", end])
    result = run("generate", "hi")
    assert result.exit_code == 130
    assert result.stdout == "Once upon a\n"
    assert "Traceback" not in result.stderr
    record = json.loads(run("generate", "hi", "--json").stdout)
    assert (record["text"], record["finish_reason"]) == ("Once upon a", "interrupted")
    assert record["token_ids"] == [100, 101]


def test_interrupted_while_loading(engine):
    engine(load_error=KeyboardInterrupt())
    result = run("generate", "hi")
    assert result.exit_code == 130
    assert result.stdout == ""
    assert result.stderr.strip() == ""


def test_closed_pipe_is_quiet():
    code = (
        "import sys\nsys.path.insert(0, 'tests')\nimport fake_engine\n"
        "sys.modules['ds4.engine'] = fake_engine.module(['word\\n'] * 50000)\n"
        "from ds4.cli import main\nmain(['generate', 'hi'])\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=env
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"word\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1
