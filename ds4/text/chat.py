"""From a conversation to the prompt text of DeepSeek-V4.

The model ships a renderer instead of a Jinja template; this module writes the same bytes. A message is a mapping:

    role               system | user | assistant | tool | latest_reminder | developer
    content            str; user and tool also take a list of blocks ({"type": "text", "text": ...})
    content_blocks     user only: blocks, read instead of ``content``
    tools              system, developer: [{"type": "function", "function": {...}}, ...]
    response_format    system, developer: JSON schema
    tool_calls         assistant: [{"id": ..., "function": {"name": str, "arguments": JSON text or mapping}}, ...]
    reasoning_content  assistant (``reasoning`` is read as the same)
    tool_call_id       tool
    task, wo_eos       internal to the model's makers: quick-task token, no EOS after this message

Errors: every malformed conversation raises Ds4Error naming the message by its position.
Source: chat.md 2.1 to 2.5.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ds4.errors import Ds4Error
from ds4.text import templates as t
from ds4.text.templates import Generation

Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool", "latest_reminder", "developer")


def encode_messages(
    messages: Sequence[Message],
    *,
    thinking: bool,
    reasoning_effort: str | None = None,
    drop_thinking: bool = True,
    add_bos: bool = True,
    generation: Generation = "preview",
    context: Sequence[Message] | None = None,
) -> str:
    """Render ``messages`` as prompt text, byte for byte as the reference encoder does.

    thinking          True opens the answer with ``<think>``, False with ``</think>``
    reasoning_effort  None (the default level), "high", "max"; "low" with generation "0731"; no effect without thinking
    drop_thinking     leave the reasoning of turns before the last user message out (never when tools are defined)
    add_bos           begin with BOS; never where there is a context
    generation        "preview" (V4-Flash, V4-Pro) or "0731" and later: what the effort levels mean
    context           messages already encoded: they are read for order and dropping, but not rendered
    Limits:   a user turn that starts ``messages`` is not merged into one that ends ``context``.
    Error:    Ds4Error on an unknown role, missing content or a level that the generation does not have.
    Source:   chat.md 2.2 to 2.4; vectors in golden/chat.
    """
    prefix = _effort_prefix(reasoning_effort, generation)
    before = _fold_tool_messages(context or [])
    turns = before + _fold_tool_messages(messages)
    _order_tool_results(turns)

    drop = drop_thinking and not any(m.get("tools") for m in turns)
    n_before = len(before)
    last_user = _last_user(turns)
    if thinking and drop:
        stays = [m["role"] != "developer" or i >= last_user for i, m in enumerate(turns)]
        n_before = sum(stays[:n_before])  # a developer message of the context may be among those that go
        turns = [m for m, stay in zip(turns, stays, strict=True) if stay]
        last_user = _last_user(turns)

    parts = [t.BOS] if add_bos and not before else []
    if thinking and n_before == 0 and turns:
        parts.append(prefix)
    for index in range(n_before, len(turns)):
        parts.append(_render(turns, index, thinking=thinking, keep_from=last_user if drop else -1))
    return "".join(parts)


def chat_generation(*, name: str = "", chat_template: str | None = None, dspark: bool = False) -> Generation:
    """Which generation of the chat format a checkpoint speaks (chat.md 2.4).

    name           model name or directory name
    chat_template  ``tokenizer.chat_template`` of a GGUF, if any
    dspark         the checkpoint has ``dspark_*`` keys or DSpark tensors
    """
    marks = name.lower()
    newer = dspark or "0731" in marks or "dspark" in marks
    # The template may escape the text, so look only for its first words.
    return "0731" if newer or "Beyond maximum" in (chat_template or "") else "preview"


def _effort_prefix(level: str | None, generation: str) -> str:
    levels = t.EFFORT_PREFIXES.get(generation)
    if levels is None:
        raise Ds4Error(f"chat generation {generation!r} is unknown; use one of {', '.join(t.EFFORT_PREFIXES)}")
    if level not in levels:
        known = ", ".join(str(name) for name in levels if name)
        raise Ds4Error(f"reasoning effort {level!r} is unknown to the {generation} chat format; use one of {known}")
    return levels[level]


def _last_user(turns: Sequence[Message]) -> int:
    """Index of the last user or developer message after folding; -1 if there is none."""
    return max((i for i, m in enumerate(turns) if m["role"] in ("user", "developer")), default=-1)


# Folding: tool results become blocks of user turns


def _fold_tool_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Check every message and join consecutive user and tool messages into single user turns made of blocks."""
    turns: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        role = _check(message, index)
        if role not in ("user", "tool"):
            turns.append(dict(message))
            continue
        open_turn = turns[-1] if turns and turns[-1]["role"] == "user" else None
        if role == "tool":
            blocks = [
                {"type": "tool_result", "tool_use_id": message.get("tool_call_id"), "content": message["content"]}
            ]
        else:
            blocks = _user_blocks(message)
            if open_turn is not None and open_turn.get("task") is not None:
                open_turn = None  # a task ends its turn; only tool results may still join it
        if open_turn is None:
            # Other fields of a user message (tools among them) have no meaning to the reference: they end here.
            kept = {key: message[key] for key in ("task", "wo_eos") if role == "user" and key in message}
            turns.append({"role": "user", "content_blocks": blocks, **kept})
        else:
            open_turn["content_blocks"].extend(blocks)
    return turns


