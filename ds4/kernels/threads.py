"""Threads: independent pieces of a prompt's arithmetic on several cores.

torch splits single operations over cores, and a prompt consists of thousands of small ones: they gain little, and as
soon as a core is busy with something else each of them waits for it (docs/experiments.md). Here every operation runs on
one thread, and threads take whole pieces, such as a tile of tokens or an expert. What a piece computes does not depend
on who takes it, so that the number of threads changes no bit of a prompt.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch

T = TypeVar("T")


class _Here(threading.local):
    """How many threads may share the pieces that this thread is about to compute."""

    width = 1


_here = _Here()
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}  # by process and number of helpers


@contextmanager
def one_thread() -> Iterator[int]:
    """Operations within it run on one thread; gives the number of threads that torch has otherwise."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield threads
        return
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


@contextmanager
def shared_pieces() -> Iterator[None]:
    """Within it ``spread`` uses as many threads as torch has, and single operations use one."""
    with one_thread() as threads:
        before, _here.width = _here.width, threads
        try:
            yield
        finally:
            _here.width = before


def spread(pieces: Sequence[Callable[[], T]]) -> list[T]:
    """The results of ``pieces`` in order, each computed by whichever thread is free.

    Outside ``shared_pieces``, and in a piece itself, they are computed one after the other. Pieces must not depend on
    each other, nor write to the same places. The first error (or Ctrl-C) is raised when no piece is at work any more;
    those not yet begun then never are.
    """
    width = min(_here.width, len(pieces))
    if width <= 1:
        return [piece() for piece in pieces]
    results: list[T | None] = [None] * len(pieces)
    queue = deque(enumerate(pieces))
    work = partial(_work, queue, results, torch.is_inference_mode_enabled())
    helpers = [_pool(width - 1).submit(work) for _ in range(width - 1)]
    before, _here.width = _here.width, 1
    try:
        work()
    finally:
        queue.clear()
        _here.width = before
        _wait(helpers)
    for helper in helpers:
        helper.result()
    return results  # type: ignore[return-value]


def each(f: Callable[..., T], *lists: Sequence[object]) -> list[T]:
    """``f`` of the first items, of the second ones and so on, spread over threads."""
    return spread([partial(f, *items) for items in zip(*lists, strict=True)])


def _work(queue: deque[tuple[int, Callable[[], T]]], results: list[T | None], inference: bool) -> None:
    with torch.inference_mode(inference):  # which is a thread's own
        while True:
            try:
                place, piece = queue.popleft()
            except IndexError:
                return
            try:
                results[place] = piece()
            except BaseException:
                queue.clear()
                raise


def _wait(helpers: Sequence[Future[None]]) -> None:
    """Comes back when no helper is at work, also where Ctrl-C is pressed again."""
    interruption: KeyboardInterrupt | None = None
    while True:
        try:
            wait(helpers)
            break
        except KeyboardInterrupt as error:
            interruption = error
    if interruption is not None:
        raise interruption


def _pool(n: int) -> ThreadPoolExecutor:
    key = (os.getpid(), n)  # threads do not survive a fork
    if key not in _pools:
        _pools[key] = ThreadPoolExecutor(n, "ds4", initializer=torch.set_num_threads, initargs=(1,))
    return _pools[key]
