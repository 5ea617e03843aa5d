"""How long the experts of a layer of V4-Flash take on a GPU, in every format, and how much of the copy bandwidth it is.

256 experts a layer lie in memory, in at least three layers and in as many as it takes until one launch in each reads
twice what the L2 cache holds. A CUDA graph goes through all layers, several times with other experts; before a replay
the cache is filled with something else, so that weights come from memory, as in a decode step. Weights are random bytes
made on the GPU. Up and down projection are measured each and one after the other; all launches of a format in turn, and
that several times.

Bytes are those of the experts that the tokens really chose, each once, with the shared expert and the activations.
Routings: "uniform" and "skewed" (an expert's share falls with the root of its rank) draw a token's experts alone;
"same" gives all tokens the same ones, so that more tokens add arithmetic, but no weights.

    python scripts/bench_moe.py [--formats nvfp4,q4_k] [--n-tok 1,2] [--layers N] [--experts N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_kernels import flush_buffer
from gpu_compile import compile_many
from moe_layers import MIXTURES, ROUTINGS, Plan, random_ids, random_layer, resident

from ds4.errors import CudaError, Ds4Error
from ds4.graph.capture import CudaGraph
from ds4.kernels.bandwidth import measure as measure_copy
from ds4.kernels.bandwidth import open_gpu, seconds
from ds4.kernels.cases import Inputs, Outputs
from ds4.kernels.cuda_backend import CudaBackend
from ds4.kernels.entry import Backend, KernelCall
from ds4.kernels.moe.op import MOE_DOWN, MOE_UP
from ds4.profiling.measure import distinct_experts

PARTS = ("up", "down", "up+down")
GATE = 1e-5  # relative RMS error of results: sums in another order


@dataclass
class Prepared:
    """A graph of launches of one part; ``calls`` keep the tensors alive. ``distinct``: experts of each routing."""

    part: str
    routing: str
    n_tok: int
    graph: CudaGraph
    calls: Sequence[KernelCall]
    distinct: list[int]


def _calls(part: str, inputs: Inputs, outputs: Outputs) -> list[KernelCall]:
    up = MOE_UP.calls(inputs, {"mid": outputs["mid"]}) if "up" in part else []
    names = ("y", "parts", "counter")
    return up + (MOE_DOWN.calls(inputs, {name: outputs[name] for name in names}) if "down" in part else [])


class Bench:
    """The launches on one mixture's layers, with one set of activations and results for each number of tokens."""

    def __init__(self, mixture: str, plan: Plan, layers: int, experts: int, device: torch.device) -> None:
        self.plan, self.experts, self.device = plan, experts, device
        self.rng = torch.Generator().manual_seed(0)
        weights = torch.Generator(device).manual_seed(0)
        self.layers = [random_layer(weights, mixture, plan, experts) for _ in range(layers)]
        self._shared: dict[int, tuple[Inputs, Outputs]] = {}

    def activations(self, n_tok: int) -> tuple[Inputs, Outputs]:
        """Inputs without ids, and results and workspaces of both; launches run in order, as in a step."""
        if n_tok not in self._shared:
            x = torch.randn(n_tok, self.plan.d, generator=self.rng)
            weights = torch.rand(n_tok, self.plan.top_k, generator=self.rng) + 0.1
            ids = torch.zeros(n_tok, self.plan.top_k, dtype=torch.int32)
            inputs: Inputs = {"x": x.to(self.device), "weights": weights.to(self.device), "limit": 10.0}
            made = MOE_UP.outputs({**self.layers[0], **inputs, "ids": ids.to(self.device)})
            down = MOE_DOWN.outputs({**self.layers[0], **made, "ids": ids.to(self.device)})
            self._shared[n_tok] = {**inputs, "mid": made["mid"]}, {**made, **down}
        return self._shared[n_tok]

    def launches(self, part: str, routing: str, n_tok: int) -> tuple[list[KernelCall], list[int]]:
        """In every layer in turn, and that ``turns`` times; and how many experts each routing has."""
        inputs, outputs = self.activations(n_tok)
        calls, distinct = [], []
        for _, layer in product(range(self.plan.turns), self.layers):
            ids = random_ids(self.rng, routing, n_tok, self.plan.top_k, self.experts)
            distinct.append(distinct_experts(ids))
            every = {**layer, **inputs, "ids": ids.to(self.device)}
            calls += _calls(part, every, outputs)
        return calls, distinct

    def check(self, backend: Backend) -> dict[str, float]:
        """Relative RMS errors of mid and y for the most tokens of a step, by the torch reference on the same device.

        Raises Ds4Error for one of more than GATE.
        """
        n_tok = max(self.plan.n_toks)
        inputs, outputs = self.activations(n_tok)
        ids = random_ids(self.rng, "uniform", n_tok, self.plan.top_k, self.experts)
        every = {**self.layers[-1], **inputs, "ids": ids.to(self.device)}
        backend.run(_calls("up+down", every, outputs))
        with self.device:  # where the reference makes its results
            wanted = {**MOE_UP.reference(every), **MOE_DOWN.reference(every)}
        errors = {name: float((outputs[name] - want).norm() / want.norm()) for name, want in wanted.items()}
        for name, error in errors.items():
            if not error <= GATE:
                raise Ds4Error(f"moe: {name} of {n_tok} tokens has a relative RMS error of {error:.1e}")
        return errors

    def prepare(self, backend: Backend) -> Iterator[Prepared]:
        """Every graph, launched once before. Raises Ds4Error where a result is not finite."""
        for n_tok, routing, part in product(self.plan.n_toks, self.plan.routings, PARTS):
            if n_tok == 1 and routing == "same" and len(self.plan.routings) > 1:
                continue
            calls, distinct = self.launches(part, routing, n_tok)
            backend.run(calls)
            result = self.activations(n_tok)[1]["mid" if part == "up" else "y"]
            if not result.isfinite().all():
                raise Ds4Error(f"moe {part}: a result for {n_tok} tokens is not finite")
            yield Prepared(part, routing, n_tok, CudaGraph(backend, calls), calls, distinct)


