"""scripts/gpu_replay.py: what it finds, with the emulation and recorded lists in the GPU's place."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from cuemu.backend import CpuBackend, missing

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import gpu_replay
from gpu_replay import Run
from recorded_runner import RecordedRunner

from ds4 import engine
from ds4.engine import LLM
from ds4.graph.runner import Left


def run(tokens=(1, 2, 3), logit=0.5, byte=7, gpu_us=90.0, wall_us=100.0) -> Run:
    return Run(list(tokens), torch.tensor([[logit]]), {"layers.0.ring": torch.tensor([byte])}, gpu_us, wall_us)


def compared(monkeypatch, eager: Run, replay: Run):
    monkeypatch.setattr(gpu_replay, "_llm", lambda: None)
    monkeypatch.setattr(gpu_replay, "steps", lambda llm, kind, k, n: {"eager": eager, "replay": replay}[kind])
    return gpu_replay.compare(2, 40)


def test_figures(monkeypatch):
    text, data = compared(monkeypatch, run(wall_us=300.0), run())
    first, second = text.split("; ")
    assert first == "40 steps, 3 tokens, the same bits"
    assert second == "eager 300 us a step, replay 100 (3.0x), of which 10 between steps"
    assert (data["gain"], data["gap_us"], data["eager_us"], data["tokens"]) == (3.0, 10.0, 300.0, 3)


@pytest.mark.parametrize(
    ("replay", "message"),
    [
        (run(tokens=(1, 5, 3)), "token 1 is 5 by replay, 2 by single launches"),
        (run(tokens=(1, 2)), "2 tokens by replay, 3 by single launches"),
        (run(logit=0.25), "the last step's logits differ"),
        (run(byte=8), r"the caches differ: layers\.0\.ring"),
        (run(wall_us=190.0, gpu_us=180.0), r"replay 190 \(1\.6x\), of which 10 between steps: at least 2x"),
        (run(gpu_us=60.0), r"replay 100 \(3\.0x\), of which 40 between steps: .* at most 30 us are wanted"),
    ],
)
def test_what_is_wrong(monkeypatch, replay, message):
    with pytest.raises(AssertionError, match=message):
        compared(monkeypatch, run(wall_us=300.0), replay)


class Millisecond(RecordedRunner):
    """Replays of a millisecond each."""

    def left(self) -> Left:
        return Left(super().left().words, 1e-3)


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_steps_of_the_bundled_model(monkeypatch):
    monkeypatch.setattr(engine, "resolve_device", lambda device: device)
    monkeypatch.setattr(engine, "current_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(engine, "backend_for", lambda device: CpuBackend())
    monkeypatch.setitem(gpu_replay.RUNNERS, "replay", Millisecond)
    llm = LLM(device="cuda", ctx=512)
    eager, replay = (gpu_replay.steps(llm, kind, 1, 2) for kind in ("eager", "replay"))
    assert eager.tokens == replay.tokens
    assert 3 <= len(eager.tokens) <= 5
    assert torch.equal(eager.rows, replay.rows)
    assert eager.rows.shape == (2, llm.config.vocab_size)
    assert eager.state.keys() == replay.state.keys()
    assert all(torch.equal(part, replay.state[name]) for name, part in eager.state.items())
    assert replay.gpu_us == pytest.approx(1000)
    assert replay.wall_us > 0
    assert [name for name, _ in gpu_replay.items(quick=True)] == ["20 steps, plain", "20 steps, 2 drafts"]
