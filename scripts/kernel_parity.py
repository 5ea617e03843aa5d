"""Greedy decoding by the torch reference on the CPU against the kernels, which are given the same tokens.

    python scripts/kernel_parity.py                  # the bundled model on the GPU
    python scripts/kernel_parity.py --emulate        # its kernels on the CPU's emulation: some minutes
    python scripts/kernel_parity.py -m model.gguf --tokens 512 --n-tok 2 --json

Prints how many next tokens agree, how far logits differ, and each token that differs with its gap: how far the
reference prefers its own choice. Codes of the cache that lie between two values may fall differently when sums are
taken in another order, so a token may differ where the reference hardly prefers one. The exit code is 1 where one
differs whose gap is above the tolerance, 2 where the kernels cannot run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ds4
from ds4.errors import CudaError, Ds4Error

if TYPE_CHECKING:
    from ds4.engine import LLM
    from ds4.session import Session

TOKENS = 512
PROMPT = "Tell me a short story about a robot learning to paint."
# Of the RMS of a row of logits. Codes of the cache that fall differently moved a row of the bundled model by up to 1e-3
# of its norm in 512 tokens; the difference of two logits moves by a few times that share of their RMS.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Difference:
    """A next token that the kernels choose differently: at which step, counted from 1; ``gap`` in logits, and by the
    RMS of the row."""

    step: int
    want: int
    got: int
    gap: float
    relative_gap: float

    def text(self) -> str:
        """In words."""
        share = f"{100 * self.relative_gap:.2g}% of the row's RMS"
        higher = f"whose logit is {self.gap:.3g} higher on the CPU, {share}"
        return f"step {self.step}: {self.got} instead of {self.want}, {higher}"


@dataclass
class Parity:
    """What a comparison found.

    tokens      rows of logits compared; n_tok of them come from one step of the kernels
    relative    of each row |got - want| / |want|
    largest     largest difference of two logits
    differing   the rows whose largest logit is another
    tolerance   largest ``relative_gap`` that passes
    """

    n_tok: int
    tolerance: float
    tokens: int = 0
    relative: list[float] = field(default_factory=list)
    largest: float = 0.0
    differing: list[Difference] = field(default_factory=list)

    def add(self, want: Tensor, got: Tensor) -> None:
        """Compare two rows of logits f32 [vocab]; one that is not finite differs by infinity."""
        self.tokens += 1
        want, got = want.double(), got.double()
        relative, largest = float((got - want).norm() / want.norm()), float((got - want).abs().max())
        if not (got.isfinite().all() and want.isfinite().all()):
            relative = largest = float("inf")
        self.relative.append(relative)
        self.largest = max(self.largest, largest)
        first, other = int(want.argmax()), int(got.argmax())
        if first != other or largest == float("inf"):
            gap = float(want[first] - want[other]) if largest < float("inf") else float("inf")
            rms = float(want.square().mean().sqrt())
            self.differing.append(Difference(self.tokens, first, other, gap, gap / rms))

    @property
    def wrong(self) -> list[Difference]:
        """Tokens that differ by more than the tolerance."""
        return [one for one in self.differing if not one.relative_gap <= self.tolerance]

    def record(self) -> dict[str, Any]:
        """The figures, for JSON."""
        return {
            "tokens": self.tokens,
            "n_tok": self.n_tok,
            "agree": self.tokens - len(self.differing),
            "median_relative_difference": statistics.median(self.relative),
            "largest_relative_difference": max(self.relative),
            "largest_difference": self.largest,
            "tolerance": self.tolerance,
            "above_tolerance": len(self.wrong),
            "differing": [asdict(one) for one in self.differing],
        }

    def text(self) -> str:
        """The figures in a line, without the tokens that differ."""
        agree = self.tokens - len(self.differing)
        shares = f"rows differ by {statistics.median(self.relative):.1e} of their norm in the median"
        most = f"{max(self.relative):.1e} at most, logits by {self.largest:.3g} at most"
        return f"{agree} of {self.tokens} next tokens agree, {shares}, {most}"


def compare(
    reference: Session,
    kernels: Session,
    ids: Sequence[int],
    tokens: int = TOKENS,
    n_tok: int = 1,
    tolerance: float = TOLERANCE,
) -> Parity:
    """Continue the prompt ``ids`` by ``tokens`` greedy choices of ``reference``, and compare every row behind it.

    ``reference`` takes a token a step, ``kernels`` ``n_tok`` (1 to 8, fewer in the last step) of the same tokens. Both
    sessions are empty. Raises ValueError for a number of tokens that is no step.
    """
    if not 1 <= n_tok <= 8 or tokens < 1:
        raise ValueError(f"{tokens} tokens in steps of {n_tok}: 1 to 8 are a step")
    found = Parity(n_tok, tolerance)
    row = torch.empty(0)
    for token in ids:  # by decode steps: the prefill forms differ by more (scripts/form_parity.py)
        row = reference.decode([token])[0].cpu()
        kernels.decode([token])
    while found.tokens < tokens:
        given, rows = [], []
        for _ in range(min(n_tok, tokens - found.tokens)):
            given.append(int(row.argmax()))
            row = reference.decode(given[-1:])[0].cpu()
            rows.append(row)
        for want, got in zip(rows, kernels.decode(given).cpu(), strict=True):
            found.add(want, got)
    return found


def emulated(path: Path | None, ctx: int) -> LLM:
    """The model as on a GPU, with its kernels run by the CPU's emulation. Raises Ds4Error where that is not there."""
    try:
        from tests.cuemu.backend import CpuBackend, missing
    except ImportError as error:
        raise Ds4Error(f"the emulation is not here: {error}") from None
    from ds4.model.device_params import DeviceParams
    from ds4.model.transformer import Transformer

    if lacking := missing():
        raise Ds4Error(lacking)
    llm = ds4.LLM(path, device="cpu", ctx=ctx, draft="off")
    llm.model = Transformer(llm.config, DeviceParams(llm.checkpoint, "cpu"), llm.numerics)
    llm.backend = CpuBackend()
    return llm


