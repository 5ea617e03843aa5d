"""Streaming a checkpoint's bytes to a device: files in order, through a small buffer.

The peak is the destination plus the buffers: data is read with ``preadv`` on the mapped files' descriptors, so that it
passes through no page of this process's memory but the buffer's. For a CUDA device there are two buffers of pinned
memory, and one is filled while the other is copied.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ds4.weights.checkpoint import Checkpoint
from ds4.weights.storage import MappedFile, StoredTensor

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) after every buffer; tensor bytes only, without headers and padding."""

BUFFER_BYTES = 8 << 20
"""Small enough for a CPU's cache: reading 64 MiB at a time is half as fast. Hints to the system about what is read next
(WILLNEED, SEQUENTIAL) are not given: reads from the page cache lose a tenth by them, reads from disk gain nothing."""

_MAX_GAP = 4096
"""Tensors that lie this close are read together with what is between them."""

_MAX_BLOCK = 4 << 20
"""No block of the system's page cache is larger."""


class Piece(NamedTuple):
    """Bytes ``offset ..`` of a stored tensor: ``data`` uint8 [n], n > 0, in CPU memory (pinned for a CUDA device)."""

    tensor: StoredTensor
    offset: int
    data: Tensor


def pieces(
    tensors: Iterable[StoredTensor],
    device: torch.device | str = "cpu",
    *,
    progress: Progress | None = None,
    buffer_bytes: int = BUFFER_BYTES,
    drop_cache: bool = False,
) -> Iterator[Piece]:
    """Everything the tensors hold, once, file by file and in ascending order within a file.

    A piece's ``data`` is overwritten later: use it, or enqueue its copy to ``device`` on the current stream, before
    asking for the next piece. ``drop_cache``: what was read is dropped from the system's page cache, for a GPU that
    shares its memory with the CPU.
    Error:   Ds4Error if a file cannot be read or has become shorter.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    buffers = [torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=cuda) for _ in range(2 if cuda else 1)]
    copied: list[torch.cuda.Event | None] = [None] * len(buffers)
    tensors = list(tensors)
    total, done, turn = sum(t.nbytes for t in tensors), 0, 0
    for run in _runs(tensors):
        file, end = run[0].file, run[-1].offset + run[-1].nbytes
        waiting = iter(run)
        tensor = next(waiting)
        for start in range(run[0].offset, end, buffer_bytes):
            event = copied[turn]
            if event is not None:
                event.synchronize()
            stop = min(start + buffer_bytes, end)
            buffer = buffers[turn][: stop - start]
            file.read_into(buffer, start)
            if drop_cache and hasattr(os, "posix_fadvise"):
                # Only whole blocks of the cache are dropped, so those that reach into the last buffer come again.
                back = max(0, start - _MAX_BLOCK)
                os.posix_fadvise(file.fd, back, stop - back, os.POSIX_FADV_DONTNEED)
            while tensor.offset < stop:
                first, last = max(start, tensor.offset), min(stop, tensor.offset + tensor.nbytes)
                yield Piece(tensor, first - tensor.offset, buffer[first - start : last - start])
                done += last - first
                if last < tensor.offset + tensor.nbytes or last == end:
                    break
                tensor = next(waiting)
            if cuda:
                copied[turn] = torch.cuda.current_stream(device).record_event()
            turn = (turn + 1) % len(buffers)
            if progress is not None:
                progress(done, total)
    for event in copied:
        if event is not None:
            event.synchronize()


def _runs(tensors: list[StoredTensor]) -> Iterator[list[StoredTensor]]:
    """Tensors of one file that follow each other closely, by file in order of first appearance, then by offset."""
    files: dict[MappedFile, list[StoredTensor]] = {}
    for tensor in tensors:
        files.setdefault(tensor.file, []).append(tensor)
    for found in files.values():
        run: list[StoredTensor] = []
        for tensor in sorted((t for t in found if t.nbytes), key=lambda t: t.offset):
            if run and tensor.offset - (run[-1].offset + run[-1].nbytes) > _MAX_GAP:
                yield run
                run = []
            run.append(tensor)
        if run:
            yield run


def load(
    tensors: Iterable[StoredTensor],
    device: torch.device | str,
    *,
    progress: Progress | None = None,
    buffer_bytes: int = BUFFER_BYTES,
    drop_cache: bool = False,
) -> dict[StoredTensor, Tensor]:
    """Copy stored tensors (``Checkpoint.tensors()``) to a device: uint8 [nbytes] of each, exactly the file's bytes.

    Peak memory: the result and two buffers (one on the CPU).
    Error:   Ds4Error as in ``pieces``; torch's out-of-memory error if the device is too small.
    """
    tensors = list(tensors)
    loaded = {t: torch.empty(t.nbytes, dtype=torch.uint8, device=device) for t in tensors}
    for piece in pieces(tensors, device, progress=progress, buffer_bytes=buffer_bytes, drop_cache=drop_cache):
        target = loaded[piece.tensor][piece.offset : piece.offset + piece.data.numel()]
        target.copy_(piece.data, non_blocking=True)
    return loaded


def read_speed(
    ckpt: Checkpoint,
    device: torch.device | str = "cpu",
    *,
    limit_bytes: int = 8 << 30,
    repeats: int = 5,
    buffer_bytes: int = BUFFER_BYTES,
) -> dict[str, float]:
    """How fast a checkpoint streams to a device, against plain reads of the same bytes; both from the page cache.

    The first tensors up to ``limit_bytes`` (at least one) are read once to warm the cache, then read and streamed in
    turns. Nothing is kept: a plain read goes to one buffer used over and over, and so does what the loader delivers
    (on a CUDA device, to a buffer there).
    returns  bytes a pass, repeats, read_gb_s and load_gb_s (medians, 10^9 bytes a second), ratio = load / read
    """
    chosen: list[StoredTensor] = []
    n_bytes = 0
    for tensor in ckpt.tensors():
        if chosen and n_bytes + tensor.nbytes > limit_bytes:
            break
        chosen.append(tensor)
        n_bytes += tensor.nbytes
    _read(chosen, buffer_bytes)
    times = [(_read(chosen, buffer_bytes), _deliver(chosen, device, buffer_bytes)) for _ in range(repeats)]
    read, loaded = (n_bytes / statistics.median(column) / 1e9 for column in zip(*times, strict=True))
    speeds = {"read_gb_s": read, "load_gb_s": loaded, "ratio": loaded / read}
    return {"bytes": n_bytes, "repeats": repeats, **speeds}


def _read(tensors: list[StoredTensor], buffer_bytes: int) -> float:
    """Seconds of plain sequential reads into one buffer, new like the loader's."""
    started = time.perf_counter()
    buffer = memoryview(torch.empty(buffer_bytes, dtype=torch.uint8).numpy().data)
    for run in _runs(tensors):
        fd, at, end = run[0].file.fd, run[0].offset, run[-1].offset + run[-1].nbytes
        while at < end:
            at += os.preadv(fd, [buffer[: end - at]], at)
    return time.perf_counter() - started


def _deliver(tensors: list[StoredTensor], device: torch.device | str, buffer_bytes: int) -> float:
    """Seconds of streaming to one buffer on the device; on the CPU that is where the pieces arrive."""
    on_cpu = torch.device(device).type == "cpu"
    target = torch.empty(0 if on_cpu else buffer_bytes, dtype=torch.uint8, device=device)
    started = time.perf_counter()
    for piece in pieces(tensors, device, buffer_bytes=buffer_bytes):
        if not on_cpu:
            target[: piece.data.numel()].copy_(piece.data, non_blocking=True)
    return time.perf_counter() - started
