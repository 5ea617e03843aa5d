"""The device's own loop: each step's tokens and position are what the step before it left, and the host only looks on.

A step is one list of launches: the draft head drafts, the trunk verifies, ``accept`` takes what agrees (where tokens
are drawn: what rejection sampling keeps), moves the position and puts the next token where the next step begins. So the
host can launch a step before it has seen what the last one chose, and find out later. What it launched too much is
undone as a rejected draft is: by the position.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ds4.graph.drawing import Drawing
from ds4.graph.runner import SLOTS, Runner, runner_for
from ds4.kernels.draft import words as at
from ds4.kernels.entry import KernelCall
from ds4.kernels.launch import DECODE_ROWS
from ds4.model.steps import Decoder, DecodeStep
from ds4.mtp.drafter import KernelDrafter


@dataclass(frozen=True)
class Plan:
    """What a step does: the head's rows of the last ``pairs`` positions are written, ``k`` tokens are drafted, then
    verified. Rows that were written before are written again, the same bits, so that a plan fits wherever at most
    ``pairs`` are missing. 0 pairs: the head is left out."""

    k: int
    pairs: int

    def missing_after(self, before: int) -> int:
        """How many rows may be missing behind the step, if at most ``before`` were in front of it."""
        return (0 if self.pairs else before) + self.k + 1


@dataclass(frozen=True)
class Outcome:
    """What a step did.

    k        tokens that were drafted
    tokens   1 to k + 1: those of the draft that were accepted, and the one that was chosen behind them
    finite   whether the logits that decided were; if not, the last token means nothing
    seconds  that the step ran
    """

    k: int
    tokens: list[int]
    finite: bool
    seconds: float


class DeviceLoop:
    """Decoding of one session on the device, greedy or drawn, with drafts by ``drafter`` or without one.

    Lists, and the graphs they are captured in, are made once for each plan, and anew where the decoder's steps are.
    Those that draw are others than the greedy ones, the same for all parameters.

    position  tokens processed, as far as outcomes were taken
    token     the one behind them: chosen, not processed
    flying    number of drafted tokens of every step that was launched and not taken, in order
    """

    def __init__(self, decoder: Decoder, drafter: KernelDrafter | None = None, runner: Runner | None = None) -> None:
        self.decoder, self.drafter = decoder, drafter
        self.position = self.token = 0
        self._runner = runner or runner_for(decoder)
        self._plans: deque[Plan] = deque()
        self._missing = 0  # rows of the head, at most
        self._draws = False
        self._ready: dict[tuple[Plan, bool], tuple[DecodeStep, Any]] = {}
        decoder.cache.holders.add(self)

    def forget(self) -> None:
        """Lists and graphs are made anew from now on; what was launched is not touched."""
        self._ready.clear()

    @property
    def flying(self) -> list[int]:
        return [plan.k for plan in self._plans]

    @torch.inference_mode()
    def start(self, position: int, token: int, params: Tensor | None = None) -> None:
        """Go on from here: ``position`` tokens are processed, ``token`` comes behind them. What was launched and not
        taken is forgotten.

        params  i64 [6] on the CPU, by which tokens are drawn from now on (ds4.kernels.head.op.sample_params, without
                a repetition penalty); None: the likeliest is taken
        """
        self._runner.forget()
        self._plans.clear()
        self._missing = self.drafter.n_unwritten() if self.drafter is not None and position else 0
        self._draws = params is not None
        if params is not None:
            self._drawing.write(params)
        self.decoder.state.write(position, [token])
        self.position, self.token = position, token

    @torch.inference_mode()
    def launch(self, k: int) -> bool:
        """Launch a step that drafts ``k`` tokens, 0 to 7. False where an outcome has to be taken first.

        Raises ValueError for drafts without a head, or without a token in front of them.
        """
        if k and (self.drafter is None or not self.position):
            raise ValueError(f"{k} tokens cannot be drafted at position {self.position}, head {self.drafter}")
        if len(self._plans) == SLOTS:
            return False
        plan = self._plan(k)
        if plan is None:
            return False
        self._runner.launch(self._list(plan))
        self._plans.append(plan)
        return True

    def take(self) -> Outcome:
        """The outcome of the oldest step that was launched; waits for that step and no other."""
        left = self._runner.left()
        plan, words = self._plans.popleft(), left.words
        n, start, first = words[at.ACCEPTED], self.position, self.token
        if words[at.POS] != start + n + 1 or not 0 <= n <= plan.k:
            raise RuntimeError(f"a step of {plan} from position {start} says {n} accepted, position {words[at.POS]}")
        self.position, self.token = start + n + 1, words[at.TOKENS]
        if self.drafter is not None:
            self._missing = plan.missing_after(self._missing)
            if plan.pairs:
                self.drafter.drafted(first)
            else:
                self.drafter.begin(first)
            self.drafter.end(plan.k + 1)
            self.drafter.rewind(self.position)
        tokens = [*words[at.TOKENS + 1 : at.TOKENS + 1 + n], self.token]
        return Outcome(plan.k, tokens, words[at.STATUS] == 0, left.seconds)

    def rows(self, outcome: Outcome) -> Tensor:
        """Logits f32 ``[len(tokens), vocab]``, new, that the tokens of the last outcome were chosen from.

        Raises ValueError where a step is flying, as it may write where they were.
        """
        if self._plans:
            raise ValueError("a step is flying: the rows of those before it are lost")
        return self.decoder.step(outcome.k + 1).logits[: len(outcome.tokens)].clone()

    def _plan(self, k: int) -> Plan | None:
        """The next step's; None where it may not have as many pairs as it needs behind the steps that are flying."""
        least, missing = self.position, self._missing
        for plan in self._plans:
            least += 1
            missing = plan.missing_after(missing)
        if not self._plans:
            missing = min(missing, least)
        pairs = missing if self.drafter is not None and (k or missing >= DECODE_ROWS) else 0
        return Plan(k, pairs) if pairs <= min(least, DECODE_ROWS) else None

    @cached_property
    def _drawing(self) -> Drawing:
        return Drawing(self.decoder.state, 1 if self.drafter is None else DECODE_ROWS)

    def _list(self, plan: Plan) -> Any:
        """The plan's launches, made ready by the runner."""
        step = self.decoder.step(plan.k + 1)
        found = self._ready.get((plan, self._draws))
        if found is None or found[0] is not step:
            accept = self._drawing.accept(step) if self._draws else step.accept
            made = self._runner.ready([*self._head_calls(plan), *step.calls, *accept])
            found = self._ready[plan, self._draws] = step, made
        return found[1]

    def _head_calls(self, plan: Plan) -> list[KernelCall]:
        """What the plan has the head do in front of the step."""
        head = self.drafter
        if head is None or not plan.pairs:
            return []
        if not plan.k:
            return head.rows_calls(plan.pairs)
        if self._draws:
            return self._drawing.draft(head.draft_steps(plan.k, plan.pairs))
        return head.draft_calls(plan.k, plan.pairs)
