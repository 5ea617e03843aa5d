"""``ds4 bench`` without a mode: tokens a second over the length of the context, plain and with drafts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ds4.cli_bench import Wanted, open_model, profile
from ds4.cli_common import TOKENS, ProgressBar, print_plan
from ds4.errors import Ds4Error

if TYPE_CHECKING:
    from ds4.bench.synthetic import Synthetic
    from ds4.bench.walk import Plan
    from ds4.draft_length import DraftLength
    from ds4.engine import LLM

FRONTIERS = {"cuda": (2048, 8192, 32768, 65536, 131072), "cpu": (512, 2048, 4096)}
CHUNKS = {"cuda": 4096, "cpu": 512}
BREAKDOWN_STEPS = 20


@dataclass(frozen=True)
class Throughput:
    """What is to be measured; None: what suits the device and the model."""

    model: str | None = None
    ctx: tuple[int, ...] | None = None
    device: str = "auto"
    draft: str = "auto"
    draft_model: str | None = None
    accept: float | None = None
    prompts: tuple[str, ...] | None = None
    tokens: int = 64
    repeats: int = 3
    chunk: int | None = None
    synthetic: str | None = None
    layers: int | None = None
    experts: int | None = None
    skew: float = 0.0
    shrink: int = 1
    csv: str | None = None
    plots: str | None = None
    as_json: bool = False

    def __post_init__(self) -> None:
        if self.accept is not None and self.draft in ("off", "0"):
            raise click.UsageError("--accept needs drafts: leave out --draft off")
        if self.synthetic is None:
            options = {"--layers": self.layers, "--experts": self.experts, "--skew": self.skew}
            options["--shrink"] = self.shrink if self.shrink > 1 else None
            for option, value in options.items():
                if value:
                    raise click.UsageError(f"{option} belongs to --synthetic")
        elif self.model is not None:
            raise click.UsageError("choose one of --model and --synthetic")

    def synthetic_model(self) -> Synthetic | None:
        """The model of random weights, if that is what is to be measured."""
        from ds4.bench.synthetic import Synthetic

        if self.synthetic is None:
            return None
        return Synthetic(self.synthetic, self.layers, self.experts, self.skew, self.shrink)


class Frontiers(click.ParamType):
    """Lengths of the context with commas, ascending: 2k,8k."""

    name = "list of lengths"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        found = tuple(TOKENS.convert(one, param, ctx) for one in str(value).split(","))
        if any(b <= a for a, b in itertools.pairwise(found)):
            self.fail(f"{value!r}: each length has to be above the one before", param, ctx)
        return found


class Kinds(click.ParamType):
    """Kinds of text with commas."""

    name = "list of kinds"
    known = ("chat", "code", "random")  # ds4.bench.prompts.KINDS, which needs torch

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        found = tuple(dict.fromkeys(str(value).split(",")))
        if unknown := [one for one in found if one not in self.known]:
            self.fail(f"{', '.join(unknown)!r} is not among {', '.join(self.known)}", param, ctx)
        return found


def throughput_command(wanted: Throughput) -> None:
    """Measure, print, and write what files are wanted."""
    from ds4.bench import plots
    from ds4.bench.record import csv_text, measure
    from ds4.bench.text import bench_text

    for option, path in (("--csv", wanted.csv), ("--plots", wanted.plots)):  # before minutes are spent
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise Ds4Error(f"{option} {path}: {Path(path).absolute().parent} is no folder; make it first")
    if wanted.plots is not None:
        plots.check()
    llm, todo = load(wanted)
    bar = ProgressBar("measuring")
    try:
        record = measure(
            llm,
            todo,
            synthetic=wanted.synthetic_model(),
            progress=bar.update,
            breakdown=lambda copy: breakdown(llm, todo, copy),
        )
    finally:
        bar.close()
    if wanted.csv is not None:
        Path(wanted.csv).write_text(csv_text(record), encoding="utf-8")
    if wanted.plots is not None:
        plots.draw(record, Path(wanted.plots))
    click.echo(json.dumps(record) if wanted.as_json else bench_text(record))


def load(wanted: Throughput) -> tuple[LLM, Plan]:
    """The loaded model, with room for two sessions where it drafts, and what to measure."""
    from ds4.bench.prompts import kinds_of
    from ds4.bench.synthetic import SyntheticLLM
    from ds4.bench.walk import Plan
    from ds4.draft_length import draft_length
    from ds4.engine import LLM, resolve_device

    device = resolve_device(wanted.device)
    synthetic, forced = wanted.synthetic_model(), wanted.accept is not None
    most = (synthetic.checkpoint(1) if synthetic else open_model(wanted.model)).config.max_position_embeddings

    def todo(prompts: tuple[str, ...], draft: DraftLength) -> Plan:
        decoded = wanted.tokens * wanted.repeats
        ctx = wanted.ctx or tuple(n for n in FRONTIERS[device] if n + decoded < most) or (max(1, most // 2),)
        return Plan(ctx, prompts, wanted.tokens, wanted.repeats, wanted.chunk or CHUNKS[device], draft, wanted.accept)

    first = todo((), draft_length(wanted.draft))
    if first.ctx > most:
        raise click.UsageError(f"--ctx: {first.ctx} tokens are needed, the model's context ends at {most}")
    bar = ProgressBar("loading the weights", bytes_done=True)
    options: dict[str, Any] = {"device": device, "ctx": first.ctx, "on_load": bar.update, "on_plan": print_plan}
    options |= {"sessions": 2 if first.draft else 1, "draft": "off" if forced else wanted.draft}
    try:
        if synthetic is not None:
            checkpoint = synthetic.fitting(device, first.ctx, options["sessions"])
            llm: LLM = SyntheticLLM(checkpoint, skew=wanted.skew, **options)
        else:
            llm = LLM(wanted.model, draft_model=wanted.draft_model, **options)
    finally:
        bar.close()
    return llm, todo(wanted.prompts or kinds_of(llm), first.draft if forced else llm.draft)


def breakdown(llm: LLM, todo: Plan, copy: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a plain step: of its kernels on a GPU, of the references' on the CPU."""
    from ds4.bench.breakdown import device_breakdown, host_breakdown
    from ds4.graph.capture import CudaGraph
    from ds4.profiling.clock import CudaClock

    position = min(todo.frontiers[0], todo.chunk)
    if llm.backend is None:
        return host_breakdown(llm, position, BREAKDOWN_STEPS)
    wanted = Wanted(profile="step", ctx=position, steps=BREAKDOWN_STEPS)
    return device_breakdown(profile(llm, wanted, CudaClock(), CudaGraph, copy["copy_gb_s"]))
