"""Faults planted into kernels: each is caught, with a message that says what and where; the corrected kernel is not."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import cast

import pytest
import torch
from cuemu.backend import CpuBackend, missing
from cuemu.builder import MODES, Mode
from cuemu.calls import FIXTURES, kernel_call
from cuemu.errors import KernelError, SanitizerError
from cuemu.module import ORDERS
from torch import Tensor

from ds4.kernels.arch import ARCHITECTURES
from ds4.kernels.entry import ArgPack, Entry, KernelCall
from ds4.kernels.signature import kernel_signatures, parse_parameters

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

FAULTS = FIXTURES / "faults.cu"
SOURCE = FAULTS.read_text(encoding="utf-8")
PARAMETERS = {name: parse_parameters(text) for name, text in kernel_signatures(SOURCE).items()}
N = 64


@dataclass(frozen=True)
class Fault:
    """``how`` it is caught: "poison", NaN in the results; "plain", by the scheduler; else the sanitizer's mode.

    ``message`` is a pattern of the error's text; ``{text}`` in it stands for the line of faults.cu in the kernel that
    has this text.
    """

    kernel: str
    how: str
    message: str = ""
    threads: int = N
    blocks: int = 1


EVERY = (
    Fault("no_barrier", "poison"),
    Fault("no_barrier", "tsan", "data race at {s[threadIdx.x] =}, {y[threadIdx.x] =}"),
    Fault("no_barrier_before_reuse", "tsan", "data race at .*{s[threadIdx.x / 32] =}"),
    Fault("no_syncwarp", "poison", threads=32),
    Fault("no_syncwarp", "tsan", "data race at {s[threadIdx.x] =}", threads=32),
    Fault("uninitialised", "poison"),
    Fault("divergent_barrier", "plain", "different __syncthreads, one at .*{__syncthreads} .* at {warp 1 is here}"),
    Fault(
        "barrier_within_a_warp",
        "plain",
        r"deadlock: 64 of 64 threads wait: .*47 more in __syncthreads at {if (right}; "
        r".*\(48,0,0\) and 15 more in __syncwarp, mask ffffffff at {__syncwarp}",
    ),
    Fault("endless_loop", "plain", r"time limit reached: .*thread \(0,0,0\) at {while}"),
    Fault(
        "missing_lanes", "plain", "deadlock: 32 of 64 .*__shfl_xor_sync, mask ffffffff, of which ffff0000 .* at {if}"
    ),
    Fault("not_in_mask", "plain", r"__shfl_xor_sync: the calling lane is not in the mask .*\(16,0,0\) at {y[}"),
    Fault("exited_lane", "plain", "deadlock: .*mask ffffffff, of which ffff0000 have exited, at {y[}"),
    Fault("lane_outside_mask", "plain", "lane 0 shuffles from lane 20, which is not in mask ffff .* at {if}"),
    Fault("two_collectives", "plain", "different collectives, __ballot_sync and __shfl_xor_sync .* at {ballot}"),
    Fault("outside_static_shared", "asan", r"index 64 out of bounds for type 'float \[64\]' at {s[threadIdx.x +}"),
    Fault("outside_dynamic_shared", "asan", "AddressSanitizer: heap-buffer-overflow at {s[threadIdx.x +}"),
    Fault("outside_global", "asan", "AddressSanitizer: heap-buffer-overflow at {y[}"),
    Fault("misaligned", "plain", "misaligned vector access .* < {load_vec}"),
    Fault("misaligned_plain", "asan", "misaligned address .*float4', which requires 16 byte .* at {float4 v}"),
    Fault("unaligned_shared", "asan", "store to misaligned address .* at {s[threadIdx.x] =}"),
    Fault("null_pointer", "plain", "memory fault at .* at {p[}"),
    Fault("null_pointer", "asan", "store to null pointer .* at {p[}"),
    Fault("global_race", "tsan", "data race at {y[0] +=}"),
    Fault("same_thread_of_two_blocks", "tsan", "data race at {y[right}", blocks=4),
    Fault("after_a_barrier", "tsan", "data race at {y[32}, {y[blockIdx}", blocks=4),
    Fault("no_async_wait", "poison", threads=32),
    Fault("no_async_commit", "poison", threads=32),
    Fault("async_overtakes_reader", "tsan", "data race at .*{cp_async<4>}"),
    Fault("async_to_global", "plain", "cp.async to memory that is not shared .* < {cp_async<4>}"),
)


def fault_call(fault: Fault, right: int, y: Tensor) -> KernelCall:
    values: dict[str, Tensor | int] = {"x": torch.arange(float(N)), "y": y, "right": right}
    arguments = [values[name] for name, _ in PARAMETERS[fault.kernel]]
    return kernel_call(
        FAULTS, fault.kernel, (fault.blocks, 1, 1), (fault.threads, 1, 1), *arguments, shared_bytes=4 * N
    )


def pattern(fault: Fault) -> str:
    """The message's pattern with {text} replaced by file and line."""
    start = SOURCE.index(f"void {fault.kernel}(")

    def place(match: re.Match[str]) -> str:
        return rf"faults\.cu:{SOURCE.count(chr(10), 0, SOURCE.index(match[1], start)) + 1}\b"

    return re.sub(r"\{([^{}]+)\}", place, fault.message)


