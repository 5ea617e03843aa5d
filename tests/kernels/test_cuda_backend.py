"""The CUDA backend, without a GPU: what reaches the driver through cuda.bindings, and how failures end.

The library of fake_libcuda.cpp stands for the driver, compiled against the toolkit's own cuda.h, so the layouts that it
reads are the real ones. That a GPU does the right thing with them only a GPU can show.
"""

from __future__ import annotations

import json
import struct

import pytest
import torch
from fake_driver import build_fake_driver, run_with_fake_driver

from ds4.errors import CudaError, Ds4Error
from ds4.kernels import arch, driver
from ds4.kernels.driver import check

SOURCE = """
extern "C" __global__ void one(float* x, int n, float scale, long long big) {
    __shared__ float s[kN];
    s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = s[kN - 1 - threadIdx.x] * scale + n + big;
}
extern "C" __global__ void two(float* x, int n, float scale, long long big) { if (x) *x = n; }
"""


@pytest.fixture(scope="module")
def happened(tmp_path_factory):
    """What cuda_backend_script.py reports, by scenario."""
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "two.cu").write_text(SOURCE)
    script = str(__file__).replace("test_cuda_backend.py", "cuda_backend_script.py")
    done = run_with_fake_driver(build_fake_driver(folder), script, str(folder), log=str(folder / "log"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def launch(happened, stream="5eed", pointer=None, shared=0, grid="4 2 1", extra=""):
    """The line that the fake driver logs for a launch of the scenarios."""
    address = happened["address"] if pointer is None else pointer
    arguments = [struct.pack("<Q", address), struct.pack("<i", -7), struct.pack("<f", 0.25), struct.pack("<q", 1 << 40)]
    params = " ".join(data.hex() for data in arguments)
    return f"launch grid {grid} block 64 2 1 shared {shared} stream {stream} extra 0 params {params}{extra}"


LOADS = ["push", "push", "load 7f454c46", "function one", "load function", "pop"]


def test_facts_come_from_the_driver(happened):
    assert happened["facts"] == ["Fake GPU", 132, 50 << 20, 100_000_000_000, "sm_90a", 60_000_000_000]


def test_a_first_run_loads_and_launches_with_the_packs_bytes(happened):
    assert happened["plain"] == [*LOADS, launch(happened), "pop", "ok"]


def test_later_runs_only_launch_on_the_stream_of_the_moment(happened):
    second = happened["second"]
    assert second[:2] == ["push", launch(happened, "abc")]
    # kernel two is in the same file: its module is there already
    assert second[2:5] == ["push", "function two", "load function"]
    assert second[5:] == ["pop", launch(happened, "abc", pointer=0), "pop", "ok"]


def test_attributes(happened):
    assert happened["pdl"] == ["push", launch(happened, "abc", extra=" pdl 1"), "pop", "ok"]
    assert happened["cluster"] == ["push", launch(happened, "abc", extra=" cluster 2 1 1 pdl 1"), "pop", "ok"]
    non_portable = "attribute 14 1"
    assert happened["large_cluster"][:2] == ["push", non_portable]
    assert happened["large_cluster"][2] == launch(happened, "abc", grid="16 1 1", extra=" cluster 16 1 1")


def test_shared_memory_beyond_the_default_is_asked_for_once(happened):
    assert happened["shared_default"] == ["push", launch(happened, "abc", shared=47 * 1024), "pop", "ok"]
    more = 47 * 1024 + 16
    assert happened["shared_more"] == ["push", f"attribute 8 {more}", launch(happened, "abc", shared=more), "pop", "ok"]
    assert happened["shared_again"] == ["push", launch(happened, "abc", shared=more - 8), "pop", "ok"]
    assert f"attribute 8 {232448 - 1024}" in happened["shared_most"]
    log = happened["shared_too_much"]
    assert log[:-1] == ["push", "pop"]
    assert log[-1].startswith("ValueError: one (grid (4, 2, 1)")
    assert "232449 bytes of shared memory, Fake GPU has 232448" in log[-1]


def test_the_synchronous_backend_waits_after_each_launch(happened):
    assert happened["synchronous"] == [*LOADS, launch(happened, "abc"), "synchronize", "pop", "ok"]


@pytest.mark.parametrize(
    ("scenario", "doing"),
    [
        ("launch_fails", "launching one (grid (4, 2, 1), block (64, 2, 1), 0 bytes of dynamic shared memory, kN=256)"),
        ("sync_fails", "running one (grid (4, 2, 1), block (64, 2, 1), 0 bytes of dynamic shared memory, kN=256)"),
    ],
)
def test_a_fault_names_kernel_and_configuration(happened, scenario, doing):
    *log, error = happened[scenario]
    assert error == f"CudaError: {doing} on Fake GPU: CUDA_ERROR_ILLEGAL_ADDRESS, text of the driver"
    assert log.count("push") == log.count("pop")


def test_other_failures_end_loudly(happened):
    assert happened["load_fails"][-1].startswith("CudaError: loading one (")
    assert happened["load_fails"][-1].endswith(", sm_90a): CUDA_ERROR_OTHER, text of the driver")
    assert happened["load_fails"].count("push") == happened["load_fails"].count("pop")
    assert happened["context_fails"] == ["CudaError: opening GPU 0 (Fake GPU): CUDA_ERROR_OTHER, text of the driver"]
    assert happened["init_fails"] == [
        "Ds4Error: the NVIDIA driver does not start (CUDA_ERROR_NO_DEVICE): no GPU is visible: see nvidia-smi and "
        "CUDA_VISIBLE_DEVICES, or use --device cpu"
    ]


def test_nothing_is_loaded_while_a_stream_is_captured(happened):
    assert happened["captured"] == ["push", launch(happened, "abc"), "pop", "ok"]
    assert happened["capture_loads"][:-1] == ["push", "pop"]
    assert happened["capture_loads"][-1].startswith("ValueError: one is not loaded yet")


def test_calls_that_do_not_fit_are_refused_before_the_launch(happened):
    for scenario, message in {
        "another_device": "ValueError: one .*: the tensors are on cuda:1, not on cuda:0",
        "no_kernel": "Ds4Error: one: there is no kernel for sm_90a .Fake GPU., only for sm_80, sm_120a; use",
        "wrong_width": "ValueError: .*two.cu: one takes .*i64 big.* in C but .*i32 big.* in Python",
        "old_cluster": "ValueError: one .*: sm_80 has no clusters",
        "unsupported": "Ds4Error: the GPU has compute capability 7.5, ds4's kernels support 8.0",
    }.items():
        *log, error = happened[scenario]
        assert not [line for line in log if line.startswith("launch")], scenario
        assert log.count("push") == log.count("pop"), scenario
        with pytest.raises(ValueError, match=message):
            raise ValueError(error)


def test_architectures_without_pdl_launch_without_it(happened):
    assert launch(happened, "abc") in happened["old_pdl"]
    assert happened["old_pdl"][-1] == "ok"


# The driver module, with bindings made up


class Result:
    """An error code as cuda.bindings has them."""

    CUDA_SUCCESS = 0


class FakeBindings:
    """The three functions that check() asks."""

    CUresult = Result

    @staticmethod
    def cuGetErrorName(status):
        return (0, b"CUDA_ERROR_X") if status == 1 else (1, None)

    cuGetErrorString = cuGetErrorName


def test_check_unpacks_results():
    assert check(FakeBindings, (0,), "doing") is None
    assert check(FakeBindings, (0, 5), "doing") == 5
    assert check(FakeBindings, (0, 5, 6), "doing") == (5, 6)
    assert check(FakeBindings, (0, 0), "doing") == 0
    with pytest.raises(CudaError, match="doing: CUDA_ERROR_X, CUDA_ERROR_X"):
        check(FakeBindings, (1, 5), "doing")
    with pytest.raises(CudaError, match="doing: error 77"):
        check(FakeBindings, (77,), "doing")


def test_bindings_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    with pytest.raises(Ds4Error, match=r"cuda-bindings cannot be imported .*pip install"):
        driver.load_driver()


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(arch, "load_driver", lambda: FakeBindings)
    monkeypatch.setattr(arch, "device_count", lambda: 2)
    for index in (2, -1):
        with pytest.raises(Ds4Error, match=f"device: there is no GPU {index}; the driver shows 2"):
            arch.device_facts.__wrapped__(index)


def facts(capability):
    """A device of which only the capability matters."""
    return arch.DeviceFacts(0, "GPU", capability, 1, 1, 1, 1, 1)


def test_what_follows_from_the_capability():
    table = {
        pair: (facts(pair).pdl, facts(pair).clusters, facts(pair).fp4_mma)
        for pair in [(8, 9), (9, 0), (10, 3), (12, 1)]
    }
    assert table == {
        (8, 9): (False, False, False),
        (9, 0): (True, True, False),
        (10, 3): (True, True, True),
        (12, 1): (True, True, True),
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
def test_the_probe_runs_on_this_gpu():
    from ds4.kernels.cuda_backend import backend_for
    from ds4.kernels.probe import run_probe

    run_probe(backend_for(torch.device("cuda")), torch.device("cuda", torch.cuda.current_device()))
