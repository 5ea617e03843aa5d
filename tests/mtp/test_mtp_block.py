"""The preview generation's MTP block against the official preview code (golden/mtp), everything FP32.

Pass line: each row of logits within 5e-5 (norm of the difference over norm of the row) and the same argmax. Measured:
2.4e-6 trunk and streams, 2.4e-6 block. The mistakes below are off by 1.5e-2 to 1.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ds4.kernels.numerics import resolve
from ds4.model.transformer import Transformer
from ds4.mtp import mtp_block
from ds4.mtp.mtp_block import MTPBlock
from ds4.weights import open_checkpoint

LENGTHS = (5, 128, 300)
PASS_LINE = 5e-5
N_GENERATED = 6

each_length = pytest.mark.parametrize("n", LENGTHS)


def assert_rows(actual: Tensor, expected: Tensor) -> None:
    """Every row within the pass line, every argmax equal."""
    assert actual.shape == expected.shape
    worst = ((actual - expected).norm(dim=1) / expected.norm(dim=1)).max().item()
    assert worst <= PASS_LINE, f"relative difference {worst:.2e}"
    assert torch.equal(actual.argmax(1), expected.argmax(1))


class Run:
    """Trunk over prompt and greedy tokens, and the pair list (h_p, x_{p+1}) of every position.

    The text is padded with zeros to whole windows of 128; attention is causal, so rows in front do not see them.
    """

    def __init__(self, directory: Path, n: int) -> None:
        checkpoint = open_checkpoint(directory)
        golden = load_file(directory / "golden.safetensors")
        self.n = n
        self.golden = {key: golden[f"f32.{key}.{n}"] for key in ("y", "h", "z", "logits", "drafts", "draft_logits")}
        self.golden |= {key: golden[f"f32.{key}.{n}"] for key in ("h_prefill", "mtp_prefill")}
        trunk = Transformer(checkpoint.config, checkpoint, resolve("exact"))
        self.block = MTPBlock(checkpoint.config, checkpoint, trunk)
        text = torch.cat((golden[f"tokens.{n}"], self.golden["y"])).long()
        self.ids = torch.nn.functional.pad(text[:-1], (0, -(len(text) - 1) % 128))
        self.next_ids = torch.nn.functional.pad(text[1:], (0, -(len(text) - 1) % 128))
        self.logits, self.h = trunk.forward_text(self.ids)

    def mtp(self, h: Tensor | None = None, next_ids: Tensor | None = None) -> Tensor:
        """Block logits of the pairs."""
        h = self.h if h is None else h
        return self.block.forward_text(h, self.next_ids if next_ids is None else next_ids)


@pytest.fixture(scope="module")
def runs(golden: Path) -> dict[int, Run]:
    with torch.inference_mode():
        return {n: Run(golden / "mtp", n) for n in LENGTHS}


@each_length
def test_trunk(runs: dict[int, Run], n: int) -> None:
    """Greedy tokens, logits and streams that the block is fed with."""
    run = runs[n]
    steps = slice(n - 1, n + N_GENERATED)
    assert torch.equal(run.logits[steps].argmax(1), run.golden["y"].long())
    assert_rows(run.logits[steps], run.golden["logits"])
    assert_rows(run.h[steps].flatten(1), run.golden["h"].flatten(1))
    assert_rows(run.h[max(0, n - 128) : n].flatten(1), run.golden["h_prefill"].flatten(1))


@each_length
def test_pairs_of_the_prompt(runs: dict[int, Run], n: int) -> None:
    """x_N, the token of the last pair, is the first one generated."""
    assert_rows(runs[n].mtp()[:n], runs[n].golden["mtp_prefill"])


@each_length
def test_pairs_of_generated_tokens(runs: dict[int, Run], n: int) -> None:
    """The official run made these one by one, we the whole text at once."""
    run = runs[n]
    logits = run.mtp()[n - 1 : n + N_GENERATED]
    assert_rows(logits, run.golden["draft_logits"][:, 0])
    assert torch.equal(logits.argmax(1), run.golden["drafts"][:, 0].long())


def test_streams_of_the_block(runs: dict[int, Run]) -> None:
    run = runs[5]
    seen: list[Tensor] = []
    logits_of = run.block.logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.block, "logits", lambda z: (seen.append(z), logits_of(z))[1])
        run.mtp()
    assert_rows(seen[0][4 : 5 + N_GENERATED].flatten(1), run.golden["z"].flatten(1))


@each_length
def test_mistakes_are_seen(runs: dict[int, Run], n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs[n]
    expected = run.golden["mtp_prefill"]

    def collapsed_then_normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """hnorm of the mean over the streams, the same for all; other norms as they are."""
        return right(x.mean(1, keepdim=True).expand_as(x) if x.dim() == 3 else x, weight, eps)

    def normed_together(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """One mean square for all four streams."""
        if x.dim() == 2:
            return right(x, weight, eps)
        return right(x.flatten(1), None, eps).view_as(x) * weight

    right = mtp_block.rms_norm
    wrong = {
        "token of the same position": run.mtp(next_ids=run.ids),
        "token one further on": run.mtp(next_ids=run.next_ids.roll(-1)),
        "streams of the position before": run.mtp(h=run.h.roll(1, 0)),
        "streams in reverse order": run.mtp(h=run.h.flip(1)),
    }
    for name, norm in (("collapsed", collapsed_then_normed), ("together", normed_together)):
        monkeypatch.setattr(mtp_block, "rms_norm", norm)
        wrong[name] = run.mtp()
    for logits in wrong.values():
        with pytest.raises(AssertionError, match="relative difference"):
            assert_rows(logits[:n], expected)
