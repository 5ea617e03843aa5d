"""The cubin cache: what its key depends on, damaged files, many processes, a bounded size."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4.kernels import cubin_cache
from ds4.kernels.compiler import CompileError, Cubin, Resources
from ds4.kernels.cubin_cache import CubinCache, cubin_key, decode, default_directory, encode
from ds4.kernels.entry import Entry, constant_set

RESOURCES = {"k": Resources(registers=8, static_shared_bytes=0, stack_bytes=0, spill_store_bytes=0, spill_load_bytes=0)}


class Counting:
    """A compiler that counts its calls; the cubin says what it was made of."""

    def __init__(self, size: int = 100) -> None:
        self.calls, self.size = 0, size

    def __call__(self, path, constants, architecture):
        self.calls += 1
        return Cubin(f"{path.read_text()}|{constants}|{architecture}|".encode().ljust(self.size, b"."), RESOURCES)


@pytest.fixture
def entry(tmp_path):
    path = tmp_path / "src" / "k.cu"
    path.parent.mkdir()
    path.write_text('#include "a.cuh"\nextern "C" __global__ void k() {}')
    (path.parent / "a.cuh").write_text('#include "b.cuh"')
    (path.parent / "b.cuh").write_text("// first")
    return Entry("k", str(path), ())


@pytest.fixture
def cache(tmp_path):
    return CubinCache(tmp_path / "cache", compiler=Counting())


def stored(cache: CubinCache) -> list[Path]:
    return sorted(cache.directory.iterdir())


def test_a_hit_equals_what_was_compiled(cache, entry):
    first = cache.get(entry, (), "sm_80")
    assert cache.get(entry, (), "sm_80") == first
    assert CubinCache(cache.directory, compiler=cache._compile).get(entry, (), "sm_80") == first
    assert cache._compile.calls == 1
    assert len(stored(cache)) == 1


def test_everything_that_matters_changes_the_key(entry, monkeypatch):
    keys = {cubin_key(entry.path, (), "sm_80")}

    def another() -> None:
        key = cubin_key(entry.path, (), "sm_80")
        assert key not in keys
        keys.add(key)

    for name, text in [("k.cu", '#include "a.cuh"\n'), ("a.cuh", '#include "b.cuh"\n'), ("b.cuh", "// second")]:
        (entry.path.parent / name).write_text(text)
        another()
    for constants, architecture in [((), "sm_86"), (constant_set(kA=1), "sm_80"), (constant_set(kA=1.0), "sm_80")]:
        key = cubin_key(entry.path, constants, architecture)
        assert key not in keys
        keys.add(key)
    for toolchain in ("nvrtc 13.1", "nvrtc 13.0 options"):
        monkeypatch.setattr(cubin_cache, "toolchain", lambda value=toolchain: value)
        another()


def test_what_does_not_matter_does_not_change_the_key(entry, tmp_path):
    before = cubin_key(entry.path, (), "sm_80")
    (entry.path.parent / "unused.cuh").write_text("// not included")
    os.utime(entry.path, (1, 1))
    assert cubin_key(entry.path, (), "sm_80") == before
    entry.path.parent.rename(tmp_path / "moved")
    assert cubin_key(tmp_path / "moved" / "k.cu", (), "sm_80") == before


@given(st.data())
def test_no_damage_gets_through(data):
    cubin = Cubin(b"machine code\nwith a line break", RESOURCES, ("a warning",))
    good = encode(cubin, "key")
    assert decode(good, "key") == cubin
    assert decode(good, "another key") is None
    kind = data.draw(st.sampled_from(["cut", "flip", "append", "other"]))
    if kind == "cut":
        bad = good[: data.draw(st.integers(0, len(good) - 1))]
    elif kind == "flip":
        at = data.draw(st.integers(0, len(good) - 1))
        bad = good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :]
    elif kind == "append":
        bad = good + data.draw(st.binary(min_size=1))
    else:
        bad = data.draw(st.binary())
    assert decode(bad, "key") is None


def test_a_damaged_file_is_replaced(cache, entry):
    first = cache.get(entry, (), "sm_80")
    (file,) = stored(cache)
    good = file.read_bytes()
    for bad in (b"", good[:-1], good[:40], b"\0" * len(good), good.replace(b"sm_80", b"sm_86")):
        file.write_bytes(bad)
        assert cache.get(entry, (), "sm_80") == first
        assert file.read_bytes() == good
    assert cache._compile.calls == 6


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, entry):
    (tmp_path / "file").write_text("")
    cache = CubinCache(tmp_path / "file" / "cache", compiler=Counting())
    with pytest.warns(UserWarning, match="cannot be kept in"):
        first = cache.get(entry, (), "sm_80")
    assert cache.get(entry, (), "sm_80") == first  # and warns only once: pytest makes a second warning an error below
    assert cache._compile.calls == 2


@pytest.mark.filterwarnings("error")
def test_a_full_disk_leaves_nothing_behind(cache, entry, monkeypatch):
    cache._warned = True

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert cache.get(entry, (), "sm_80").resources == RESOURCES
    assert stored(cache) == []


def test_an_error_is_not_kept(tmp_path, entry):
    def broken(path, constants, architecture):
        raise CompileError("k.cu:1: sm_80: wrong", "log")

    with pytest.raises(CompileError):
        CubinCache(tmp_path / "cache", compiler=broken).get(entry, (), "sm_80")
    assert not (tmp_path / "cache").exists()


def test_the_size_is_bounded_and_the_oldest_go(tmp_path, entry):
    cache = CubinCache(tmp_path / "cache", max_bytes=4000, compiler=Counting(size=600))
    now = time.time()
    for i in range(4):
        cache.get(entry, constant_set(kI=i), "sm_80")
        newest = max(stored(cache), key=lambda file: file.stat().st_mtime)
        os.utime(newest, (now - 1000 + i, now - 1000 + i))
    assert len(stored(cache)) == 4
    assert cache._compile.calls == 4
    cache.get(entry, constant_set(kI=0), "sm_80")  # a use makes it the youngest
    cache.get(entry, constant_set(kI=9), "sm_80")
    assert sum(file.stat().st_size for file in stored(cache)) <= 4000
    calls = cache._compile.calls
    cache.get(entry, constant_set(kI=0), "sm_80")
    cache.get(entry, constant_set(kI=9), "sm_80")
    assert cache._compile.calls == calls
    cache.get(entry, constant_set(kI=1), "sm_80")
    assert cache._compile.calls == calls + 1


def test_temporary_files_of_dead_processes_go(cache, entry):
    cache.directory.mkdir(parents=True)
    old, new = cache.directory / ".tmp-old", cache.directory / ".tmp-new"
    for file in (old, new):
        file.write_text("half a cubin")
    os.utime(old, (1, 1))
    cache.get(entry, (), "sm_80")
    assert not old.exists()
    assert new.exists()


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "ds4" / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_directory() == tmp_path / "home" / ".cache" / "ds4" / "kernels"


def hammer(directory: Path, entry: Entry, barrier, seed: int) -> str:
    """One process: gets cubins, and every few rounds damages or removes a file. Returns the first thing wrong."""
    cache = CubinCache(directory, max_bytes=4000, compiler=Counting(size=500))
    barrier.wait()
    for round_ in range(60):
        n = (seed * 7 + round_ * 3) % 10
        got = cache.get(entry, constant_set(kI=n), "sm_80")
        if f"|(('kI', {n}),)|sm_80|".encode() not in got.data or got.resources != RESOURCES:
            return f"wrong cubin for {n}: {got.data!r}"
        files = [file for file in directory.iterdir() if file.suffix == ".cubin"]
        if files and round_ % 5 == seed % 5:
            victim = files[round_ % len(files)]
            try:
                if seed % 2:
                    victim.unlink()
                else:
                    victim.write_bytes(victim.read_bytes()[:60])  # written in place: others read half a file
            except FileNotFoundError:
                pass
    return ""


def test_eight_processes_at_once(tmp_path, entry):
    directory = tmp_path / "cache"
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(8), context.SimpleQueue()
    work = [
        context.Process(target=lambda seed=seed: results.put(hammer(directory, entry, barrier, seed)))
        for seed in range(8)
    ]
    for process in work:
        process.start()
    for process in work:
        process.join(60)
    assert [process.exitcode for process in work] == [0] * 8
    assert [results.get() for _ in work] == [""] * 8
    assert not [file for file in directory.iterdir() if file.name.startswith(".tmp-")]


def test_with_the_real_compiler(tmp_path):
    path = tmp_path / "k.cu"
    path.write_text('extern "C" __global__ void k(float* x) { *x = kValue; }')
    entry, cache = Entry("k", str(path), (("x", "f32*"),), ("kValue",)), CubinCache(tmp_path / "cache")
    one, two = (cache.get(entry, constant_set(kValue=value), "sm_90a") for value in (1.0, 2.0))
    assert one.data != two.data
    assert cache.get(entry, constant_set(kValue=1.0), "sm_90a") == one
    assert len(stored(cache)) == 2
