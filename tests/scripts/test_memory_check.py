"""A checkpoint made by scripts/memory_check.py runs within its limit, and the limit is one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ds4.errors import Ds4Error
from ds4.weights import open_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import memory_check
from memory_check import Widths, fabricate, run_limited

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")

SMALL = Widths(
    **{"vocab": 129280, "hidden": 512, "heads": 4, "q_lora": 256, "groups": 2, "o_lora": 256, "inter": 256},
    **{"index_heads": 4, "max_experts": 32},
)
MB = 10**6


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fabricate(tmp_path_factory.mktemp("memory") / "random.gguf", 230 * MB, SMALL)


def test_size_and_formats(path: Path) -> None:
    assert abs(path.stat().st_size - 230 * MB) < 10 * MB
    ckpt = open_checkpoint(path)
    assert {t.format for t in ckpt.tensors()} == {"f16", "f32", "i32", "q8_0", "iq2_xxs", "q2_k", "mxfp4"}
    assert ckpt.tensor("layers.1.ffn.experts.3.w1.weight").dequantize().isfinite().all()


def test_runs_in_bounded_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head alone has 265 MB in FP32. Takes 3 s: two processes that import torch."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    result = run_limited(path, path.stat().st_size + 2 * 265 * MB, 12, 2)
    assert result["finite"]
    anonymous = result["peak_anon_bytes"] - result["idle_anon_bytes"]
    assert 0 < anonymous < 200 * MB  # measured 130 MB
    assert result["peak_rss_bytes"] < path.stat().st_size + 2 * 265 * MB
    with pytest.raises(Ds4Error, match="failed"):
        run_limited(path, path.stat().st_size + result["idle_anon_bytes"] + 20 * MB, 12, 2)


def test_a_limit_below_the_file_is_refused(path: Path) -> None:
    with pytest.raises(Ds4Error, match="memory-gb"):
        memory_check.run_here(path, path.stat().st_size, 1, 1)


def test_too_small_a_size_is_refused() -> None:
    with pytest.raises(Ds4Error, match=r"at least 2\.52"):
        memory_check.choose_sizes(Widths(), 10**9)
