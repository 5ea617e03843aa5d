"""scripts/kernel_parity.py: its arithmetic on models in Python, and the bundled model on the emulation."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import kernel_parity
from cuemu.backend import missing
from kernel_parity import Parity, compare

import ds4
from ds4.errors import Ds4Error

VOCAB = 600
NORM = 100.0  # of the model's rows
RMS = NORM / VOCAB**0.5


class Session:
    """The next token is the last one plus one. At position ``wrong_at`` token 0 is preferred by ``lead``."""

    def __init__(self, wrong_at=None, lead=0.0):
        self.wrong_at, self.lead, self.position, self.steps = wrong_at, lead, 0, []

    def decode(self, ids):
        self.steps.append(list(ids))
        rows = []
        for token in ids:
            self.position += 1
            rows.append(self.row(token))
        return torch.stack(rows)

    def row(self, last):
        row = torch.zeros(VOCAB)
        row[(last + 1) % VOCAB] = NORM
        if self.position == self.wrong_at:
            row[0] = NORM + self.lead
        return row


@pytest.mark.parametrize("n_tok", [1, 3, 8])
def test_both_are_given_the_same_tokens(n_tok):
    reference, kernels = Session(), Session()
    found = compare(reference, kernels, [3, 4], tokens=20, n_tok=n_tok)
    chosen = list(range(5, 25))
    assert reference.steps == [[token] for token in [3, 4, *chosen]]
    assert kernels.steps == [[3], [4], *(chosen[i : i + n_tok] for i in range(0, 20, n_tok))]
    assert (found.tokens, found.differing, found.largest, found.relative) == (20, [], 0.0, [0.0] * 20)
    assert found.text().startswith("20 of 20 next tokens agree")


@pytest.mark.parametrize("n_tok", [1, 4])
def test_a_token_that_differs(n_tok):
    found = compare(Session(), Session(wrong_at=2 + 10, lead=5.0), [3, 4], tokens=20, n_tok=n_tok)
    (one,) = found.differing
    assert (one.step, one.want, one.got, one.gap) == (10, 15, 0, NORM)
    assert one.relative_gap == pytest.approx(NORM / RMS)
    assert found.wrong == [one]
    assert found.largest == NORM + 5
    assert max(found.relative) == pytest.approx(1.05)
    record = found.record()
    assert (record["agree"], record["above_tolerance"], record["median_relative_difference"]) == (19, 1, 0)
    assert json.loads(json.dumps(record))["differing"][0]["step"] == 10
    assert one.text().startswith("step 10: 0 instead of 15, whose logit is 100 higher on the CPU")


def test_a_small_gap_passes():
    """The reference itself hardly prefers its choice: by 0.5% or 2% of the row's RMS."""
    for share, wrong in ((0.005, 0), (0.02, 1)):
        want = torch.zeros(VOCAB)
        want[7], want[9] = NORM, NORM - share * RMS * 2**0.5  # two logits, so sqrt(2) times the RMS of one
        got = want.clone()
        got[9] = NORM + 0.01
        found = Parity(1, 0.01)
        found.add(want, got)
        (one,) = found.differing
        assert (one.want, one.got) == (7, 9)
        assert one.relative_gap == pytest.approx(share, rel=1e-3)
        assert len(found.wrong) == wrong


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_never_pass(bad):
    for which in (0, 1):
        rows = [torch.ones(8), torch.ones(8)]
        rows[which][3] = bad
        found = Parity(1, 0.01)
        found.add(*rows)
        assert len(found.wrong) == 1
        assert found.largest == float("inf")


def test_a_step_has_at_most_8_tokens():
    for tokens, n_tok in ((10, 9), (10, 0), (0, 1)):
        with pytest.raises(ValueError, match="1 to 8 are a step"):
            compare(Session(), Session(), [1], tokens, n_tok)


@pytest.mark.parametrize("options", [["--tokens", "0"], ["--n-tok", "9"]])
def test_options_that_make_no_sense(options, capsys):
    with pytest.raises(SystemExit):
        kernel_parity.main(options)
    assert options[0] in capsys.readouterr().err


def test_command(monkeypatch, capsys):
    """The model is loaded twice, and exit codes are 0, 1 and 2."""
    loaded = []

    def model(path, *, device, draft, ctx=None):
        loaded.append((path, device, draft))
        tokenizer = SimpleNamespace(encode=lambda text: [3, 4])
        wrong_at = wrong if device == "cuda" else None
        return SimpleNamespace(session=lambda ctx=None: Session(wrong_at, 1.0), tokenizer=tokenizer)

    monkeypatch.setattr(ds4, "LLM", model, raising=False)
    wrong = None
    assert kernel_parity.main(["-m", "model.gguf", "--tokens", "9", "--json"]) == 0
    assert loaded == [(Path("model.gguf"), "cpu", "off"), (Path("model.gguf"), "cuda", "off")]
    assert json.loads(capsys.readouterr().out)["agree"] == 9
    wrong = 5
    assert kernel_parity.main(["--tokens", "9"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("8 of 9 next tokens agree")
    assert printed[1].startswith("step 3: 0 instead of 8")
    assert kernel_parity.main(["--tokens", "9", "--tolerance", "100"]) == 0

    def refuse(*given, **options):
        raise Ds4Error("device: no GPU")

    capsys.readouterr()
    monkeypatch.setattr(ds4, "LLM", refuse, raising=False)
    assert kernel_parity.main([]) == 2
    assert capsys.readouterr() == ("", "kernel_parity: device: no GPU\n")


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_the_bundled_model_on_the_emulation(capsys):
    """Sixteen tokens, two a step; that kernels made the rows shows in their last bits."""
    assert kernel_parity.main(["--emulate", "--tokens", "16", "--n-tok", "2", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["tokens"], record["n_tok"], record["agree"]) == (16, 2, 16)
    assert 0 < record["median_relative_difference"] < 3e-5
    assert record["largest_relative_difference"] < 1e-2
