"""``ds4 chat``: a conversation on the terminal; one list of messages, one session, a handful of commands."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ds4.cli_answer import Printer, print_statistics, stream_answer
from ds4.cli_common import Options, one_line
from ds4.cli_session import Talk, load_talk, save_talk, say
from ds4.errors import Ds4Error
from ds4.replacing import replacing

if TYPE_CHECKING:
    from ds4.engine import LLM, Session

HELP = """\
/help            this list
/think [EFFORT]  reason before answering (EFFORT: low, high or max)
/nothink         answer at once
/reset           forget the conversation
/save FILE       keep the conversation in a file
                 (FILE.json: only its text, as JSON)
/load FILE       go on with a conversation that was kept
/quit            leave (also Ctrl-D)
Ctrl-C stops an answer; what was said until then stays in the conversation."""


class Conversation:
    """Reads lines and answers them until /quit or the end of input."""

    def __init__(self, llm: LLM, options: Options) -> None:
        if llm.tokenizer is None:
            raise Ds4Error(f"{llm.path}: the checkpoint has no tokenizer, so it cannot chat")
        self.llm = llm
        self.options = options
        self.think = options.think
        self.effort = options.effort
        self.messages: list[dict[str, Any]] = options.first_messages()
        self.session: Session | None = llm.session()
        self.spoken: list[int] = []  # every token up to the end of the last answer, if that was one without reasoning

    def run(self) -> None:
        """The loop; Ctrl-C at the prompt drops the line."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - line editing and history for input()
        terminal = sys.stdin.isatty()
        if terminal:
            say(f"{self.llm.path}: /help lists the commands, Ctrl-D quits")
        while True:
            try:
                line = input("> " if terminal else "").strip()
            except KeyboardInterrupt:
                click.echo()
                continue
            except EOFError:
                if terminal:
                    click.echo()
                return
            except UnicodeDecodeError:
                self._complain("that line is not UTF-8 text")
                continue
            if line == "/quit":
                return
            try:
                if line.startswith("/"):
                    self.command(line)
                elif line:
                    self.answer(line)
            except Ds4Error as error:
                self._complain(str(error))

    def command(self, line: str) -> None:
        """Carry out a line that begins with a slash."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name == "/help":
            click.echo(HELP)
        elif name == "/think":
            if argument not in ("", "low", "high", "max"):
                raise Ds4Error(f"/think takes low, high or max, not {argument}")
            self.think, self.effort = True, argument or self.effort
            say(f"reasoning is on, effort {self.effort}" if self.effort else "reasoning is on")
        elif name == "/nothink":
            self.think, self.effort = False, None
            say("reasoning is off")
        elif name == "/reset":
            self.messages, self.spoken, self.session = self.options.first_messages(), [], None
            say("the conversation is forgotten")
        elif name == "/save":
            if not argument:
                raise Ds4Error("/save needs the name of a file")
            self.save(Path(argument).expanduser())
        elif name == "/load":
            if not argument:
                raise Ds4Error("/load needs the name of a file")
            self.load(Path(argument).expanduser())
        else:
            raise Ds4Error(f"unknown command {name}; /help lists the commands")

    def answer(self, text: str) -> None:
        """Put ``text`` to the model and print its answer; a question that fails is taken back."""
        printer = Printer()
        self.messages.append({"role": "user", "content": text})
        finished = False
        try:
            ids = self._prompt_ids()
            if len(ids) > self.options.ctx:
                raise Ds4Error(
                    f"the conversation has grown to {len(ids)} tokens, the context holds {self.options.ctx}; "
                    "/reset starts a new one"
                )
            got = stream_answer(
                self.llm,
                ids,
                self.options,
                think=self.think,
                effort=self.effort,
                show=printer.show,
                session=self._session_for(ids),
            )
            finished = got.statistics is not None
            self.spoken = [] if self.think else ids + got.token_ids
        except Ds4Error:
            self.messages.pop()
            raise
        finally:
            printer.end()
            if not finished:  # broken off, maybe in the middle of a step: that state is not to be trusted
                self.session, self.spoken = None, []
        if got.text or got.reasoning:
            message = {"role": "assistant", "content": got.text}
            self.messages.append(message | ({"reasoning_content": got.reasoning} if got.reasoning else {}))
        else:
            self.messages.pop()
            self.spoken = []  # the session has heard a question that is no longer asked
        print_statistics(got.statistics)

    def _prompt_ids(self) -> list[int]:
        """The tokens of the conversation up to the last question.

        Where reasoning plays no part, a turn is a pure addition: the question is encoded alone and put behind the
        tokens that the model really said, which its own text might not encode to again; so the session goes on.
        """
        if self.spoken and not self.think:
            bos, eos = self.llm.config.bos_token_id, self.llm.config.eos_token_id
            question = self.llm.encode_prompt(self.messages[-1:])
            if question[0] == bos:
                return self.spoken + [eos] * (self.spoken[-1] != eos) + question[1:]
        return self.llm.encode_prompt(self.messages, thinking=self.think, reasoning_effort=self.effort)

    def _session_for(self, ids: list[int]) -> Session:
        """The session so far if its tokens begin the prompt; else (after /reset, say) a new one in its place."""
        session = self.session
        if session is not None and session.position < len(ids) and session.ids == ids[: session.position]:
            return session
        session = self.session = None  # frees the old state before the new one is allocated
        self.session = self.llm.session()
        return self.session

    def save(self, path: Path) -> None:
        """Write the conversation to ``path``, whole or not at all: its text to x.json, else text and session."""
        if path.suffix == ".json":
            self._save_text(path)
            return
        session = self.session if self.session is not None else self.llm.session()
        n = session.position
        unprocessed = self.spoken[n:] if self.spoken and self.spoken[:n] == session.ids else None
        save_talk(session, path, Talk(self.messages, self.think, self.effort, unprocessed))

    def _save_text(self, path: Path) -> None:
        record = {"model": str(self.llm.path), "messages": self.messages}
        text = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
        try:
            write_atomically(path, text)
        except OSError as error:
            raise Ds4Error(f"{path}: {error.strerror or error}") from None
        say(f"{len(self.messages)} messages saved to {path}")

    def load(self, path: Path) -> None:
        """Go on with the conversation in ``path``; the one so far stays if that fails."""
        session, talk = load_talk(self.llm, path)
        self.session, self.messages, self.think, self.effort = session, talk.messages, talk.think, talk.effort
        self.spoken = [] if talk.unprocessed is None else session.ids + talk.unprocessed
        say(f"{len(self.messages)} messages loaded from {path}, {session.position} tokens")

    def _complain(self, message: str) -> None:
        click.echo(f"ds4: error: {one_line(message)}", err=True)


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, which is never half-written. Raises OSError."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
