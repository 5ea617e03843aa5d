"""scripts/trace_decode.py without a GPU: recorded events, idle times, the viewer's format; scripts/decode_plan.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import decode_plan
import trace_decode

from ds4.errors import Ds4Error
from ds4.profiling.timeline import Span, chrome_trace, idle_record, labelled, laid_out, spans_of

# As torch.profiler exports them: kernels of a stream among other events, in the order of their ends.
RECORDED: list[dict[str, Any]] = [
    {"ph": "M", "name": "process_name", "pid": 0, "tid": 0, "ts": 0, "args": {"name": "python"}},
    *[
        {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": dur, "args": args}
        for cat, name, pid, tid, ts, dur, args in [
            ("cuda_driver", "cuLaunchKernelEx", 9001, 9001, 990.0, 4.5, {"correlation": 11}),
            ("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 0, 7, 995.25, 1.25, {"bytes": 64}),
            ("kernel", "mhc_finalise", 0, 7, 1012.0, 4.0, {"grid": [32, 1, 1], "registers per thread": 40}),
            ("kernel", "mhc_partials", 0, 7, 1000.0, 10.0, {"grid": [64, 1, 1]}),
            ("kernel", "proj", 0, 7, 1015.0, 20.0, {"grid": [520, 1, 1]}),
            ("kernel", "proj", 0, 7, 1040.5, 9.5, {"grid": [520, 1, 1]}),
        ]
    ],
]


def step_of(*names: str) -> Any:
    """A step of two operations with these launches: the first two, and the others in layer 3."""
    calls = [SimpleNamespace(entry=SimpleNamespace(name=name)) for name in names]
    parts = [
        SimpleNamespace(operation=SimpleNamespace(name="first"), layer=None, calls=calls[:2]),
        SimpleNamespace(operation=SimpleNamespace(name="second"), layer=3, calls=calls[2:]),
    ]
    return SimpleNamespace(parts=parts, calls=calls, n_tok=1, run=lambda ids, start, backend: backend.run(calls))


STEP = step_of("mhc_partials", "mhc_finalise", "proj", "proj")


def test_kernels_of_recorded_events():
    spans = spans_of(RECORDED)
    assert [span.name for span in spans] == ["mhc_partials", "mhc_finalise", "proj", "proj"]
    assert (spans[1].start, spans[1].end, spans[1].about["registers per thread"]) == (1012.0, 1016.0, 40)


def test_idle_times():
    found = idle_record(spans_of(RECORDED), n_gaps=1)
    assert (found["kernels"], found["total_us"], found["busy_us"], found["idle_us"]) == (4, 50.0, 42.5, 7.5)
    assert found["overlap_us"] == 1.0  # the end of mhc_finalise beside the start of proj
    assert found["idle_percent"] == 15.0
    assert found["longest_gaps"] == [{"us": 5.5, "at_us": 35.0, "after": "proj", "before": "proj"}]
    assert [gap["us"] for gap in idle_record(spans_of(RECORDED))["longest_gaps"]] == [5.5, 2.0]


def test_a_kernel_within_another_hides_no_gap():
    spans = [Span("long", 0.0, 10.0), Span("inside", 1.0, 2.0), Span("late", 12.0, 1.0)]
    found = idle_record(spans)
    assert (found["idle_us"], found["overlap_us"]) == (2.0, 2.0)
    assert found["longest_gaps"][0]["after"] == "long"
    assert idle_record(spans[:1])["idle_us"] == 0
    with pytest.raises(ValueError, match="no kernels"):
        idle_record([])


def test_labels():
    spans = labelled(spans_of(RECORDED), STEP)
    assert [(span.about["operation"], span.about["layer"]) for span in spans] == [("first", None)] * 2 + [
        ("second", 3)
    ] * 2
    assert spans[0].about["grid"] == [64, 1, 1]
    with pytest.raises(ValueError, match="3 kernels were seen, which are not the 4 launches"):
        labelled(spans[:3], STEP)
    with pytest.raises(ValueError, match="are not the 4 launches"):
        labelled(spans, step_of("mhc_finalise", "mhc_partials", "proj", "proj"))


def test_trace_for_the_viewer():
    spans = labelled(spans_of(RECORDED), STEP)
    trace = json.loads(json.dumps(chrome_trace(spans, "a step")))
    kernels = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [(event["ts"], event["dur"]) for event in kernels] == [(0, 10), (12, 4), (15, 20), (40.5, 9.5)]
    assert [event["tid"] for event in kernels] == [0, 0, 1, 0]  # what overlaps is on another line
    assert kernels[2]["args"] == {"operation": "second", "layer": 3, "grid": [520, 1, 1]}
    names = {
        (event["name"], event["tid"]): event["args"]["name"] for event in trace["traceEvents"] if "ts" not in event
    }
    assert names == {("process_name", 0): "a step", ("thread_name", 0): "kernels 1", ("thread_name", 1): "kernels 2"}
    assert idle_record(spans_of(trace["traceEvents"])) == idle_record(spans)


def test_timed_launches_as_spans():
    (span, other) = laid_out(["a", "b"], [(0.0, 2e-6), (3e-6, 7e-6)])
    assert (span.name, span.start, span.duration) == ("a", 0, pytest.approx(2))
    assert (other.start, other.end) == (pytest.approx(3), pytest.approx(7))


class Held(trace_decode.OneHold):
    """The clock without its GPU: a mark a microsecond."""

    now = 0

    def mark(self) -> Any:
        self.now += 1
        return self.now

    def seconds(self, first: Any, last: Any) -> float:
        return (last - first) * 1e-6


@pytest.fixture
def no_gpu(monkeypatch):
    """torch.cuda's functions that the script uses; returns the cycles that the device was held for."""
    held: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "_sleep", held.append)
    monkeypatch.setattr(trace_decode, "OneHold", Held)
    return held


