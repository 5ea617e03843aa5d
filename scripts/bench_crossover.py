"""From how many tokens on the prefill form's products are faster than decode steps of 8 tokens, on a GPU.

    python scripts/bench_crossover.py [--formats iq2_xxs,nvfp4] [--tokens 1,8,64,4096] [--json FILE] [--plot FILE.png]

For the experts of a layer of V4-Flash (scripts/moe_layers.py) and for wq_b, its widest dense projection, both forms are
timed over the same tokens: the decode kernels in launches of up to 8 tokens, which read the weights once each, and the
prefill kernels in one. The crossover is the first number of tokens from which on the prefill form is always the faster.
Results are compared before anything is timed: they agree but for activations rounded to BF16.

A dense form of the experts (every expert times every token) is not measured: it would do 43 times the arithmetic of the
grouped one, which pays where FP4 tensor cores are, and there are no such kernels here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe_layers import MIXTURES, Plan, random_ids, random_layer, random_matrix

from ds4.bench import plots
from ds4.errors import CudaError, Ds4Error
from ds4.graph.capture import CudaGraph
from ds4.kernels.bandwidth import open_gpu, seconds
from ds4.kernels.cases import Inputs
from ds4.kernels.cuda_backend import CudaBackend
from ds4.kernels.entry import Backend, KernelCall
from ds4.kernels.gemm.op import GEMM
from ds4.kernels.launch import DECODE_ROWS
from ds4.kernels.moe.op import MOE_DOWN, MOE_UP
from ds4.kernels.moe.prefill_op import MOE_COMBINE, MOE_DOWN_GEMM, MOE_GROUP, MOE_UP_GEMM
from ds4.kernels.moe.prefill_plan import expert_tile
from ds4.kernels.proj.op import PROJ_Q
from ds4.kernels.registry import Operation

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
REPEATS = 5
DENSE = ("q8_0", "fp8_block", "bf16")
Q_LORA, QUERIES = 1024, 32768
GATE = 1e-2  # relative RMS difference of the forms: BF16 activations twice, 2^-9 each
Timer = Callable[[Sequence[KernelCall]], float]
"""Seconds that launches take, together."""


@dataclass(frozen=True)
class Row:
    """``rows_us``: by decode kernels, 8 tokens a launch; ``grouped_us``: by prefill kernels, all at once."""

    what: str
    n_tok: int
    rows_us: float
    grouped_us: float


@dataclass(frozen=True, eq=False)
class Forms:
    """Launches of both forms for the same tokens, and their results f32 ``[n_tok, n]``, filled when they run."""

    by_rows: list[KernelCall]
    grouped: list[KernelCall]
    rows: list[Tensor]
    result: Tensor

    def difference(self, backend: Backend) -> float:
        """Relative RMS of the two results' difference."""
        backend.run(self.by_rows)
        backend.run(self.grouped)
        want = torch.cat(self.rows)
        return float((self.result - want).norm() / want.norm())


Maker = Callable[[int], Forms]
"""The forms for so many tokens."""


def _append(calls: list[KernelCall], inputs: Inputs, *operations: Operation) -> Inputs:
    """Append the launches of operations, each of which takes the results of those before it."""
    for operation in operations:
        made = operation.outputs(inputs)
        calls += operation.calls(inputs, made)
        inputs = inputs | made
    return inputs


def experts(mixture: str, plan: Plan, device: torch.device) -> Maker:
    """The experts of a layer: up and down projections, and what groups and adds them."""
    weights = random_layer(torch.Generator(device).manual_seed(0), mixture, plan, plan.experts)
    up, down, _ = MIXTURES[mixture]
    sizes = {"d": plan.d, "inter": plan.inter, "n_experts": plan.experts}

    def make(n_tok: int) -> Forms:
        rng = torch.Generator().manual_seed(n_tok)
        x, shares = torch.randn(n_tok, plan.d, generator=rng), torch.rand(n_tok, plan.top_k, generator=rng) + 0.1
        ids = random_ids(rng, "uniform", n_tok, plan.top_k, plan.experts)
        given: Inputs = {**weights, "limit": 10.0, "count": None}
        forms = Forms([], [], [], torch.empty(0))
        for first in range(0, n_tok, DECODE_ROWS):
            rows = slice(first, first + DECODE_ROWS)
            one = {name: t[rows].to(device, copy=True) for name, t in (("x", x), ("weights", shares), ("ids", ids))}
            forms.rows.append(_append(forms.by_rows, given | one, MOE_UP, MOE_DOWN)["y"])
        tile = expert_tile((up, up), down, **sizes, n_pairs=n_tok * plan.top_k, device=device)
        given |= {"x": x.bfloat16().to(device), "weights": shares.to(device), "ids": ids.to(device)}
        given |= {"n_experts": plan.experts, "tile": tile}
        made = _append(forms.grouped, given, MOE_GROUP, MOE_UP_GEMM, MOE_DOWN_GEMM, MOE_COMBINE)
        return replace(forms, result=made["y"])

    return make