def measure(
    mixture: str, plan: Plan, backend: CudaBackend, device: torch.device, copy_gb_s: float
) -> list[dict[str, Any]]:
    """A row for every part, routing and number of tokens. Raises Ds4Error where not even a token's experts fit, and
    where results are wrong.

    us: median over the repeats of the time of a launch (of two for "up+down"), spread_percent: their range by it;
    bytes, distinct_experts: means over the launches; time_ratio, byte_ratio: to the row of as many layers for one
    token, None without one; errors: of :meth:`Bench.check`.
    """
    torch.cuda.empty_cache()  # what was measured before
    free, _total = torch.cuda.mem_get_info(device)
    layers, experts, note = resident(mixture, plan, free, backend.facts.l2)
    bench = Bench(mixture, plan, layers, experts, device)
    errors = bench.check(backend)
    flush = flush_buffer(backend.facts.l2, device)
    prepared = list(bench.prepare(backend))
    times: list[list[float]] = [[] for _ in prepared]
    for repeat in range(plan.repeats + 1):  # the first round uploads the graphs
        for one, into in zip(prepared, times, strict=True):
            flush.sum()
            took = seconds(one.graph.replay) / len(one.distinct)
            if repeat:
                into.append(took)
    about = {"format": mixture, "layers": layers, "experts": experts, "note": note, "errors": errors}
    rows = [about | row(mixture, plan, *found, copy_gb_s) for found in zip(prepared, times, strict=True)]
    return with_ratios(rows)


def row(mixture: str, plan: Plan, one: Prepared, times: Sequence[float], copy_gb_s: float) -> dict[str, Any]:
    """The figures of a graph, from times of a launch in seconds."""
    median = statistics.median(times)
    weights = statistics.mean(plan.weight_bytes(mixture, one.part, n) for n in one.distinct)
    moved = weights + plan.activation_bytes(one.part, one.n_tok)
    return {
        "part": one.part,
        "routing": one.routing,
        "n_tok": one.n_tok,
        "us": median * 1e6,
        "spread_percent": 100 * (max(times) - min(times)) / median,
        "bytes": moved,
        "distinct_experts": statistics.mean(one.distinct),
        "gb_s": moved / median / 1e9,
        "percent_of_copy": 100 * moved / median / 1e9 / copy_gb_s,
        "launches": len(one.distinct),
        "repeats": len(times),
    }


