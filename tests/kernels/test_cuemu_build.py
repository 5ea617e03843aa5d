"""How kernel files become libraries for the CPU: rewriting, house rules, errors, the cache."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cuemu import builder
from cuemu.backend import CpuBackend, missing
from cuemu.calls import FIXTURES, kernel_call
from cuemu.errors import CompileError, SourceError
from cuemu.source import rewrite

from ds4.kernels.entry import INCLUDE_DIR, ConstantValue

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

KERNEL = 'extern "C" __global__ void kernel(int* y) {\n%s\n}\n'


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Libraries of the files written here stay out of the cache; the scheduler is taken from it."""
    scheduler = builder.scheduler()
    monkeypatch.setattr(builder, "scheduler", lambda: scheduler)
    monkeypatch.setattr(builder, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def write(folder: Path, body: str, name: str = "kernel.cu", before: str = "") -> Path:
    path = folder / name
    path.write_text(before + KERNEL % body)
    return path


def run(path: Path, threads: int = 32, **constants: ConstantValue) -> list[int]:
    y = torch.full((threads,), -1, dtype=torch.int32)
    CpuBackend().run([kernel_call(path, "kernel", (1, 1, 1), (threads, 1, 1), y, constants=constants)])
    return y.tolist()


@pytest.mark.parametrize(
    "declaration",
    [
        "__shared__ int a[32], b[2][16];",
        "__shared__ int a[32]; __shared__ __align__(16) int b[2][16];",
        "__align__(16) __shared__ int a[32];\n  __shared__ alignas(8) int b[2]\n    [16];",
        "static __shared__ int a[N > 4 ? 32 : 1]; __shared__ Pair<int, 16> b;",
        "// __shared__ int a[1];\n  __shared__ int a[32]; /* extern __shared__ */ __shared__ int b[ 2 ][ 16 ];",
    ],
)
def test_shared_declarations(tmp_path, declaration):
    """Forms in which shared memory is declared: two arrays of their own, poisoned before the first write."""
    before = "template <class T, int n> struct Pair { T v[2][n]; T (&operator[](int i))[n] { return v[i]; } };\n"
    body = f"""  {declaration}
  const int i = threadIdx.x, untouched = a[i] & b[i / 16][i % 16];
  a[i] = i;
  b[i / 16][i % 16] = 100 + i;
  __syncthreads();
  static_assert(N == 5);
  y[i] = untouched == -1 ? a[31 - i] + b[0][0] : -2;"""
    assert run(write(tmp_path, body, before=before), N=5) == [131 - i for i in range(32)]


def test_each_template_instance_has_its_own_shared_memory(tmp_path):
    before = "template <int n> __device__ int* own() { __shared__ int cell; return &cell; }\n"
    body = """  if (threadIdx.x == 0) *own<1>() = 1, *own<2>() = 2;
  __syncthreads();
  y[threadIdx.x] = 10 * *own<1>() + *own<2>() + (own<1>() == own<1>() ? 100 : 0);"""
    assert run(write(tmp_path, body, before=before)) == [112] * 32


def test_libraries_of_one_source_do_not_share_what_is_static(tmp_path):
    """Two sets of constants that lay out shared memory differently, loaded side by side and used in turn."""
    before = """template <int n> __device__ int* own() { __shared__ int cell[n]; return cell; }
#if V
__device__ int first() { return own<3>()[0]; }
#endif
__device__ int second() { return own<2>()[0]; }
"""
    body = """  if (threadIdx.x == 0) own<1>()[0] = V, own<2>()[0] = 10;
  __syncthreads();
  y[threadIdx.x] = own<1>()[0] + second();"""
    path = write(tmp_path, body, before=before)
    assert [run(path, V=v)[0] for v in (0, 1, 0, 1)] == [10, 11, 10, 11]


@pytest.mark.parametrize(
    ("body", "before", "message"),
    [
        ("  __shared__ struct { int a; } s;", "", r"kernel\.cu:2: name the type of a shared variable"),
        ("  __shared__ int (*p)[4];", "", r"kernel\.cu:2: cannot read this declaration: __shared__ int \(\*p\)\[4\];"),
        ("  extern __shared__ int a[], b[];", "", "dynamic shared memory is declared as: extern __shared__ type name"),
        ("  extern __shared__ int a;", "", "dynamic shared memory is declared as"),
        ("", "\nextern __shared__ int a[];\n", r"kernel\.cu:2: declare shared memory inside the function"),
        ('  asm volatile("bar.sync 0;");', "", r"kernel\.cu:2: PTX belongs into ptx\.cuh, with its host twin"),
        ("", "#include <cooperative_groups.h>\n", r"kernel\.cu:1: cooperative_groups\.h is no header of the project"),
        ("", '#include "nowhere.cuh"\n', r"kernel\.cu:1: nowhere\.cuh is no header"),
    ],
)
def test_unfit_source_is_refused_with_its_line(tmp_path, body, before, message):
    with pytest.raises(SourceError, match=message):
        rewrite(write(tmp_path, body, before=before))


def test_file_without_a_kernel_is_refused(tmp_path):
    path = tmp_path / "none.cu"
    path.write_text("__global__ void kernel() {}")
    with pytest.raises(SourceError, match=r'no kernel found; declare it as: extern "C" __global__ void name\('):
        rewrite(path)
    with pytest.raises(SourceError, match=r"gone\.cu: cannot be read: No such file"):
        rewrite(tmp_path / "gone.cu")


@pytest.mark.parametrize("path", [*INCLUDE_DIR.glob("*.cuh"), *FIXTURES.glob("*.cu")], ids=lambda path: path.name)
def test_rewriting_keeps_every_line_in_its_place(path, tmp_path):
    """Every header and fixture: what is not a shared declaration or an include stays, on its line."""
    main = path if path.suffix == ".cu" else write(tmp_path, "", before=f'#include "{path.name}"\n')
    files = rewrite(main).files
    new = next(text for name, text in files.items() if name.endswith(f"/{path.name}")).splitlines()
    old = path.read_text().splitlines()
    assert new[0] == f'#line 1 "{path}"'
    changed = [line for line, rewritten in zip(old, new[1:], strict=False) if line != rewritten]
    assert all("__shared__" in line or '#include "' in line for line in changed)
    assert len([line for line in new[1 + len(old) :] if line and not line.startswith("CUEMU_EXPORT(")]) == 0


def test_compile_error_names_the_line_of_the_source(tmp_path):
    (tmp_path / "helper.cuh").write_text("#pragma once\n\n__device__ int broken() { return nothing; }\n")
    with pytest.raises(CompileError, match=r"helper\.cuh:3:\d+: error: .*nothing.* not declared") as caught:
        run(write(tmp_path, "  y[0] = broken();", before='#include "helper.cuh"\n'))
    assert "broken" in caught.value.log
    with pytest.raises(CompileError, match=r"kernel\.cu:4:\d+: error"):
        run(write(tmp_path, "  __shared__ int\n    s[2];\n  y[0] = s;"))


def test_intra_warp_scheduling_functions_that_no_kernel_may_use_do_not_exist(tmp_path):
    with pytest.raises(CompileError, match="__activemask"):
        run(write(tmp_path, "  y[0] = __activemask();"))


def test_constants_and_headers_make_different_libraries(tmp_path, monkeypatch):
    path = write(tmp_path, "  y[threadIdx.x] = SCALE * kOffset;", before='#include "offset.cuh"\n')
    (tmp_path / "offset.cuh").write_text("constexpr int kOffset = 3;\n")
    assert run(path, SCALE=2)[0] == 6
    assert run(path, SCALE=5)[0] == 15
    (tmp_path / "offset.cuh").write_text("constexpr int kOffset = 4;\n")
    assert run(path, SCALE=5)[0] == 20

    def no_compiler(command: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(builder, "_run", no_compiler)
    assert run(path, SCALE=5)[0] == 20
    with pytest.raises(AssertionError, match="compiled again"):
        run(path, SCALE=7)


def test_libraries_may_be_asked_for_at_the_same_time(tmp_path, own_cache, monkeypatch):
    """By threads here; the lock and the renaming make no difference between threads and processes."""
    runs: list[object] = []
    compile_really = builder._run

    def count(command: Sequence[str]) -> None:
        runs.append(command)
        compile_really(command)

    monkeypatch.setattr(builder, "_run", count)
    path = write(tmp_path, "  y[threadIdx.x] = 1;")
    with ThreadPoolExecutor(3) as pool:
        built = set(pool.map(lambda _: builder.kernel_library(path, (), "plain"), range(3)))
    assert len(built) == len(runs) == 1
    assert {file.suffix for file in own_cache.iterdir()} == {".so", ".lock"}  # nothing half-done is left


def test_what_was_not_used_for_a_week_goes(tmp_path, own_cache):
    path = write(tmp_path, "  y[threadIdx.x] = 1;")
    used = builder.kernel_library(path, (), "plain")
    unused = own_cache / "unused.so"
    unused.touch()
    for file in (used, unused):
        os.utime(file, (time.time() - 8 * 24 * 3600,) * 2)
    builder._known.clear()  # as in a new process
    assert builder.kernel_library(path, (), "plain") == used
    builder.kernel_library(write(tmp_path, "  y[threadIdx.x] = 2;"), (), "plain")
    assert used.exists()
    assert not unused.exists()
