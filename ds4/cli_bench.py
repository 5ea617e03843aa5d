"""``ds4 bench`` of a decode step: what it launches and moves (--plan, --dispatch) and takes on a GPU (--profile)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from ds4.cli_common import ProgressBar, print_plan
from ds4.errors import Ds4Error

if TYPE_CHECKING:
    from ds4.engine import LLM
    from ds4.kernels.entry import Backend, KernelCall
    from ds4.model.steps import Decoder, DecodeStep
    from ds4.profiling.clock import Clock
    from ds4.weights.checkpoint import Checkpoint

PLAN_POSITION, PROFILE_POSITION = 4096, 512


@dataclass(frozen=True)
class Wanted:
    """What ``ds4 bench`` is asked for; exactly one of the first three."""

    plan: bool = False
    dispatch: bool = False
    profile: str | None = None
    model: str | None = None
    n_tok: int = 1
    mix: Mapping[int, int] | None = None
    run: bool = False
    ctx: int | None = None
    steps: int = 50
    as_json: bool = False


class Mix(click.ParamType):
    """How many steps of how many tokens: 1:256,2:64."""

    name = "mix"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[int, int]:
        if isinstance(value, dict):
            return value
        pairs = [re.fullmatch(r"([1-8]):([1-9][0-9]{0,8})", one) for one in str(value).split(",")]
        mix = {int(pair[1]): int(pair[2]) for pair in pairs if pair}
        if len(mix) < len(pairs):
            self.fail(f"{value!r} is not a list of tokens:steps, such as 1:256,2:64 (1 to 8 tokens, each once)")
        return mix


def bench_command(wanted: Wanted) -> None:
    """Print what is wanted. Raises Ds4Error where it needs a GPU and there is none."""
    from ds4.profiling import tables

    if wanted.profile is not None:
        record, text = _profile(wanted), tables.moe_text if wanted.profile == "moe" else tables.profile_text
    elif wanted.dispatch:
        record, text = _dispatch(wanted), tables.dispatch_text
    else:
        record, text = plan(open_model(wanted.model), wanted.n_tok, wanted.ctx), tables.plan_text
    click.echo(json.dumps(record) if wanted.as_json else text(record))


def open_model(model: str | None) -> Checkpoint:
    """A checkpoint, of which headers are read; the bundled one for None."""
    from ds4 import hub
    from ds4.demo import bundled_model_path
    from ds4.weights import open_checkpoint

    return open_checkpoint(bundled_model_path() if model is None else hub.local_path(model))


def _position(checkpoint: Checkpoint, ctx: int | None, default: int, n_more: int) -> int:
    """Tokens before the first step: as asked for, or the default as far as the model's context allows."""
    most = checkpoint.config.max_position_embeddings - n_more
    if ctx is not None and ctx > most:
        raise click.UsageError(f"--ctx {ctx}: the steps have to end within the model's {most + n_more} tokens")
    return ctx if ctx is not None else min(default, most)


def plan(checkpoint: Checkpoint, n_tok: int, ctx: int | None) -> dict[str, Any]:
    """``ds4.profiling.plan.plan_record`` of a checkpoint, of which only headers are read."""
    from ds4.model.steps import DecodeStep
    from ds4.profiling.plan import plan_record, plan_step
    from ds4.profiling.shapes import shape_model

    position = _position(checkpoint, ctx, PLAN_POSITION, n_tok)
    model = shape_model(checkpoint)
    cache = model.new_cache(position + n_tok)
    return plan_record(plan_step(model, cache, DecodeStep(model, cache, n_tok), checkpoint, position))


def _dispatch(wanted: Wanted) -> dict[str, Any]:
    from ds4.model.steps import DecodeStep
    from ds4.profiling.dispatch import dispatch_record, planned
    from ds4.profiling.shapes import shape_model

    mix = dict(wanted.mix or {1: 1, 2: 1})
    if wanted.run:
        return count_dispatch(on_gpu(wanted, sum(n * times for n, times in mix.items())), mix, wanted.ctx)
    checkpoint = open_model(wanted.model)
    model = shape_model(checkpoint)
    cache = model.new_cache(_position(checkpoint, wanted.ctx, PLAN_POSITION, max(mix)) + max(mix))
    steps = {n_tok: DecodeStep(model, cache, n_tok) for n_tok in mix}
    return dispatch_record(steps, mix, planned(steps, mix))


