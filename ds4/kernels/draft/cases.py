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
_MEAN = Close(1e-6, 1e-6, "a mean of four of size 1, summed in another order: two roundings of a sum of size 4, 2^-22")
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


def _mean(seed: int, device: torch.device, *, n_tok: int, d: int, pos: int, first: int, taps: int) -> Inputs:
    rng = torch.Generator().manual_seed(seed)
    inputs = _tap(seed, torch.device("cpu"), n_tok=n_tok, d=d, pos=pos)
    return _moved(inputs | {"tail": torch.randn(SLOTS, taps * d, generator=rng), "first": first * d}, device)


def mean_cases() -> list[Case]:
    """As for ``draft_tap``; the first, the last and the only layer."""

    def case(name: str, group: Group, n_tok: int, d: int, pos: int, first: int = 0, taps: int = 3) -> Case:
        make = partial(_mean, n_tok=n_tok, d=d, pos=pos, first=first, taps=taps)
        return Case(name, group, make, {"tail": _MEAN, "ids": _EXACT}, bytes_moved=n_tok * (20 * d + 12))

    return [
        case("8 tokens across the ring's end", "smoke", 8, 1056, 12, 1),
        case("the first token", "edges", 1, 32, 0),
        case("the last positions of 1M", "edges", 3, 36, 2**20 - 3, 2),
        case("one layer", "edges", 2, 4, 7, 0, 1),
        *(case(f"n={n}", "decode", n, 4096, 5000, 1) for n in (1, 2, 8)),
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


def _norm(seed: int, device: torch.device, *, n_tok: int, d: int, size: float) -> Inputs:
    inputs = _join(seed, device, n_tok=n_tok, d=d, size=size)
    return {"x": inputs["h"][:, 1].contiguous(), "norm": inputs["hnorm"], "eps": inputs["eps"]}


def norm_cases() -> list[Case]:
    """As for ``draft_join``."""

    def case(name: str, group: Group, n_tok: int, d: int, size: float = 1.0) -> Case:
        make = partial(_norm, n_tok=n_tok, d=d, size=size)
        return Case(name, group, make, {"y": _NORM}, bytes_moved=n_tok * 8 * d + 4 * d)

    return [
        case("8 tokens", "smoke", 8, 1280),
        case("a short row", "edges", 3, 4),
        case("eps shows", "edges", 2, 96, 1e-3),
        *(case(f"n={n}", "decode", n, 4096) for n in (1, 2, 8)),
    ]


def _block(seed: int, device: torch.device, *, n_tok: int, pos: int) -> Inputs:
    return _moved({"words": words_of(pos, [7 + seed], drafted=3), "noise": 128799, "n_tok": n_tok}, device)


def block_cases() -> list[Case]:
    """Blocks of 1, 5 and 8; there are no dimensions."""

    def case(name: str, group: Group, n_tok: int, pos: int) -> Case:
        results = dict.fromkeys(("words", "tokens"), _EXACT)
        return Case(name, group, partial(_block, n_tok=n_tok, pos=pos), results, bytes_moved=4 * n_tok + 20)

    return [
        case("a block of 8", "smoke", 8, 1000),
        case("the token alone", "edges", 1, 1),
        case("a block of 5", "decode", 5, 2**20 - 1),
    ]


def _choose(seed: int, device: torch.device, *, vocab: int, kind: str) -> Inputs:
    rng = torch.Generator().manual_seed(seed)
    logits, bias = (torch.randn(1, vocab, generator=rng) for _ in range(2))
    if kind == "ties":
        logits, bias = logits.round(), bias.round()
    elif kind == "nan":
        bias[0, vocab // 2 :: 3] = torch.nan
    elif kind == "negative":
        logits -= 50
    return _moved({"logits": logits, "bias": bias}, device)


def choose_cases() -> list[Case]:
    """The best in any block, among many equals, and where nothing is a number or above 0."""

    def case(name: str, group: Group, vocab: int, kind: str = "") -> Case:
        results = dict.fromkeys(("biased", "token"), _EXACT)
        return Case(name, group, partial(_choose, vocab=vocab, kind=kind), results, bytes_moved=12 * vocab)

    return [
        case("three blocks", "smoke", 2500),
        case("many equal ones", "edges", 3000, "ties"),
        case("not a number", "edges", 1030, "nan"),
        case("all below 0", "edges", 40, "negative"),
        case("V4-Flash", "decode", 129280),
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