def _user_blocks(message: Message) -> list[dict[str, Any]]:
    blocks = message.get("content_blocks") or message["content"]
    return [{"type": "text", "text": blocks}] if isinstance(blocks, str) else list(blocks)


def _order_tool_results(turns: Sequence[dict[str, Any]]) -> None:
    """Put the results of each user turn in the order of the calls they answer; text blocks keep their slots."""
    order: dict[str, int] = {}
    for turn in turns:
        if turn["role"] == "assistant" and turn.get("tool_calls"):
            ids = [call.get("id") or call["function"].get("id") for call in turn["tool_calls"]]
            order = {call_id: position for position, call_id in enumerate(ids) if call_id}
        elif turn["role"] == "user":
            results = [b for b in turn["content_blocks"] if b.get("type") == "tool_result"]
            if len(results) > 1 and order:
                results.sort(key=lambda block: order.get(block.get("tool_use_id") or "", 0))
                slots = iter(results)
                turn["content_blocks"] = [
                    next(slots) if b.get("type") == "tool_result" else b for b in turn["content_blocks"]
                ]


# Rendering


def _render(turns: Sequence[Message], index: int, *, thinking: bool, keep_from: int) -> str:
    """One message and the transition after it; reasoning lives at and after ``keep_from`` (-1: everywhere)."""
    message = turns[index]
    role = message["role"]
    if role == "system":
        text = message["content"] + _extras(message)
    elif role == "developer":
        text = t.USER + message["content"] + _extras(message)
    elif role == "user":
        text = t.USER + "\n\n".join(_block_text(block) for block in message["content_blocks"])
    elif role == "latest_reminder":
        text = t.LATEST_REMINDER + message["content"]
    else:
        after_task = index > 0 and turns[index - 1].get("task") is not None
        text = ""
        if thinking and not after_task and index > keep_from:
            text = (message.get("reasoning_content") or message.get("reasoning") or "") + t.THINK_END
        text += (message.get("content") or "") + _calls_text(message.get("tool_calls") or [])
        text += "" if message.get("wo_eos") else t.EOS

    if index + 1 < len(turns) and turns[index + 1]["role"] not in ("assistant", "latest_reminder"):
        return text
    task = message.get("task")
    if task is not None:
        lead = t.ASSISTANT + (t.THINK if thinking else t.THINK_END) if task == "action" else ""
        return text + lead + t.TASKS[task]
    if role in ("user", "developer"):
        return text + t.ASSISTANT + (t.THINK if thinking and index >= keep_from else t.THINK_END)
    return text


def _extras(message: Message) -> str:
    """Tool block and response format that follow the text of a system or developer message."""
    text = ""
    if message.get("tools"):
        lines = "\n".join(_json(tool["function"]) for tool in message["tools"])
        text += "\n\n" + t.TOOLS_INTRO + lines + t.TOOLS_OUTRO
    if message.get("response_format"):
        text += "\n\n" + t.RESPONSE_FORMAT + _json(message["response_format"])
    return text


