"""Builds fake_libcuda.cpp and runs Python with it in place of the driver's library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ds4.kernels.compiler import cuda_headers

ROOT = Path(__file__).resolve().parents[1]


def build_fake_driver(folder: Path) -> Path:
    """Compile the library into ``folder`` and return it; the test is skipped where there is no C++ compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++ or clang++)")
    library = folder / "libcuda.so.1"
    source = Path(__file__).with_name("fake_libcuda.cpp")
    flags = ["-shared", "-fPIC", "-std=c++17", "-Wl,-soname,libcuda.so.1", f"-I{cuda_headers()}"]
    subprocess.run([compiler, *flags, str(source), "-ldl", "-o", str(library)], check=True, timeout=60)
    return library


def run_with_fake_driver(library: Path, *command: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run ``python *command`` with ``library`` as the driver; ``settings`` are its FAKE_CUDA_ variables."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": str(library.parent)}
    env |= {f"FAKE_CUDA_{name.upper()}": value for name, value in settings.items()}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120, env=env)
