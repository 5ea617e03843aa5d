"""Which tile of tokens, and how many stages, a launch of gemm_tiles.cuh takes: data, one file a card.

No result depends on a pick, only the time does. Without a file a rule decides; ``scripts/tune_prefill.py`` measures the
candidates on a card and writes its file beside the compiled kernels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ds4.errors import Ds4Error
from ds4.kernels.arch import device_facts
from ds4.kernels.cubin_cache import default_directory

TOKENS = (8, 16, 32, 64, 128)
STAGES = (2, 3, 4)
N_SMS = 132  # where there is no GPU: those of an H200
_FORMAT = 1  # of the file
_DEFAULT_STAGES = {8: 4, 16: 4, 32: 3, 64: 2, 128: 2}
_STEP = 8  # a pick made for n tokens serves down to n / 8: the capacities of a prompt's chunks are that far apart
_MOST_SHARED = 97 * 1024  # bytes of a block's 99 KB; the rest is for what a kernel declares itself
_MINIMA, _PATTERNED = ("q2_k", "q4_k"), ("iq2_xxs",)
_PATTERN_BYTES = 256 * 8 * 16  # iq2_weights.cuh: kPatternBytes


@dataclass(frozen=True)
class Pick:
    """``tokens`` of a tile, ``stages`` of x in shared memory; of TOKENS and STAGES."""

    tokens: int
    stages: int


@dataclass(frozen=True)
class Shape:
    """A launch: the kernel, the columns of its matrices, their rows together and their formats in order."""

    kernel: str
    n_cols: int
    n_rows: int
    formats: tuple[str, ...]


def shared_bytes(pick: Pick, formats: Sequence[str]) -> int:
    """Dynamic shared memory of a block: GemmPlan::bytes, and the patterns of IQ2_XXS."""
    minima = any(name in _MINIMA for name in formats)
    patterned = any(name in _PATTERNED for name in formats)
    return (256 * pick.stages + 32 * minima) * pick.tokens + _PATTERN_BYTES * patterned


def candidates(formats: Sequence[str]) -> list[Pick]:
    """All picks whose block has the shared memory on every architecture."""
    picks = [Pick(tokens, stages) for tokens in TOKENS for stages in STAGES]
    return [pick for pick in picks if shared_bytes(pick, formats) <= _MOST_SHARED]


def pick(
    kernel: str,
    *,
    n_cols: int,
    n_rows: int,
    formats: Sequence[str],
    n_tok: int,
    device: torch.device,
    blocks: Callable[[int], int] | None = None,
) -> Pick:
    """The pick of a launch: that of the card's file, else by the rule of :func:`default_pick`.

    kernel   "gemm", "moe_up", "moe_down"
    n_cols, n_rows, formats  see :class:`Shape`
    n_tok    tokens that are expected: of the launch, or of an expert
    blocks   of the launch with tiles of so many tokens, see :func:`default_pick`
    Error:   Ds4Error for a file that is there but cannot be used
    """
    facts = device_facts(device.index or 0) if device.type == "cuda" else None
    table = _used.get() or (picks_of(facts.name) if facts is not None else Picks())
    found = table.find(Shape(kernel, n_cols, n_rows, tuple(formats)), n_tok)
    if found is not None:
        return found
    return default_pick(n_tok, facts.n_sms if facts is not None else N_SMS, blocks)


def default_pick(n_tok: int, n_sms: int = N_SMS, blocks: Callable[[int], int] | None = None) -> Pick:
    """The smallest tile that covers ``n_tok``, at most 128; where ``blocks`` says that a launch with it leaves
    more than an eighth of the multiprocessors idle, a smaller one, down to 16, as far as that makes more blocks."""
    tokens = next((n for n in TOKENS if n >= n_tok), TOKENS[-1])
    while (
        blocks is not None and tokens > 16 and 8 * blocks(tokens) < 7 * n_sms and blocks(tokens // 2) > blocks(tokens)
    ):
        tokens //= 2
    return Pick(tokens, _DEFAULT_STAGES[tokens])


class Picks:
    """The picks of a card: (shape, n_tok) -> Pick."""

    def __init__(self, entries: Iterable[tuple[Shape, int, Pick]] = ()) -> None:
        self._picks = {(shape, n_tok): pick for shape, n_tok, pick in entries}

    def find(self, shape: Shape, n_tok: int) -> Pick | None:
        """Of the smallest number of tokens that was measured and is ``n_tok`` to 8 ``n_tok`` - 1, or None."""
        measured = [n for at, n in self._picks if at == shape and n_tok <= n < _STEP * n_tok]
        return self._picks[shape, min(measured)] if measured else None

    def rows(self) -> list[tuple[Shape, int, Pick]]:
        """All of them, in order."""
        ordered = sorted(self._picks.items(), key=lambda item: (repr(item[0][0]), item[0][1]))
        return [(shape, n_tok, pick) for (shape, n_tok), pick in ordered]

    def __str__(self) -> str:
        lines = [
            f"{shape.kernel} {shape.n_rows} x {shape.n_cols} {','.join(shape.formats)}, {n_tok} tokens: "
            f"tiles of {pick.tokens}, {pick.stages} stages"
            for shape, n_tok, pick in self.rows()
        ]
        return "\n".join(lines)

    def to_json(self, card: str) -> str:
        """The text of the card's file."""
        rows = [
            {"kernel": s.kernel, "n_cols": s.n_cols, "n_rows": s.n_rows, "formats": list(s.formats)}
            | {"n_tok": n_tok, "tokens": pick.tokens, "stages": pick.stages}
            for s, n_tok, pick in self.rows()
        ]
        return json.dumps({"format": _FORMAT, "card": card, "picks": rows}, indent=1) + "\n"


