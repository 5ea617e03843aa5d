"""One answer of the model on its way to the terminal: streaming, interruption, statistics, ``ds4 generate`` itself."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from ds4.cli_common import Options, ProgressBar, load_llm
from ds4.cli_session import SessionFile

if TYPE_CHECKING:
    from ds4.engine import LLM, Session, Statistics
    from ds4.speculation import DraftStatistics

_IMPORTED_AT = time.monotonic()
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but newline and tab


@dataclass
class Answer:
    """What came back from one generation; ``statistics`` is None when it was interrupted before they were made."""

    text: str = ""
    reasoning: str = ""
    token_ids: list[int] = field(default_factory=list)
    statistics: Statistics | None = None
    interrupted: bool = False
    seconds_to_first_token: float | None = None

    @property
    def finish_reason(self) -> str:
        return "interrupted" if self.interrupted or self.statistics is None else self.statistics.finish_reason


class Printer:
    """Writes an answer to standard output as it comes: reasoning (dim on a terminal), a blank line, the text."""

    def __init__(self) -> None:
        self._kind = ""
        self._newlines = 2  # how many of them end what was written

    def show(self, kind: str, text: str) -> None:
        """Write a piece of reasoning, content or tool calls (these are shown as they are)."""
        if self._kind == "reasoning" and kind != "reasoning":
            text = text.lstrip("\n")
            if not text:
                return
            click.echo("\n" * (2 - self._newlines), nl=False)
        self._kind = kind
        if sys.stdout.isatty():  # a terminal would obey control characters
            text = _CONTROLS.sub("\ufffd", text)
        self._newlines = min(2, len(text) - len(text.rstrip("\n")))
        click.echo(click.style(text, dim=True) if kind == "reasoning" else text, nl=False)  # flushes; plain in a pipe

    def end(self) -> None:
        """Finish the line."""
        if self._kind and not self._newlines:
            click.echo()


def stream_answer(
    llm: LLM,
    prompt: str | list[dict[str, Any]] | list[int],
    options: Options,
    *,
    think: bool,
    effort: str | None,
    show: Callable[[str, str], None],
    raw: bool = False,
    session: Session | None = None,
) -> Answer:
    """Generate, pass every piece of text on to ``show(kind, text)``; Ctrl-C ends the answer, not the program."""
    from ds4.engine import Piece
    from ds4.text.chat_parse import StreamParser

    answer = Answer()
    parser = None if raw else StreamParser(think)

    def take(events: list[tuple[Any, str]]) -> None:
        for kind, text in events:
            if kind == "reasoning":
                answer.reasoning += text
            else:
                answer.text += text
            show(kind, text)

    bar = ProgressBar("reading the prompt", tokens=True)
    stream = llm.generate(
        prompt,
        options.sampling_params(),
        thinking=think,
        raw=raw,
        reasoning_effort=effort,
        session=session,
        progress=bar.update,
    )
    try:
        for item in stream:
            if isinstance(item, Piece):
                if answer.seconds_to_first_token is None:
                    answer.seconds_to_first_token = process_age()
                answer.token_ids += item.token_ids
                take(parser.push(item.text) if parser else [("content", item.text)])
            else:
                answer.statistics = item
                answer.token_ids = list(item.token_ids)
        answer.interrupted = answer.finish_reason == "interrupted"
    except KeyboardInterrupt:
        answer.interrupted = True
        with contextlib.suppress(KeyboardInterrupt, StopIteration):
            item = stream.throw(KeyboardInterrupt())  # it came while a piece was printed: let the engine end properly
            while isinstance(item, Piece):
                item = next(stream)
            answer.statistics = item
            answer.token_ids = list(item.token_ids)
    finally:
        bar.close()
    take(parser.flush() if parser else [])
    return answer


def statistics_lines(statistics: Statistics, since_start: float | None = None) -> list[str]:
    """Two or three short lines for people; ``since_start``: seconds from the program's start to the first token."""
    s = statistics
    first = f"{s.first_token_seconds:.2f} s" if since_start is None else f"{since_start:.2f} s from the start"
    cached = f" ({s.cached_tokens} cached)" if s.cached_tokens else ""
    return [
        f"{s.prompt_tokens} prompt tokens{cached}, {s.prompt_tokens_per_second:.1f} tokens/s; "
        f"first token after {first}",
        f"{s.generated_tokens} tokens generated, {s.tokens_per_second:.1f} tokens/s ({s.finish_reason}); "
        f"peak memory {s.peak_memory_bytes / 2**20:,.0f} MiB",
        *([draft_line(s.draft)] if s.draft is not None and _says_something(s.draft) else []),
    ]


