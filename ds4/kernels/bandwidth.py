"""Memory bandwidth of a GPU: what the kernels' figures are percentages of.

Read (a kernel that sums), copy (a kernel) and memcpy (the driver's), each over tensors far larger than the L2 cache,
from a cold cache, in rounds of all three, so that a drift of the clocks hits all alike. Copies count bytes read plus
bytes written. Data are random: some cards move zeros faster.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ds4.errors import CudaError, Ds4Error
from ds4.kernels.cuda_backend import CudaBackend
from ds4.kernels.entry import ArgPack, Entry, KernelCall

PARAMS = (("x", "f32*"), ("y", "f32*"), ("n", "i64"))
COPY, READ = (Entry(f"bandwidth_{what}", "bandwidth.cu", PARAMS) for what in ("copy", "read"))
SIZES = (256 << 20, 1 << 30, 4 << 30)  # bytes
REPEATS = 7
TILE = 16 * 1024  # bytes that a block moves at a time


def bandwidth_call(entry: Entry, x: torch.Tensor, y: torch.Tensor, blocks: int) -> KernelCall:
    """A launch of one of the two over x f32 [n], n a multiple of 4096, with y f32 [n], or [blocks * 256] for READ.

    Raises ValueError where the sizes do not fit.
    """
    size = x.numel() * 4
    if size % TILE or y.numel() != (x.numel() if entry is COPY else blocks * 256):
        raise ValueError(f"{entry.name}: x of {size} bytes and y of {y.numel()} values do not fit")
    return KernelCall(entry, (), (blocks, 1, 1), (256, 1, 1), 0, ArgPack(entry, {"x": x, "y": y, "n": size // 16}))


def open_gpu() -> tuple[CudaBackend, torch.device]:
    """The first GPU. Raises Ds4Error where there is none that torch can use too."""
    backend = CudaBackend(0)
    if not torch.cuda.is_available():
        raise Ds4Error("this torch cannot use the GPU; see ds4 doctor")
    return backend, torch.device("cuda", 0)


def sizes_for(free_bytes: int, l2_bytes: int) -> list[int]:
    """The sizes of SIZES that leave most of the memory free and are eight times the L2 cache or more; at least one."""
    fitting = [size for size in SIZES if size <= free_bytes // 8 and size >= 8 * l2_bytes]
    return fitting or [max(TILE, min(free_bytes // 8, 8 * l2_bytes) // TILE * TILE)]


def seconds(work: Callable[[], object]) -> float:
    """Time of enqueued work on the GPU, by events around it."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure(backend: CudaBackend, device: torch.device, repeats: int = REPEATS) -> dict[str, Any]:
    """Rows with kind, size in bytes, median and extremes in GB/s; and the best median copy, read, of all sizes."""
    rows: list[dict[str, Any]] = []
    free, _total = torch.cuda.mem_get_info(device)
    blocks = 8 * backend.facts.n_sms
    for size in sizes_for(free, backend.facts.l2):
        x = torch.randn(size // 4, device=device)
        y, sums = torch.empty_like(x), torch.empty(blocks * 256, device=device)
        copy, read = bandwidth_call(COPY, x, y, blocks), bandwidth_call(READ, x, sums, blocks)
        works: dict[str, tuple[int, Callable[[], object]]] = {
            "read": (size, partial(backend.run, [read])),
            "copy": (2 * size, partial(backend.run, [copy])),
            "memcpy": (2 * size, partial(y.copy_, x)),
        }
        rates: dict[str, list[float]] = {kind: [] for kind in works}
        for repeat in range(repeats + 1):  # the first round compiles, loads and warms up
            for kind, (moved, work) in works.items():
                rate = moved / seconds(work) / 1e9
                if repeat:
                    rates[kind].append(rate)
        if not torch.equal(x, y):
            raise CudaError("bandwidth_copy: the copy differs from its source")
        for kind, values in rates.items():
            rows.append(
                {
                    "kind": kind,
                    "bytes": size,
                    "gb_s": statistics.median(values),
                    "min": min(values),
                    "max": max(values),
                }
            )
    best = {
        what: max(row["gb_s"] for row in rows if row["kind"] in kinds)
        for what, kinds in (("copy", ("copy", "memcpy")), ("read", ("read",)))
    }
    return {"rows": rows, "copy_gb_s": best["copy"], "read_gb_s": best["read"], "repeats": repeats}
