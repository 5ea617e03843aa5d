"""Cases of ``sample`` and ``sample_with_probs``: the same inputs, compared with or without the distribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ds4.kernels.cases import Case, Close, Compare, Exact, Group, Inputs
from ds4.kernels.head.sample_ref import sample_params

COMPARE: dict[str, Compare] = {"token": Exact(), "status": Exact()}
_PROBS = Close(
    2.0**-46, 2.0**-22, "exp of another library may differ in its last place: E by 1, p by one rounding to f32"
)
NEVER = 2**31 - 1  # first_seen of a token that is not in the text
_CHAT = {"temperature": 0.6, "top_p": 0.95}
_ALL = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.1, "seen": True}
Row = Callable[[torch.Generator, int, int], Tensor]  # (generator, n_tok, vocab) -> logits f32 [n_tok, vocab]


def _normal(rng: torch.Generator, n_tok: int, vocab: int) -> Tensor:
    return torch.randn(n_tok, vocab, generator=rng) * 3


def _few_values(rng: torch.Generator, n_tok: int, vocab: int) -> Tensor:
    """Ties everywhere, also of -0 and 0."""
    return torch.randint(-4, 5, (n_tok, vocab), generator=rng).float() / 2 * -1.0


def _equal(rng: torch.Generator, n_tok: int, vocab: int) -> Tensor:
    return torch.full((n_tok, vocab), -3.25)


def _wide(rng: torch.Generator, n_tok: int, vocab: int) -> Tensor:
    """Magnitudes up to FP32's largest, denormals, and -inf, which can never be drawn."""
    x = torch.randn(n_tok, vocab, generator=rng) * torch.exp2(torch.randint(-140, 126, (n_tok, vocab), generator=rng))
    x[:, ::5] = -torch.inf
    return x


def _damaged(rng: torch.Generator, n_tok: int, vocab: int) -> Tensor:
    """Rows of which the largest is NaN, inf, -inf and a number."""
    x = torch.randn(n_tok, vocab, generator=rng)
    x[0, 7], x[0, 9], x[0, 3] = torch.nan, torch.nan, torch.inf
    x[1, 5] = torch.inf
    x[2] = -torch.inf
    return x