def count_dispatch(llm: LLM, mix: Mapping[int, int], ctx: int | None) -> dict[str, Any]:
    """``ds4.profiling.dispatch.dispatch_record`` of steps that run on ``llm``, launches counted."""
    from ds4.profiling.dispatch import CountingBackend, dispatch_record

    n_all = sum(n * times for n, times in mix.items())
    ids, position, decoder = begin(llm, ctx, n_all)
    counting = CountingBackend(decoder.backend)
    steps: dict[int, DecodeStep] = {}
    for n_tok, times in mix.items():
        steps[n_tok] = decoder.step(n_tok)
        for _ in range(times):
            steps[n_tok].run(ids[position : position + n_tok], position, counting)
            position += n_tok
    return dispatch_record(steps, mix, counting.counts)


def _profile(wanted: Wanted) -> dict[str, Any]:
    from ds4.graph.capture import CudaGraph
    from ds4.profiling.clock import CudaClock
    from ds4.profiling.environment import copy_gb_s
    from ds4.profiling.measure import WARM_UP

    llm = on_gpu(wanted, (wanted.steps + WARM_UP) * wanted.n_tok)
    assert llm.backend is not None
    copy = copy_gb_s(llm.backend, llm.model.device)
    return profile(llm, wanted, CudaClock(), CudaGraph, copy)


def profile(
    llm: LLM,
    wanted: Wanted,
    clock: Clock,
    graph: Callable[[Backend, Sequence[KernelCall]], Backend] | None,
    copy_gb_s: float,
) -> dict[str, Any]:
    """``profile_record`` or ``moe_record`` (ds4.profiling.measure) of decode steps that run on ``llm``."""
    from ds4.profiling.measure import WARM_UP, moe_record, profile_record, record_steps
    from ds4.profiling.plan import plan_step

    n_all = (wanted.steps + WARM_UP) * wanted.n_tok
    ids, position, decoder = begin(llm, wanted.ctx, n_all)
    step = decoder.step(wanted.n_tok)
    found = record_steps(step, ids[position : position + n_all], position, decoder.backend, clock, graph)
    half_way = position + (n_all - wanted.n_tok) // 2
    plan = plan_step(decoder.model, decoder.cache, step, llm.checkpoint, half_way)
    return (moe_record if wanted.profile == "moe" else profile_record)(found, plan, copy_gb_s)


def on_gpu(wanted: Wanted, n_more: int) -> LLM:
    """The model, loaded onto the GPU, for a context of ``n_more`` tokens after the position; Ds4Error without a GPU."""
    import torch

    from ds4.engine import LLM

    if not torch.cuda.is_available():
        raise Ds4Error("bench: torch finds no GPU to measure on (ds4 doctor says why); --plan and --dispatch need none")
    checkpoint = open_model(wanted.model)
    position = _position(checkpoint, wanted.ctx, PROFILE_POSITION, n_more)
    bar = ProgressBar("loading the weights", bytes_done=True)
    try:
        return LLM(wanted.model, device="cuda", ctx=position + n_more, on_load=bar.update, on_plan=print_plan)
    finally:
        bar.close()


def begin(llm: LLM, ctx: int | None, n_more: int) -> tuple[list[int], int, Decoder]:
    """A text of token ids, the position up to which it has been processed, and a decoder for the rest."""
    from ds4.bench.prompts import Prompt
    from ds4.model.steps import Decoder

    assert llm.backend is not None
    position = _position(llm.checkpoint, ctx, PROFILE_POSITION, n_more)
    ids = Prompt(llm, "code" if llm.tokenizer else "random", position + n_more).body
    session = llm.session(position + n_more)
    session.cache.reserve(session.ctx)  # for the steps too, which are the decoder's own
    bar = ProgressBar("processing the prompt", tokens=True)
    try:
        session.prefill(ids[:position], progress=bar.update)
    finally:
        bar.close()
    return ids, position, Decoder(llm.model, session.cache, llm.backend)
