"""Showing stored streams to a drafter as the trunk would, launch by launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds4.kernels.launch import PREFILL_ROWS, Launch
from ds4.mtp.drafter import Draft, Drafter
from ds4.sampling import Sampler, SamplingParams


def relative(actual: Tensor, expected: Tensor) -> float:
    """Worst row: norm of the difference over norm of the reference, both f32 ``[n, ...]``."""
    assert actual.shape == expected.shape
    return ((actual - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max().item()


def _laid_out(launch: Launch, values: Tensor) -> Tensor:
    """Values ``[n_tok, ...]`` in the rows of a launch; rows without a token hold something that must not matter."""
    rows = torch.full((launch.n_rows, *values.shape[1:]), 7, dtype=values.dtype)
    rows[list(launch.rows)] = values
    return rows


def show_prompt(drafter: Drafter, ids: Sequence[int], streams: Sequence[Tensor], chunk: int = PREFILL_ROWS) -> None:
    """Tokens and, for each of the drafter's layers, streams f32 ``[n, m, d]``, ``chunk`` at a time, prefill form."""
    done, tokens = 0, torch.tensor(list(ids))
    while done < len(tokens):
        p = drafter.position
        n = min(len(tokens) - done, PREFILL_ROWS - p % PREFILL_ROWS, chunk)
        launch, part = Launch.prefill_tile(p, n), slice(done, done + n)
        drafter.observe(launch, _laid_out(launch, tokens[part]), [_laid_out(launch, s[part]) for s in streams])
        done += n


def show_step(drafter: Drafter, ids: Sequence[int], streams: Sequence[Tensor]) -> None:
    """1 to 8 tokens and their streams f32 ``[n, m, d]``, decode form."""
    launch = Launch.decode_step(drafter.position, len(ids))
    drafter.observe(launch, _laid_out(launch, torch.tensor(list(ids))), [_laid_out(launch, s) for s in streams])


class Recorder(Sampler):
    """A greedy sampler that keeps the logits it was asked about."""

    def __init__(self) -> None:
        super().__init__(SamplingParams())
        self.logits: list[Tensor] = []

    def sample(self, logits: Tensor, history: Sequence[int]) -> int:
        self.logits.append(logits.clone())
        return super().sample(logits, history)


def drafted(drafter: Drafter, history: Sequence[int], k: int) -> tuple[Draft, Tensor]:
    """A greedy draft and the logits f32 ``[k, vocab]`` that its tokens were chosen from."""
    recorder = Recorder()
    draft = drafter.draft(history, k, recorder)
    return draft, torch.stack(recorder.logits)
