"""Files and directories that appear whole or not at all.

Everything is written into ``.<name>.ds4-part`` beside the target and renamed at the end.  An error or Ctrl-C removes
that directory; a process that is killed leaves it, and the next one that writes the same target removes it, unless
somebody is still writing: the directory is locked while it is in use.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

from ds4.errors import Ds4Error


class Replacement:
    """A place to write to, and the act of putting it where it belongs.

    path    the target as it was given, for messages
    target  the same, absolute and without links
    work    the directory to write into, beside the target; exists inside the ``with`` block
    swept   what an interrupted run had left and has been removed or put back, as sentences
    Error:  Ds4Error naming the target if it cannot be written, or if another process is writing it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.target = path.resolve()  # what a link points to is replaced, not the link
        self.work = self.target.with_name(f".{self.target.name}.ds4-part")
        self.old = self.target.with_name(f".{self.target.name}.ds4-old")
        self.swept: list[str] = []
        self._lock = -1

    def __enter__(self) -> Replacement:
        try:
            self._sweep()
            self.work.mkdir()
            self._lock = self._exclusively()
        except OSError as error:
            raise Ds4Error(f"{self.path}: cannot be written: {error.strerror or error}") from None
        return self

    def _exclusively(self) -> int:
        """The lock of the work directory; Ds4Error where another process has it."""
        lock = _locked(self.work)
        if lock < 0:
            raise Ds4Error(f"{self.path}: another process is writing it at the moment, in {self.work}")
        return lock

    def _sweep(self) -> None:
        """Deal with what a killed process left."""
        if self.work.is_dir():
            lock = self._exclusively()
            shutil.rmtree(self.work)
            os.close(lock)
            self.swept.append(f"removed {self.work}, which an interrupted run had left")
        if self.old.exists():
            shutil.rmtree(self.old)
            self.swept.append(f"removed {self.old}, which an interrupted run had left")

    def put_back(self) -> None:
        """Put a directory back under its name, if a process was killed after it had moved it away; to be called before
        anybody looks whether the target exists."""
        if self.old.exists() and not self.target.exists():
            os.replace(self.old, self.target)
            self.swept.append(f"put {self.path} back, which an interrupted run had moved to {self.old}")

    def commit_directory(self) -> None:
        """Make the work directory the target, instead of a directory that is there."""
        if self.target.is_dir():
            os.replace(self.target, self.old)
            try:
                os.replace(self.work, self.target)
            except OSError:
                os.replace(self.old, self.target)
                raise
            shutil.rmtree(self.old)
        else:
            os.replace(self.work, self.target)

    def commit_files(self) -> None:
        """Move every file of the work directory beside the target, over what is there; the target itself comes last."""
        names = sorted(os.listdir(self.work), key=lambda name: (name == self.target.name, name))
        for name in names:
            os.replace(self.work / name, self.target.parent / name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        os.close(self._lock)
        if isinstance(error, OSError):
            raise Ds4Error(f"{self.path}: cannot be written: {error.strerror or error}") from None


def _locked(directory: Path) -> int:
    """A descriptor that locks the directory until it is closed; -1 where another process holds the lock."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return -1
    return descriptor


def check_space(path: Path, needed: int) -> None:
    """Raise Ds4Error if the disk of ``path``'s directory has less than ``needed`` bytes free."""
    try:
        free = shutil.disk_usage(path.resolve().parent).free
    except OSError as error:
        raise Ds4Error(f"{path}: cannot be written: {error.strerror or error}") from None
    if free < needed:
        raise Ds4Error(
            f"{path}: needs {needed / 1e9:,.3g} GB, but {path.parent} has {free / 1e9:,.3g} GB free; "
            "make room or choose another disk"
        )