class Silent:
    def __init__(self) -> None:
        self.ran = 0

    def run(self, calls: Any) -> None:
        self.ran += len(calls)


def captured(by: str, seen: list[Span], monkeypatch, graph: Any = None) -> tuple[list[Span], str, int]:
    backend = Silent()

    def profiler(run):
        run()
        return seen

    monkeypatch.setattr(trace_decode, "by_profiler", profiler)
    spans, how = trace_decode.capture(STEP, [5, 6, 7], 40, backend, graph, by)
    return spans, how, backend.ran


def test_capture(no_gpu, monkeypatch):
    spans, how, ran = captured("auto", spans_of(RECORDED), monkeypatch)
    assert (how, ran, [span.about["layer"] for span in spans]) == ("profiler", 16, [None, None, 3, 3])
    replayed = Silent()
    _, how, ran = captured("auto", spans_of(RECORDED), monkeypatch, replayed)
    assert (how, ran, replayed.ran) == ("profiler", 12, 4)
    assert no_gpu == []


def test_capture_where_the_profiler_sees_nothing(no_gpu, monkeypatch):
    spans, how, ran = captured("auto", [], monkeypatch)
    assert (how, ran) == ("events", 20)
    assert [(span.name, span.start, span.duration) for span in spans][:2] == [
        ("mhc_partials", 0, pytest.approx(1)),
        ("mhc_finalise", pytest.approx(2), pytest.approx(1)),
    ]
    assert len(no_gpu) == 1  # held once, in front of the step
    for by, graph in (("profiler", None), ("auto", Silent())):
        with pytest.raises(Ds4Error, match=r"0 kernels were seen.*--by events"):
            captured(by, [], monkeypatch, graph)


def test_report_is_narrow():
    text = trace_decode.report(idle_record(spans_of(RECORDED)), "profiler")
    assert max(map(len, text.splitlines())) <= 60
    assert text.splitlines()[:2] == ["4 kernels in 50.0 us, seen by profiler", "busy 42.5 us, idle 7.5 us (15.0%)"]
    assert "      5.50 us  proj -> proj" in text


def test_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "trace.json"
    result = CliRunner().invoke(trace_decode.main, [str(out)])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert "torch finds no GPU" in result.stderr
    assert not out.exists()
    both = CliRunner().invoke(trace_decode.main, [str(out), "--graph", "--by", "events"])
    assert both.exit_code == 2
    assert "--by events times launches one by one" in both.stderr


def test_plan_of_a_fabricated_checkpoint():
    result = CliRunner().invoke(decode_plan.main, ["k150", "--n-tok", "2", "--json"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert set(record["distinct_experts"]) == {"256", "150"}
    assert record["step"]["floor_bytes"] == pytest.approx(record["step"]["weight_bytes"], rel=2e-3)
