"""Faults planted into copies of the real kernels: the checks that every operation passes notice them.

A change of a source is a new library, which takes seconds, so for each kernel file faults are tried until every kernel
of it has had one noticed. Libraries are kept in .pytest_cache.
"""

from __future__ import annotations

import copy
import faulthandler
import multiprocessing
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path

import pytest
import torch
from cuemu.backend import CpuBackend, missing
from cuemu.errors import CompileError, KernelError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from gpu_checks import cases_of, launched

from ds4.kernels.cases import Case
from ds4.kernels.entry import INCLUDE_DIR, KERNEL_ROOT, Entry, KernelCall
from ds4.kernels.registry import Operation, all_operations
from ds4.kernels.signature import project_includes, without_comments
from ds4.kernels.verify import check_launches

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

CPU = torch.device("cpu")
OPERATIONS = all_operations()
FILES = sorted({entry.file for operation in OPERATIONS for entry in operation.entries})
BARRIER = re.compile(r"__sync(?:threads|warp)\([^;()]*\);")
INDEX = re.compile(r"\bthreadIdx\.x\b")
MOST_FAULTS = 8  # tried for a file before its kernels count as untested


@dataclass(frozen=True)
class Fault:
    """A changed copy of ``file``, a kernel file or a header of it: what was changed, and its new text."""

    file: Path
    what: str
    text: str


def changes(file: Path, what: str, pattern: re.Pattern[str], replacement: str) -> Iterator[Fault]:
    """One fault for each place in the code where ``pattern`` is found."""
    code = without_comments(file.read_text(encoding="utf-8"))  # keeps the lines
    for match in pattern.finditer(code):
        line = code.count("\n", 0, match.start()) + 1
        text = code[: match.start()] + replacement + code[match.end() :]
        yield Fault(file, f"{what} in {file.name}:{line}", text)


def faults(file: Path) -> list[Fault]:
    """In turn: a barrier gone (a file's last one first), an index off by one, two threads on one element, which is a
    race; in the kernel file, then in the headers of operations. No index leaves the range of the right one."""
    sources = [file, *(header for header in project_includes(file) if not header.is_relative_to(INCLUDE_DIR))]
    barriers = [fault for one in sources for fault in reversed(list(changes(one, "no barrier", BARRIER, ";")))]
    one_less = "(threadIdx.x ? threadIdx.x - 1 : 0)"
    off = [fault for one in sources for fault in changes(one, "index off by one", INDEX, one_less)]
    races = [fault for one in sources for fault in changes(one, "race", INDEX, "(threadIdx.x / 2)")]
    in_turn = chain.from_iterable(zip_longest(barriers, off, races))
    return [fault for fault in in_turn if fault is not None][:MOST_FAULTS]


def plant(fault: Fault, file: Path, folder: Path) -> Path:
    """A copy of the kernel file ``file`` with ``fault``, and of its headers in the same places to each other, those of
    include/ beside it, where the compiler looks first. The same fault has the same place in every run, so that its
    library is built once."""
    root = folder / re.sub(r"\W+", "-", fault.what)
    beside = root / file.parent.name
    for source in (file, *project_includes(file)):
        shared = source.is_relative_to(INCLUDE_DIR)
        place = beside / source.name if shared else root / source.relative_to(file.parent.parent)
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(f".{place.name}.{os.getpid()}")
        if source == fault.file:
            temporary.write_text(fault.text, encoding="utf-8")
        else:
            shutil.copy(source, temporary)
        temporary.replace(place)
    return beside / file.name


def planted(operation: Operation, file: Path, copied: Path) -> Operation:
    """``operation`` with the kernel file ``copied`` in place of ``file``."""

    def calls(inputs, outputs):
        return [moved(call) if call.entry.path == file else call for call in operation.calls(inputs, outputs)]

    def moved(call: KernelCall) -> KernelCall:
        pack = copy.copy(call.args)
        pack.entry = replace(call.entry, file=str(copied))
        return replace(call, entry=pack.entry, args=pack)

    return replace(operation, calls=calls)


