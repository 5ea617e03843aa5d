"""Launches that draw a step's tokens, in place of those that take the likeliest, by parameters in device memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds4.kernels.cases import Outputs
from ds4.kernels.draft import words as at
from ds4.kernels.draft.op import ACCEPT, ACCEPT_DRAWN, DRAFT_PUSH
from ds4.kernels.entry import KernelCall
from ds4.kernels.head.sample_op import SAMPLE, SAMPLE_WITH_PROBS
from ds4.kernels.registry import Operation
from ds4.model.host_block import HostBlock
from ds4.model.steps import DecodeStep, StepState
from ds4.mtp.drafter import DRAFT_STREAM
from ds4.mtp.kernel_rows import DraftStep


class Drawing:
    """Draws tokens of steps and of drafts, and accepts what was drawn, on the words of a session.

    Parameters are read by the launches: lists made once serve every answer. Launches of one list and of the next run
    in order, so that all of them share their workspaces; the distributions of a draft are kept until it is verified.

    n_rows  of a step, at most
    """

    def __init__(self, state: StepState, n_rows: int) -> None:
        self._state, self._n_rows = state, n_rows
        device = state.words.device
        numbers = torch.zeros(12, dtype=torch.int32, device=device)
        self._params = numbers.view(torch.int64)
        self._host = HostBlock(numbers)
        self._room: Outputs = {}
        self._drafts = torch.empty(0)

    def write(self, params: Tensor) -> None:
        """What is drawn by from now on: i64 [6] on the CPU (ds4.kernels.head.op.sample_params)."""
        self._host.send(params.view(torch.int32).tolist())

    def accept(self, step: DecodeStep) -> list[KernelCall]:
        """Behind the step's own launches: its tokens are drawn, its draft accepted, into the session's words."""
        words = self._state.words
        if len(step.logits) == 1:
            made, calls = self._draws(SAMPLE, step.logits)
            return calls + ACCEPT.calls({"token": made["token"], "status": made["status"], "words": words}, {})
        made, calls = self._draws(SAMPLE_WITH_PROBS, step.logits)
        inputs = {"p": made["probs"], "q": self._drafts, "token": made["token"], "status": made["status"]}
        inputs |= {"params": self._params, "words": words}
        return calls + ACCEPT_DRAWN.calls(inputs, ACCEPT_DRAWN.outputs(inputs))

    def draft(self, steps: Sequence[DraftStep]) -> list[KernelCall]:
        """The launches of ``steps``, each drawing its token instead of taking the likeliest."""
        drafted, calls = self._state.word(at.DRAFTED), []
        for i, step in enumerate(steps):
            self._make_room(step.logits)
            probs = self._drafts[i : i + 1, : step.logits.shape[1]]
            made, drawn = self._draws(
                SAMPLE_WITH_PROBS, step.logits, into={"probs": probs}, drafted=drafted, stream=DRAFT_STREAM
            )
            push = DRAFT_PUSH.calls({"token": made["token"], "words": self._state.words}, {})
            calls += [*step.calls, *drawn, *push]
        return calls

    def _draws(
        self,
        operation: Operation,
        logits: Tensor,
        *,
        into: Outputs | None = None,
        drafted: Tensor | None = None,
        stream: int = 0,
    ) -> tuple[Outputs, list[KernelCall]]:
        """What draws from each row of logits f32 ``[n, vocab]``, and where it leaves its results."""
        self._make_room(logits)
        outputs = {name: t[: len(logits)] for name, t in self._room.items()} | (into or {})
        if operation is SAMPLE:
            del outputs["probs"]
        inputs = {"logits": logits, "pos": self._state.word(at.POS), "params": self._params, "first_seen": None}
        return outputs, operation.calls(inputs | {"drafted": drafted, "stream": stream}, outputs)

    def _make_room(self, logits: Tensor) -> None:
        if not self._room:
            vocab = logits.shape[1]
            self._room = SAMPLE_WITH_PROBS.outputs({"logits": logits.new_empty(self._n_rows, vocab)})
            pitch = -(-vocab // 4) * 4  # kernels want rows that begin on 16 bytes
            self._drafts = logits.new_empty(self._n_rows - 1, pitch)
