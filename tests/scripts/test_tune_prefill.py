"""scripts/tune_prefill.py without a GPU: its launches on the emulation, a clock that tells what it is told to."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import tune_prefill
from cuemu.backend import CpuBackend, missing
from tune_prefill import CAPACITIES, expert_subjects, gemm_subjects, subjects, tune

from ds4.errors import CudaError, Ds4Error
from ds4.kernels.gemm.cases import LAUNCHES, Launch
from ds4.kernels.picks import Pick, Picks, Shape, picks_file, picks_of

CPU = torch.device("cpu")
CARD = "a card"
TINY = Launch("tiny", 64, (("q8_0", 40), ("bf16", 5)), ("f32", "bf16"))
needs_emulation = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def clock(*fast: tuple[int, int]):
    """A timer that says 1 ms for these tiles and stages, 2 ms for others, from the constants of what is launched."""

    def timer(operation, case, backend, device):
        inputs = case.make(0, CPU)
        (call, *_) = operation.calls(inputs, operation.outputs(inputs))
        constants = dict(call.constants)
        return 1e-3 if (constants["TOKENS"], constants["STAGES"]) in fast else 2e-3

    return timer


def test_the_launches_of_the_network() -> None:
    """Every dense launch and number of tokens; of the experts' those that a chunk has for each of 256."""
    dense = list(gemm_subjects(CAPACITIES))
    assert len(dense) == 4 * len(LAUNCHES)
    assert all(one.picks() for one in dense)
    by_title = {one.title: one for one in dense}
    assert {pick.tokens for pick in by_title["proj_in native CSA n=8"].picks()} == {8}
    assert {pick.tokens for pick in by_title["proj_in native CSA n=64"].picks()} == {8, 16, 32, 64}
    assert {pick.tokens for pick in by_title["proj_in native CSA n=4096"].picks()} == {64, 128}
    experts = list(expert_subjects(CAPACITIES, (("nvfp4", "q8_0"),)))
    assert [one.title for one in experts] == [f"moe_{kind} nvfp4 n={n}" for n in (2, 12, 96) for kind in ("up", "down")]
    assert experts[0].shape == Shape("moe_up", 4096, 4096, ("nvfp4", "nvfp4"))
    assert {one.shape.kernel for one in subjects((8,), ("moe_down",))} == {"moe_down"}


@needs_emulation
def test_the_fastest_pick_of_a_dense_launch() -> None:
    (subject,) = gemm_subjects((12,), [TINY])
    assert {pick.tokens for pick in subject.picks()} == {8, 16}
    rows = tune(subject, CpuBackend(), CPU, clock((16, 3)))
    assert len(rows) == 6
    assert {(row["launch"], row["kernel"], row["n_tok"]) for row in rows} == {("tiny n=12", "gemm", 12)}
    assert (rows[0]["tokens"], rows[0]["stages"], rows[0]["us"]) == (16, 3, 1000)
    assert {row["us"] for row in rows[1:]} == {2000}
    text = tune_prefill.table(rows)
    assert text.startswith("tiny n=12: 16/3 1000.0 us; ")
    assert text.count("+100 %") == 5


@needs_emulation
def test_the_fastest_pick_of_the_experts() -> None:
    """The pairs are grouped by the tile that is measured, and stages are the pick's."""
    subject = next(one for one in expert_subjects((128,), (("nvfp4", "q8_0"),), 64, 32) if "down" in one.title)
    rows = tune(subject, CpuBackend(), CPU, clock((8, 4)))
    assert (rows[0]["tokens"], rows[0]["stages"], rows[0]["us"]) == (8, 4, 1000)
    assert rows[1]["us"] == 2000


@needs_emulation
def test_results_that_depend_on_the_tile_are_an_error() -> None:
    (subject,) = gemm_subjects((12,), [TINY])

    def make(tokens, seed, device):
        inputs = subject.make(tokens, seed, device)
        return inputs | {"x": inputs["x"] * (2 if tokens == 16 else 1)}

    with pytest.raises(CudaError, match="results depend on the tile, which is a bug of ds4: tiny n=12 16/2: y0: "):
        tune(replace(subject, make=make), CpuBackend(), CPU, clock())


def test_a_file_keeps_what_it_had(tmp_path: Path) -> None:
    one, other = (Shape("gemm", 64, n, ("bf16",)) for n in (8, 16))
    assert tune_prefill.write(Picks([(one, 8, Pick(8, 2))]), CARD, tmp_path) == picks_file(CARD, tmp_path)
    tune_prefill.write(Picks([(one, 8, Pick(8, 4)), (other, 8, Pick(8, 3))]), CARD, tmp_path)
    assert picks_of(CARD, tmp_path).rows() == [(other, 8, Pick(8, 3)), (one, 8, Pick(8, 4))]
    assert [path.name for path in tmp_path.iterdir()] == ["picks-a-card.json"]


@pytest.fixture
def card(monkeypatch, tmp_path):
    """The emulation in a GPU's place."""
    backend = CpuBackend()
    object.__setattr__(backend, "facts", SimpleNamespace(name=CARD, architecture="sm_90a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tune_prefill, "open_gpu", lambda: (backend, CPU))
    compiled = []
    monkeypatch.setattr(tune_prefill, "compile_many", compiled.extend)
    monkeypatch.setattr(tune_prefill, "subjects", lambda n_toks, kernels: gemm_subjects(n_toks, [TINY]))
    monkeypatch.setattr(tune_prefill, "tune", lambda *args: tune(*args, timer=clock((8, 3))))
    yield compiled
    picks_of.cache_clear()


@needs_emulation
def test_the_command(card, tmp_path, capsys) -> None:
    times = tmp_path / "times.json"
    assert tune_prefill.main(["--show"]) == 0
    assert "the rule decides" in capsys.readouterr().out
    assert tune_prefill.main(["--n-tok", "8", "--json", str(times)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("tiny n=8: 8/3 1000.0 us")
    assert f"written: {picks_file(CARD)}" in out
    assert {dict(job[1])["STAGES"] for job in card} == {2, 3, 4}
    record = json.loads(times.read_text())
    assert (record["card"], len(record["picks"])) == (CARD, 3)
    assert tune_prefill.main(["--show"]) == 0
    assert capsys.readouterr().out == "gemm 45 x 64 q8_0,bf16, 8 tokens: tiles of 8, 3 stages\n"
    with pytest.raises(SystemExit):
        tune_prefill.main(["--n-tok", "8,x"])
    assert "8,x: numbers from 1 on with commas are needed" in capsys.readouterr().err


def test_without_a_gpu(monkeypatch, capsys) -> None:
    def none():
        raise Ds4Error("there is no GPU")

    monkeypatch.setattr(tune_prefill, "open_gpu", none)
    assert tune_prefill.main([]) == 2
    assert capsys.readouterr().err == "tune_prefill: there is no GPU\n"