def need(mode: Mode) -> None:
    lacking = missing(mode)
    if lacking:
        pytest.skip(lacking)


@pytest.mark.parametrize("fault", EVERY, ids=lambda fault: f"{fault.kernel}-{fault.how}")
def test_fault_is_caught(fault):
    y = torch.zeros(N)
    call = fault_call(fault, 0, y)
    if fault.how == "poison":
        CpuBackend().run([call])
        assert bool(y.isnan().any())
        return
    mode = cast(Mode, fault.how)
    need(mode)
    backend = CpuBackend(mode, time_limit_s=0.3 if fault.kernel == "endless_loop" else 120)
    kind = KernelError if fault.how == "plain" else SanitizerError
    with pytest.raises(kind, match=pattern(fault)) as caught:
        backend.run([call])
    assert isinstance(caught.value, SanitizerError) == (fault.how != "plain")
    assert not bool(y.isnan().any())


@pytest.mark.parametrize("mode", MODES)
def test_without_the_fault_nothing_is_found(mode, capsys):
    need(mode)
    outputs = [torch.zeros(N) for _ in EVERY]
    CpuBackend(mode).run([fault_call(fault, 1, y) for fault, y in zip(EVERY, outputs, strict=True)])
    assert not any(bool(y.isnan().any()) for y in outputs)
    with capsys.disabled():
        print(f" {len(EVERY)} corrected faults: nothing found under {mode} ")


@pytest.mark.parametrize("order", ["lifo", "warps"])
def test_other_orders_show_a_race_without_a_sanitizer(order):
    """A shared buffer that is written again too early gives other sums than in order, at least with one seed."""
    fault, right, wrong = Fault("no_barrier_before_reuse", ""), torch.zeros(N), torch.zeros(N)
    CpuBackend(order=order).run([fault_call(fault, 1, right)])
    seen = 0
    for seed in range(8):
        CpuBackend(order=order, seed=seed).run([fault_call(fault, 0, wrong)])
        seen += not torch.equal(right, wrong)
    assert seen


def test_a_failed_launch_leaves_the_next_one_alone():
    """Faults and good launches in turn, in every order: threads that were given up leave nothing behind."""
    faults = [fault for fault in EVERY if fault.how == "plain" and fault.kernel != "endless_loop"]
    for order in ORDERS:
        for fault in faults:
            y = torch.zeros(N)
            with pytest.raises(KernelError):
                CpuBackend(order=order).run([fault_call(fault, 0, y)])
            CpuBackend(order=order).run([fault_call(Fault("no_barrier", ""), 1, y)])
            assert y.tolist() == [float(N - 1 - i) for i in range(N)]


@pytest.mark.parametrize(("fences", "found"), [(0, False), (1, True), (2, True), (3, True)])
def test_last_block_needs_both_fences(fences, found):
    """The block that arrives last reads what the others wrote: a fence before the atomic and one after it."""
    need("tsan")
    y, count = torch.zeros(N + 1), torch.zeros(1, dtype=torch.int32)
    call = kernel_call(FAULTS, "last_block", (2, 1, 1), (32, 1, 1), y, count, fences)
    if found:
        with pytest.raises(SanitizerError, match="data race"):
            CpuBackend("tsan").run([call])
    else:
        CpuBackend("tsan").run([call])
        assert y[0] == N


