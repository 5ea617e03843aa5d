"""What this machine has and lacks for ``--device cuda``.

The checks run in a process of their own, which reports one JSON object a line, so that whatever a broken driver or
library does (a crash, an endless wait) ends in a line of the report.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ds4.errors import CudaError, Ds4Error

TIME_LIMIT_S = 120.0  # loading torch's CUDA libraries from a cold disk takes tens of seconds


@dataclass(frozen=True)
class Check:
    """One finding: "ok", "missing" (``--device cuda`` needs it) or "note" (it does not).

    ``text`` is one line that says, where something is missing, what to do; ``facts`` are the figures behind it.
    """

    name: str
    status: Literal["ok", "missing", "note"]
    text: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """The checks in order; ``ok``: ``--device cuda`` will work."""

    checks: list[Check]

    @property
    def ok(self) -> bool:
        return bool(self.checks) and all(check.status != "missing" for check in self.checks)


def diagnose(time_limit_s: float = TIME_LIMIT_S) -> Report:
    """Run all checks. Takes ``time_limit_s`` at most and raises nothing for what it finds."""
    with tempfile.TemporaryDirectory(prefix="ds4-doctor-", ignore_cleanup_errors=True) as folder:
        lines, errors = Path(folder) / "lines", Path(folder) / "errors"
        # Files and not pipes: a process that hangs inside the driver may not even be killed, and its pipes stay open.
        with lines.open("w") as out, errors.open("w") as err:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
            try:
                code: int | None = child.wait(time_limit_s)
            except subprocess.TimeoutExpired:
                code = None
                child.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(1)
        return Report(_read(lines.read_text(errors="replace"), errors.read_text(errors="replace"), code, time_limit_s))


def _environment() -> dict[str, str]:
    """The environment in which a child process imports this very ds4, whatever the working directory holds."""
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def _read(lines: str, errors: str, code: int | None, time_limit_s: float) -> list[Check]:
    """The checks that a child process reported, and how it ended where that was not at its end."""
    checks, under_way = [], "start"
    for line in lines.splitlines():
        try:
            fields = json.loads(line)
        except ValueError:  # some library prints, or the line was cut
            continue
        if isinstance(fields, dict) and "begins" in fields:
            under_way = fields["begins"]
        elif isinstance(fields, dict) and set(fields) == {"name", "status", "text", "facts"}:
            checks.append(Check(**fields))
    if code is None:
        text = f"no answer within {time_limit_s:g} s; if nvidia-smi hangs too, restart the machine"
        checks.append(Check(under_way, "missing", text))
    elif code:
        last = errors.strip().splitlines()[-1:] or [f"exit code {code}"]
        checks.append(Check(under_way, "missing", f"the check broke down: {last[0]}"))
    return checks


def _main() -> None:
    """The child process: one line before each check and one for each finding."""
    failed: set[str] = set()
    for name, (run, needs) in CHECKS.items():
        if failed & set(needs):  # it would only say the same again
            failed.add(name)
            continue
        print(json.dumps({"begins": name}), flush=True)
        try:
            found = run()
        except (Ds4Error, CudaError) as error:
            found = [Check(name, "missing", str(error))]
        except Exception as error:  # a broken installation can raise anything; the report goes on
            found = [Check(name, "missing", f"{type(error).__name__}: {error}; install ds4 again")]
        if any(check.status == "missing" for check in found):
            failed.add(name)
        for check in found:
            print(json.dumps(asdict(check)), flush=True)


# The checks. Each returns its findings, or raises where it cannot say.


def check_torch() -> list[Check]:
    """torch and the CUDA version it was built for."""
    import torch

    facts = {"version": torch.__version__, "cuda": torch.version.cuda}
    if torch.version.cuda is None:
        remedy = "it has no CUDA; pip install --force-reinstall torch, without the CPU index"
        return [Check("torch", "missing", f"{torch.__version__}: {remedy}", facts)]
    return [Check("torch", "ok", f"{torch.__version__}, CUDA {torch.version.cuda}", facts)]


def check_packages() -> list[Check]:
    """The two packages that compile and launch."""
    found = []
    for package in ("cuda-core", "cuda-bindings"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            return [Check("packages", "missing", f"{package} is not installed; pip install 'ds4[gpu]'")]
    return [Check("packages", "ok", ", ".join(found), dict(text.split(" ") for text in found))]


def check_driver() -> list[Check]:
    """The driver and the CUDA version it offers."""
    cuda, release = _driver_cuda(), driver_release()
    text = f"{release}, CUDA {cuda}" if release else f"CUDA {cuda}"
    facts = {"cuda": cuda, "release": release}
    return [Check("driver", "ok", text, facts)]


def _driver_cuda() -> str:
    """The CUDA version that the driver offers, 13.0. Raises as load_driver does."""
    from ds4.kernels.driver import check, load_driver

    driver = load_driver()
    number = check(driver, driver.cuDriverGetVersion(), "asking for the driver's version")
    return f"{number // 1000}.{number % 1000 // 10}"


def driver_release() -> str | None:
    """The kernel module's release (580.65.06), on Linux."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    match = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", text)
    return match[1] if match else None


