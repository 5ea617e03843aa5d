"""Files that appear whole or not at all."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ds4.errors import Ds4Error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name for a new file that takes the place of ``path`` when the block ends; if the block fails, it goes.

    It is in a directory of its own, since what writes it may make temporary files of its own. A directory that a killed
    process left behind is used again. Raises OSError; Ds4Error while another process is writing the same file.
    """
    if path.is_dir():
        raise IsADirectoryError(21, "Is a directory", str(path))
    folder = path.with_name(f".{path.name}.saving")
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, folder, path)
        try:
            _empty(folder)
            part = folder / path.name
            yield part
            _finish(part)
            os.replace(part, path)
        finally:
            _empty(folder)
            folder.rmdir()
    finally:
        os.close(descriptor)
    with _opened(path.parent) as parent:
        os.fsync(parent)


def _lock(descriptor: int, folder: Path, path: Path) -> None:
    """Take the directory for this process; where the file system has no locks, do without."""
    with suppress(OSError):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Ds4Error(f"{path}: another process is writing it; try again later") from None
    try:
        mine = os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        mine = False
    if not mine:  # the process that had the lock has finished, and took its directory away
        raise Ds4Error(f"{path}: another process has just written it; try again")


def _empty(folder: Path) -> None:
    for left in folder.iterdir():
        left.unlink()


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _finish(part: Path) -> None:
    """Permissions as of any new file, and all bytes on the disk."""
    umask = os.umask(0)
    os.umask(umask)
    part.chmod(0o666 & ~umask)
    with _opened(part) as descriptor:
        os.fsync(descriptor)
