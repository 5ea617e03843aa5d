"""The prefill form against the decode form: the logits of every token of one text, computed both ways on one device.

    python scripts/form_parity.py                          # 5,000 tokens of the demonstration corpus, on the CPU
    python scripts/form_parity.py --device cuda --json
    python scripts/form_parity.py --emulate --tokens 300   # the kernels of both forms on the CPU's emulation
    python scripts/form_parity.py --kernels-from-cpu --emulate --tokens 300   # kernels' prefill form against the CPU's

Prints how many next tokens agree and how far rows differ. Sums are taken in another order and, by the prefill kernels,
of activations rounded to BF16, so that codes of the cache that lie between two values may fall differently. The exit
code is 1 where the median row differs by more than the tolerance, or a token differs whose gap is above it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_prefill import prompt_of
from kernel_parity import Parity, emulated

import ds4
from ds4.engine import LLM
from ds4.errors import CudaError, Ds4Error

TOKENS = 5000
STEP = 8  # tokens of a decode step; it changes no bit
# Of a row's norm, in the median: the CPU's two forms differ by FP32 sums, and by codes of the cache that fall
# differently, which reach 1e-3; kernels' prefill form rounds activations to BF16, 2^-9 each.
TOLERANCE = {"cpu": 1e-3, "kernels": 3e-2}
GAP = {"cpu": 0.05, "kernels": 0.25}  # of a row's RMS, by which a choice may be preferred that the other form leaves


def text_of(llm: LLM, n: int) -> list[int]:
    """``n`` tokens that the bundled model was not trained on. Raises Ds4Error without a tokenizer."""
    if llm.tokenizer is None:
        raise Ds4Error(f"{llm.path}: the checkpoint has no tokenizer")
    return prompt_of(llm, n)


def compare(prompt: LLM, other: LLM, ids: Sequence[int], *, by_steps: bool, gap: float) -> Parity:
    """Rows of ``prompt`` in the prefill form against those of ``other``, in decode steps or in the prefill form."""
    found = Parity(STEP if by_steps else 0, gap)
    got = prompt.session(len(ids)).rows(ids).cpu()
    if not by_steps:
        want = other.session(len(ids)).rows(ids).cpu()
        for a, b in zip(want, got, strict=True):
            found.add(a, b)
        return found
    session = other.session(len(ids))
    for first in range(0, len(ids), STEP):
        part = ids[first : first + STEP]
        for a, b in zip(session.decode(part).cpu(), got[first : first + STEP], strict=True):
            found.add(a, b)
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="The prefill form against the decode form.")
    parser.add_argument("-m", "--model", type=Path, help="checkpoint (default: the bundled model)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"tokens of the text ({TOKENS})")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where both forms run (cpu)")
    parser.add_argument("--emulate", action="store_true", help="kernels on the CPU's emulation")
    parser.add_argument("--kernels-from-cpu", action="store_true", help="kernels' prefill form against the CPU's")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    if given.tokens < 1:
        parser.error("--tokens: at least 1")
    kernels = given.emulate or given.device == "cuda"
    kind = "kernels" if kernels else "cpu"
    try:
        cpu = LLM(given.model, device="cpu", ctx=given.tokens, draft="off")
        llm = cpu
        if kernels:
            make = emulated if given.emulate else lambda path, ctx: ds4.LLM(path, device="cuda", ctx=ctx, draft="off")
            llm = make(given.model, given.tokens)
        with torch.inference_mode():
            other, by_steps = (cpu, False) if given.kernels_from_cpu else (llm, True)
            found = compare(llm, other, text_of(cpu, given.tokens), by_steps=by_steps, gap=GAP[kind])
    except (Ds4Error, CudaError) as error:
        print(f"form_parity: {error}", file=sys.stderr)
        return 2
    middle = median(found.relative)
    lines = [json.dumps(found.record())] if given.json else [found.text(), *(one.text() for one in found.wrong)]
    print("\n".join(lines))
    return 1 if found.wrong or middle > TOLERANCE[kind] else 0


if __name__ == "__main__":
    sys.exit(main())
