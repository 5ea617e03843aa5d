"""Cases of the operations of drafting."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ds4.kernels.cases import Case, Close, Compare, Exact, Group, Inputs
from ds4.kernels.draft import words as at

SLOTS = 17
_NORM = Close(1e-6, 1e-5, "an FP32 sum of d squares in another order, a root and two products, rows of size 1")
_EXACT: Compare = Exact()


def words_of(pos: int, tokens: Sequence[int] = (), *, drafted: int = 0) -> Tensor:
    """A step's block i32 [64] at ``pos``; what an operation does not set is 90 and more, to show if it is touched."""
    block = torch.arange(90, 90 + at.WORDS, dtype=torch.int32)
    block[at.POS], block[at.DRAFTED], block[at.LAST] = pos, drafted, pos - 1 + drafted
    block[at.TOKENS : at.TOKENS + len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
    return block


def _moved(inputs: Inputs, device: torch.device) -> Inputs:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _ring(rng: torch.Generator, width: int) -> Inputs:
    ids = torch.randint(0, 129280, (SLOTS,), generator=rng)
    return {"tail": torch.randn(SLOTS, 4, width, generator=rng), "ids": ids}


def _tap(seed: int, device: torch.device, *, n_tok: int, d: int, pos: int) -> Inputs:
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 129280, (8,), generator=rng).tolist()
    inputs: Inputs = {"streams": torch.randn(n_tok, 4, d, generator=rng), "words": words_of(pos, tokens)}
    return _moved(inputs | _ring(rng, d), device)


def tap_cases() -> list[Case]:
    """Smoke and edges for the emulation, decode at the dimensions of V4-Flash."""

    def case(name: str, group: Group, n_tok: int, d: int, pos: int) -> Case:
        make = partial(_tap, n_tok=n_tok, d=d, pos=pos)
        return Case(name, group, make, {"tail": _EXACT, "ids": _EXACT}, bytes_moved=n_tok * (32 * d + 12))

    return [
        case("8 tokens across the ring's end", "smoke", 8, 288, 12),
        case("the first token", "edges", 1, 32, 0),
        case("the last positions of 1M", "edges", 3, 36, 2**20 - 3),
        *(case(f"n={n}", "decode", n, 4096, 5000) for n in (1, 2, 8)),
    ]


def _pairs(seed: int, device: torch.device, *, n_pairs: int, d: int, pos: int) -> Inputs:
    rng = torch.Generator().manual_seed(seed)
    return _moved({"words": words_of(pos, [7 + seed]), **_ring(rng, d), "n_pairs": n_pairs}, device)


def pairs_cases() -> list[Case]:
    """As for ``draft_tap``."""

    def case(name: str, group: Group, n_pairs: int, d: int, pos: int) -> Case:
        make = partial(_pairs, n_pairs=n_pairs, d=d, pos=pos)
        results = dict.fromkeys(("words", "h", "tokens"), _EXACT)
        return Case(name, group, make, results, bytes_moved=n_pairs * (32 * d + 12))

    return [
        case("8 pairs across the ring's end", "smoke", 8, 288, 20),
        case("the first pair", "edges", 1, 32, 1),
        case("as many as there are", "edges", 5, 36, 5),
        *(case(f"n={n}", "decode", n, 4096, 5000) for n in (1, 2, 8)),
    ]


def _join(seed: int, device: torch.device, *, n_tok: int, d: int, size: float) -> Inputs:
    rng = torch.Generator().manual_seed(seed)
    embedded, h = torch.randn(2, n_tok, 4, d, generator=rng) * size
    enorm, hnorm = torch.rand(2, d, generator=rng) + 0.5
    return _moved({"embedded": embedded, "h": h, "enorm": enorm, "hnorm": hnorm}, device) | {"eps": 1e-6}


def join_cases() -> list[Case]:
    """As for ``draft_tap``."""

    def case(name: str, group: Group, n_tok: int, d: int, size: float = 1.0) -> Case:
        make = partial(_join, n_tok=n_tok, d=d, size=size)
        return Case(name, group, make, {"e": _NORM, "hn": _NORM}, bytes_moved=n_tok * 40 * d + 8 * d)

    return [
        case("8 tokens", "smoke", 8, 1280),
        case("a short row", "edges", 3, 4),
        case("eps shows", "edges", 2, 96, 1e-3),
        case("large streams", "edges", 2, 96, 1e4),
        *(case(f"n={n}", "decode", n, 4096) for n in (1, 2, 8)),
    ]


def _push(seed: int, device: torch.device, *, drafted: int) -> Inputs:
    token = torch.tensor([100 + seed], dtype=torch.int32)
    return _moved({"token": token, "words": words_of(1000, drafted=drafted)}, device)


def push_cases() -> list[Case]:
    """The first token of a draft, and the last of the longest; there are no dimensions."""

    def case(name: str, group: Group, drafted: int) -> Case:
        return Case(name, group, partial(_push, drafted=drafted), {"words": _EXACT}, bytes_moved=28)

    return [case("the first", "smoke", 0), case("the seventh", "edges", 6), case("the second", "decode", 1)]


def _accept(
    seed: int, device: torch.device, *, drafts: Sequence[int], token: Sequence[int], bad: int | None = None
) -> Inputs:
    status = torch.zeros(len(token), dtype=torch.int32)
    if bad is not None:
        status[bad:] = 1
    rows = torch.tensor(token, dtype=torch.int32) + seed
    return _moved({"token": rows, "status": status, "words": words_of(77, [5, *(t + seed for t in drafts)])}, device)


def accept_cases() -> list[Case]:
    """All, some, none accepted; a right token behind a wrong one; rows that are not finite."""

    def case(name: str, group: Group, drafts: Sequence[int], token: Sequence[int], bad: int | None = None) -> Case:
        make = partial(_accept, drafts=drafts, token=token, bad=bad)
        return Case(name, group, make, {"words": _EXACT}, bytes_moved=12 * len(token) + 20)

    return [
        case("5 of 7", "smoke", [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 9, 7, 8]),
        case("7 of 7", "edges", [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8]),
        case("none", "edges", [1], [2, 1]),
        case("without a draft", "edges", [], [3]),
        case("not finite behind the accepted", "edges", [1, 2, 3], [1, 2, 0, 4], bad=2),
        case("not finite, though the token agrees", "edges", [1, 2], [1, 2, 3], bad=0),
        case("1 of 1", "decode", [1], [1, 4]),
    ]