def test_overlapping_launch_has_to_wait():
    """With ``pdl`` a launch may start before the one whose results it reads has ended."""
    need("tsan")
    x, y, z = torch.zeros(N), torch.zeros(N), torch.zeros(N)

    def launches(right: int, pdl: bool) -> list[KernelCall]:
        one = ((1, 1, 1), (N, 1, 1))
        first = kernel_call(FAULTS, "no_pdl_wait", *one, x, y, 1)
        return [first, kernel_call(FAULTS, "no_pdl_wait", *one, y, z, right, pdl=pdl)]

    CpuBackend("tsan").run(launches(1, pdl=True))
    CpuBackend("tsan").run(launches(0, pdl=False))
    assert z.tolist() == [2.0] * N
    with pytest.raises(SanitizerError, match=r"data race at faults\.cu:\d+"):
        CpuBackend("tsan").run(launches(0, pdl=True))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ((("y", "f32*"), ("right", "i64")), r"no_barrier takes \(f32\* y, i32 right\) in C but \(f32\* y, i64 right\)"),
        ((("y", "f32*"), ("right", "f32")), "f32 right"),
        ((("y", "bf16*"), ("right", "i32")), r"bf16\* y"),
        ((("y", "f32*"),), r"in C but \(f32\* y\) in Python"),
        ((("right", "i32"), ("y", "f32*")), r"in C but \(i32 right, f32\* y\)"),
    ],
)
def test_wrong_argument_declaration_is_refused(params, message):
    entry = Entry("no_barrier", str(FAULTS), params)
    values: dict[str, Tensor | int] = {
        "y": torch.zeros(N, dtype=torch.bfloat16 if params[0][1] == "bf16*" else torch.float32),
        "right": 1,
    }
    pack = ArgPack(entry, {name: values[name] for name, _ in params})
    with pytest.raises(ValueError, match=message):
        CpuBackend().run([KernelCall(entry, (), (1, 1, 1), (N, 1, 1), 0, pack)])


@pytest.mark.parametrize("mode", ["plain", "asan"])
def test_more_shared_memory_than_an_architecture_has_is_refused(mode):
    need(mode)
    most = 99 << 10  # sm_86's

    def launch(shared_bytes: int, architectures: tuple[str, ...]) -> None:
        entry = Entry("uninitialised", str(FAULTS), PARAMETERS["uninitialised"], architectures=architectures)
        pack = ArgPack(entry, {"y": torch.zeros(N), "right": 1})
        CpuBackend(mode).run([KernelCall(entry, (), (1, 1, 1), (N, 1, 1), shared_bytes, pack)])

    launch(most, ARCHITECTURES)
    launch(227 << 10, ("sm_90a", "sm_100a"))
    for shared_bytes, architectures in ((most + 1, ARCHITECTURES), ((227 << 10) + 1, ("sm_90a",))):
        with pytest.raises(KernelError, match=rf"{shared_bytes} bytes of dynamic and 0 of static shared memory"):
            launch(shared_bytes, architectures)


def test_static_shared_memory_counts_too():
    y = torch.zeros(N)
    call = fault_call(Fault("no_barrier", ""), 1, y)
    CpuBackend().run([dataclasses.replace(call, shared_bytes=(99 << 10) - 4 * N)])
    with pytest.raises(KernelError, match=rf"{(99 << 10) - 4 * N + 1} bytes of dynamic and {4 * N} of static"):
        CpuBackend().run([dataclasses.replace(call, shared_bytes=(99 << 10) - 4 * N + 1)])


def test_results_stay_untouched_where_a_sanitizer_finds_something():
    need("asan")
    y = torch.full((N,), 7.0)
    with pytest.raises(SanitizerError) as caught:
        CpuBackend("asan").run([fault_call(Fault("outside_global", "asan"), 0, y)])
    assert y.tolist() == [7.0] * N
    assert "WRITE of size 4" in caught.value.report
