"""Captures graphs and runs the device's loop on the fake driver, and prints what happened as JSON: test_graphs.py.

Nothing runs there, so the words that a step would leave are put in by hand in front of each launch.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))

import torch
from cuda_backend_script import GPU, SIZES, Stream, backend, call, entry, failing, logged
from torch.utils._python_dispatch import TorchDispatchMode

from ds4.graph.capture import CudaGraph
from ds4.graph.loop import DeviceLoop
from ds4.graph.runner import GraphRunner, runner_for
from ds4.kernels.cuda_backend import CudaBackend
from ds4.kernels.draft import words as at
from ds4.kernels.head.op import sample_params
from ds4.model.steps import Decoder
from ds4.mtp.kernel_rows import DraftStep

STEPS = 40


class ToyDecoder(Decoder):
    """Steps of two launches and one that accepts."""

    def __init__(self, gpu: CudaBackend) -> None:
        super().__init__(None, SimpleNamespace(device=torch.device("cpu"), holders=set()), gpu)  # type: ignore[arg-type]
        self.x = torch.zeros(16)

    def step(self, n_tok: int) -> Any:
        if n_tok not in self._steps:
            calls = [call(entry(), self.x), call(entry("two"), None)]
            self._steps[n_tok] = SimpleNamespace(  # type: ignore
                calls=calls, accept=[call(entry(), self.x)], logits=torch.zeros(n_tok, 16)
            )
        return self._steps[n_tok]


class Head:
    """A draft head whose lists are one launch a token, and which says what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def n_unwritten(self) -> int:
        return 1

    def draft_calls(self, k: int, n_pairs: int) -> list[Any]:
        self.told.append(f"draft_calls {k} {n_pairs}")
        return [call(entry("two"), None)] * k

    def draft_steps(self, k: int, n_pairs: int) -> list[DraftStep]:
        push = [call(entry("two"), None)]
        return [DraftStep(calls, push, torch.zeros(1, 16)) for calls in [self.draft_calls(1, n_pairs)] * k]

    def __getattr__(self, name: str) -> Any:
        return lambda value: self.told.append(f"{name} {value}")


class Stepping(GraphRunner):
    """Puts the words in that the launched step would leave: it accepts one draft, if there is one."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        self._view = decoder.state.words.numpy()

    def kept(self, ready: CudaGraph) -> int:
        return min(1, len(ready.calls) - 3)  # launches beyond a plain step's draft

    def launch(self, ready: CudaGraph) -> None:
        words, n = self._view, self.kept(ready)
        words[at.POS] += n + 1
        words[at.TOKENS] = words[at.POS] + 1000
        words[at.ACCEPTED] = n
        super().launch(ready)


class Drawing(Stepping):
    """For lists with the launches that draw, whose tensors are on the CPU here."""

    def ready(self, calls: Any) -> CudaGraph:
        for one in calls:
            one.args.device = GPU
        return super().ready(calls)

    def kept(self, ready: CudaGraph) -> int:
        return sum(one.entry.name == "accept_drawn" for one in ready.calls)


class Operations(TorchDispatchMode):
    """Notes torch's operations, allocations among them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def capture(out: dict[str, Any]) -> None:
    """Graphs by themselves."""
    gpu, x = backend(), torch.zeros(16)
    calls = [call(entry(), x, pdl=True), call(entry("two"), None)]
    graphs: list[CudaGraph] = []
    Stream.cuda_stream = 0
    out["capture"] = logged(lambda: graphs.append(CudaGraph(gpu, calls)))
    Stream.cuda_stream = 0xABC
    out["replay"] = logged(graphs[0].replay)
    out["run"] = logged(lambda: graphs[0].run(calls))
    out["others"] = logged(lambda: graphs[0].run(list(calls)))
    out["launch_fails"] = failing("cuLaunchKernelEx=700", lambda: CudaGraph(gpu, calls))
    out["instantiate_fails"] = failing("cuGraphInstantiate=2", lambda: CudaGraph(gpu, calls))
    out["replay_fails"] = failing("cuGraphLaunch=700", graphs[0].replay)
    out["synchronous"] = logged(lambda: CudaGraph(backend(synchronous=True), calls))
    out["empty"] = logged(lambda: CudaGraph(gpu, []))
    out["dropped"] = logged(lambda: (graphs.clear(), gc.collect()))


