"""NVRTC without a GPU: every architecture, errors in a line, and nothing that hangs where there is no driver."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ds4.errors import Ds4Error
from ds4.kernels import compiler
from ds4.kernels.arch import ARCHITECTURES, architecture_of
from ds4.kernels.compiler import CompileError, Resources, compile_source, parse_resources
from ds4.kernels.entry import constant_set
from ds4.kernels.probe import PROBE
from ds4.kernels.signature import check_entry

ROOT = Path(__file__).resolve().parents[2]

TWO_KERNELS = """
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_fp4.h>
#include <math_constants.h>
#include "beside.cuh"
extern "C" __global__ void small(float* y) {
    __shared__ float s[kN];
    s[threadIdx.x] = y[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = twice(s[kN - 1 - threadIdx.x]) * kScale;
}
extern "C" __global__ void stack(float* y, int n) {
    float a[50];
    for (int i = 0; i < 50; ++i) a[i] = y[i];
    for (int i = 0; i < n; ++i) a[(i * n) % 50] += 1.0f;
    for (int i = 0; i < 50; ++i) y[i] = a[i];
}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "beside.cuh").write_text("__device__ __forceinline__ float twice(float x) { return 2.0f * x; }\n")
    return tmp_path


def kernel(folder: Path, text: str) -> Path:
    """A source file with this text."""
    path = folder / "k.cu"
    path.write_text(text)
    return path


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_and_its_resources(folder, architecture):
    constants = constant_set(kN=64, kScale=0.5)
    cubin = compile_source(kernel(folder, TWO_KERNELS), constants, architecture)
    assert isinstance(cubin.data, bytes)
    assert cubin.data[:4] == b"\x7fELF"
    # an ELF of a GPU: machine EM_CUDA
    assert int.from_bytes(cubin.data[18:20], "little") == 190
    assert set(cubin.resources) == {"small", "stack"}
    assert cubin.resources["small"].static_shared_bytes == 64 * 4
    assert cubin.resources["small"].stack_bytes == 0
    assert cubin.resources["stack"].stack_bytes >= 50 * 4
    assert all(4 <= kernel.registers <= 255 for kernel in cubin.resources.values())
    assert cubin.warnings == ()


def test_constants_reach_the_code(folder):
    path = kernel(folder, TWO_KERNELS)
    small, large = (
        compile_source(path, constant_set(kN=n, kScale=1.0), "sm_90a").resources["small"].static_shared_bytes
        for n in (32, 256)
    )
    assert (small, large) == (128, 1024)


def test_a_spill_is_seen(folder):
    # 128 values are live at once and a thread may have 32 registers
    text = """extern "C" __global__ void __launch_bounds__(1024, 2) k(float* x) {
        float a[128];
        #pragma unroll
        for (int i = 0; i < 128; ++i) a[i] = x[i * 1024 + threadIdx.x];
        __syncthreads();
        #pragma unroll
        for (int i = 0; i < 128; ++i) x[((i * 37) % 128) * 1024 + threadIdx.x] = a[i] * a[127 - i];
    }"""
    used = compile_source(kernel(folder, text), (), "sm_90a").resources["k"]
    assert used.registers <= 32
    assert used.spill_store_bytes > 0
    assert used.spill_load_bytes > 0


def test_a_warning_is_kept(folder):
    cubin = compile_source(kernel(folder, 'extern "C" __global__ void k() { int unused; }'), (), "sm_80")
    assert len(cubin.warnings) == 1
    assert "k.cu(1)" in cubin.warnings[0]
    assert "unused" in cubin.warnings[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('\n\nextern "C" __global__ void k() { int x = undefined_name; }', r"k\.cu:3: sm_80: .*undefined_name"),
        ('#include "nowhere.cuh"\n', r"k\.cu:1: sm_80: cannot open source file \"nowhere.cuh\""),
        ("#error kN is missing\n", r"k\.cu:1: sm_80: .*kN is missing"),
        ('#include "broken.cuh"\n', r"broken\.cuh:2: sm_80: "),
        ('extern "C" __global__ void k() { asm volatile("griddepcontrol.wait;"); }', r"k\.cu: sm_80: ptxas: .*sm_90"),
        (
            'extern "C" __device__ float f(float);\nextern "C" __global__ void k(float* x) { *x = f(*x); }',
            r"k\.cu: sm_80: ptxas: Unresolved extern function 'f'",
        ),
        (
            'extern "C" __global__ void k(float* x) { __shared__ float s[99999]; s[*(int*)x] = 1; *x = s[3]; }',
            r"k\.cu: sm_80: ptxas: .*too much shared data",
        ),
    ],
)
def test_errors_are_one_line_and_the_log_is_kept(folder, text, message):
    (folder / "broken.cuh").write_text("\nint f( {\n")
    with pytest.raises(CompileError, match=message) as error:
        compile_source(kernel(folder, text), constant_set(kM=3), "sm_80")
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(" [kM=3]")
    assert str(folder) in str(error.value)
    assert len(error.value.log) > len("error")


