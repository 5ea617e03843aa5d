"""Every registered operation's kernels on a GPU, with all cases; skipped without one.

scripts/gpu_check.py runs the same checks without pytest, within a time limit and with a table.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from gpu_checks import GROUPS, cases_of, check_graph, has_tokens, remembered

from ds4.errors import CudaError, Ds4Error
from ds4.kernels.cuda_backend import CudaBackend
from ds4.kernels.registry import all_operations
from ds4.kernels.verify import check_launches, check_tokens

OPERATIONS = all_operations()


def ids(value) -> str:
    return getattr(value, "name", str(value))


@pytest.fixture(scope="module")
def gpu() -> tuple[CudaBackend, torch.device]:
    """The first GPU; every launch is waited for, so that a fault names its kernel."""
    try:
        backend = CudaBackend(0, synchronous=True)
    except (Ds4Error, CudaError) as error:
        pytest.skip(f"needs a GPU: {error}")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: this torch cannot use it")
    return backend, torch.device("cuda", 0)


@pytest.mark.parametrize("operation", OPERATIONS, ids=ids)
def test_kernels_agree_with_the_reference(operation, gpu):
    for case in cases_of(operation, GROUPS):
        for seed in (0, 1):
            assert check_launches(operation, remembered(case), *gpu, seed=seed) == []


@pytest.mark.parametrize("operation", [op for op in OPERATIONS if op.token_inputs], ids=ids)
def test_rows_do_not_depend_on_the_number_of_tokens(operation, gpu):
    cases = [remembered(case) for case in cases_of(operation, GROUPS)]
    several = [case for case in cases if has_tokens(operation, case) > 1]
    assert several
    for case in several:
        assert check_tokens(operation, case, *gpu) == []


@pytest.mark.parametrize("operation", OPERATIONS, ids=ids)
def test_graph_replays_equal_eager_launches(operation, gpu):
    backend, device = CudaBackend(0), gpu[1]  # one that waits after each launch cannot be captured
    for case in cases_of(operation, GROUPS):
        assert check_graph(operation, remembered(case), backend, device) == []
