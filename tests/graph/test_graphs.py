"""Graphs and the device's loop, without a GPU: what reaches the driver, counted step by step.

The library of fake_libcuda.cpp stands for the driver (tests/kernels/test_cuda_backend.py). It has no allocation and no
call that waits but those that it logs: a step that made another would fail here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fake_driver import build_fake_driver, run_with_fake_driver

KERNELS = """
extern "C" __global__ void one(float* x, int n, float scale, long long big) { x[threadIdx.x % kN] += n; }
extern "C" __global__ void two(float* x, int n, float scale, long long big) { if (x) *x = n; }
"""


@pytest.fixture(scope="module")
def happened(tmp_path_factory):
    """What graph_script.py reports, by scenario."""
    folder = tmp_path_factory.mktemp("graphs")
    (folder / "two.cu").write_text(KERNELS)
    script = str(Path(__file__).with_name("graph_script.py"))
    done = run_with_fake_driver(build_fake_driver(folder), script, str(folder), log=str(folder / "log"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def calls(log):
    """What was called, without its arguments and without the switching of contexts."""
    return [re.split(r" [\d(]| stream| mode", line)[0] for line in log if line not in ("push", "pop")]


def assert_steady(log, events, first):
    """40 steps of a replay, a copy and two marks each, of which the other slot's step is waited for; ``first`` is the
    slot of the first. ``events``: begin and end of the two slots."""
    *log, ended = log
    assert ended == "ok"
    steps = "\n".join(log).split("\npush\nevent")
    assert len(steps) == 40
    graph = next(line for line in log if line.startswith("graph"))
    slots = [events[:2], events[2:]]
    for i, step in enumerate(steps, first):
        begin, end = slots[i % 2]
        lines = step.removeprefix("push\nevent").split("\n")
        assert lines == [
            f" {begin} stream abc",
            graph,
            "copy 256 stream abc",
            f"event {end} stream abc",
            *("pop", "push", f"wait for event {slots[(i + 1) % 2][1]}", "pop"),
        ]


def test_a_capture_loads_first_and_launches_on_a_stream_of_its_own(happened):
    loads = ["load", "function one", "load function", "function two", "load function"]
    log = [line.replace("load 7f454c46", "load") for line in happened["capture"]]
    assert calls(log)[:5] == loads
    rest = [line for line in log if line not in ("push", "pop")][5:]
    assert [line.split(" block")[0] for line in rest] == [
        *("cuStreamCreate", "begin capture e01 mode 1", "launch grid 4 2 1", "launch grid 4 2 1", "end capture"),
        *("cuGraphInstantiate", "cuGraphDestroy", "cuGraphUpload", "cuStreamDestroy", "ok"),
    ]
    first, second = (line for line in rest if line.startswith("launch"))
    assert "stream e01" in first
    assert first.endswith("pdl 1")
    assert "stream e01" in second
    assert "pdl" not in second


def test_a_replay_is_one_call_on_the_stream_of_the_moment(happened):
    assert happened["replay"] == happened["run"] == ["push", "graph e01 stream abc", "pop", "ok"]
    assert happened["others"] == ["ValueError: the launches to run are not those of the graph"]
    assert happened["dropped"] == ["push", "cuGraphExecDestroy", "pop", "ok"]


def test_what_cannot_be_captured(happened):
    for scenario in ("synchronous", "empty"):
        assert happened[scenario][-1].startswith(
            "ValueError: a graph has launches, of a CudaBackend that does not wait"
        )
    *log, error = happened["launch_fails"]
    assert error.startswith("CudaError: launching one (grid (4, 2, 1)")
    assert calls(log)[-2:] == ["end capture", "cuStreamDestroy"]
    *log, error = happened["instantiate_fails"]
    assert error == "CudaError: capturing 2 launches on Fake GPU: CUDA_ERROR_OTHER, text of the driver"
    assert calls(log)[-2:] == ["cuGraphDestroy", "cuStreamDestroy"]
    assert happened["replay_fails"][-1].startswith("CudaError: launching a graph of 2 kernels: CUDA_ERROR_ILLEGAL_A")


def test_who_gets_graphs(happened):
    assert happened["kinds"] == ["GraphRunner", "EagerRunner", "EagerRunner", "GraphRunner"]
    assert calls(happened["made"]) == [*["cuEventCreate"] * 4, "ok"]
    assert {line for line in happened["made"] if line.startswith("cuEvent")} == {"cuEventCreate 1"}  # who waits sleeps


def test_a_token_costs_a_launch_a_copy_and_two_marks(happened):
    """And one look at the step before: the host waits for a step only when the next one is enqueued behind it."""
    assert calls(happened["first"])[-5:] == ["event e01", "graph e03", "copy", "event e02", "ok"]
    assert_steady(happened["steady"], ["e01", "e02", "e03", "e04"], first=1)
    assert len(happened["tokens"]) == 40
    assert happened["operations"] == []  # torch does nothing at all: no allocation, no copy


def test_a_drawn_token_costs_the_same(happened):
    """With drafts; and other parameters are no other graph."""
    first = happened["drawn first"]
    launches = [line for line in first if line.startswith("launch")]
    # the head's step, drawn and pushed; the trunk's, drawn and accepted
    assert len(launches) == 1 + 8 + 1 + 2 + 8 + 1
    events = sorted({line.split()[1] for line in happened["drawn steady"] if line.startswith("event")})
    assert_steady(happened["drawn steady"], events, first=0)
    assert len(happened["drawn tokens"]) == 40
    assert all(len(tokens) == 2 for tokens in happened["drawn tokens"])
    assert happened["drawn operations"] == []
    (graph,) = (line for line in first if line.startswith("graph"))
    assert graph in happened["drawn by others"]
    assert not any("capture" in line for line in happened["drawn by others"])
    counts = [
        len([line for line in happened[name] if line.startswith("launch")]) for name in ("drawn plain", "greedy again")
    ]
    assert counts == [2 + 7 + 1, 3]  # a plain step needs no distributions


def test_what_steps_left_is_seen_late_and_in_order(happened):
    assert happened["tokens"] == [[1101 + i] for i in range(40)]
    assert happened["position"] == 140
    assert happened["full"] == [True, False, [0, 0]]
    # Words are written again only when nobody writes them any more.
    assert calls(happened["restart"]) == ["wait for event e02", "wait for event e04", "ok"]
    assert happened["none"] == ["ValueError: no list was launched that nobody looked at"]
    assert happened["take_fails"][-1].startswith("CudaError: running a step on Fake GPU: CUDA_ERROR_ILLEGAL_ADDRESS")
    assert happened["astray"] == "a step of Plan(k=0, pairs=0) from position 300 says 0 accepted, position 306"


def test_drafts_lead_the_list(happened):
    assert happened["drafts"] == [[5, [0, 1052], 52], [5, [0, 1054], 54], [3, [1055], 55], [5, [0, 1057], 57]]
    steps = [
        ["draft_calls 2 1", "drafted 7", "end 3", "rewind 52"],  # as many rows as are missing
        ["draft_calls 2 3", "drafted 1052", "end 3", "rewind 54"],  # as many as may be, from here on
        ["begin 1054", "end 1", "rewind 55"],
        ["draft_calls 2 4", "drafted 1055", "end 3", "rewind 57"],
    ]
    assert happened["told"] == [line for step in steps for line in step]


def test_other_steps_are_captured_anew(happened):
    log = calls(happened["steps anew"])
    assert "begin capture e09" in log
    assert log.index("begin capture e09") < log.index("cuGraphExecDestroy") < log.index("copy")