def check_gpus() -> list[Check]:
    """Every GPU; only the first one has to be usable."""
    from ds4.kernels.arch import device_count, device_facts, free_memory

    found = []
    for index in range(device_count()):
        device = device_facts(index)
        free = free_memory(index)
        facts = {
            "index": index,
            "name": device.name,
            "compute_capability": "{}.{}".format(*device.capability),
            "memory_bytes": device.memory,
            "free_bytes": free,
            "sms": device.n_sms,
            "l2_bytes": device.l2,
        }
        text = f"{device.name}, {free / 1e9:.1f} of {device.memory / 1e9:.1f} GB free"
        try:
            facts["architecture"] = device.architecture
            found.append(Check(f"gpu {index}", "ok", f"{text}, {device.architecture}", facts))
        except Ds4Error as error:
            found.append(Check(f"gpu {index}", "note" if index else "missing", f"{text}: {error}", facts))
    return found


def check_nvrtc() -> list[Check]:
    """The compiler library, which the driver must be able to follow, and the headers that kernels include."""
    from ds4.kernels.compiler import cuda_headers, nvrtc_version

    version, headers = nvrtc_version(), cuda_headers()
    found = [
        Check("nvrtc", "ok", version, {"version": version}),
        Check("headers", "ok", str(headers), {"path": str(headers)}),
    ]
    try:
        driver = _driver_cuda()
    except Ds4Error:
        return found
    if int(driver.split(".")[0]) < int(version.split(".")[0]):  # cubins run on drivers of their own major version
        text = f"{version} is newer than the driver, CUDA {driver}; install a driver of release 580 or newer"
        found[0] = Check("nvrtc", "missing", text, {"version": version})
    return found


def check_compile() -> list[Check]:
    """A small kernel compiles, past the cache, for the first GPU; without one, for an H100."""
    from ds4.kernels.arch import device_facts
    from ds4.kernels.compiler import compile_source
    from ds4.kernels.probe import PROBE

    try:
        architecture = device_facts(0).architecture
    except Ds4Error:
        architecture = "sm_90a"
    size = len(compile_source(PROBE.path, (), architecture).data)
    return [Check("compile", "ok", f"a test kernel for {architecture}", {"bytes": size, "architecture": architecture})]


def check_run() -> list[Check]:
    """The same kernel runs, by the same way as all others."""
    import torch

    if not torch.cuda.is_available():
        return [Check("run", "missing", "torch cannot use the GPU; see python -c 'import torch; torch.cuda.init()'")]
    from ds4.kernels.cuda_backend import CudaBackend
    from ds4.kernels.probe import run_probe

    run_probe(CudaBackend(0, synchronous=True), torch.device("cuda", 0))
    return [Check("run", "ok", f"a test kernel on {torch.cuda.get_device_name(0)}")]


def check_cache() -> list[Check]:
    """The folder of compiled kernels; without it everything is compiled in each process, which works but takes long."""
    from ds4.kernels.cubin_cache import MAX_BYTES, default_directory

    folder = default_directory()
    sizes = [file.stat().st_size for file in folder.glob("*.cubin")] if folder.is_dir() else []
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    facts = {"path": str(folder), "files": len(sizes), "bytes": sum(sizes), "limit": MAX_BYTES, "writable": writable}
    if not writable:
        return [Check("cache", "note", f"{folder} cannot be written; make it writable or set XDG_CACHE_HOME", facts)]
    return [Check("cache", "ok", f"{folder}, {len(sizes)} kernels, {sum(sizes) / 1e6:.1f} MB", facts)]


def check_kernels() -> list[Check]:
    """Every operation has kernels for the first GPU, and the engine takes ``cuda``."""
    from ds4.engine import resolve_device
    from ds4.kernels.arch import device_facts
    from ds4.kernels.registry import all_operations

    resolve_device("cuda")
    operations, device = all_operations(), device_facts(0)
    lacking = [op.name for op in operations if any(device.architecture not in e.architectures for e in op.entries)]
    facts = {"operations": len(operations), "lacking": lacking}
    if lacking:
        text = f"none for {device.architecture} of {', '.join(lacking)}; use --device cpu"
        return [Check("kernels", "missing", text, facts)]
    return [Check("kernels", "ok", f"{len(operations)} operations for {device.architecture}", facts)]


def check_cxx() -> list[Check]:
    """g++, with which the tests run kernels on the CPU."""
    path = shutil.which("g++")
    if path is None:
        return [Check("g++", "note", "not found; only the tests need it (apt install g++)")]
    done = subprocess.run([path, "-dumpfullversion"], capture_output=True, text=True, timeout=20)
    return [Check("g++", "ok", f"{done.stdout.strip()}, for the tests", {"path": path, "version": done.stdout.strip()})]


def check_python() -> list[Check]:
    """The interpreter and the machine."""
    facts = {"version": platform.python_version(), "machine": platform.machine(), "system": platform.system()}
    return [Check("python", "ok", f"{facts['version']}, {facts['system']} {facts['machine']}", facts)]


# Name -> the check, and the checks without which it says nothing new.
CHECKS: dict[str, tuple[Callable[[], list[Check]], tuple[str, ...]]] = {
    "python": (check_python, ()),
    "packages": (check_packages, ()),
    "driver": (check_driver, ("packages",)),
    "gpus": (check_gpus, ("driver",)),
    "torch": (check_torch, ()),
    "nvrtc": (check_nvrtc, ("packages",)),
    "compile": (check_compile, ("nvrtc",)),
    "cache": (check_cache, ()),
    "run": (check_run, ("torch", "gpus", "compile")),
    "kernels": (check_kernels, ()),
    "g++": (check_cxx, ()),
}

if __name__ == "__main__":
    _main()
