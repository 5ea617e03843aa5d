"""A list of launches as one CUDA graph.

Captured by the driver itself: ``torch.cuda.graph`` would wait for the device, collect garbage and empty torch's memory
pool first, to guard allocations, which a list of launches has none of. A stream of its own is captured, since the
default stream cannot be; dependent launches (pdl) become dependent nodes.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from ds4.kernels.cuda_backend import CudaBackend
from ds4.kernels.driver import check
from ds4.kernels.entry import Backend, KernelCall


class CudaGraph:
    """``calls`` of a :class:`CudaBackend`, replayed as one launch; a :class:`Backend` for them alone.

    Kernels are loaded and configured first, so that nothing is left for a replay to do. The graph keeps ``calls``, and
    so the tensors they read and write, alive. Raises as ``CudaBackend.run`` does, ValueError for no calls or a backend
    that waits after each of them.
    """

    def __init__(self, backend: Backend, calls: Sequence[KernelCall]) -> None:
        if not isinstance(backend, CudaBackend) or backend.synchronous or not calls:
            raise ValueError("a graph has launches, of a CudaBackend that does not wait after each of them")
        self.calls = calls
        self._backend = backend
        backend.prepare(calls)
        with backend.on_device():
            self._graph = _captured(backend, calls)
        weakref.finalize(self, _give_back, backend, self._graph).atexit = False  # the driver is gone by then

    def replay(self) -> None:
        """Enqueue the launches on torch's current stream of the device. Raises CudaError where the driver fails."""
        with self._backend.on_device():
            self.enqueue(self._backend.stream())

    def enqueue(self, stream: Any) -> None:
        """:meth:`replay` on another stream, within ``CudaBackend.on_device``."""
        driver = self._backend.driver
        check(driver, driver.cuGraphLaunch(self._graph, stream), f"launching a graph of {len(self.calls)} kernels")

    def run(self, calls: Sequence[KernelCall]) -> None:
        """Replay. Raises ValueError where ``calls`` are not those of the graph."""
        if calls is not self.calls:
            raise ValueError("the launches to run are not those of the graph")
        self.replay()


def _captured(backend: CudaBackend, calls: Sequence[KernelCall]) -> Any:
    """An executable graph, on the device already."""
    driver, doing = backend.driver, f"capturing {len(calls)} launches on {backend.facts.name}"
    stream = check(driver, driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING), doing)
    try:
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        check(driver, driver.cuStreamBeginCapture(stream, mode), doing)
        try:
            backend.enqueue(calls, stream)
        except BaseException:
            driver.cuStreamEndCapture(stream)  # fails too; the first error is the one to report
            raise
        graph = check(driver, driver.cuStreamEndCapture(stream), doing)
        try:
            made = check(driver, driver.cuGraphInstantiate(graph, 0), doing)
        finally:
            driver.cuGraphDestroy(graph)
        check(driver, driver.cuGraphUpload(made, backend.stream()), doing)
        return made
    finally:
        driver.cuStreamDestroy(stream)


def _give_back(backend: CudaBackend, graph: Any) -> None:
    with backend.on_device():
        backend.driver.cuGraphExecDestroy(graph)  # one that is still running is freed when it has ended