def noticed(check: Callable[[], list[str]], limit_s: float = 120) -> str:
    """The first line of what ``check`` or the emulation finds; "" for nothing, or where the source does not compile.

    It runs in a process of its own, which a fault may break. Raises RuntimeError where it fails in another way.
    """

    def work(pipe) -> None:
        torch.set_num_threads(1)
        faulthandler.disable()  # a crash is an answer, not news
        try:
            answer = ("found", *check()[:1])
        except KernelError as error:
            answer = ("found", str(error))
        except CompileError:
            answer = ("found",)
        except Exception as error:
            answer = ("failed", repr(error))
        pipe.send(answer)
        pipe.close()
        os._exit(0)

    context = multiprocessing.get_context("fork")  # as torch's data loaders do: starting anew takes seconds
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(theirs,))
    child.start()
    theirs.close()
    try:
        how, *found = ours.recv() if ours.poll(limit_s) else ("found", "no end")
    except EOFError:
        how, *found = "found", "the process died"
    finally:
        child.kill()
        child.join()
    if how == "failed":
        raise RuntimeError(found[0])
    return found[0] if found else ""


@pytest.mark.parametrize("name", FILES)
def test_planted_faults_are_noticed(name, request, capsys):
    """In each kernel that a smoke case launches. Takes two or three compilations."""
    file = KERNEL_ROOT / name
    todo: dict[Entry, tuple[Operation, Case]] = {}
    for operation in OPERATIONS:
        for case in cases_of(operation, ("smoke",)):
            todo |= {e: (operation, case) for e in launched(operation, [case]) if e.file == name and e not in todo}
    assert todo
    for operation, case in todo.values():
        assert noticed(partial(check_launches, operation, case, CpuBackend(), CPU)) == ""
    seen: dict[Entry, str] = {}
    tried = []
    for fault in faults(file):
        copied = plant(fault, file, Path(request.config.cache.mkdir("faults")))
        tried.append(fault.what)
        for entry in todo.keys() - seen.keys():
            operation, case = todo[entry]
            check = partial(check_launches, planted(operation, file, copied), case, CpuBackend(time_limit_s=5), CPU)
            if text := noticed(check):
                seen[entry] = f"{fault.what}: {text}"
        if len(seen) == len(todo):
            break
    with capsys.disabled():
        print(f" {name}: faults noticed in {len(seen)} of {len(todo)} kernels, tried: {', '.join(tried)} ")
    unnoticed = sorted(entry.name for entry in todo.keys() - seen.keys())
    assert not unnoticed, f"{', '.join(tried)}; noticed: {list(seen.values())}"


def test_what_counts_as_noticed():
    def fails(error: Exception) -> list[str]:
        raise error

    assert noticed(lambda: []) == ""
    assert noticed(lambda: ["wrong", "more"]) == "wrong"
    assert noticed(partial(fails, KernelError("deadlock"))) == "deadlock"
    assert noticed(partial(fails, CompileError("no such name", ""))) == ""
    assert noticed(partial(os._exit, 3)) == "the process died"
    assert noticed(lambda: [str(os.read(os.pipe()[0], 1))], limit_s=0.2) == "no end"
    with pytest.raises(RuntimeError, match="arguments differ"):
        noticed(partial(fails, ValueError("arguments differ")))


def test_faults_of_a_source(tmp_path):
    header, source = tmp_path / "b" / "h.cuh", tmp_path / "a" / "k.cu"
    for path, text in (
        (header, '#include "reduce.cuh"\ninline void f() { __syncwarp(0xff); }'),
        (
            source,
            '#include "../b/h.cuh"\n// __syncthreads();\nint i = threadIdx.x;\n__syncthreads();\n__syncthreads();',
        ),
    ):
        path.parent.mkdir()
        path.write_text(text)
    assert [fault.what for fault in faults(source)] == [
        "no barrier in k.cu:5",
        "index off by one in k.cu:3",
        "race in k.cu:3",
        "no barrier in k.cu:4",
        "no barrier in h.cuh:2",
    ]
    copied = plant(faults(source)[-1], source, tmp_path / "faults")
    assert copied.read_text() == source.read_text()
    assert (copied.parent / "../b/h.cuh").read_text().endswith("inline void f() { ; }")
    root = tmp_path / "faults"
    assert all(path.is_relative_to(root) for path in project_includes(copied))  # reduce.cuh and what it includes too