def _block_text(block: Mapping[str, Any]) -> str:
    kind = block.get("type")
    if kind == "text":
        return block.get("text") or ""
    if kind == "tool_result":
        content = block.get("content") or ""
        # Inside a result, only text parts can be shown; a nested result is as unsupported as an image.
        if not isinstance(content, str):
            content = "\n\n".join(
                (part.get("text") or "") if part.get("type") == "text" else f"[Unsupported {part.get('type')}]"
                for part in content
            )
        return t.RESULT_OPEN + content + t.RESULT_CLOSE
    return f"[Unsupported {kind}]"


def _calls_text(calls: Sequence[Mapping[str, Any]]) -> str:
    if not calls:
        return ""
    lines = [t.CALLS_OPEN + ">"]
    for call in calls:
        function = call["function"]
        lines.append(f'{t.INVOKE_OPEN} name="{function["name"]}">')
        # No arguments leave one empty line between the tags, as the reference writes it.
        lines.append("\n".join(_parameter(k, v) for k, v in _arguments(function["arguments"]).items()))
        lines.append(t.INVOKE_CLOSE + ">")
    return "\n\n" + "\n".join([*lines, t.CALLS_CLOSE])


def _parameter(name: str, value: Any) -> str:
    is_text = isinstance(value, str)
    body = value if is_text else _json(value)
    return f'{t.PARAM_OPEN} name="{name}" string="{"true" if is_text else "false"}">{body}{t.PARAM_CLOSE}>'


def _arguments(arguments: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """Arguments as a mapping; text that is no JSON object becomes the one parameter ``arguments``."""
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"arguments": arguments}


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as err:
        raise Ds4Error(f"a tool, response format or argument cannot be written as JSON ({err})") from err


# Checks


def _check(message: Message, index: int) -> str:
    """Return the role of a well-formed message, or say what is wrong with it."""
    if not isinstance(message, Mapping):
        raise _bad(index, f"expected an object with role and content, got {type(message).__name__}")
    role = message.get("role")
    if role not in ROLES:
        raise _bad(index, f"unknown role {role!r}; use one of {', '.join(ROLES)}")
    _check_content(message, role, index)
    task = message.get("task")
    if task is not None and task not in t.TASKS:
        raise _bad(index, f"unknown task {task!r}; use one of {', '.join(t.TASKS)}")
    for tool in _entries(message, "tools", index):
        if not isinstance(tool.get("function"), Mapping):
            raise _bad(index, 'every tool must look like {"type": "function", "function": {...}}')
    for call in _entries(message, "tool_calls", index):
        function = call.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise _bad(index, 'every tool call must look like {"function": {"name": "...", "arguments": ...}}')
        if not isinstance(function.get("arguments"), (str, Mapping)):
            raise _bad(index, f"arguments of the call to {function['name']} must be JSON text or an object")
    return role


def _check_content(message: Message, role: str, index: int) -> None:
    """Text where there must be text; blocks only in user and tool messages."""
    for key in ("content", "reasoning_content", "reasoning"):
        value = message.get(key)
        if value is not None and not isinstance(value, str) and (key != "content" or role not in ("user", "tool")):
            raise _bad(index, f"{key} of role {role} must be text, got {type(value).__name__}")
    key = "content_blocks" if role == "user" and message.get("content_blocks") else "content"
    content = message.get(key)
    if content is None and role != "assistant":
        raise _bad(index, f"role {role} has no content; give it a text, which may be empty")
    if role == "developer" and not content:
        raise _bad(index, "role developer needs content that is not empty")
    if not isinstance(content, str):
        for block in _entries(message, key, index):
            if not isinstance(block.get("text") or "", str):
                raise _bad(index, f"the text of a block of {key} must be text")
            if block.get("type") == "tool_result" and not isinstance(block.get("content") or "", str):
                _entries(block, "content", index)


def _entries(owner: Message, key: str, index: int) -> Sequence[Mapping[str, Any]]:
    """``owner[key]``, which must be a list of objects or nothing."""
    entries = owner.get(key) or []
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, Mapping) for entry in entries):
        raise _bad(index, f"{key} must be a list of objects")
    return entries


def _bad(index: int, what: str) -> Ds4Error:
    return Ds4Error(f"message {index}: {what}")
