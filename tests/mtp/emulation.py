"""Decoding and drafting by kernels on the CPU's emulation, with the bundled model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike

import pytest
import torch
from cuemu.backend import CpuBackend
from torch import Tensor

from ds4 import engine
from ds4.engine import LLM
from ds4.kernels.draft import words
from ds4.session import Session


@contextmanager
def emulated_llm(ctx: int, draft_model: PathLike[str] | None = None) -> Iterator[LLM]:
    """The bundled model as with ``--device cuda``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "resolve_device", lambda device: device)
        patch.setattr(engine, "current_gpu", lambda: torch.device("cpu"))
        patch.setattr(engine, "backend_for", lambda device: CpuBackend())
        yield LLM(device="cuda", ctx=ctx, draft_model=draft_model)


def prefill_in_torch(session: Session, prompt: Sequence[int]) -> None:
    """The prompt as the CPU processes it, so that what follows can be compared with it closely."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "_prefiller", None)
        session.prefill(prompt)


def greedy(session: Session, prompt: Sequence[int], n: int) -> tuple[list[int], Tensor]:
    """The next n tokens by single steps, and the rows that they were chosen from."""
    rows = [session.prefill(prompt)]
    ids = [int(rows[0].argmax())]
    while len(ids) < n:
        rows.append(session.decode([ids[-1]])[0])
        ids.append(int(rows[-1].argmax()))
    return ids, torch.stack(rows)


def speculated(
    session: Session, prompt: Sequence[int], n: int, lengths: Sequence[int]
) -> tuple[list[int], Tensor, list[int]]:
    """n tokens or a few more, in drafts of these lengths in turn, 0 for a plain step; their rows; how many of each
    draft were kept."""
    rows = [session.prefill(prompt)]
    ids, kept, turn = [int(rows[0].argmax())], [], 0
    while len(ids) < n:
        k = lengths[turn % len(lengths)]
        if k:
            tokens, found = session.speculate(ids[-1], k)
            kept.append(len(tokens) - 1)
        else:
            found = session.decode([ids[-1]])
            tokens = [int(found[0].argmax())]
        ids += tokens
        rows += found
        turn += 1
    return ids, torch.stack(rows), kept


def assert_as_plain(
    session: Session, ids: list[int], rows: Tensor, plain: tuple[list[int], Tensor, Session]
) -> tuple[int, Session]:
    """Tokens, logits and every live byte of the trunk's cache are those of single steps, ``plain``: tokens, rows and
    session. The position that was compared, and that session."""
    assert ids == plain[0][: len(ids)]
    assert torch.equal(rows, plain[1][: len(rows)])
    position, other = session.position, plain[2]
    assert session.ids == other.ids[:position]
    live = session.cache.live(position)
    assert all(torch.equal(live[name], part) for name, part in other.cache.live(position).items())
    return position, other


def stepped(session: Session, token: int, k: int, n_pairs: int, n: int) -> tuple[list[int], list[int]]:
    """n tokens or a few more from ``token`` on, by the same launches over and over without the host, as a graph has
    them: drafts of k, verification, acceptance. Tokens, and how many of each draft were kept."""
    decoder, drafter = session._decoder, session._kernel_drafter
    assert decoder is not None
    assert drafter is not None
    step = decoder.step(k + 1)
    calls = [*drafter.draft_calls(k, n_pairs), *step.calls, *step.accept]
    decoder.state.write(session.position, [token])
    ids, kept = [token], []
    while len(ids) < n:
        decoder.backend.run(calls)
        found = decoder.state.words.tolist()
        kept.append(found[words.ACCEPTED])
        ids += [*found[words.TOKENS + 1 : words.TOKENS + 1 + kept[-1]], found[words.TOKENS]]
    assert decoder.state.words[0] == session.position + len(ids) - 1
    return ids, kept
