"""From a completion text back to an assistant message, at once or while it streams.

The prompt already holds ``<think>`` or ``</think>``, so a completion begins inside the reasoning (thinking) or with the
answer itself (chat):

    thinking   reasoning </think> content [ "\\n\\n" tool block ] EOS
    chat       content [ "\\n\\n" tool block ] EOS

Strict parsing takes exactly what the encoder writes; lenient parsing takes what models really do and never fails.
Source: chat.md 2.5, 2.6.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal, NoReturn

from ds4.text import templates as t

EventKind = Literal["reasoning", "content", "tool_calls"]
Event = tuple[EventKind, str]

# One or no newline before the block is a slip of the model; in every case they belong to the block, not to the text.
_CALLS_STARTS = ("\n\n" + t.CALLS_OPEN, "\n" + t.CALLS_OPEN, t.CALLS_OPEN)
_MARKERS: dict[EventKind, tuple[str, ...]] = {
    "reasoning": (t.THINK_END, *_CALLS_STARTS, t.EOS),
    "content": (*_CALLS_STARTS, t.EOS),
    "tool_calls": (t.EOS,),
}


class ChatParseError(ValueError):
    """A completion that the strict parser refuses; the message says what was expected."""


def parse_message(text: str, *, thinking: bool, strict: bool = False) -> dict[str, Any]:
    """Split a completion into ``role``, ``content``, ``reasoning_content`` and ``tool_calls``.

    text       the completion with its EOS, without the prompt
    thinking   the mode of the prompt
    strict     True: the reference grammar; ChatParseError on any deviation.
               False: no EOS needed; ``</think>`` may be missing before a tool block; blanks between tags are free; an
               invoke may hold a JSON object instead of parameters; a value marked as JSON that is none is taken as
               text; unfinished calls are left out; a block without one whole call is given back as content.
    Returns tool_calls as [{"type": "function", "function": {"name": str, "arguments": JSON object text}}, ...].
    """
    return _parse_strict(text, thinking) if strict else _parse_lenient(text, thinking)


class StreamParser:
    """Sort the pieces of a streamed completion into reasoning, content and tool-call text.

    Text that may turn out to be the start of ``</think>``, of a tool block or of EOS is held back until it is decided,
    so that nothing shown ever has to be taken back. The events of a stream do not depend on how it was cut into pieces
    (joined by kind), and ``</think>`` and EOS appear in none of them; tool_calls events hold the raw block.
    """

    def __init__(self, thinking: bool) -> None:
        self.thinking = thinking
        self._kind: EventKind = "reasoning" if thinking else "content"
        self._held = ""
        self._seen: list[str] = []
        self._ended = False

    def push(self, text: str) -> list[Event]:
        """Take the next piece; return the events that are certain by now."""
        if self._ended:
            return []
        self._seen.append(text)
        self._held += text
        events: list[Event] = []
        while self._held and not self._ended:
            at, marker = _find_first(self._held, _MARKERS[self._kind])
            if marker is None:
                keep = _held_back(self._held, _MARKERS[self._kind])
                self._emit(events, len(self._held) - keep)
                break
            self._emit(events, at)
            if marker == t.EOS:
                self._ended, self._held = True, ""
            elif marker == t.THINK_END:
                self._kind, self._held = "content", self._held[len(marker) :]
            else:
                self._kind, self._held = "tool_calls", self._held.lstrip("\n")
        return events

    def flush(self) -> list[Event]:
        """The stream is over: what was held back is ordinary text."""
        events: list[Event] = []
        self._emit(events, len(self._held))
        self._ended = True
        return events

    def message(self) -> dict[str, Any]:
        """The lenient parse of all that was pushed."""
        return parse_message("".join(self._seen), thinking=self.thinking)

    def _emit(self, events: list[Event], n_chars: int) -> None:
        if n_chars:
            events.append((self._kind, self._held[:n_chars]))
            self._held = self._held[n_chars:]


def _find_first(text: str, markers: tuple[str, ...]) -> tuple[int, str | None]:
    """The marker that starts first (the longest form of a tool block start wins, as it starts earlier)."""
    found = [(text.find(marker), marker) for marker in markers if marker in text]
    return min(found, key=lambda hit: hit[0]) if found else (len(text), None)


def _held_back(text: str, markers: tuple[str, ...]) -> int:
    """Length of the longest end of ``text`` that begins one of the markers."""
    longest = min(len(text), max(map(len, markers)) - 1)
    return next((n for n in range(longest, 0, -1) if any(m.startswith(text[-n:]) for m in markers)), 0)


def _message(content: str, reasoning: str, calls: list[tuple[str, str]]) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning,
        "tool_calls": [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls],
    }


def _object_text(members: dict[str, str]) -> str:
    """A JSON object from parameter names and values that are JSON already, in the order of the call."""
    return "{" + ", ".join(f"{json.dumps(k, ensure_ascii=False)}: {v}" for k, v in members.items()) + "}"


# Strict


class _Cursor:
    def __init__(self, text: str) -> None:
        self.text = text
        self.pos = 0

    def until(self, *stops: str) -> tuple[str, str | None]:
        """The text up to the nearest stop, and that stop (None: the text ended); move behind it."""
        at, stop = min(
            ((self.text.find(s, self.pos), s) for s in stops if self.text.find(s, self.pos) >= 0),
            default=(len(self.text), None),
        )
        passage = self.text[self.pos : at]
        self.pos = at + len(stop or "")
        return passage, stop


def _refuse(what: str, got: str) -> NoReturn:
    raise ChatParseError(f"{what}, got {got[:60]!r}")


def _parse_strict(text: str, thinking: bool) -> dict[str, Any]:
    cursor = _Cursor(text)
    reasoning = ""
    if thinking:
        reasoning, stop = cursor.until(t.THINK_END, _CALLS_STARTS[0])
        if stop != t.THINK_END:
            _refuse("expected </think> after the reasoning", text[cursor.pos :])
    content, stop = cursor.until(t.EOS, _CALLS_STARTS[0])
    calls: list[tuple[str, str]] = []
    if stop == _CALLS_STARTS[0]:
        calls = _strict_calls(cursor)
        rest, stop = cursor.until(t.EOS)
        if rest:
            _refuse("expected EOS right after the tool calls", rest)
    if stop != t.EOS:
        _refuse("expected EOS at the end", text[-60:])
    if cursor.pos != len(text):
        _refuse("expected nothing after EOS", text[cursor.pos :])
    for token in (t.BOS, t.EOS, t.THINK, t.THINK_END, t.DSML):
        if token in content or token in reasoning:
            raise ChatParseError(f"special token {token} inside the content or the reasoning")
    return _message(content, reasoning, calls)


def _strict_calls(cursor: _Cursor) -> list[tuple[str, str]]:
    calls: list[tuple[str, str]] = []
    while True:
        gap, stop = cursor.until(t.INVOKE_OPEN, t.CALLS_CLOSE)
        if gap != ">\n":
            _refuse("expected '>' and a newline between tool tags", gap)
        if stop != t.INVOKE_OPEN:
            if stop is None:
                raise ChatParseError("expected an invoke tag or the end of the tool calls, got the end of the text")
            return calls
        header, stop = cursor.until(t.PARAM_OPEN, t.INVOKE_CLOSE)
        named = re.fullmatch(r'\s*name="(.*?)">\n', header, re.DOTALL)
        if named is None:
            _refuse('expected name="..."> and a newline in an invoke tag', header)
        members: dict[str, str] = {}
        while stop == t.PARAM_OPEN:
            # The search is for the closing tag without its "<", so a value may not even hold that.
            body, _ = cursor.until(t.PARAM_CLOSE[1:])
            fields = re.match(r' name="(.*?)" string="(true|false)">', body, re.DOTALL)
            if fields is None or not body.endswith("<"):
                _refuse('expected name="..." string="true|false">value in a parameter', body)
            name, is_text = fields.groups()
            value = body[fields.end() : -1]
            if name in members:
                raise ChatParseError(f"parameter {name} is given twice")
            members[name] = json.dumps(value, ensure_ascii=False) if is_text == "true" else value
            gap, stop = cursor.until(t.PARAM_OPEN, t.INVOKE_CLOSE)
            if gap != ">\n":
                _refuse("expected '>' and a newline after a parameter", gap)
        calls.append((named[1], _object_text(members)))


# Lenient

_INVOKE = re.compile(re.escape(t.INVOKE_OPEN) + r'\s+name\s*=\s*"([^"]*)"\s*>')
_PARAM = re.compile(
    r"\s*"
    + re.escape(t.PARAM_OPEN)
    + r'\s+name\s*=\s*"([^"]*)"(?:\s+string\s*=\s*"(true|false)")?\s*>(.*?)'
    + re.escape(t.PARAM_CLOSE)
    + r"\s*>",
    re.DOTALL,
)
_BRACE = re.compile(r"\s*(?={)")
_INVOKE_END = re.compile(r"\s*" + re.escape(t.INVOKE_CLOSE) + r"\s*>")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)  # NaN and Infinity: Python reads them, no other JSON reader does


_JSON = json.JSONDecoder(parse_constant=_no_constant)


def _parse_lenient(text: str, thinking: bool) -> dict[str, Any]:
    stream = StreamParser(thinking)
    texts: dict[EventKind, str] = {"reasoning": "", "content": "", "tool_calls": ""}
    for kind, piece in stream.push(text) + stream.flush():
        texts[kind] += piece
    calls = _block_calls(texts["tool_calls"])
    content = texts["content"]
    if texts["tool_calls"] and not calls:
        content += texts["tool_calls"]  # better shown than lost
    return _message(content, texts["reasoning"], calls)


def _block_calls(block: str) -> list[tuple[str, str]]:
    """The calls of a block: as the strict grammar reads them where it can, so that both agree on good output."""
    try:
        calls = _strict_calls(_Cursor(block.removeprefix(t.CALLS_OPEN)))
    except ChatParseError:
        return _lenient_calls(block)
    return calls if all(_is_json(arguments) for _, arguments in calls) else _lenient_calls(block)


def _lenient_calls(block: str) -> list[tuple[str, str]]:
    """Every whole call of a block; an invoke that cannot be read is passed over."""
    calls: list[tuple[str, str]] = []
    pos = 0
    last_close = block.rfind(t.PARAM_CLOSE)  # no search beyond it, or a flood of open tags would cost quadratic time
    while header := _INVOKE.search(block, pos):
        pos = header.end()
        members: dict[str, str] = {}
        while pos <= last_close and (param := _PARAM.match(block, pos)):
            name, is_text, value = param.groups()
            members[name] = value if is_text != "true" and _is_json(value) else json.dumps(value, ensure_ascii=False)
            pos = param.end()
        arguments = _object_text(members)
        if not members:
            arguments, pos = _json_object_at(block, pos)
        if end := _INVOKE_END.match(block, pos):
            calls.append((header[1], arguments))
            pos = end.end()
    return calls


def _is_json(text: str) -> bool:
    try:
        _JSON.decode(text)
    except (ValueError, RecursionError):
        return False
    return True


def _json_object_at(block: str, pos: int) -> tuple[str, int]:
    """A JSON object standing in place of the parameters, and the position behind it; "{}" where there is none."""
    if brace := _BRACE.match(block, pos):
        try:
            value, end = _JSON.raw_decode(block, brace.end())
            return json.dumps(value, ensure_ascii=False), end
        except (ValueError, RecursionError):
            pass
    return "{}", pos
