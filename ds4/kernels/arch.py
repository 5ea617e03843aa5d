"""GPU architectures: those that kernels are compiled for, and the facts of a device, asked from its driver."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from ds4.errors import Ds4Error
from ds4.kernels.driver import check, load_driver

# The suffix a gives access to a GPU's own instructions (wgmma, block-scaled mma) and binds the cubin to it.
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_120a", "sm_121a")
_BY_CAPABILITY = {
    (int(digits[:-1]), int(digits[-1])): name
    for name, digits in ((name, name.removeprefix("sm_").removesuffix("a")) for name in ARCHITECTURES)
}


def architecture_of(capability: tuple[int, int]) -> str:
    """The architecture that kernels are compiled for on a device of this compute capability, (9, 0) -> sm_90a.

    Raises Ds4Error for one that ds4 does not support, a related one included: cubins run on their own kind of GPU only.
    """
    name = _BY_CAPABILITY.get(capability)
    if name is None:
        known = ", ".join(f"{major}.{minor}" for major, minor in _BY_CAPABILITY)
        raise Ds4Error(
            f"the GPU has compute capability {capability[0]}.{capability[1]}, ds4's kernels support {known}; "
            "use --device cpu"
        )
    return name


@dataclass(frozen=True)
class DeviceFacts:
    """What a kernel's configuration may depend on. Sizes in bytes.

    ``shared_per_block`` is the most a block may have after opting in, static and dynamic together;
    ``pdl`` and ``clusters``: programmatic dependent launch, thread block clusters (compute capability 9.0 and later);
    ``fp4_mma``: block-scaled FP4 mma instructions (10.x and 12.x).
    """

    index: int
    name: str
    capability: tuple[int, int]
    memory: int
    n_sms: int
    shared_per_block: int
    shared_per_sm: int
    l2: int

    @property
    def architecture(self) -> str:
        """As :func:`architecture_of`; raises Ds4Error where there is none."""
        return architecture_of(self.capability)

    @property
    def pdl(self) -> bool:
        return self.capability >= (9, 0)

    @property
    def clusters(self) -> bool:
        return self.capability >= (9, 0)

    @property
    def fp4_mma(self) -> bool:
        return self.capability[0] in (10, 12)


def device_count() -> int:
    """GPUs that the driver shows (CUDA_VISIBLE_DEVICES counts). Raises Ds4Error without a driver or GPU."""
    driver = load_driver()
    return check(driver, driver.cuDeviceGetCount(), "counting the GPUs")


@cache
def device_facts(index: int) -> DeviceFacts:
    """Facts of GPU ``index``, as torch counts them too. No context is created.

    Raises Ds4Error without a driver or such a GPU, CudaError where the driver fails.
    """
    driver = load_driver()
    n_devices = device_count()
    if not 0 <= index < n_devices:
        raise Ds4Error(f"device: there is no GPU {index}; the driver shows {n_devices}")
    doing = f"asking for the properties of GPU {index}"
    handle = check(driver, driver.cuDeviceGet(index), doing)
    attributes = driver.CUdevice_attribute

    def ask(name: str) -> int:
        attribute = getattr(attributes, f"CU_DEVICE_ATTRIBUTE_{name}")
        return check(driver, driver.cuDeviceGetAttribute(attribute, handle), doing)

    name = check(driver, driver.cuDeviceGetName(256, handle), doing)
    return DeviceFacts(
        index=index,
        name=name.split(b"\0")[0].decode(errors="replace"),
        capability=(ask("COMPUTE_CAPABILITY_MAJOR"), ask("COMPUTE_CAPABILITY_MINOR")),
        memory=check(driver, driver.cuDeviceTotalMem(handle), doing),
        n_sms=ask("MULTIPROCESSOR_COUNT"),
        shared_per_block=ask("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
        shared_per_sm=ask("MAX_SHARED_MEMORY_PER_MULTIPROCESSOR"),
        l2=ask("L2_CACHE_SIZE"),
    )


def free_memory(index: int) -> int:
    """Bytes of GPU ``index`` that nobody uses. Opens torch's context there if it is not open yet (some 0.5 GB).

    Raises Ds4Error without a driver or such a GPU, CudaError where no context can be made.
    """
    driver, facts = load_driver(), device_facts(index)
    doing = f"asking for the free memory of GPU {index} ({facts.name})"
    handle = check(driver, driver.cuDeviceGet(index), doing)
    context = check(driver, driver.cuDevicePrimaryCtxRetain(handle), doing)
    try:
        check(driver, driver.cuCtxPushCurrent(context), doing)
        free, _total = check(driver, driver.cuMemGetInfo(), doing)
        check(driver, driver.cuCtxPopCurrent(), doing)
    finally:
        driver.cuDevicePrimaryCtxRelease(handle)
    return free
