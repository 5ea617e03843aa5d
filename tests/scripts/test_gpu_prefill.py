"""scripts/gpu_prefill.py: what it finds, with the emulation in the GPU's place."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cuemu.backend import missing

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "mtp"))

import gpu_prefill
from emulation import emulated_llm

from ds4.kernels import picks
from ds4.kernels.moe import prefill_plan
from ds4.model import prefill_pass

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(autouse=True)
def _short_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tests/model/test_prefill_pass.py, whose compiled kernels serve here."""
    monkeypatch.setattr(prefill_pass, "CAPACITIES", (8, 136))
    for module in (picks, prefill_plan):
        monkeypatch.setattr(module, "default_pick", lambda *_: picks.Pick(16, 2))


def test_chunks_and_forms() -> None:
    with emulated_llm(256) as llm:
        text, data = gpu_prefill.chunks(llm, (3, 50), 136)
        assert text == "136 tokens, chunks of 3, 50, and broken off: the same bits"
        found, record = gpu_prefill.forms(llm, 100)
        assert "of 100 next tokens agree" in found
        assert record["above_tolerance"] == 0
    assert data == {"tokens": 136}


def test_differences_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    with emulated_llm(256) as llm:
        monkeypatch.setattr(gpu_prefill, "_same", _with_another_state(gpu_prefill._same))
        with pytest.raises(AssertionError, match=r"chunks of 50: the caches differ: layers\.0\.ring"):
            gpu_prefill.chunks(llm, (50,), 60)
        monkeypatch.setattr(gpu_prefill.form_parity, "TOLERANCE", {"kernels": 1e-9})
        with pytest.raises(AssertionError, match="next tokens agree"):
            gpu_prefill.forms(llm, 8)


def _with_another_state(same):
    """The comparison, of a session whose cache had a byte changed."""

    def compare(what, session, *rest):
        session.cache.layers[0].ring[(session.position - 1) % session.cache.layers[0].ring.shape[0], 0] += 1
        same(what, session, *rest)

    return compare