def parity(
    path: Path | None = None,
    tokens: int = TOKENS,
    n_tok: int = 1,
    tolerance: float = TOLERANCE,
    *,
    emulate: bool = False,
    prompt: str = PROMPT,
) -> Parity:
    """:func:`compare` for a model: None is the bundled one. Raises Ds4Error where the kernels cannot run it."""
    reference = ds4.LLM(path, device="cpu", draft="off")
    if reference.tokenizer is None:
        raise Ds4Error(f"{path}: the checkpoint has no tokenizer")
    ids = reference.tokenizer.encode(prompt)
    ctx = len(ids) + tokens
    kernels = emulated(path, ctx) if emulate else ds4.LLM(path, device="cuda", ctx=ctx, draft="off")
    with torch.inference_mode():
        return compare(reference.session(ctx), kernels.session(), ids, tokens, n_tok, tolerance)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Greedy decoding: the torch reference against the kernels.")
    parser.add_argument("-m", "--model", type=Path, help="checkpoint (default: the bundled model)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"tokens to compare ({TOKENS})")
    parser.add_argument("--n-tok", type=int, default=1, choices=range(1, 9), help="tokens of a step of the kernels (1)")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help=f"gap by the row's RMS ({TOLERANCE})")
    parser.add_argument("--emulate", action="store_true", help="the kernels on the CPU's emulation, not on a GPU")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    if given.tokens < 1:
        parser.error("--tokens: at least 1")
    try:
        found = parity(given.model, given.tokens, given.n_tok, given.tolerance, emulate=given.emulate)
    except (Ds4Error, CudaError) as error:
        print(f"kernel_parity: {error}", file=sys.stderr)
        return 2
    lines = [json.dumps(found.record())] if given.json else [found.text(), *(one.text() for one in found.differing)]
    print("\n".join(lines))
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