def loop(out: dict[str, Any]) -> None:
    """Steps that are launched ahead."""
    gpu = backend()
    decoder = ToyDecoder(gpu)
    words = decoder.state.words

    def plain(steps: int) -> list[list[int]]:
        found = []
        for _ in range(steps):
            loop.launch(0)
            found.append(loop.take().tokens)
        return found

    made: list[DeviceLoop] = []
    out["made"] = logged(lambda: made.append(DeviceLoop(decoder, runner=Stepping(decoder))))
    (loop,) = made
    loop.start(100, 7)
    out["first"] = logged(lambda: loop.launch(0))
    operations = Operations()
    tokens: list[list[int]] = []
    with operations:
        out["steady"] = logged(lambda: tokens.extend(plain(STEPS)))
    out |= {"tokens": tokens, "position": loop.position}
    out["operations"] = operations.names
    out["full"] = [loop.launch(0), loop.launch(0), loop.flying]
    out["restart"] = logged(lambda: loop.start(200, 8))
    out["none"] = logged(loop.take)
    loop.launch(0)
    out["take_fails"] = failing("cuEventSynchronize=700", loop.take)
    loop.start(300, 9)
    words[at.POS] += 5
    loop.launch(0)
    try:
        loop.take()
    except RuntimeError as error:
        out["astray"] = str(error)

    head = Head()
    loop = DeviceLoop(decoder, head, Stepping(decoder))  # type: ignore[arg-type]
    loop.start(50, 7)
    out["drafts"] = []
    for k in (2, 2, 0, 2):
        launched = logged(lambda k=k: loop.launch(k))
        out["drafts"].append([sum(line.startswith("launch") for line in launched), loop.take().tokens, loop.position])
    out["told"] = head.told
    decoder.watch(head)  # type: ignore[arg-type]
    out["steps anew"] = logged(lambda: loop.launch(0))
    waiting = ToyDecoder(backend(synchronous=True))
    out["kinds"] = [type(runner_for(one)).__name__ for one in (decoder, waiting)]
    for value in ("1", "0"):
        os.environ["DS4_EAGER"] = value
        out["kinds"].append(type(runner_for(decoder)).__name__)
    del os.environ["DS4_EAGER"]


def drawn(out: dict[str, Any]) -> None:
    """Steps that draw, with drafts of one token and without."""
    decoder = ToyDecoder(backend())
    loop = DeviceLoop(decoder, Head(), Drawing(decoder))  # type: ignore[arg-type]
    params = [sample_params(temperature=t, seed=3) for t in (0.5, 1.0)]
    loop.start(100, 7, params[0])
    out["drawn first"] = logged(lambda: loop.launch(1))
    loop.launch(1)
    loop.take()
    operations = Operations()
    tokens: list[list[int]] = []
    with operations:
        out["drawn steady"] = logged(
            lambda: tokens.extend([loop.launch(1), loop.take().tokens][1] for _ in range(STEPS))
        )
    out |= {"drawn tokens": tokens, "drawn operations": operations.names}
    loop.start(300, 7, params[1])
    out["drawn by others"] = logged(lambda: [loop.launch(1), loop.take()])
    out["drawn plain"] = logged(lambda: loop.launch(0))
    loop.start(400, 7)
    out["greedy again"] = logged(lambda: loop.launch(0))


def main() -> None:
    """All scenarios, each under a name."""
    torch.cuda.current_stream = lambda index: Stream  # type: ignore
    torch.cuda.is_current_stream_capturing = lambda: False  # type: ignore
    os.environ["FAKE_CUDA_PARAM_SIZES"] = SIZES
    out: dict[str, Any] = {}
    capture(out)
    loop(out)
    os.environ["FAKE_CUDA_PARAM_SIZES"] = ""
    drawn(out)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
