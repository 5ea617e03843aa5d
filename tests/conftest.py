"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before anything imports torch. Tests run in two processes side by side; with a thread a core in each of them, and in
# the commands they start, the threads would wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Directory of the golden data, which lives beside the repository and not in it; the test is skipped without."""
    directory = Path(__file__).resolve().parents[2] / "shared" / "golden"
    if not directory.is_dir():
        pytest.skip("golden data not found beside the repository: ../shared/golden")
    return directory
