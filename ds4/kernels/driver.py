"""The CUDA driver behind ``cuda.bindings``, opened with care and with errors that say what was going on.

Without a driver some calls of cuda.core wait forever on a lock, so nothing of ds4 calls into the driver before
:func:`load_driver` has seen cuInit succeed.
"""

from __future__ import annotations

from typing import Any

from ds4.errors import CudaError, Ds4Error

# What to do about the ways in which cuInit is known to fail, by the error's name.
_REMEDIES = {
    "CUDA_ERROR_NO_DEVICE": "no GPU is visible: see nvidia-smi and CUDA_VISIBLE_DEVICES",
    "CUDA_ERROR_STUB_LIBRARY": "a toolkit's stub libcuda was loaded: take its folder off LD_LIBRARY_PATH",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "the driver's libraries and kernel module differ: restart the machine",
    "CUDA_ERROR_SYSTEM_NOT_READY": "start nvidia-fabricmanager or nvidia-persistenced",
}


def load_driver() -> Any:
    """The module cuda.bindings.driver, after cuInit has succeeded. Cheap after the first time.

    Raises Ds4Error where the bindings or the driver are missing, or the driver finds no GPU. It never waits for either.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise Ds4Error(f"cuda-bindings cannot be imported ({error}); pip install 'ds4[gpu]'") from None
    try:
        (status,) = driver.cuInit(0)
    except RuntimeError:  # no libcuda, or one without cuInit
        raise Ds4Error("no NVIDIA driver found (libcuda); install it, or use --device cpu") from None
    if status != driver.CUresult.CUDA_SUCCESS:
        name = getattr(status, "name", str(status))
        remedy = _REMEDIES.get(name, "see nvidia-smi")
        raise Ds4Error(f"the NVIDIA driver does not start ({name}): {remedy}, or use --device cpu")
    return driver


def check(driver: Any, result: tuple[Any, ...], doing: str) -> Any:
    """What a driver call returned after its status: nothing, one value, or a tuple of several.

    Raises CudaError with ``doing``, the error's name and the driver's description where the status is not success.
    """
    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        raise CudaError(f"{doing}: {_describe(driver, status)}")
    return values[0] if len(values) == 1 else tuple(values) or None


def _describe(driver: Any, status: Any) -> str:
    """Name and description of an error code."""
    texts = []
    for ask in (driver.cuGetErrorName, driver.cuGetErrorString):
        failed, text = ask(status)
        if failed == driver.CUresult.CUDA_SUCCESS and text:
            texts.append(text.decode())
    return ", ".join(texts) or f"error {int(status)}"
