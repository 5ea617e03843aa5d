"""The probe kernel (probe.cu): whether this machine compiles and runs kernels."""

from __future__ import annotations

import torch

from ds4.errors import CudaError
from ds4.kernels.entry import ArgPack, Backend, Entry, KernelCall

PROBE = Entry("probe", "probe.cu", (("y", "f32*"), ("n", "i32"), ("scale", "f32")))
_N = 200  # integers up to 256 are exact in bf16, so that the result is known exactly


def run_probe(backend: Backend, device: torch.device) -> None:
    """Run the kernel on ``backend`` with tensors on ``device``. Raises CudaError for a wrong result."""
    y = torch.full((_N,), -1.0, device=device)
    pack = ArgPack(PROBE, {"y": y, "n": _N, "scale": 1.0})
    backend.run([KernelCall(PROBE, (), ((_N + 63) // 64, 1, 1), (64, 1, 1), 0, pack)])
    wrong = int((y.cpu() != torch.arange(_N)).sum())
    if wrong:
        raise CudaError(f"{PROBE.name}: {wrong} of {_N} values are wrong")
