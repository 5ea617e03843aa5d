"""A timeline of kernels: from torch's profiler or from times of launches, to Chrome/Perfetto JSON and idle times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ds4.model.steps import DecodeStep


@dataclass(frozen=True)
class Span:
    """A kernel on the device: start and duration in us; ``about`` is shown by the viewer (operation, layer, ...)."""

    name: str
    start: float
    duration: float
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def end(self) -> float:
        return self.start + self.duration


def spans_of(events: Iterable[dict[str, Any]]) -> list[Span]:
    """The kernels among trace events as torch's profiler exports them, by start."""
    found = [
        Span(event["name"], float(event["ts"]), float(event["dur"]), dict(event.get("args", {})))
        for event in events
        if event.get("ph") == "X" and event.get("cat") == "kernel"
    ]
    return sorted(found, key=lambda span: span.start)


def labelled(spans: Sequence[Span], step: DecodeStep) -> list[Span]:
    """Spans of one run of ``step`` with each one's operation and layer, which follow from its place in the order.

    Raises ValueError where the names are not those of the step's launches, in order.
    """
    places = [(call.entry.name, part) for part in step.parts for call in part.calls]
    if [span.name for span in spans] != [name for name, _ in places]:
        raise ValueError(f"{len(spans)} kernels were seen, which are not the {len(places)} launches of the step")
    return [
        replace(span, about={"operation": part.operation.name, "layer": part.layer, **span.about})
        for span, (_, part) in zip(spans, places, strict=True)
    ]


def idle_record(spans: Sequence[Span], n_gaps: int = 5) -> dict[str, Any]:
    """How long the device worked and waited from the first kernel's start to the last one's end, times in us.

    returns  kernels, total_us, busy_us (at least one kernel ran), idle_us (none did), overlap_us (time that kernels
             spent beside others), idle_percent, longest_gaps (the ``n_gaps`` longest: us, at_us from the start, after
             and before: the kernels around it)
    Raises ValueError without spans.
    """
    if not spans:
        raise ValueError("no kernels: there is no timeline")
    spans = sorted(spans, key=lambda span: span.start)
    gaps: list[dict[str, Any]] = []
    begin, last = spans[0].start, spans[0]
    for span in spans[1:]:
        if span.start > last.end:
            where = {"after": last.name, "before": span.name}
            gaps.append({"us": span.start - last.end, "at_us": last.end - begin, **where})
        last = max(last, span, key=lambda one: one.end)
    total, idle = last.end - begin, sum(gap["us"] for gap in gaps)
    return {
        "kernels": len(spans),
        "total_us": total,
        "busy_us": total - idle,
        "idle_us": idle,
        "overlap_us": sum(span.duration for span in spans) - (total - idle),
        "idle_percent": 100 * idle / total if total else 0.0,
        "longest_gaps": sorted(gaps, key=lambda gap: -gap["us"])[:n_gaps],
    }


def chrome_trace(spans: Sequence[Span], title: str) -> dict[str, Any]:
    """The spans as trace events of one process from time 0, which Perfetto and chrome://tracing open.

    Kernels that run beside each other (dependent launches) are on lines of their own.
    """
    spans = sorted(spans, key=lambda span: span.start)
    begin = spans[0].start if spans else 0.0
    ends: list[float] = []
    timed = []
    for span in spans:
        line = next((i for i, end in enumerate(ends) if end <= span.start), len(ends))
        ends[line : line + 1] = [span.end]
        event = {"ph": "X", "cat": "kernel", "name": span.name, "pid": 0, "tid": line}
        timed.append({**event, "ts": span.start - begin, "dur": span.duration, "args": span.about})
    named = [
        _named("process_name", 0, title),
        *(_named("thread_name", i, f"kernels {i + 1}") for i in range(len(ends))),
    ]
    return {"traceEvents": named + timed, "displayTimeUnit": "ns"}


def _named(what: str, line: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": 0, "tid": line, "args": {"name": name}}


def laid_out(names: Sequence[str], times: Sequence[tuple[float, float]]) -> list[Span]:
    """Spans of launches whose beginnings and ends were timed, in seconds."""
    rows = zip(names, times, strict=True)
    return [Span(name, first * 1e6, (last - first) * 1e6) for name, (first, last) in rows]
