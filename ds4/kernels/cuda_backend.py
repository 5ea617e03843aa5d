"""Launches on a GPU: cubins loaded into torch's context, run on torch's current stream.

Everything goes through ``cuda.bindings.driver``: cuLaunchKernelEx takes an ArgPack's address as ``kernelParams`` and
the attributes for clusters and programmatic dependent launch. Launches are asynchronous and may be captured
(ds4/graph/capture.py); whoever captures keeps the packs, and so their tensors, alive.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ds4.errors import Ds4Error
from ds4.kernels.arch import device_facts
from ds4.kernels.cubin_cache import CubinCache
from ds4.kernels.driver import check, load_driver
from ds4.kernels.entry import Constants, Entry, KernelCall
from ds4.kernels.signature import check_entry

_DEFAULT_SHARED = 48 << 10  # bytes a block gets without opting in, static and dynamic together
_PORTABLE_CLUSTER = 8  # blocks; larger clusters have to be asked for


@dataclass
class LoadedKernel:
    """A kernel on the device. ``dynamic_limit``: bytes of dynamic shared memory that it may be launched with so far."""

    handle: Any
    static_shared_bytes: int
    dynamic_limit: int
    large_clusters: bool = False


class CudaBackend:
    """Runs kernel calls on GPU ``index``.

    A kernel is compiled (or taken from ``cubins``) and loaded when first run or prepared, which may take seconds and is
    refused while torch's stream is captured. ``synchronous`` waits after every launch, so that an error names the
    kernel that made it; otherwise a fault may be reported by a later launch or by torch.

    Raises Ds4Error where there is no driver or GPU, or its architecture has no kernels.
    """

    def __init__(self, index: int, *, cubins: CubinCache | None = None, synchronous: bool = False) -> None:
        self.driver = load_driver()
        self.facts = device_facts(index)
        self.architecture = self.facts.architecture
        self.synchronous = synchronous
        self._cubins = cubins or CubinCache()
        self._modules: dict[tuple[str, Constants], Any] = {}
        self._kernels: dict[tuple[Entry, Constants], LoadedKernel] = {}
        doing = f"opening GPU {index} ({self.facts.name})"
        device = check(self.driver, self.driver.cuDeviceGet(index), doing)
        self._context = check(self.driver, self.driver.cuDevicePrimaryCtxRetain(device), doing)

    def run(self, calls: Sequence[KernelCall]) -> None:
        """Enqueue ``calls`` in order on torch's current stream of the device.

        Raises Ds4Error where a kernel does not exist for this GPU or does not compile, ValueError where a call does not
        fit the device or loads a kernel while capturing, CudaError where the driver fails.
        """
        with self.on_device():
            self.enqueue(calls, self.stream())

    def stream(self) -> Any:
        """torch's current stream of the device."""
        return self.driver.CUstream(torch.cuda.current_stream(self.facts.index).cuda_stream)

    def enqueue(self, calls: Sequence[KernelCall], stream: Any) -> None:
        """:meth:`run` on another stream, within :meth:`on_device`."""
        driver = self.driver
        for call in calls:
            kernel = self._prepare(call)
            launched = driver.cuLaunchKernelEx(self._config(call, stream), kernel.handle, call.args.address, 0)
            check(driver, launched, f"launching {call.describe()} on {self.facts.name}")
            if self.synchronous:
                check(driver, driver.cuStreamSynchronize(stream), f"running {call.describe()} on {self.facts.name}")

    def prepare(self, calls: Sequence[KernelCall]) -> None:
        """Load and configure the kernels of ``calls``, so that launching them does nothing else. Raises as ``run``."""
        with self.on_device():
            for call in calls:
                self._prepare(call)

    def load(self, entry: Entry, constants: Constants) -> LoadedKernel:
        """The kernel, compiled and loaded at the first call. Raises as :meth:`run` does."""
        kernel = self._kernels.get((entry, constants))
        if kernel is not None:
            return kernel
        if self.architecture not in entry.architectures:
            raise Ds4Error(
                f"{entry.name}: there is no kernel for {self.architecture} ({self.facts.name}), only for "
                f"{', '.join(entry.architectures)}; use --device cpu"
            )
        if torch.cuda.is_current_stream_capturing():
            raise ValueError(f"{entry.name} is not loaded yet: run what is to be captured once before")
        check_entry(entry)
        cubin = self._cubins.get(entry, constants, self.architecture)
        driver, doing = self.driver, f"loading {entry.name} ({entry.file}, {self.architecture})"
        with self.on_device():
            # One module serves all the kernels of a file; it stays loaded as long as the process lives.
            module = self._modules.get((entry.file, constants))
            if module is None:
                module = check(driver, driver.cuModuleLoadData(cubin.data), doing)
                self._modules[entry.file, constants] = module
            handle = check(driver, driver.cuModuleGetFunction(module, entry.name.encode()), doing)
            check(
                driver, driver.cuFuncLoad(handle), doing
            )  # lazy loading would do it at the launch, maybe in a capture
        static = cubin.resources[entry.name].static_shared_bytes
        kernel = LoadedKernel(handle, static, max(0, _DEFAULT_SHARED - static))
        self._kernels[entry, constants] = kernel
        return kernel

    def _prepare(self, call: KernelCall) -> LoadedKernel:
        """The call's kernel, loaded and allowed what the call asks for."""
        on = call.args.device
        if on is not None and on != torch.device("cuda", self.facts.index):
            raise ValueError(f"{call.describe()}: the tensors are on {on}, not on cuda:{self.facts.index}")
        kernel = self.load(call.entry, call.constants)
        driver, attributes = self.driver, self.driver.CUfunction_attribute
        if call.shared_bytes > kernel.dynamic_limit:
            needed, most = kernel.static_shared_bytes + call.shared_bytes, self.facts.shared_per_block
            if needed > most:
                raise ValueError(f"{call.describe()}: {needed} bytes of shared memory, {self.facts.name} has {most}")
            attribute = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            done = driver.cuFuncSetAttribute(kernel.handle, attribute, call.shared_bytes)
            check(driver, done, f"reserving shared memory for {call.describe()}")
            kernel.dynamic_limit = call.shared_bytes
        if call.cluster is not None:
            if not self.facts.clusters:
                raise ValueError(f"{call.describe()}: {self.architecture} has no clusters")
            if math.prod(call.cluster) > _PORTABLE_CLUSTER and not kernel.large_clusters:
                attribute = attributes.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
                done = driver.cuFuncSetAttribute(kernel.handle, attribute, 1)
                check(driver, done, f"allowing the cluster of {call.describe()}")
                kernel.large_clusters = True
        return kernel

    def _config(self, call: KernelCall, stream: Any) -> Any:
        """CUlaunchConfig of a call; grid and block are in blocks and threads, with or without clusters."""
        driver = self.driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = call.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = call.block
        config.sharedMemBytes = call.shared_bytes
        config.hStream = stream
        attributes = []
        if call.cluster is not None:
            value = driver.CUlaunchAttributeValue()
            value.clusterDim.x, value.clusterDim.y, value.clusterDim.z = call.cluster
            attributes.append(self._attribute("CLUSTER_DIMENSION", value))
        if call.pdl and self.facts.pdl:
            value = driver.CUlaunchAttributeValue()
            value.programmaticStreamSerializationAllowed = 1
            attributes.append(self._attribute("PROGRAMMATIC_STREAM_SERIALIZATION", value))
        if attributes:
            config.attrs = attributes
            config.numAttrs = len(attributes)
        return config

    def _attribute(self, name: str, value: Any) -> Any:
        """A launch attribute with its value."""
        attribute = self.driver.CUlaunchAttribute()
        attribute.id = getattr(self.driver.CUlaunchAttributeID, f"CU_LAUNCH_ATTRIBUTE_{name}")
        attribute.value = value
        return attribute

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Within it this thread has torch's context of the device, afterwards the one that was there."""
        driver, doing = self.driver, f"switching to GPU {self.facts.index}"
        check(driver, driver.cuCtxPushCurrent(self._context), doing)
        try:
            yield
        except BaseException:
            driver.cuCtxPopCurrent()  # after a fault this fails too; the first error is the one to report
            raise
        check(driver, driver.cuCtxPopCurrent(), doing)


@cache
def _backend(index: int) -> CudaBackend:
    return CudaBackend(index)


def backend_for(device: torch.device) -> CudaBackend:
    """The process's backend of a CUDA device (torch's current one without an index). Raises as CudaBackend does."""
    return _backend(torch.cuda.current_device() if device.index is None else device.index)
