"""Runs the CUDA backend on the fake driver and prints what happened as JSON; started by test_cuda_backend.py.

torch here has no CUDA, so its stream and the packs' device are put in by hand; the arguments are host addresses, which
the fake driver reads where a GPU would.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from ds4.errors import CudaError, Ds4Error
from ds4.kernels.arch import device_facts, free_memory
from ds4.kernels.cubin_cache import CubinCache
from ds4.kernels.cuda_backend import CudaBackend
from ds4.kernels.entry import ArgPack, Entry, KernelCall, constant_set

FOLDER = Path(sys.argv[1])
LOG = Path(os.environ["FAKE_CUDA_LOG"])
PARAMS = (("x", "f32*"), ("n", "i32"), ("scale", "f32"), ("big", "i64"))
SIZES = "8,4,4,8"
GPU = torch.device("cuda", 0)


class Stream:
    """What the backend asks torch's stream for; the handle changes between runs."""

    cuda_stream = 0x5EED


def entry(name: str = "one", **fields: Any) -> Entry:
    """A kernel of the test's source file."""
    return Entry(name, str(FOLDER / "two.cu"), PARAMS, ("kN",), **fields)


def call(used: Entry, x: torch.Tensor | None, **fields: Any) -> KernelCall:
    """A call with fixed scalars."""
    pack = ArgPack(used, {"x": x, "n": -7, "scale": 0.25, "big": 1 << 40})
    pack.device = GPU if x is not None else None
    settings: dict[str, Any] = {"grid": (4, 2, 1), "block": (64, 2, 1), "shared_bytes": 0, **fields}
    return KernelCall(used, constant_set(kN=256), args=pack, **settings)


def attempt(work: Any) -> str:
    """The error that ``work`` ends with, by kind and text, or "ok"."""
    try:
        work()
    except (Ds4Error, CudaError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


def logged(work: Any) -> list[str]:
    """What the driver was asked to do during ``work``, which may fail."""
    LOG.write_text("")
    result = attempt(work)
    return [*LOG.read_text().splitlines(), result]


def backend(capability: str = "9.0", **fields: Any) -> CudaBackend:
    """A new backend on a device of this compute capability."""
    os.environ["FAKE_CUDA_CAPABILITY"] = capability
    device_facts.cache_clear()
    return CudaBackend(0, cubins=CubinCache(FOLDER / "cache"), **fields)


def failing(what: str, work: Any) -> list[str]:
    """As logged, while a driver call fails."""
    os.environ["FAKE_CUDA_FAIL"] = what
    try:
        return logged(work)
    finally:
        del os.environ["FAKE_CUDA_FAIL"]


def main() -> None:
    """All scenarios, each under a name."""
    torch.cuda.current_stream = lambda index: Stream  # type: ignore
    torch.cuda.is_current_stream_capturing = lambda: capturing  # type: ignore
    capturing = False
    os.environ["FAKE_CUDA_PARAM_SIZES"] = SIZES
    x = torch.zeros(16)
    out: dict[str, Any] = {"address": x.data_ptr()}
    gpu = backend()
    out["facts"] = [gpu.facts.name, gpu.facts.n_sms, gpu.facts.l2, gpu.facts.memory, gpu.architecture, free_memory(0)]
    one, two = entry(), entry("two")
    out["plain"] = logged(lambda: gpu.run([call(one, x)]))
    Stream.cuda_stream = 0xABC
    out["second"] = logged(lambda: gpu.run([call(one, x), call(two, None)]))
    out["pdl"] = logged(lambda: gpu.run([call(one, x, pdl=True)]))
    out["cluster"] = logged(lambda: gpu.run([call(one, x, cluster=(2, 1, 1), pdl=True)]))
    out["large_cluster"] = logged(lambda: gpu.run([call(one, x, grid=(16, 1, 1), cluster=(16, 1, 1))]))
    # kernel one has 1024 bytes of static shared memory
    out["shared_default"] = logged(lambda: gpu.run([call(one, x, shared_bytes=47 * 1024)]))
    out["shared_more"] = logged(lambda: gpu.run([call(one, x, shared_bytes=47 * 1024 + 16)]))
    out["shared_again"] = logged(lambda: gpu.run([call(one, x, shared_bytes=47 * 1024 + 8)]))
    out["shared_most"] = logged(lambda: gpu.run([call(one, x, shared_bytes=232448 - 1024)]))
    out["shared_too_much"] = logged(lambda: gpu.run([call(one, x, shared_bytes=232448 - 1023)]))
    out["synchronous"] = logged(lambda: backend(synchronous=True).run([call(one, x)]))
    out["launch_fails"] = failing("cuLaunchKernelEx=700", lambda: gpu.run([call(one, x)]))
    out["sync_fails"] = failing("cuStreamSynchronize=700", lambda: backend(synchronous=True).run([call(one, x)]))
    out["load_fails"] = failing("cuModuleLoadData=209", lambda: backend().run([call(one, x)]))
    out["context_fails"] = failing("cuDevicePrimaryCtxRetain=2", backend)
    out["init_fails"] = failing("cuInit=100", backend)
    capturing = True
    out["captured"] = logged(lambda: gpu.run([call(one, x)]))
    out["capture_loads"] = logged(lambda: backend().run([call(one, x)]))
    capturing = False
    elsewhere = call(one, x)
    elsewhere.args.device = torch.device("cuda", 1)
    out["another_device"] = logged(lambda: gpu.run([elsewhere]))
    only = entry(architectures=("sm_80", "sm_120a"))
    out["no_kernel"] = logged(lambda: gpu.run([call(only, x)]))
    wrong = Entry("one", str(FOLDER / "two.cu"), (*PARAMS[:3], ("big", "i32")), ("kN",))
    pack = ArgPack(wrong, {"x": None, "n": 1, "scale": 1.0, "big": 1})
    mismatch = KernelCall(wrong, constant_set(kN=256), (1, 1, 1), (1, 1, 1), 0, pack)
    out["wrong_width"] = logged(lambda: gpu.run([mismatch]))
    old = backend("8.0")
    out["old_pdl"] = logged(lambda: old.run([call(one, x, pdl=True)]))
    out["old_cluster"] = logged(lambda: old.run([call(one, x, cluster=(2, 1, 1))]))
    out["unsupported"] = logged(lambda: backend("7.5"))
    print(json.dumps(out))


if __name__ == "__main__":
    main()
