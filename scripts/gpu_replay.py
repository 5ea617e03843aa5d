"""The device's own loop on a GPU, with the bundled model: graphs against single launches, bit for bit and by time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ds4.engine import LLM
from ds4.graph.loop import DeviceLoop
from ds4.graph.runner import EagerRunner, GraphRunner, Runner
from ds4.model.steps import Decoder
from ds4.session import Session

STEPS, QUICK_STEPS = 320, 20  # all boundaries of 4 and 128, and the rings' ends, several times over
LENGTHS = (0, 2)  # of drafts
PROMPT = "Tell me a short story about a robot learning to paint."
LEAST_GAIN = 2.0  # of a replay over single launches
MOST_GAP_US = 30.0  # a step, in which the GPU has nothing to do

RUNNERS: dict[str, Callable[[Decoder], Runner]] = {"eager": EagerRunner, "replay": GraphRunner}


@dataclass
class Run:
    """Steps of the loop in a session of their own.

    rows  logits f32 [k + 1, vocab] of the last step; state: every live byte of the caches behind it
    gpu_us  median of a step on the GPU (eager: on the host); wall_us  of one step of all, first ones left out
    """

    tokens: list[int]
    rows: Tensor
    state: dict[str, Tensor]
    gpu_us: float
    wall_us: float


def steps(llm: LLM, kind: str, k: int, n: int) -> Run:
    """``n`` steps with drafts of ``k`` tokens behind PROMPT. The first quarter makes lists and graphs ready."""
    session = llm.session(256 + n * (k + 1))
    loop, first = _begun(session, llm, kind)
    tokens, seconds, launched, warm, began = [first], [], 0, n // 4, 0.0
    for taken in range(n):
        if taken == warm:
            began = time.perf_counter()
        while launched < n and loop.launch(k):
            launched += 1
        outcome = loop.take()
        if not outcome.finite:
            raise AssertionError(f"step {taken}: the logits are not finite")
        tokens += outcome.tokens
        seconds.append(outcome.seconds)
    wall = time.perf_counter() - began
    rows, state = loop.decoder.step(k + 1).logits.cpu(), session.cache.live(loop.position)
    us = 1e6 * statistics.median(seconds[warm:])
    return Run(tokens, rows, {name: part.cpu() for name, part in state.items()}, us, 1e6 * wall / (n - warm))


def _begun(session: Session, llm: LLM, kind: str) -> tuple[DeviceLoop, int]:
    """The loop behind the prompt, and the first token."""
    decoder = session._decoder
    assert decoder is not None
    first = int(session.prefill(llm.encode_prompt(PROMPT)).argmax())
    loop = DeviceLoop(decoder, session._kernel_drafter, RUNNERS[kind](decoder))
    loop.start(session.position, first)
    return loop, first


def compare(k: int, n: int) -> tuple[str, dict[str, Any]]:
    """Replays and single launches leave the same. Raises AssertionError where they do not, or a replay is too slow."""
    eager, replay = (steps(_llm(), kind, k, n) for kind in ("eager", "replay"))
    for i, (one, other) in enumerate(zip(eager.tokens, replay.tokens, strict=False)):
        if one != other:
            raise AssertionError(f"token {i} is {other} by replay, {one} by single launches")
    if len(eager.tokens) != len(replay.tokens):
        raise AssertionError(f"{len(replay.tokens)} tokens by replay, {len(eager.tokens)} by single launches")
    if not torch.equal(eager.rows, replay.rows):
        raise AssertionError("the last step's logits differ")
    wrong = [name for name, part in eager.state.items() if not torch.equal(part, replay.state[name])]
    if wrong:
        raise AssertionError(f"the caches differ: {', '.join(wrong)}")
    gain, gap = eager.wall_us / replay.wall_us, replay.wall_us - replay.gpu_us
    data = {"k": k, "steps": n, "tokens": len(replay.tokens), "eager_us": eager.wall_us, "replay_us": replay.wall_us}
    data |= {"replay_gpu_us": replay.gpu_us, "gain": gain, "gap_us": gap}
    text = f"{n} steps, {len(replay.tokens)} tokens, the same bits; eager {eager.wall_us:.0f} us a step, "
    text += f"replay {replay.wall_us:.0f} ({gain:.1f}x), of which {gap:.0f} between steps"
    if gain < LEAST_GAIN or gap > MOST_GAP_US:
        raise AssertionError(f"{text}: at least {LEAST_GAIN:.0f}x and at most {MOST_GAP_US:.0f} us are wanted")
    return text, data


@cache
def _llm() -> LLM:
    return LLM(device="cuda")


def items(quick: bool) -> Iterator[tuple[str, Callable[[], tuple[str, Any]]]]:
    """(name, work) for each draft length."""
    n = QUICK_STEPS if quick else STEPS
    for k in LENGTHS:
        yield f"{n} steps, {f'{k} drafts' if k else 'plain'}", partial(compare, k, n)
