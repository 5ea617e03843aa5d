"""Energy counters: the GPU's through NVML, or a processor's through Linux's powercap; none where neither tells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class Meter:
    """A counter of joules; ``source`` names it, None where there is none."""

    def __init__(self, source: str | None = None, read: Callable[[], float] | None = None) -> None:
        self.source = source
        self._read = read

    def joules(self) -> float | None:
        """The counter's value, whose zero means nothing; None without one."""
        return self._read() if self._read is not None else None


def gpu_meter(uuid: str) -> Meter:
    """The driver's counter of the GPU with this identity (its number would not do: CUDA_VISIBLE_DEVICES hides some)."""
    try:
        from cuda.bindings import nvml

        nvml.init_v2()
        handle = nvml.device_get_handle_by_uuid(f"GPU-{uuid}")
        nvml.device_get_total_energy_consumption(handle)
    except (ImportError, AttributeError, RuntimeError):  # no NVML, an older binding, a card that does not count
        return Meter()
    return Meter("NVML, the whole GPU", lambda: nvml.device_get_total_energy_consumption(handle) / 1e3)


def cpu_meter(powercap: Path = POWERCAP) -> Meter:
    """The packages' counters; most systems let only root read them."""
    files = sorted(powercap.glob("intel-rapl:*/energy_uj")) if powercap.is_dir() else []
    files = [file for file in files if file.parent.name.count(":") == 1]  # a package, not a part of one

    def read() -> float:
        return sum(int(file.read_text()) for file in files) / 1e6

    try:
        read()
    except (OSError, ValueError):
        return Meter()
    return Meter("powercap, all processor packages", read) if files else Meter()


def meter_for(device: str) -> Meter:
    """The counter of what computes."""
    if device != "cuda":
        return cpu_meter()
    import torch

    return gpu_meter(str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid))
