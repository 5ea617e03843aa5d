"""One warm decode token on a GPU as a timeline, and how long the GPU waited between its kernels.

    python scripts/trace_decode.py trace.json [-m MODEL] [--n-tok N] [--ctx N] [--graph] [--by auto|profiler|events]

The file opens in https://ui.perfetto.dev or chrome://tracing. Kernels are seen by torch's profiler (CUPTI); where it
does not work, CUDA events around every launch time them, which costs the overlap of neighbours and makes gaps longer by
the events themselves. Without a GPU: one line and exit code 2.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from ds4.cli_bench import Wanted, begin, on_gpu
from ds4.cli_common import TOKENS, WholeRange
from ds4.errors import CudaError, Ds4Error
from ds4.graph.capture import CudaGraph
from ds4.kernels.entry import Backend
from ds4.model.steps import DecodeStep
from ds4.profiling.clock import Clock, CudaClock, TimedBackend
from ds4.profiling.measure import WARM_UP
from ds4.profiling.timeline import Span, chrome_trace, idle_record, labelled, laid_out, spans_of

_HOLD_CYCLES = 20_000_000  # about 10 ms: longer than the host needs to enqueue a step


class OneHold(CudaClock):
    """Holds the device once, in front of the step, so that gaps are not the host's."""

    def __init__(self) -> None:
        self._held = False

    def hold(self) -> None:
        if not self._held:
            torch.cuda._sleep(_HOLD_CYCLES)
        self._held = True


def by_profiler(run: Callable[[], None]) -> list[Span]:
    """The kernels of ``run()`` as torch's profiler sees them; none where CUPTI does not work."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        return spans_of(json.loads(path.read_text())["traceEvents"])


def by_events(run: Callable[[Backend], None], step: DecodeStep, backend: Backend, clock: Clock) -> list[Span]:
    """The launches of ``run(backend)``, which runs the step on a backend, timed one by one."""
    timed = TimedBackend(backend, clock, [[call] for call in step.calls])
    run(timed)
    return laid_out([call.entry.name for call in step.calls], timed.times())


def capture(
    step: DecodeStep, ids: Sequence[int], position: int, backend: Backend, graph: Backend | None, by: str
) -> tuple[list[Span], str]:
    """The spans of one run of the step, labelled with operation and layer, and how they were seen.

    ``ids`` are the tokens from ``position`` on; the steps before the last one warm up. ``graph``: replay this instead
    of launching on ``backend``. Raises Ds4Error where the profiler sees others than the step's launches, and nothing
    else may see them.
    """
    starts = range(0, len(ids) - step.n_tok + 1, step.n_tok)
    for start in starts:
        step.run(ids[start : start + step.n_tok], position + start, backend)
    torch.cuda.synchronize()
    last = starts[-1]

    def run(on: Backend) -> None:
        step.run(ids[last : last + step.n_tok], position + last, on)

    if by != "events":
        try:
            return labelled(by_profiler(lambda: run(graph or backend)), step), "profiler"
        except ValueError as error:
            if by == "profiler" or graph is not None:
                raise Ds4Error(f"trace: {error}; try --by events, without --graph") from None
    return labelled(by_events(run, step, backend, OneHold()), step), "events"


def report(found: dict[str, Any], by: str) -> str:
    """The idle times as text of at most 60 columns."""
    lines = [
        f"{found['kernels']} kernels in {found['total_us']:.1f} us, seen by {by}",
        f"busy {found['busy_us']:.1f} us, idle {found['idle_us']:.1f} us ({found['idle_percent']:.1f}%)",
        f"beside each other {found['overlap_us']:.1f} us",
    ]
    if found["longest_gaps"]:
        lines.append("longest gaps:")
    lines += [f"  {gap['us']:8.2f} us  {gap['after']} -> {gap['before']}" for gap in found["longest_gaps"]]
    return "\n".join(lines)


@click.command()
@click.argument("out", type=click.Path(dir_okay=False))
@click.option("-m", "--model", metavar="PATH", help="Checkpoint or hub name; the bundled small model if left out.")
@click.option("--n-tok", type=WholeRange(1, 8), default=1, metavar="N", help="Tokens of the step (1).")
@click.option("--ctx", type=TOKENS, metavar="N", help="Tokens before the step (512).")
@click.option("--graph", is_flag=True, help="Run the step as one CUDA graph.")
@click.option("--by", type=click.Choice(["auto", "profiler", "events"]), default="auto", help="What sees the kernels.")
@click.option("--json", "as_json", is_flag=True, help="Print the idle times as one JSON object.")
def main(out: str, model: str | None, n_tok: int, ctx: int | None, graph: bool, by: str, as_json: bool) -> None:
    """Trace one warm decode step of the model on the GPU and write it to OUT.

    \b
    Example:
      python scripts/trace_decode.py trace.json -m model.gguf --graph
    """
    if graph and by == "events":
        raise click.UsageError("--by events times launches one by one, which a --graph has none of")
    try:
        n_more = (WARM_UP + 1) * n_tok
        llm = on_gpu(Wanted(model=model, n_tok=n_tok, ctx=ctx), n_more)
        ids, position, decoder = begin(llm, ctx, n_more)
        step = decoder.step(n_tok)
        replay = CudaGraph(decoder.backend, step.calls) if graph else None
        spans, seen = capture(step, ids[position:], position, decoder.backend, replay, by)
    except (Ds4Error, CudaError) as error:
        click.echo(f"trace_decode: {error}", err=True)
        sys.exit(2)
    Path(out).write_text(json.dumps(chrome_trace(spans, f"decode step of {n_tok}, position {position}")))
    found = idle_record(spans)
    click.echo(json.dumps({"schema": 1, "by": seen, "n_tok": n_tok, **found}) if as_json else report(found, seen))


if __name__ == "__main__":
    main()