def make_inputs(
    seed: int,
    device: torch.device,
    *,
    n_tok: int,
    vocab: int,
    row: Row = _normal,
    seen: bool = False,
    drafted: int | None = None,
    stream: int = 0,
    **params: Any,
) -> Inputs:
    """Logits of ``row``, a position, and the parameters. Where ``seen``, half of the tokens stand in the text, some of
    them first at the position of one of the rows."""
    rng = torch.Generator().manual_seed(seed)
    start = 100
    first_seen = torch.full((vocab,), NEVER, dtype=torch.int32)
    if seen:
        ids = torch.randperm(vocab, generator=rng)[: (vocab + 1) // 2]
        first_seen[ids] = torch.randint(start - 8, start + 8, (len(ids),), generator=rng, dtype=torch.int32)
    inputs: Inputs = {
        "logits": row(rng, n_tok, vocab),
        "pos": torch.tensor([start - 1], dtype=torch.int32),
        "drafted": torch.tensor([drafted], dtype=torch.int32) if drafted is not None else None,
        "params": sample_params(seed=2**63 - 1 - seed, **params),
        "first_seen": first_seen if seen else None,
    }
    moved: Inputs = {name: value.to(device) if value is not None else None for name, value in inputs.items()}
    return moved | {"stream": stream}


def _case(name: str, group: Group, n_tok: int, vocab: int, **more: Any) -> Case:
    make = partial(make_inputs, n_tok=n_tok, vocab=vocab, **more)
    # logits and first_seen once, keys and E written once and read six times and twice
    return Case(name, group, make, COMPARE, bytes_moved=n_tok * vocab * (4 + 4 * 7 + 8 * 3) + 4 * vocab)


def cases() -> list[Case]:
    """Smoke and a few edges for the emulation, decode with the vocabulary of V4-Flash."""
    smoke = [
        _case("everything 8 tokens", "smoke", 8, 1100, **_ALL),
        _case("chat", "smoke", 2, 1100, **_CHAT),
        _case("greedy", "smoke", 2, 300, repetition_penalty=1.3, seen=True),
        _case("plain", "smoke", 3, 1100, temperature=1.0),
        _case("the third of a draft", "smoke", 1, 1100, temperature=1.0, drafted=2, stream=2),
    ]
    edges = [
        _case("three blocks", "edges", 2, 2500, **_ALL),
        _case("vocabulary of one", "edges", 1, 1, **_ALL),
        *(_case(f"n={n}", "edges", n, 300, **_ALL) for n in (5, 7)),
        _case("damaged", "edges", 4, 300, row=_damaged, **_CHAT),
        _case("damaged, greedy", "edges", 4, 300, row=_damaged),
        _case("ties, greedy", "edges", 4, 300, row=_few_values),
    ]
    decode = [_case(f"chat n={n}", "decode", n, 129280, **_CHAT) for n in (1, 2, 8)]
    decode += [_case("everything", "decode", 1, 129280, **_ALL), _case("greedy n=1", "decode", 1, 129280)]
    return [*smoke, *edges, *decode]


def _filters() -> list[Case]:
    """Each filter at its limits, and on ties."""
    cold = {"row": _few_values, "temperature": 0.7}
    warm = {"row": _few_values, "temperature": 1.0}
    return [
        *(_case(f"top_k {k}", "edges", 2, 300, temperature=1.5, top_k=k) for k in (1, 2, 299, 300, 301, 2**40)),
        *(_case(f"top_p {p}", "edges", 2, 300, temperature=2.0, top_p=p) for p in (1e-300, 0.5, 1 - 2.0**-53)),
        *(_case(f"min_p {p}", "edges", 2, 300, temperature=2.0, min_p=p) for p in (1e-300, 1e-6, 0.3, 1.0)),
        *(_case(f"temperature {x}", "edges", 2, 300, temperature=x, top_p=0.9) for x in (1e-300, 0.01, 1e300)),
        *(_case(f"ties, top_k {k}", "edges", 4, 300, top_k=k, **warm) for k in (1, 20, 200)),
        *(_case(f"ties, top_p {p}", "edges", 4, 300, top_p=p, **cold) for p in (0.1, 0.6, 0.99)),
        *(_case(f"ties, min_p {p}", "edges", 4, 300, min_p=p, **warm) for p in (0.25, 1.0)),
        _case("ties, all filters", "edges", 4, 300, row=_few_values, **_ALL),
        _case("ties over blocks", "edges", 3, 2500, top_k=700, top_p=0.95, **warm),
        _case("all equal", "edges", 3, 1100, row=_equal, temperature=1.0, top_k=1063, top_p=0.97),
        _case("top_p meets top_k", "edges", 2, 300, top_k=40, top_p=1 - 2.0**-53, **warm),
        _case("min_p meets top_k", "edges", 4, 300, top_k=10, min_p=1.0, **warm),
        _case("wide", "edges", 2, 300, row=_wide, temperature=1.0, top_k=200, top_p=0.9),
        _case("wide and hot", "edges", 2, 300, row=_wide, temperature=1e38, top_k=280),
        _case("strong penalty", "edges", 4, 300, temperature=1.0, repetition_penalty=1e3, seen=True),
        _case("reward", "edges", 4, 300, temperature=1.0, repetition_penalty=0.5, seen=True),
    ]


def cases_with_probs() -> list[Case]:
    """The same with the distribution, which tells more than a token about the filters: theirs are here."""
    compare = {**COMPARE, "probs": _PROBS}
    return [replace(case, compare=compare, bytes_moved=case.bytes_moved * 3 // 2) for case in (*cases(), *_filters())]