def _says_something(draft: DraftStatistics) -> bool:
    """A short answer may end before anything is drafted."""
    return draft.drafts > 0 or draft.stopped_after is not None


def draft_line(draft: DraftStatistics) -> str:
    """What drafting brought."""
    gain = f"; estimated {draft.gain:.2f}x plain decoding" if draft.gain is not None else ""
    ended = f"; ended after {draft.stopped_after} tokens: it did not pay" if draft.stopped_after is not None else ""
    return (
        f"draft {draft.mode}: {draft.accepted} of {draft.drafted} drafted tokens accepted, "
        f"{draft.tokens_per_step:.2f} tokens a step{gain}{ended}"
    )


def print_statistics(statistics: Statistics | None, since_start: float | None = None) -> None:
    """To standard error, dim on a terminal."""
    for line in statistics_lines(statistics, since_start) if statistics else []:
        click.secho(line, err=True, dim=True)


def process_age() -> float:
    """Seconds since this process started (where the system does not tell: since ds4 was imported)."""
    try:
        with open("/proc/self/stat", "rb") as file:
            started = int(file.read().rsplit(b")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError, ValueError, IndexError):
        return time.monotonic() - _IMPORTED_AT


# ds4 generate


def generate_command(prompt: str, options: Options, *, raw: bool, as_json: bool, session: str | None = None) -> None:
    """Run ``ds4 generate``; ``session`` names its file. Exits with 130 after an interruption."""
    options.sampling_params()  # whatever is wrong with them shows before a model is loaded
    file = None if session is None else SessionFile(session)
    llm = load_llm(options)
    printer = Printer()
    think, effort = options.think, options.effort
    wanted: str | list[dict[str, Any]] | list[int] = (
        prompt if raw else [*options.first_messages(), {"role": "user", "content": prompt}]
    )
    kept = None
    if file is not None:
        wanted = ids = llm.encode_prompt(wanted, thinking=think, raw=raw, reasoning_effort=effort)
        kept = file.load(llm, ids)
    show = (lambda kind, text: None) if as_json else printer.show
    answer = stream_answer(llm, wanted, options, think=think, effort=effort, show=show, raw=raw, session=kept)
    if as_json:
        click.echo(json.dumps(_record(llm, prompt, options, answer), ensure_ascii=True))
    else:
        printer.end()
        print_statistics(answer.statistics, answer.seconds_to_first_token)
    if file is not None and kept is not None and answer.statistics is not None:
        file.save(kept, quiet=as_json)
    if answer.interrupted:
        sys.exit(130)


def _record(llm: LLM, prompt: str, options: Options, answer: Answer) -> dict[str, Any]:
    """The object of ``--json``."""
    import torch

    from ds4.kernels.numerics import DEFAULT_GROUP

    statistics: dict[str, Any] = answer.statistics.to_dict() if answer.statistics else {}
    statistics.pop("token_ids", None)
    statistics |= {
        "seconds_to_first_token": answer.seconds_to_first_token,
        "threads": torch.get_num_threads(),
        "device": str(llm.device),
        "numerics": options.numerics or DEFAULT_GROUP,
    }
    return {
        "model": str(llm.path),
        "prompt": prompt,
        "text": answer.text,
        "reasoning": answer.reasoning,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "statistics": statistics,
    }