_used: ContextVar[Picks | None] = ContextVar("picks", default=None)


@contextmanager
def using(picks: Picks) -> Iterator[None]:
    """These picks on every device, in place of the card's file: for measurements, and for tests."""
    token = _used.set(picks)
    try:
        yield
    finally:
        _used.reset(token)


def picks_file(card: str, directory: Path | None = None) -> Path:
    """Where the picks of a card are, ``card`` being its name from the driver; beside the compiled kernels."""
    return (directory or default_directory()) / f"picks-{re.sub(r'[^A-Za-z0-9]+', '-', card)}.json"


@cache
def picks_of(card: str, directory: Path | None = None) -> Picks:
    """The picks of a card, none where it has no file; read once. Raises Ds4Error for a file that cannot be used."""
    file = picks_file(card, directory)
    return read_picks(file, card) if file.is_file() else Picks()


def read_picks(file: Path, card: str) -> Picks:
    """The picks in a file of this card. Raises Ds4Error where it cannot be read or is not one."""

    def wrong(what: str) -> Ds4Error:
        return Ds4Error(f"{file}: {what}; delete it, or make it anew with scripts/tune_prefill.py")

    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise wrong(f"not readable as JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(data, dict) or data.get("format") != _FORMAT or not isinstance(data.get("picks"), list):
        raise wrong(f"no picks of format {_FORMAT}")
    if data.get("card") != card:
        raise wrong(f"picks of {data.get('card')!r}, not of {card!r}")
    entries = []
    for i, row in enumerate(data["picks"]):
        try:
            entries.append(_entry(row))
        except ValueError as error:
            raise wrong(f"pick {i}: {error}") from None
    return Picks(entries)


def _entry(row: Any) -> tuple[Shape, int, Pick]:
    """A row of the file. Raises ValueError for what is wrong with it."""
    numbers, known = ("n_cols", "n_rows", "n_tok", "tokens", "stages"), isinstance(row, dict)
    if not known or set(row) != {"kernel", "formats", *numbers}:
        raise ValueError(f"not an object with kernel, formats, {', '.join(numbers)}")
    for name in numbers:
        if type(row[name]) is not int or row[name] < 1:
            raise ValueError(f"{name} is {row[name]!r}, not a positive number")
    formats = row["formats"]
    if type(row["kernel"]) is not str or type(formats) is not list or not all(type(name) is str for name in formats):
        raise ValueError("kernel is a name and formats a list of names")
    pick = Pick(row["tokens"], row["stages"])
    if pick not in candidates(formats):
        raise ValueError(f"tiles of {pick.tokens} with {pick.stages} stages: there is no such launch")
    return Shape(row["kernel"], row["n_cols"], row["n_rows"], tuple(formats)), row["n_tok"], pick
