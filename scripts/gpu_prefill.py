"""Prompts through kernels on a GPU: any cutting gives the same bits, the forms agree, and how fast it is.

The stage ``prefill`` of scripts/gpu_check.py. Without a GPU, on the CPU's emulation (a quarter of an hour):

    python scripts/gpu_prefill.py [--tokens 1021]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench_crossover
import form_parity
import kernel_parity
from moe_layers import Plan

from ds4.bench.synthetic import Synthetic, SyntheticLLM
from ds4.engine import LLM
from ds4.errors import Ds4Error
from ds4.kernels.bandwidth import open_gpu
from ds4.session import Session
from ds4.weights.published import FLASH

CHUNKS = (1, 3, 7, 8, 9, 64, 127, 128, 129, 1000)
N = 1021
TAIL = 40  # tokens that short chunks process, behind the rest in one
FORM_TOKENS = 2000
RECIPE, LAYERS = "q2", 6  # of V4-Flash: two of each kind
CHUNK, N_CHUNKS = 4096, 17  # the last one behind 65,536 tokens
CROSSOVER = {"experts iq2_xxs": "iq2_xxs", "experts mxfp4": "mxfp4"}
CROSSOVER_TOKENS = (1, 8, 32, 64, 128, 512, 4096)


@cache
def _llm() -> LLM:
    return LLM(device="cuda", ctx=2048)


def state(session: Session) -> dict[str, Tensor]:
    """Every byte that what follows depends on."""
    return session.cache.live(session.position)


def chunks(llm: LLM, sizes: Sequence[int], n: int) -> tuple[str, dict[str, Any]]:
    """Prompts of ``n`` tokens in chunks of each size, and one that is broken off. Raises AssertionError."""
    ids = form_parity.text_of(llm, n)
    whole = llm.session()
    want = whole.prefill(ids)
    for size in sizes:
        session, first = llm.session(), 0 if size > TAIL else n - TAIL
        if first:
            session.prefill(ids[:first])
        _same(f"chunks of {size}", session, session.prefill(ids[first:], chunk=size), whole, want)
    session = llm.session()
    session.prefill(ids[: n // 2])
    try:
        session.prefill(ids[n // 2 :], chunk=n // 8, progress=_break_off)
    except KeyboardInterrupt:
        done = session.position
    assert n // 2 < done < n
    _same(f"broken off at {done}", session, session.prefill(ids[done:]), whole, want)
    return f"{n} tokens, chunks of {', '.join(map(str, sizes))}, and broken off: the same bits", {"tokens": n}


def _break_off(done: int, total: int) -> None:
    if done > total // 3:
        raise KeyboardInterrupt


def _same(what: str, session: Session, logits: Tensor, whole: Session, want: Tensor) -> None:
    if not torch.equal(logits, want):
        raise AssertionError(f"{what}: the last logits differ")
    a, b = state(session), state(whole)
    if wrong := [name for name in b if not torch.equal(a[name], b[name])]:
        raise AssertionError(f"{what}: the caches differ: {', '.join(wrong)}")


def forms(llm: LLM, n: int) -> tuple[str, dict[str, Any]]:
    """The prefill form against decode steps. Raises AssertionError where they differ by more than the tolerance."""
    with torch.inference_mode():
        found = form_parity.compare(
            llm, llm, form_parity.text_of(llm, n), by_steps=True, gap=form_parity.GAP["kernels"]
        )
    if found.wrong or median(found.relative) > form_parity.TOLERANCE["kernels"]:
        raise AssertionError(found.text())
    return found.text(), found.record()


def speed(recipe: str, layers: int, chunk: int, n_chunks: int) -> tuple[str, dict[str, Any]]:
    """Tokens a second by chunk, of random tokens and weights at V4-Flash's dimensions; the second of two prompts.

    Layers of every kind in their proportion; ``whole`` are tokens a second of as many layers as the model has.
    """
    llm = SyntheticLLM(Synthetic(recipe).checkpoint(layers), device="cuda", ctx=chunk * n_chunks)
    ids = torch.randint(5, 129000, (chunk * n_chunks,), generator=torch.Generator().manual_seed(0)).tolist()
    seconds: list[float] = []
    for _ in range(2):
        session, seconds = llm.session(), []
        for first in range(0, len(ids), chunk):
            began = time.perf_counter()
            session.prefill(ids[first : first + chunk])
            seconds.append(time.perf_counter() - began)
    rates = [chunk / took for took in seconds]
    share = layers / FLASH.num_hidden_layers
    whole = [share * rates[0], share * rates[-1]]
    text = f"{recipe}, {layers} layers, chunks of {chunk}: {rates[0]:.0f} tokens/s, behind {len(ids) - chunk} tokens "
    text += (
        f"{rates[-1]:.0f} ({100 * (rates[-1] / rates[0] - 1):+.0f} %); of 43 layers {whole[0]:.0f} and {whole[1]:.0f}"
    )
    return text, {"recipe": recipe, "layers": layers, "chunk": chunk, "tokens_s": rates, "whole": whole}


def crossover(what: str, mixture: str, tokens: Sequence[int]) -> tuple[str, list[dict[str, Any]]]:
    """From how many tokens on the prefill form's experts are faster."""
    backend, device = open_gpu()
    make, timer = bench_crossover.experts(mixture, Plan(), device), bench_crossover.timer_of(backend)
    rows = list(bench_crossover.measure(what, make, tokens, backend, timer))
    print(bench_crossover.table(rows), flush=True)
    return bench_crossover.table(rows).splitlines()[-1].strip(), [asdict(row) for row in rows]


def items(quick: bool) -> Iterator[tuple[str, Callable[[], tuple[str, Any]]]]:
    """(name, work), the cheapest and most telling first."""
    sizes, n = (CHUNKS[2:5], 200) if quick else (CHUNKS, N)
    yield "chunks", lambda: chunks(_llm(), sizes, n)
    yield "forms", lambda: forms(_llm(), n if quick else FORM_TOKENS)
    yield "speed", partial(speed, RECIPE, LAYERS, CHUNK, 2 if quick else N_CHUNKS)
    for name, mixture in list(CROSSOVER.items())[: 1 if quick else None]:
        yield name, partial(crossover, name, mixture, CROSSOVER_TOKENS[:2] if quick else CROSSOVER_TOKENS)


def main(arguments: list[str] | None = None) -> int:
    """The comparison of chunks on the emulation."""
    parser = argparse.ArgumentParser(description="Prompts through kernels, cut in many ways, on the CPU's emulation.")
    parser.add_argument("--tokens", type=int, default=N, help=f"of the prompt ({N})")
    given = parser.parse_args(arguments)
    if given.tokens < 2 * TAIL:
        parser.error(f"--tokens: at least {2 * TAIL}")
    try:
        print(chunks(kernel_parity.emulated(None, given.tokens), CHUNKS, given.tokens)[0])
    except Ds4Error as error:
        print(f"gpu_prefill: {error}", file=sys.stderr)
        return 2
    except AssertionError as error:
        print(f"gpu_prefill: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
