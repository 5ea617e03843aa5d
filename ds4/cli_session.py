"""Session files at the command line: ``ds4 generate --session``, and what ``ds4 chat`` saves and loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ds4.errors import Ds4Error

if TYPE_CHECKING:
    from ds4.engine import LLM, Session


def check_place(path: Path) -> None:
    """Raise Ds4Error where a file could not be written: better before the model answers than afterwards."""
    if path.is_dir():
        raise Ds4Error(f"{path}: is a directory; give the name of a file")
    if not path.parent.is_dir():
        raise Ds4Error(f"{path}: cannot be written: there is no directory {path.parent}")


class SessionFile:
    """The file of ``ds4 generate --session``. Raises Ds4Error for a place where it could not be written."""

    def __init__(self, name: str) -> None:
        self.path = Path(name).expanduser()
        self._begun = 0  # tokens of the session before anything was added
        check_place(self.path)

    def load(self, llm: LLM, ids: Sequence[int]) -> Session:
        """The session in the file, set back to where the prompt ``ids`` goes on; a new one if there is no file.

        A session that would have to be set back too far is of no use: then a new one too, and a line says so. Raises
        Ds4Error for a file that does not fit (ds4/store.py), and for a conversation, which the new text would replace.
        """
        from ds4.store import Saved, common_beginning

        if not self.path.exists():
            return llm.session()
        saved = Saved(self.path)
        if "messages" in saved.record.notes:
            raise Ds4Error(f"{self.path}: holds a conversation; /load it in ds4 chat, or name another file")
        session = saved.session(llm)
        n, position = common_beginning(session, ids), session.position
        if position - n <= session.undoable:
            session.rewind(position - n)
            self._begun = n
            return session
        del session  # before the new one is allocated
        say(f"{self.path}: only {n} of its {position} tokens begin this prompt, so it starts anew")
        return llm.session()

    def save(self, session: Session, *, quiet: bool) -> None:
        """Write the session back, and say so unless ``quiet``; one broken off before it had a new token is left out."""
        if session.position <= self._begun:
            return
        size = session.save(self.path)
        if not quiet:
            say(f"{session.position} tokens saved to {self.path}, {size / 2**20:.1f} MiB")


def say(message: str) -> None:
    """A line on standard error, dim on a terminal."""
    click.secho(message, err=True, dim=True)


@dataclass
class Talk:
    """What a conversation needs beside its session, JSON values.

    messages       of the conversation
    think, effort  how the next answer is reasoned about
    unprocessed    tokens spoken behind those of the session, which go on word for word; None where the messages have
                   to be encoded anew
    """

    messages: list[dict[str, Any]]
    think: bool = False
    effort: str | None = None
    unprocessed: list[int] | None = None


def save_talk(session: Session, path: Path, talk: Talk) -> None:
    """Write a conversation with its session. Raises Ds4Error."""
    from ds4.store import save

    check_place(path)
    size = save(session, path, asdict(talk))
    say(f"{len(talk.messages)} messages saved to {path}, {session.position} tokens, {size / 2**20:.1f} MiB")


def load_talk(llm: LLM, path: Path) -> tuple[Session, Talk]:
    """A conversation that ``save_talk`` wrote. Raises Ds4Error for another file, and as ds4/store.py does."""
    from ds4.store import Saved

    if path.suffix == ".json":
        raise Ds4Error(f"{path}: /load takes what /save wrote under a name without .json")
    saved = Saved(path)
    try:
        talk = Talk(**saved.record.notes)
    except TypeError:
        raise Ds4Error(f"{path}: holds no conversation; ds4 generate --session goes on with it") from None
    return saved.session(llm), talk
