"""Cases of ``accept_drawn``."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ds4.kernels.cases import Case, Exact, Group, Inputs
from ds4.kernels.draft.cases import words_of
from ds4.kernels.head.sample_ref import sample_params
from ds4.kernels.launch import DECODE_ROWS

MOST_DRAFTED = DECODE_ROWS - 1


def _rows(rng: torch.Generator, n: int, vocab: int, kind: str) -> tuple[Tensor, Tensor]:
    """Distributions f32 ``[n, vocab]`` of the verifier and of the draft."""
    logits = torch.randn(n, vocab, generator=rng) * 2
    p = torch.softmax(logits.double(), dim=1)
    q = torch.softmax((logits + 0.4 * torch.randn(n, vocab, generator=rng)).double(), dim=1)
    if kind == "apart":  # not one token in common
        p[:, ::2], q[:, 1::2] = 0, 0
    elif kind == "certain":  # a draft that was not drawn
        q = torch.zeros_like(q).scatter_(1, q.argmax(1, keepdim=True), 1.0)
    elif kind == "the same":
        q = p.clone()
    return tuple((x / x.sum(1, keepdim=True)).float() for x in (p, q))  # type: ignore[return-value]


def _accept_drawn(
    seed: int,
    device: torch.device,
    *,
    n_tok: int,
    vocab: int,
    kind: str = "",
    bad: int | None = None,
    most: bool = False,
) -> Inputs:
    rng = torch.Generator().manual_seed(seed)
    p, drafts = _rows(rng, n_tok, vocab, kind)
    pitch = -(-vocab // 4) * 4
    q = torch.full((MOST_DRAFTED, pitch), torch.nan)
    q[: n_tok - 1, :vocab] = drafts[:-1]
    drawn = [int(torch.multinomial(row, 1, generator=rng)) for row in drafts[:-1]]
    status = torch.zeros(n_tok, dtype=torch.int32)
    if bad is not None:
        status[bad:] = 1
    if kind == "nothing left":  # the drafted token is impossible, and nothing else is likelier than in the draft
        p[0] = q[0, :vocab]
        p[0, drawn[0]] = 0
    inputs: Inputs = {
        "p": p,
        "q": q,
        "token": torch.randint(0, vocab, (n_tok,), generator=rng, dtype=torch.int32),
        "status": status,
        "params": sample_params(temperature=1.0, seed=2**63 - 1 - seed),
        "words": words_of(2**20 - 9 if most else 77, [5, *drawn]),
    }
    return {name: value.to(device) for name, value in inputs.items()}


def accept_drawn_cases() -> list[Case]:
    """Drafts kept, replaced at a place in any block, and rows without a draft or without numbers."""

    def case(name: str, group: Group, n_tok: int, vocab: int, **more: object) -> Case:
        make = partial(_accept_drawn, n_tok=n_tok, vocab=vocab, **more)  # type: ignore[arg-type]
        return Case(name, group, make, {"words": Exact()}, bytes_moved=8 * vocab + 16 * n_tok)

    return [
        case("a draft of 7", "smoke", 8, 2500),
        case("rejected at once", "smoke", 3, 1100, kind="apart"),
        case("all kept", "edges", 4, 300, kind="the same", most=True),
        case("certain", "edges", 3, 300, kind="certain"),
        case("nothing left", "edges", 2, 300, kind="nothing left"),
        case("without a draft", "edges", 1, 300),
        case("a vocabulary of one", "edges", 3, 1),
        case("not finite at once", "edges", 3, 300, bad=0),
        case("not finite behind a kept one", "edges", 3, 300, kind="the same", bad=1),
        *(case(f"n={n}", "decode", n, 129280) for n in (2, 4, 8)),
    ]
