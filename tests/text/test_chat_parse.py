"""Completions back to messages: golden vectors, round trips, what real models do, and streams cut anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4.text import templates as t
from ds4.text.chat import encode_messages
from ds4.text.chat_parse import ChatParseError, StreamParser, parse_message

SETTINGS = settings(max_examples=300, deadline=None)
OPEN, CLOSE = "<｜DSML｜tool_calls>\n", "</｜DSML｜tool_calls>"


def invoke(name: str, body: str) -> str:
    return f'<｜DSML｜invoke name="{name}">\n{body}</｜DSML｜invoke>\n'


def param(name: str, value: str, string: str = ' string="true"') -> str:
    return f'<｜DSML｜parameter name="{name}"{string}>{value}</｜DSML｜parameter>\n'


def calls_of(message: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message["tool_calls"]]


def completion_of(message: dict[str, Any], thinking: bool) -> str:
    """What the model would have to write for the encoder to render ``message`` so."""
    question = {"role": "user", "content": "q"}
    whole = encode_messages([question, message], thinking=thinking)
    return whole.removeprefix(encode_messages([question], thinking=thinking))


def test_parse_vectors(golden: Path) -> None:
    rows = json.loads((golden / "chat" / "parse_vectors.json").read_text(encoding="utf-8"))
    assert len(rows) == 10
    n_errors = n_rendered = 0
    for row in rows:
        thinking = row["thinking_mode"] == "thinking"
        if row.get("error"):
            n_errors += 1
            with pytest.raises(ChatParseError):
                parse_message(row["text"], thinking=thinking, strict=True)
            parse_message(row["text"], thinking=thinking)  # lenient never fails
            continue
        parsed = parse_message(row["text"], thinking=thinking, strict=True)
        assert parsed == row["parsed"], row["name"]
        assert parse_message(row["text"], thinking=thinking) == parsed, row["name"]
        if row["name"] != "no_params":  # the encoder writes an empty line there, the vector has none
            n_rendered += 1
            assert completion_of(parsed, thinking) == row["text"], row["name"]
    assert (n_errors, n_rendered) == (4, 5)


def test_completions_of_the_encode_vectors(golden: Path) -> None:
    """The last answer of every golden prompt parses strictly and renders to the same text again."""
    rows = json.loads((golden / "chat" / "encode_vectors.json").read_text(encoding="utf-8"))
    prompts = [(row["prompt"], row["thinking_mode"] == "thinking") for row in rows]
    for number in (1, 2, 3):
        prompts.append(((golden / "chat" / f"test_output_{number}.txt").read_bytes().decode(), True))
    n_answers = 0
    for prompt, thinking in prompts:
        _, _, answer = prompt.rpartition(t.ASSISTANT)
        if not answer.endswith(t.EOS):
            continue
        completion = answer.removeprefix(t.THINK if thinking else t.THINK_END)
        parsed = parse_message(completion, thinking=thinking, strict=True)
        assert parse_message(completion, thinking=thinking) == parsed
        assert completion_of(parsed, thinking) == completion
        n_answers += 1
    assert n_answers >= 6


plain = st.text(st.characters(exclude_characters="<>/｜", exclude_categories=["Cs"]))
names = st.text(st.characters(categories=["L", "N"]), min_size=1)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=5,
)
tool_calls = st.lists(st.tuples(names, st.dictionaries(names, values, min_size=1, max_size=3)), max_size=3)


@SETTINGS
@given(content=plain, reasoning=plain, calls=tool_calls, thinking=st.booleans())
def test_round_trip(content: str, reasoning: str, calls: list[tuple[str, dict[str, Any]]], thinking: bool) -> None:
    message = {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning if thinking else "",
        "tool_calls": [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls],
    }
    text = completion_of(message, thinking)
    for strict in (True, False):
        parsed = parse_message(text, thinking=thinking, strict=strict)
        assert {key: parsed[key] for key in ("role", "content", "reasoning_content")} == {
            key: message[key] for key in ("role", "content", "reasoning_content")
        }
        assert calls_of(parsed) == calls
        assert completion_of(parsed, thinking) == text


BLOCK = OPEN + invoke("f", param("x", "1")) + CLOSE


@pytest.mark.parametrize(
    ("text", "thinking"),
    [
        (f"r\n\n{BLOCK}{t.EOS}", True),  # a tool block inside the reasoning
        (f"a\n\n{BLOCK}", False),  # the end without EOS
        (f"a{BLOCK}{t.EOS}", False),  # no blank line before the block: a DSML token in the content
        (f"a{t.EOS}b", False),
        (f"a{t.THINK_END}b{t.EOS}", False),
        (f"a{t.THINK}b</think>c{t.EOS}", True),
        (f"a{t.BOS}{t.EOS}", False),
        (f"\n\n{OPEN}{t.EOS}", False),
        (f"\n\n{OPEN}{invoke('f', param('x', '1'))}", False),
        (f"\n\n{OPEN} {invoke('f', '')}{CLOSE}{t.EOS}", False),
        (f"\n\n{OPEN}{invoke('f', param('x', '1') + param('x', '2'))}{CLOSE}{t.EOS}", False),
        (f"\n\n{OPEN}{invoke('f', param('x', '1') + ' ')}{CLOSE}{t.EOS}", False),
        (f"\n\n{OPEN}{invoke('f', '{}')}{CLOSE}{t.EOS}", False),
        (f"\n\n{OPEN}<｜DSML｜invoke>\n</｜DSML｜invoke>\n{CLOSE}{t.EOS}", False),
        (f"\n\n{OPEN}{invoke('f', param('x', 'a /｜DSML｜parameter b'))}{CLOSE}{t.EOS}", False),
    ],
)
def test_strict_refuses(text: str, thinking: bool) -> None:
    with pytest.raises(ChatParseError) as caught:
        parse_message(text, thinking=thinking, strict=True)
    assert "\n" not in str(caught.value)
    parse_message(text, thinking=thinking)


@pytest.mark.parametrize(
    ("body", "calls"),
    [
        (invoke("f", param("x", "a")), [("f", {"x": "a"})]),
        ("  \n" + invoke("f", "\n " + param("x", "a") + "\n") + "\n", [("f", {"x": "a"})]),
        (invoke("f", '{"x": [1, "é"]}\n'), [("f", {"x": [1, "é"]})]),
        (invoke("f", "\n"), [("f", {})]),
        (invoke("f", param("x", "[1, 2", ' string="false"')), [("f", {"x": "[1, 2"})]),
        (invoke("f", param("x", "NaN", ' string="false"')), [("f", {"x": "NaN"})]),
        (invoke("f", param("x", "[" * 100_000, ' string="false"')), [("f", {"x": "[" * 100_000})]),
        (invoke("f", '{"x": ' * 100_000) + invoke("g", ""), [("g", {})]),
        (invoke("f", '{"x": NaN}') + invoke("g", ""), [("g", {})]),
        (invoke("f", param("x", " 7 ", ' string="false"')), [("f", {"x": 7})]),
        (invoke("f", param("x", "7", "") + param("y", "no", "")), [("f", {"x": 7, "y": "no"})]),
        (invoke("f", param("x", "a") + param("x", "b")), [("f", {"x": "b"})]),
        (invoke("f", '{"x": ') + invoke("g", ""), [("g", {})]),
        (invoke("f", param("x", "</｜DSML｜invoke>")), [("f", {"x": "</｜DSML｜invoke>"})]),
    ],
)
def test_lenient_calls(body: str, calls: list[tuple[str, Any]]) -> None:
    for end in (CLOSE, CLOSE + t.EOS, ""):
        message = parse_message(f"text\n\n{OPEN}{body}{end}", thinking=False)
        assert message["content"] == "text"
        assert calls_of(message) == calls


@pytest.mark.parametrize("gap", ["", "\n", "\n\n"])
def test_lenient_gap_before_the_block(gap: str) -> None:
    message = parse_message(f"text{gap}{BLOCK}{t.EOS}", thinking=False)
    assert (message["content"], calls_of(message)) == ("text", [("f", {"x": "1"})])


def test_lenient_thinking() -> None:
    skipped = parse_message(f"why\n\n{BLOCK}{t.EOS}", thinking=True)
    assert (skipped["reasoning_content"], skipped["content"]) == ("why", "")
    assert calls_of(skipped) == [("f", {"x": "1"})]
    cut_off = parse_message("still thinking", thinking=True)
    assert (cut_off["reasoning_content"], cut_off["content"]) == ("still thinking", "")


def test_lenient_cut_off_call() -> None:
    whole, part = (
        invoke("f", param("x", "1")),
        '<｜DSML｜invoke name="g">\n<｜DSML｜parameter name="y" string="true">ab',
    )
    assert calls_of(parse_message(f"a\n\n{OPEN}{whole}{part}", thinking=False)) == [("f", {"x": "1"})]
    nothing = parse_message(f"a\n\n{OPEN}{part}", thinking=False)
    assert nothing["tool_calls"] == []
    assert nothing["content"] == f"a{OPEN}{part}"


def test_lenient_time_is_bounded() -> None:
    """Half-open tags in great number must not make the search explode."""
    flood = '<｜DSML｜invoke name="a">\n<｜DSML｜parameter name="x" string="true">' * 10000
    assert parse_message(f"\n\n{OPEN}{flood}", thinking=False)["tool_calls"] == []


fragments = st.sampled_from(
    [
        "a",
        "\n",
        "<",
        "</",
        "</think>",
        "<think>",
        t.EOS,
        t.CALLS_OPEN,
        f"\n\n{BLOCK}",
        BLOCK,
        "</｜DSML｜",
        "<｜",
        "\n\n<｜DSML｜tool",
    ]
)


@SETTINGS
@given(texts=st.lists(fragments, max_size=12), cuts=st.lists(st.integers(1, 9)), thinking=st.booleans())
def test_stream_does_not_depend_on_the_cuts(texts: list[str], cuts: list[int], thinking: bool) -> None:
    text = "".join(texts)

    def joined(pieces: list[str]) -> tuple[dict[str, str], dict[str, Any]]:
        stream = StreamParser(thinking)
        events = [event for piece in pieces for event in stream.push(piece)] + stream.flush()
        assert stream.push("late") == []
        kinds = ("reasoning", "content", "tool_calls")
        assert [kinds.index(kind) for kind, _ in events] == sorted(kinds.index(kind) for kind, _ in events)
        return {kind: "".join(piece for k, piece in events if k == kind) for kind in kinds}, stream.message()

    whole, message = joined([text])
    pieces, rest = [], text
    for cut in cuts:
        pieces.append(rest[:cut])
        rest = rest[cut:]
    assert joined([*pieces, rest]) == (whole, message)
    assert joined(list(text)) == (whole, message)
    assert message == parse_message(text, thinking=thinking)
    assert whole["reasoning"] == message["reasoning_content"]
    assert whole["content"] + ("" if message["tool_calls"] else whole["tool_calls"]) == message["content"]


def test_stream_shows_text_at_once_and_holds_back_marks() -> None:
    stream = StreamParser(thinking=True)
    assert stream.push("why </") == [("reasoning", "why ")]
    assert stream.push("b </thi") == [("reasoning", "</b ")]
    assert stream.push("nk>Yes.\n") == [("content", "Yes.")]
    assert stream.push("\n") == []
    assert stream.push("<") == []
    assert stream.push("｜DSML｜tool_calls>\n") == [("tool_calls", OPEN)]
    assert stream.push(invoke("f", "") + CLOSE) == [("tool_calls", invoke("f", "") + CLOSE)]
    assert stream.push(t.EOS) == []
    assert stream.flush() == []
    assert calls_of(stream.message()) == [("f", {})]
    plain = StreamParser(thinking=False)
    assert plain.push("a\n\n") == [("content", "a")]
    assert plain.flush() == [("content", "\n\n")]