def dense(fmt: str, shape: tuple[int, int], device: torch.device) -> Maker:
    """One matrix."""
    made = random_matrix(torch.Generator(device).manual_seed(0), "w", fmt, shape, None)
    planes = [made[key] for key in made if key not in ("w_format", "w_scale")]
    weights: Inputs = {"formats": (fmt,), "w0": planes[0], "s0": planes[1] if len(planes) > 1 else None}

    def make(n_tok: int) -> Forms:
        x = torch.randn(n_tok, shape[1], generator=torch.Generator().manual_seed(n_tok)).to(device)
        forms = Forms([], [], [], torch.empty(0))
        for first in range(0, n_tok, DECODE_ROWS):
            one = weights | {"x": x[first : first + DECODE_ROWS].clone()}
            forms.rows.append(_append(forms.by_rows, one, PROJ_Q)["y0"])
        given = weights | {"x": x.bfloat16(), "count": None, "out": ("f32",)}
        return replace(forms, result=_append(forms.grouped, given, GEMM)["y0"])

    return make


def measure(what: str, make: Maker, tokens: Sequence[int], backend: Backend, timer: Timer) -> Iterator[Row]:
    """A row for each number of tokens. Raises Ds4Error where the forms do not agree."""
    for n_tok in tokens:
        forms = make(n_tok)
        off = forms.difference(backend)
        if not off <= GATE:
            raise Ds4Error(f"{what}: the forms differ by {off:.1e} of the results' size for {n_tok} tokens")
        yield Row(what, n_tok, 1e6 * timer(forms.by_rows), 1e6 * timer(forms.grouped))


def crossover(rows: Sequence[Row]) -> int | None:
    """The smallest number of tokens from which on the prefill form is always the faster; None where it never is."""
    found = None
    for row in sorted(rows, key=lambda row: -row.n_tok):
        if row.grouped_us >= row.rows_us:
            break
        found = row.n_tok
    return found


def table(rows: Sequence[Row]) -> str:
    """The rows as text, a line for the crossover behind those of one thing."""
    lines = []
    for what in dict.fromkeys(row.what for row in rows):
        mine = [row for row in rows if row.what == what]
        lines.append(f"{what:24} {'tokens':>6} {'by 8 us':>10} {'at once us':>10} {'ratio':>6}")
        for row in mine:
            ratio = row.rows_us / row.grouped_us
            lines.append(f"{'':24} {row.n_tok:6} {row.rows_us:10.1f} {row.grouped_us:10.1f} {ratio:6.2f}")
        at = crossover(mine)
        lines.append(f"{'':24} crossover: {'none' if at is None else f'{at} tokens'}")
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Microseconds over tokens, both forms of everything. Raises Ds4Error without matplotlib."""
    plots.check()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for color, what in zip(plots.COLORS * 4, dict.fromkeys(row.what for row in rows), strict=False):
        mine = [row for row in rows if row.what == what]
        n_toks = [row.n_tok for row in mine]
        axes.loglog(n_toks, [row.rows_us for row in mine], "--", color=color, label=f"{what}, 8 a launch")
        axes.loglog(n_toks, [row.grouped_us for row in mine], "-", color=color, label=f"{what}, at once")
    axes.set(xlabel="tokens", ylabel="us", title=title)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def timer_of(backend: CudaBackend, repeats: int = REPEATS) -> Timer:
    """Medians of replays of a graph of the launches."""

    def timer(calls: Sequence[KernelCall]) -> float:
        graph = CudaGraph(backend, calls)
        graph.replay()
        return statistics.median(seconds(graph.replay) for _ in range(repeats))

    return timer


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Decode steps against the prefill form, on a GPU.")
    parser.add_argument("--formats", default="iq2_xxs,mxfp4", help=f"of {', '.join(MIXTURES)} (iq2_xxs,mxfp4)")
    parser.add_argument("--dense", default="q8_0", help=f"of {', '.join(DENSE)} (q8_0)")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="numbers of tokens")
    parser.add_argument("--experts", type=int, default=256, help="of the layer (256)")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--plot", type=Path, help="draw them there, a PNG")
    given = parser.parse_args(arguments)
    mixtures, formats = given.formats.split(","), [fmt for fmt in given.dense.split(",") if fmt]
    tokens = [int(n) for n in given.tokens.split(",") if n.isdigit()]
    if unknown := [*(set(mixtures) - set(MIXTURES)), *(set(formats) - set(DENSE))]:
        parser.error(f"{', '.join(unknown)}: not among the formats")
    if not tokens or min(tokens) < 1:
        parser.error(f"--tokens {given.tokens}: numbers of 1 or more, with commas between them")
    try:
        backend, device = open_gpu()
        plan, timer = Plan(experts=given.experts), timer_of(backend)
        makers = {f"experts {name}": experts(name, plan, device) for name in mixtures}
        makers |= {f"wq_b {fmt}": dense(fmt, (QUERIES, Q_LORA), device) for fmt in formats}
        rows = [row for what, make in makers.items() for row in measure(what, make, tokens, backend, timer)]
        if given.plot:
            plot(rows, given.plot, f"{backend.facts.name}, {given.experts} experts")
    except (Ds4Error, CudaError) as error:
        print(f"bench_crossover: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