def with_ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with time and bytes by those of one token, whose experts are as good as any other's."""
    single = {one["part"]: one for one in reversed(rows) if one["n_tok"] == 1}
    return [
        one
        | {f"{what}_ratio": one[key] / base[key] if base else None for what, key in (("time", "us"), ("byte", "bytes"))}
        for one in rows
        for base in (single.get(one["part"]),)
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text; ``x us`` and ``x MB`` are those of one token, ``experts`` what they read on average."""
    lines = [
        f"{'experts':10} {'part':8} {'routing':8} {'n':>2} {'us':>9} {'+-%':>5} {'MB':>9} {'experts':>7} {'GB/s':>7} "
        f"{'%copy':>6} {'x us':>5} {'x MB':>5}"
    ]
    for one in sorted(rows, key=lambda one: (PARTS.index(one["part"]), ROUTINGS.index(one["routing"]))):
        ratios = (f"{one[key]:.2f}" if one[key] else "" for key in ("time_ratio", "byte_ratio"))
        lines.append(
            f"{one['format']:10} {one['part']:8} {one['routing']:8} {one['n_tok']:2} {one['us']:9.2f} "
            f"{one['spread_percent']:5.1f} {one['bytes'] / 1e6:9.3f} {one['distinct_experts']:7.1f} {one['gb_s']:7.1f} "
            f"{one['percent_of_copy']:6.1f} " + " ".join(f"{ratio:>5}" for ratio in ratios)
        )
    firsts = {one["format"]: one for one in reversed(rows)}
    for name, one in reversed(firsts.items()):
        errors = ", ".join(f"{key} {error:.1e}" for key, error in one["errors"].items())
        note = f" ({one['note']})" if one["note"] else ""
        lines.append(f"{name}: {one['layers']} layers of {one['experts']} experts{note}, relative errors: {errors}")
    return "\n".join(lines)


def compile_kernels(mixtures: Sequence[str], plan: Plan, architecture: str) -> tuple[str, Any]:
    """Compile all that is launched, on all cores: how many kernels, and their size."""
    kernels = dict.fromkeys(kernel for mixture in mixtures for kernel in plan.kernels(mixture))
    return compile_many([(*kernel, architecture) for kernel in kernels])


def _names(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """Names of a list with commas. Raises argparse's error for others."""
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(known)}")
    return names


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return int(text)


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, Plan]:
    """The options, and the plan they make."""
    plan = Plan()
    parser = argparse.ArgumentParser(description="Times of a layer's experts at the dimensions of V4-Flash.")
    parser.add_argument("--layers", type=_count, default=plan.layers, help=f"at least so many ({plan.layers})")
    parser.add_argument("--experts", type=_count, default=plan.experts, help=f"of a layer ({plan.experts})")
    parser.add_argument("--formats", type=lambda text: _names(text, list(MIXTURES)), default=tuple(MIXTURES))
    parser.add_argument("--routings", type=lambda text: _names(text, ROUTINGS), default=plan.routings)
    parser.add_argument("--n-tok", type=lambda text: _names(text, "12345678"), default=plan.n_toks, help="1,2,4,8")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    given = parser.parse_args(arguments)
    if given.experts < plan.top_k:
        parser.error(f"--experts: a token has {plan.top_k}")
    n_toks = tuple(sorted({int(n) for n in given.n_tok}))
    return given, Plan(layers=given.layers, experts=given.experts, n_toks=n_toks, routings=given.routings)


def main(arguments: list[str] | None = None) -> int:
    """The command; 2 where there is no GPU."""
    given, plan = parse(arguments)
    try:
        backend, device = open_gpu()
        copy = measure_copy(backend, device)
        compile_kernels(given.formats, plan, backend.facts.architecture)
        rows = []
        for mixture in given.formats:
            rows += measure(mixture, plan, backend, device, copy["copy_gb_s"])
    except (Ds4Error, CudaError) as error:
        print(f"bench_moe: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    print(f"copy {copy['copy_gb_s']:.1f} GB/s")
    if given.json:
        given.json.write_text(json.dumps({"copy": copy, "moe": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