def test_a_programmers_mistakes(folder):
    with pytest.raises(ValueError, match="sm_90 is not one of"):
        compile_source(kernel(folder, ""), (), "sm_90")
    with pytest.raises(Ds4Error, match=r"gone\.cu: cannot read the kernel source"):
        compile_source(folder / "gone.cu", (), "sm_90a")


def test_missing_nvrtc_and_headers_say_what_to_install(monkeypatch):
    from cuda.bindings import nvrtc

    def gone():
        raise RuntimeError("no libnvrtc\nlong story")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", gone)
    with pytest.raises(Ds4Error, match=r"NVRTC.*no libnvrtc\); pip install 'ds4\[gpu\]'"):
        compiler.nvrtc_version.__wrapped__()
    monkeypatch.setattr(compiler, "_header_folders", lambda: iter([Path("/nowhere")]))
    with pytest.raises(Ds4Error, match=r"headers .*not found; pip install 'ds4\[gpu\]'"):
        compiler.cuda_headers.__wrapped__()


def test_headers_of_a_toolkit_without_the_packages(monkeypatch, tmp_path):
    from cuda import pathfinder

    def unknown(name):
        raise RuntimeError(f"UNKNOWN libname={name!r}")

    for find in (unknown, lambda name: None, lambda name: str(tmp_path / "empty")):
        monkeypatch.setattr(pathfinder, "find_nvidia_header_directory", find)
        monkeypatch.setattr(compiler.shutil, "which", lambda name: str(tmp_path / "cuda" / "bin" / name))
        (tmp_path / "cuda" / "include").mkdir(parents=True, exist_ok=True)
        (tmp_path / "cuda" / "include" / "cuda_bf16.h").write_text("")
        assert compiler.cuda_headers.__wrapped__() == tmp_path / "cuda" / "include"


def test_resources_of_a_recorded_log():
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'a' for 'sm_80'
ptxas info    : Function properties for a
ptxas         .     9320 bytes stack frame, 18724 bytes spill stores, 20752 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 9320 bytes cumulative stack size, 360 bytes cmem[0]
ptxas info    : Function properties for helper
ptxas         .     8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Compiling entry function 'b' for 'sm_80'
ptxas info    : Function properties for b
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 1 barriers, 1024 bytes smem, 372 bytes cmem[0]
"""
    assert parse_resources(log) == {"a": Resources(32, 0, 9320, 18724, 20752), "b": Resources(12, 1024, 0, 0, 0)}


def test_capabilities():
    assert architecture_of((9, 0)) == "sm_90a"
    assert architecture_of((12, 1)) == "sm_121a"
    assert architecture_of((8, 6)) == "sm_86"
    found = {architecture_of(pair) for pair in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)]}
    assert found == set(ARCHITECTURES)
    for pair in [(7, 5), (8, 7), (11, 0), (13, 0)]:
        with pytest.raises(Ds4Error, match=rf"capability {pair[0]}\.{pair[1]}, ds4's kernels support 8\.0, 8\.6"):
            architecture_of(pair)


def test_the_probe_kernel():
    check_entry(PROBE)
    assert compile_source(PROBE.path, (), "sm_80").resources["probe"].spill_store_bytes == 0


WITHOUT_DRIVER = """
import sys
from ds4.errors import Ds4Error
from ds4.kernels.arch import device_count, device_facts, free_memory
from ds4.kernels.compiler import compile_source
from ds4.kernels.cuda_backend import CudaBackend
from ds4.kernels.cubin_cache import CubinCache
from ds4.kernels.driver import load_driver
from ds4.kernels.probe import PROBE
for attempt in range(3):
    print(len(compile_source(PROBE.path, (), "sm_90a").data) > 1000)
    for ask in (load_driver, device_count, lambda: device_facts(0), lambda: free_memory(0), lambda: CudaBackend(0)):
        try:
            ask()
            print("no error")
        except Ds4Error as error:
            print(error)
"""


def test_without_a_driver_nothing_hangs_and_every_question_is_answered(tmp_path):
    # An empty libcuda.so.1 stands for the missing one, so that the test says the same on a machine with a driver.
    (tmp_path / "libcuda.so.1").write_bytes(b"")
    env = {"PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": str(tmp_path), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DRIVER], capture_output=True, text=True, timeout=60, env=env, check=True
    )
    lines = done.stdout.splitlines()
    assert lines.count("True") == 3
    assert len(lines) == 18
    answers = {line for line in lines if line != "True"}
    assert answers == {"no NVIDIA driver found (libcuda); install it, or use --device cpu"}


def test_options_leave_ieee_arithmetic_alone():
    assert not {"use_fast_math", "ftz", "prec_div", "prec_sqrt"} & set(compiler.OPTIONS)
    assert re.fullmatch(r"\d+\.\d+", compiler.nvrtc_version())
