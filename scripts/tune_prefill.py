"""Find the fastest tiles of the prefill form's products on this GPU, and keep them where ds4 looks for them.

For every launch of V4-Flash and number of tokens each pick (ds4/kernels/picks.py) is compiled, its results are compared
bit for bit with those of the others, and its time is taken as scripts/bench_kernels.py does: graphs of many launches on
copies of the tensors, from a cold cache, several times, the median. The fastest picks become the card's file.

    python scripts/tune_prefill.py [--kernel gemm] [--n-tok 64,512] [--json FILE]    measure, write the card's file
    python scripts/tune_prefill.py --show                                            print what the file has
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_kernels import REPEATS, flush_buffer, prepare
from gpu_compile import compile_many

from ds4.errors import CudaError, Ds4Error
from ds4.kernels.bandwidth import open_gpu, seconds
from ds4.kernels.cases import Case, Inputs
from ds4.kernels.cuda_backend import CudaBackend
from ds4.kernels.entry import Backend
from ds4.kernels.gemm.cases import LAUNCHES, Launch, make_inputs
from ds4.kernels.gemm.op import GEMM
from ds4.kernels.moe.prefill_cases import Chunk, Experts, down_inputs, up_inputs
from ds4.kernels.moe.prefill_op import MOE_DOWN_GEMM, MOE_UP_GEMM
from ds4.kernels.picks import Pick, Picks, Shape, candidates, picks_file, picks_of, using
from ds4.kernels.registry import Operation, run_kernels
from ds4.kernels.verify import CPU, compared, copy_to
from ds4.replacing import replacing

CAPACITIES = (8, 64, 512, 4096)  # tokens of a chunk that a pass is made for
N_EXPERTS, TOP_K = 16, 6  # experts of a launch: fewer than a layer has, and more than the cache holds
EXPERTS = (("nvfp4", "q8_0"), ("mxfp4", "fp8_block"), ("iq2_xxs", "q8_0"), ("q2_k", "q8_0"), ("q4_k", "q8_0"))

Timer = Callable[[Operation, Case, CudaBackend, torch.device], float]


@dataclass(frozen=True)
class Subject:
    """What one pick is for. ``make(tokens, seed, device)``: inputs of a launch with tiles of so many tokens."""

    title: str
    shape: Shape
    n_tok: int
    operation: Operation
    make: Callable[[int, int, torch.device], Inputs]

    def case(self, pick: Pick) -> Case:
        """The launch with a pick, as bench_kernels.py takes it."""
        return Case(f"{self.title} {pick.tokens}/{pick.stages}", "decode", partial(self.make, pick.tokens), {}, 0)

    def picks(self) -> list[Pick]:
        """The candidates: no tile of which more than half would be empty, none below a 64th of the tokens."""
        fitting = [pick for pick in candidates(self.shape.formats) if pick.tokens * 64 >= self.n_tok]
        return [pick for pick in fitting if pick.tokens < 2 * self.n_tok or pick.tokens == 8]

    def only(self, pick: Pick) -> Picks:
        """A table with this pick for it, and nothing else."""
        return Picks([(self.shape, self.n_tok, pick)])


def _remembered(make: Callable[[int, int], Inputs]) -> Callable[[int, int, torch.device], Inputs]:
    """``make(tokens, seed)``, called once for each, with copies of its tensors on a device."""
    made = cache(make)
    return lambda tokens, seed, device: copy_to(made(tokens, seed), device)


def gemm_subjects(n_toks: Sequence[int], launches: Sequence[Launch] = LAUNCHES) -> Iterator[Subject]:
    """The dense products of a layer."""
    for one in launches:
        shape = Shape("gemm", one.k, sum(n for _, n in one.segments), tuple(fmt for fmt, _ in one.segments))
        sizes = {"k": one.k, "segments": one.segments, "out": one.out, "groups": one.groups}
        for n in n_toks:
            made = partial(make_inputs, device=CPU, n_rows=n, **sizes)
            make = _remembered(lambda _tokens, seed, made=made: made(seed))
            yield Subject(f"{one.title} n={n}", shape, n, GEMM, make)


def expert_subjects(
    n_toks: Sequence[int], formats: Sequence[tuple[str, str]] = EXPERTS, d: int = 4096, inter: int = 2048
) -> Iterator[Subject]:
    """The experts' products, with as many pairs for each as chunks of these lengths have for one of 256 experts.

    formats  of the routed experts and of the shared one
    """
    for fmt, shared in formats:
        kinds = (
            (Shape("moe_up", d, 2 * inter, (fmt, fmt)), MOE_UP_GEMM, up_inputs, (fmt, fmt, shared, shared)),
            (Shape("moe_down", inter, d, (fmt,)), MOE_DOWN_GEMM, down_inputs, (fmt, shared)),
        )
        for n in sorted({max(1, n * TOP_K // 256) for n in n_toks}):
            n_rows = -(-n * N_EXPERTS // TOP_K)
            for shape, operation, inputs, all_formats in kinds:
                experts = Experts(d, inter, all_formats)
                make = _remembered(
                    lambda tokens, seed, n_rows=n_rows, inputs=inputs, experts=experts: inputs(
                        seed, CPU, Chunk(n_rows, N_EXPERTS, TOP_K, tokens), experts
                    )
                )
                n_tok = -(-n_rows * TOP_K // N_EXPERTS)
                yield Subject(f"{shape.kernel} {fmt} n={n_tok}", shape, n_tok, operation, make)


def subjects(n_toks: Sequence[int], kernels: Sequence[str] = ()) -> Iterator[Subject]:
    """All of them, or those of these kernels, one at a time: each keeps its tensors."""
    for one in chain(gemm_subjects(n_toks), expert_subjects(n_toks)):
        if not kernels or one.shape.kernel in kernels:
            yield one


def compile_all(subject: Subject, architecture: str) -> None:
    """Compile everything that is launched for it, on all cores."""
    jobs = {}
    for pick in subject.picks():
        with using(subject.only(pick)):
            inputs = subject.make(pick.tokens, 0, CPU)
            for call in subject.operation.calls(inputs, subject.operation.outputs(inputs)):
                jobs[call.entry, call.constants] = (call.entry, call.constants, architecture)
    compile_many(list(jobs.values()))


def timed(operation: Operation, case: Case, backend: CudaBackend, device: torch.device) -> float:
    """Seconds of a launch: the median of REPEATS replays."""
    flush = flush_buffer(backend.facts.l2, device)
    prepared = prepare(operation, case, backend, device)
    times = []
    for repeat in range(REPEATS + 1):  # the first round uploads the graph
        flush.sum()
        took = seconds(prepared.graph.replay) / prepared.n
        if repeat:
            times.append(took)
    del prepared
    torch.cuda.empty_cache()
    return statistics.median(times)


def check(subject: Subject, backend: Backend, device: torch.device) -> list[str]:
    """One line for every pick whose results are not those of the first one, bit for bit."""
    found, first = [], None
    for pick in subject.picks():
        with using(subject.only(pick)):
            results = run_kernels(subject.operation, subject.make(pick.tokens, 0, device), backend)
        if first is None:
            first = results
        found += [f"{subject.case(pick).name}: {line}" for line in compared(results, first)]
    return found


def tune(subject: Subject, backend: CudaBackend, device: torch.device, timer: Timer = timed) -> list[dict[str, Any]]:
    """A row for each pick of a subject, the fastest first. Raises CudaError where results differ."""
    if wrong := check(subject, backend, device):
        raise CudaError(f"results depend on the tile, which is a bug of ds4: {wrong[0]}")
    rows = []
    for pick in subject.picks():
        with using(subject.only(pick)):
            took = timer(subject.operation, subject.case(pick), backend, device)
        about = {"launch": subject.title, "kernel": subject.shape.kernel, "n_tok": subject.n_tok}
        rows.append(about | {"tokens": pick.tokens, "stages": pick.stages, "us": took * 1e6})
    return sorted(rows, key=lambda row: row["us"])


def write(picks: Picks, card: str, directory: Path | None = None) -> Path:
    """Put picks into the card's file, beside those for other launches that it has; returns the file."""
    file = picks_file(card, directory)
    file.parent.mkdir(parents=True, exist_ok=True)
    merged = Picks([*picks_of(card, directory).rows(), *picks.rows()])
    with replacing(file) as part:
        part.write_text(merged.to_json(card), encoding="utf-8")
    picks_of.cache_clear()
    return file


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text: of each launch the fastest pick, and how much slower the others are."""
    lines = []
    for launch in dict.fromkeys(row["launch"] for row in rows):
        best, *others = [row for row in rows if row["launch"] == launch]
        slower = ", ".join(
            f"{row['tokens']}/{row['stages']} +{100 * (row['us'] / best['us'] - 1):.0f} %" for row in others
        )
        lines.append(f"{launch}: {best['tokens']}/{best['stages']} {best['us']:.1f} us{'; ' if slower else ''}{slower}")
    return "\n".join(lines)


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text}: numbers from 1 on with commas are needed")
    return tuple(int(part) for part in parts)


def main(arguments: list[str] | None = None) -> int:
    """The command; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description="Find the fastest tiles of the prefill form's products on this GPU.")
    parser.add_argument("--kernel", action="append", choices=("gemm", "moe_up", "moe_down"), help="only this one")
    parser.add_argument("--n-tok", type=_numbers, default=CAPACITIES, help="tokens of a chunk (8,64,512,4096)")
    parser.add_argument("--json", type=Path, help="also write all times here")
    parser.add_argument("--show", action="store_true", help="print the card's file and do nothing else")
    options = parser.parse_args(arguments)
    try:
        backend, device = open_gpu()
        card = backend.facts.name
        if options.show:
            print(picks_of(card) if picks_file(card).is_file() else f"no {picks_file(card)}: the rule decides")
            return 0
        rows = []
        for subject in subjects(options.n_tok, options.kernel or ()):
            compile_all(subject, backend.facts.architecture)
            of_subject = tune(subject, backend, device)
            print(table(of_subject), flush=True)
            best = Pick(of_subject[0]["tokens"], of_subject[0]["stages"])
            write(subject.only(best), card)
            rows += of_subject
        print(f"written: {picks_file(card)}")
    except (Ds4Error, CudaError) as error:
        print(f"tune_prefill: {error}", file=sys.stderr)
        return 2
    if options.json:
        options.json.write_text(json.dumps({"card": card, "picks": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
