"""Pieces shared by threads: order, errors, interruption, and that single operations then keep to one thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from ds4.kernels.threads import each, one_thread, shared_pieces, spread


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def meeting() -> list[str]:
    """Two pieces that only end if both are computed at the same time."""
    barrier = threading.Barrier(2)

    def piece() -> str:
        barrier.wait(10)
        return threading.current_thread().name

    with shared_pieces():
        return spread([piece, piece])


def test_pieces_are_computed_at_the_same_time() -> None:
    assert len(set(meeting())) == 2


def test_results_come_in_the_order_of_the_pieces() -> None:
    with shared_pieces():
        assert spread([lambda i=i: i for i in range(50)]) == list(range(50))
        assert each(lambda a, b: a * b, range(5), range(5)) == [0, 1, 4, 9, 16]
        assert spread([]) == []


def test_operations_keep_to_one_thread_and_to_the_callers_mode() -> None:
    def piece() -> tuple[int, bool]:
        barrier.wait(10)
        return torch.get_num_threads(), torch.is_inference_mode_enabled()

    for inference in (False, True):
        barrier = threading.Barrier(2)
        with torch.inference_mode(inference), shared_pieces():
            assert spread([piece, piece]) == [(1, inference)] * 2
    assert torch.get_num_threads() == 2
    with one_thread() as threads:
        assert (threads, torch.get_num_threads()) == (2, 1)


def test_elsewhere_the_caller_computes_everything() -> None:
    """Outside ``shared_pieces``, and in pieces: there is no waiting for a thread that waits itself."""
    me = threading.current_thread()

    def name() -> threading.Thread:
        return threading.current_thread()

    assert spread([name] * 4) == [me] * 4
    with shared_pieces():
        inner = spread([lambda: (name(), spread([name] * 4))] * 4)
    assert all(threads == [outer] * 4 for outer, threads in inner)
    assert spread([name] * 4) == [me] * 4


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_ends_the_rest(error: type[BaseException]) -> None:
    """It is raised when nothing is at work any more, and the threads serve the next call."""
    begun, at_work = [], []

    def piece(i: int) -> None:
        begun.append(i)
        at_work.append(i)
        if i == 3:
            at_work.remove(i)
            raise error(i)
        threading.Event().wait(0.01)
        at_work.remove(i)

    with shared_pieces():
        with pytest.raises(error, match="3"):
            each(piece, range(100))
        assert len(begun) < 10
        assert at_work == []
    assert len(set(meeting())) == 2
