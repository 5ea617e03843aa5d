"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden() -> Path:
    """Directory of the golden data, which lives beside the repository and not in it; the test is skipped without."""
    directory = Path(__file__).resolve().parents[2] / "shared" / "golden"
    if not directory.is_dir():
        pytest.skip("golden data not found beside the repository: ../shared/golden")
    return directory
