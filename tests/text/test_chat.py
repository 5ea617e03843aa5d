"""The chat encoder: golden prompts byte for byte, the rules that they leave open, and what it refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from ds4.errors import Ds4Error
from ds4.text import templates
from ds4.text.chat import chat_generation, encode_messages
from ds4.text.tokenizer import Tokenizer

OFFICIAL_THINKING = {1: True, 2: True, 3: True, 4: False}
BOS, EOS, USER, ASSISTANT = templates.BOS, templates.EOS, templates.USER, templates.ASSISTANT
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def official(golden: Path, number: int) -> tuple[list[dict[str, Any]], str]:
    """One of the four vectors that ship with the model: messages and prompt."""
    messages = json.loads((golden / "chat" / f"test_input_{number}.json").read_text(encoding="utf-8"))
    if isinstance(messages, dict):
        messages["messages"][0]["tools"] = messages["tools"]
        messages = messages["messages"]
    return messages, (golden / "chat" / f"test_output_{number}.txt").read_bytes().decode()


@pytest.mark.parametrize("number", OFFICIAL_THINKING)
def test_official_vectors(golden: Path, v4: Tokenizer, number: int) -> None:
    messages, prompt = official(golden, number)
    assert encode_messages(messages, thinking=OFFICIAL_THINKING[number]) == prompt
    every_ids = json.loads((golden / "chat" / "test_output_ids.json").read_text(encoding="utf-8"))
    ids = every_ids[f"test_output_{number}.txt"]
    assert len(ids) > 50
    assert v4.encode(prompt) == ids
    assert v4.decode(ids) == prompt


def test_encode_vectors(golden: Path) -> None:
    rows = json.loads((golden / "chat" / "encode_vectors.json").read_text(encoding="utf-8"))
    assert len(rows) == 60
    n_compared = 0
    for row in rows:
        for generation in ("preview", "0731") if row["variant"] == "both" else (row["variant"],):
            messages = copy.deepcopy(row["messages"])
            prompt = encode_messages(
                messages,
                thinking=row["thinking_mode"] == "thinking",
                reasoning_effort=row["reasoning_effort"],
                drop_thinking=row["drop_thinking"],
                generation=generation,
            )
            assert prompt == row["prompt"], row["name"]
            assert messages == row["messages"], f"{row['name']}: the caller's messages were changed"
            n_compared += 1
    assert n_compared == 60 + sum(row["variant"] == "both" for row in rows)


def test_effort_prefixes(golden: Path) -> None:
    prefixes = json.loads((golden / "chat" / "reasoning_effort_prefixes.json").read_text(encoding="utf-8"))["prefixes"]
    ours = {g: {level: s for level, s in by.items() if level} for g, by in templates.EFFORT_PREFIXES.items()}
    assert ours == prefixes


def test_context_continues(golden: Path) -> None:
    """Encoding in two parts gives the whole, wherever the cut is not inside a user turn and nothing is dropped."""
    n_cuts = 0
    for number, thinking in OFFICIAL_THINKING.items():
        messages, prompt = official(golden, number)
        for cut in range(1, len(messages)):
            if {messages[cut - 1]["role"], messages[cut]["role"]} <= {"user", "tool"}:
                continue
            options: dict[str, Any] = {"thinking": thinking, "drop_thinking": False}
            whole = encode_messages(messages, **options)
            rest = encode_messages(messages[cut:], context=messages[:cut], **options)
            assert whole.endswith(rest)
            # With the right side rendered in context, only what precedes the cut is missing.
            assert whole[: len(whole) - len(rest)].startswith(BOS)
            dropped = encode_messages(messages[cut:], context=messages[:cut], thinking=thinking)
            assert prompt.endswith(dropped)
            n_cuts += 1
    assert n_cuts >= 10


def test_context_developer_dropped() -> None:
    context = [{"role": "developer", "content": "d"}, {"role": "assistant", "content": "a"}]
    rest = encode_messages([{"role": "user", "content": "q"}], context=context, thinking=True)
    assert rest == f"{USER}q{ASSISTANT}<think>"


def test_order_comes_from_the_context() -> None:
    calls = [{"id": i, "function": {"name": "f", "arguments": "{}"}} for i in ("x", "y")]
    context = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    results = [{"role": "tool", "tool_call_id": i, "content": i} for i in ("y", "x")]
    text = encode_messages([*results, {"role": "user", "content": "t"}], context=context, thinking=False)
    assert text.startswith(f"{USER}<tool_result>x</tool_result>\n\n<tool_result>y</tool_result>\n\nt")


def test_text_keeps_its_slot_and_unknown_ids_sort_first() -> None:
    calls = [{"id": i, "function": {"name": "f", "arguments": {}}} for i in ("x", "y")]
    messages = [
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "y", "content": "y"},
        {"role": "user", "content": "between"},
        {"role": "tool", "content": "nameless"},
        {"role": "tool", "tool_call_id": "x", "content": "x"},
    ]
    turn = encode_messages(messages, thinking=False).split(USER)[1]
    results = [f"<tool_result>{s}</tool_result>" for s in ("nameless", "x", "y")]
    assert turn == "\n\n".join([results[0], "between", *results[1:]]) + f"{ASSISTANT}</think>"


@pytest.mark.parametrize("key", ["content", "content_blocks"])
def test_user_blocks(key: str) -> None:
    blocks = [{"type": "text", "text": "a"}, {"type": "image_url"}, {"type": "text", "text": "b"}]
    text = encode_messages([{"role": "user", key: blocks}], thinking=False, add_bos=False)
    assert text == f"{USER}a\n\n[Unsupported image_url]\n\nb{ASSISTANT}</think>"


def test_a_task_ends_its_turn() -> None:
    messages = [{"role": "user", "content": "a", "task": "query"}, {"role": "user", "content": "b"}]
    assert encode_messages(messages, thinking=False) == f"{BOS}{USER}a{USER}b{ASSISTANT}</think>"


@pytest.mark.parametrize("task", templates.TASKS)
def test_no_reasoning_after_a_task(task: str) -> None:
    messages = [{"role": "user", "content": "a", "task": task}, {"role": "assistant", "content": "b", "reasoning": "r"}]
    lead = f"{ASSISTANT}<think>" if task == "action" else ""
    token = templates.TASKS[task]
    assert encode_messages(messages, thinking=True) == f"{BOS}{USER}a{lead}{token}b{EOS}"


def test_tools_of_a_user_message_mean_nothing() -> None:
    messages = [
        {"role": "user", "content": "a", "tools": TOOLS},
        {"role": "assistant", "content": "b", "reasoning_content": "r"},
        {"role": "user", "content": "c"},
    ]
    assert encode_messages(messages, thinking=True) == f"{BOS}{USER}a{ASSISTANT}</think>b{EOS}{USER}c{ASSISTANT}<think>"


def test_reasoning_alias_and_add_bos() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning": "r"}]
    assert encode_messages(messages, thinking=True, add_bos=False) == f"{USER}a{ASSISTANT}<think>r</think>b{EOS}"


@pytest.mark.parametrize("arguments", ["[1]", "5", "null", '"s"', "{", ""])
def test_arguments_that_are_no_object(arguments: str) -> None:
    calls = [{"function": {"name": "f", "arguments": arguments}}]
    text = encode_messages([{"role": "assistant", "tool_calls": calls}], thinking=False)
    assert f'<｜DSML｜parameter name="arguments" string="true">{arguments}</｜DSML｜parameter>' in text


def test_generation_of_a_checkpoint() -> None:
    assert chat_generation(name="DeepSeek-V4-Flash") == "preview"
    assert chat_generation(name="DeepSeek-V4-Flash-0731") == "0731"
    assert chat_generation(dspark=True) == "0731"
    assert chat_generation(chat_template="..." + templates.EFFORT_BEYOND) == "0731"
    assert chat_generation(chat_template="..." + templates.EFFORT_ABSOLUTE) == "preview"


BAD_MESSAGES: dict[str, tuple[Any, str]] = {
    "not an object": ("hello", "expected an object"),
    "no role": ({"content": "x"}, "unknown role None"),
    "role": ({"role": "bot", "content": "x"}, "unknown role 'bot'"),
    "user content": ({"role": "user"}, "role user has no content"),
    "tool content": ({"role": "tool", "content": None}, "role tool has no content"),
    "number": ({"role": "user", "content": 5}, "content must be a list"),
    "system list": ({"role": "system", "content": [{"type": "text", "text": "x"}]}, "content of role system must be"),
    "block": ({"role": "user", "content": ["x"]}, "content must be a list of objects"),
    "block text": ({"role": "user", "content": [{"type": "text", "text": 5}]}, "text of a block"),
    "nested": ({"role": "user", "content": [{"type": "tool_result", "content": [5]}]}, "must be a list of objects"),
    "developer": ({"role": "developer", "content": ""}, "not empty"),
    "reasoning": ({"role": "assistant", "reasoning_content": 5}, "reasoning_content of role assistant"),
    "task": ({"role": "user", "content": "x", "task": "dance"}, "unknown task 'dance'"),
    "tools": ({"role": "system", "content": "", "tools": {"name": "f"}}, "tools must be a list"),
    "tool": ({"role": "system", "content": "", "tools": [{"name": "f"}]}, "every tool must look like"),
    "call": ({"role": "assistant", "tool_calls": [{"name": "f"}]}, "every tool call must look like"),
    "arguments": ({"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}, "arguments of the call to f"),
}


@pytest.mark.parametrize("case", BAD_MESSAGES)
def test_bad_messages(case: str) -> None:
    message, complaint = BAD_MESSAGES[case]
    with pytest.raises(Ds4Error, match=complaint) as caught:
        encode_messages([{"role": "system", "content": ""}, message], thinking=True)
    assert str(caught.value).startswith("message 1: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"reasoning_effort": "low"}, "use one of high, max"),
        ({"reasoning_effort": "medium", "generation": "0731"}, "use one of low, high, max"),
        ({"generation": "v5"}, "use one of preview, 0731"),
    ],
)
@pytest.mark.parametrize("thinking", [True, False])
def test_bad_options(options: dict[str, Any], complaint: str, thinking: bool) -> None:
    with pytest.raises(Ds4Error, match=complaint):
        encode_messages([{"role": "user", "content": "x"}], thinking=thinking, **options)


def test_tool_that_is_no_json() -> None:
    tools = [{"function": {"name": "f", "default": {1, 2}}}]
    with pytest.raises(Ds4Error, match="written as JSON"):
        encode_messages([{"role": "system", "content": "", "tools": tools}], thinking=False)
