"""Streaming of stored tensors: every byte once, in order, through a small buffer."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path

import pytest
import torch
from builders import gguf_bytes, small_keys, write

from ds4.demo import bundled_model_path
from ds4.errors import Ds4Error
from ds4.weights import open_checkpoint
from ds4.weights.storage import MappedFile, StoredTensor
from ds4.weights.stream import load, pieces, read_speed

DEVICES = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
    ],
)


def stored(path: Path, *places: tuple[int, int]) -> list[StoredTensor]:
    """Tensors at (offset, bytes) of one file of random bytes, 100 KB unless it is there."""
    if not path.exists():
        path.write_bytes(os.urandom(100_000))
    file = MappedFile(path)
    return [StoredTensor(f"t{i}", "q8_0", (n,), file, at, n) for i, (at, n) in enumerate(places)]


PLACES = ((64, 1000), (1064, 5), (1088, 40_000), (41_100, 1), (60_000, 0), (60_000, 30_000), (99_999, 1))
"""Neighbours, padding, a wide gap, nothing at all, and the last byte of the file."""


@DEVICES
@pytest.mark.parametrize("buffer_bytes", [1, 7, 1000, 4096, 1 << 20])
def test_every_byte_arrives(tmp_path: Path, device: str, buffer_bytes: int) -> None:
    places = PLACES if buffer_bytes > 1 else PLACES[:2]
    tensors = stored(tmp_path / "a", *places) + stored(tmp_path / "b", (500, 3000))
    calls: list[tuple[int, int]] = []
    loaded = load(tensors, device, progress=lambda done, total: calls.append((done, total)), buffer_bytes=buffer_bytes)
    assert list(loaded) == tensors
    for tensor, data in loaded.items():
        assert data.device.type == device
        assert torch.equal(data.cpu(), tensor.data)
    total = sum(t.nbytes for t in tensors)
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)


def test_files_are_read_in_order_and_never_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = stored(tmp_path / "a", *PLACES), stored(tmp_path / "b", (3, 5000))
    reads: list[tuple[str, int, int]] = []
    read_into = MappedFile.read_into

    def watched(file: MappedFile, buffer: torch.Tensor, offset: int) -> None:
        reads.append((file.path.name, offset, offset + buffer.numel()))
        read_into(file, buffer, offset)

    monkeypatch.setattr(MappedFile, "read_into", watched)
    shuffled = [first[5], *second, first[0], first[6], first[3], first[2], first[1], first[4]]
    found = [(p.tensor, p.offset, p.data.clone()) for p in pieces(shuffled, buffer_bytes=4096)]
    assert all(torch.equal(data, t.data[at : at + data.numel()]) for t, at, data in found)
    assert reads == sorted(reads)
    assert all(0 < end - start <= 4096 for _, start, end in reads)
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in itertools.pairwise(reads))
    # The gap of 19 KB is not read, the padding of a few bytes is.
    read, wanted = sum(end - start for _, start, end in reads), sum(t.nbytes for t in (*first, *second))
    assert wanted < read < wanted + 5000


def test_a_buffer_is_used_again(tmp_path: Path) -> None:
    addresses = {piece.data.data_ptr() // (1 << 20) for piece in pieces(stored(tmp_path / "a", (0, 90_000)))}
    assert len(addresses) <= 2  # of one 8 MiB buffer, only the first 90 KB
    starts = {p.data.data_ptr() for p in pieces(stored(tmp_path / "a", (0, 90_000)), buffer_bytes=1000)}
    assert len(starts) == 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_is_the_buffer_and_no_page_of_the_map(tmp_path: Path) -> None:
    """64 MB, of which neither the map nor anything else may keep what passed through."""

    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssFile")))

    path = tmp_path / "big"
    path.write_bytes(bytes(64_000_000))
    tensors = stored(path, *((i * 1_000_000, 1_000_000) for i in range(64)))
    for _ in pieces(tensors[:1], buffer_bytes=1 << 20):
        pass
    before = resident()
    n_bytes = sum(piece.data.numel() for piece in pieces(tensors, buffer_bytes=1 << 20))
    assert n_bytes == 64_000_000
    assert resident() - before < 8e6
    assert int(tensors[0].file.bytes.sum()) == 0
    assert resident() - before > 50e6  # what touching the map looks like


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    tensors = stored(tmp_path / "a", *PLACES)
    os.truncate(tmp_path / "a", 50_000)
    with pytest.raises(Ds4Error, match=r"a: has no byte 60000; it was longer when it was opened"):
        load(tensors, "cpu")


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    tensors = stored(tmp_path / "a", *PLACES)
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(Ds4Error, match=r"a: cannot be read: Input/output error"):
        load(tensors, "cpu")


def test_a_replaced_file_is_read_as_it_was(tmp_path: Path) -> None:
    """The descriptor is that of the mapped file, whatever its name stands for now."""
    tensors = stored(tmp_path / "a", *PLACES)
    write(tmp_path / "new", bytes(100_000))
    os.replace(tmp_path / "new", tmp_path / "a")
    for tensor, data in load(tensors, "cpu").items():
        assert torch.equal(data, tensor.data)


def test_descriptors_are_closed(tmp_path: Path) -> None:
    file = stored(tmp_path / "a", (0, 10))[0].file
    fd = file.fd
    os.fstat(fd)
    del file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def cached(path: Path, offset: int) -> bool:
    """Whether a byte of a file is in the page cache: reading without waiting succeeds."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="needs Linux")
def test_dropping_what_was_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    tensors = stored(path, (0, 100_000))
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)  # what is not on disk yet cannot be dropped
    os.close(fd)
    try:
        cached(path, 0)
    except OSError:
        pytest.skip("the file system of the temporary directory does not tell what is cached")
    load(tensors, "cpu", buffer_bytes=8192)
    assert cached(path, 0)
    assert cached(path, 90_000)
    load(tensors, "cpu", buffer_bytes=8192, drop_cache=True)
    assert not cached(path, 0)
    assert not cached(path, 90_000)


@DEVICES
def test_a_whole_checkpoint(device: str) -> None:
    ckpt = open_checkpoint(bundled_model_path())
    loaded = load(ckpt.tensors(), device)
    assert sum(data.numel() for data in loaded.values()) == ckpt.total_bytes
    assert all(torch.equal(data.cpu(), tensor.data) for tensor, data in loaded.items())


@DEVICES
def test_read_speed(device: str, tmp_path: Path) -> None:
    ckpt = open_checkpoint(bundled_model_path())
    speed = read_speed(ckpt, device, repeats=3)
    assert speed["bytes"] == ckpt.total_bytes
    assert speed["repeats"] == 3
    assert speed["ratio"] == pytest.approx(speed["load_gb_s"] / speed["read_gb_s"])
    assert min(speed.values()) > 0


def test_read_speed_of_the_first_bytes(tmp_path: Path) -> None:
    data = gguf_bytes(small_keys(), [(f"t{i}", (32,), 0, 128 * i) for i in range(4)], 512)
    write(tmp_path / "m.gguf", data)

    class Stub:
        def tensors(self):
            return iter(stored(tmp_path / "m.gguf", (0, 100), (100, 100), (200, 100), (300, 100)))

    assert [read_speed(Stub(), limit_bytes=n, repeats=1)["bytes"] for n in (0, 100, 299, 300, 999)] == [
        *(100, 100, 200, 300, 400)
    ]
