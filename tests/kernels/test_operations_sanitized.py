"""Smoke cases of every registered operation under AddressSanitizer with UBSan and under ThreadSanitizer.

A sanitizer runs in a process of its own. Libraries for it take some seconds each to compile, so of an operation's smoke
cases those run that together launch all the kernels that smoke cases launch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cuemu.backend import missing
from cuemu.sanitize import sanitized

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from gpu_checks import cases_of, launched

from ds4.kernels.cases import Case
from ds4.kernels.entry import Entry
from ds4.kernels.registry import Operation, all_operations

OPERATIONS = all_operations()


def covering(operation: Operation) -> list[Case]:
    """Smoke cases, in order, as far as each launches a kernel that none before it does."""
    seen: set[Entry] = set()
    cases = []
    for case in cases_of(operation, ("smoke",)):
        entries = launched(operation, [case])
        if entries - seen:
            cases.append(case)
            seen |= entries
    return cases


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
@pytest.mark.parametrize("mode", ["asan", "tsan"])
def test_sanitizers_find_nothing(operation, mode, capsys):
    if missing(mode):
        pytest.skip(str(missing(mode)))
    cases = covering(operation)
    assert cases
    found = [line for case in cases for line in sanitized(operation, case, mode)]
    with capsys.disabled():
        print(f" {operation.name}: {len(cases)} cases under {mode} ")
    assert found == []
