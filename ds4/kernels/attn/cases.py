"""Cases of ``attn_decode``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ds4.kernels.cases import Case, Close, Compare, Group, Inputs
from ds4.kernels.common import rope_angles, rope_frequencies
from ds4.kv.rows import PackedRow

ROW = PackedRow(448, 64)
WINDOW, RING_SLOTS, EPS = 128, 136, 1e-6
STALE = 0x7F  # NaN as an e4m3 code, 2^0 as a scale, 3.4e38 as a pair of bytes of bf16

# A query and a probability are split into two bf16, which leaves 2^-18 of them at most, 2^-20 as a rule. Scores, sums
# of 512 products scaled by 512^-0.5, are then off by 2^-20 of the rows' size R, and a result by R times that: of
# thousands of results the worst has been 8e-6 for R = 1 and 9e-5 for R = 3. FP32 sums in another order add less.
_REASON = "queries and probabilities to 2^-20 or so: 1e-6 R^2 as a rule, ten times that at worst, for rows of size R"
COMPARE: dict[str, Compare] = {"o": Close(2e-5, 1e-5, _REASON)}
_LARGE: dict[str, Compare] = {"o": Close(3e-4, 1e-5, f"{_REASON}, 3 here")}


def n_entries(position: int, ratio: int) -> int:
    """Entries of the pool that a token at ``position`` may see."""
    return (position + 1) // ratio if ratio else 0


def random_inputs(
    seed: int,
    device: torch.device,
    *,
    n_tok: int,
    n_heads: int,
    pos: int,
    ratio: int = 0,
    top_k: int = 0,
    spare: int = 3,
    change: Callable[[Inputs], None] | None = None,
) -> Inputs:
    """Rows of size 1 whose scores spread by 1, in a cache whose other slots are stale; ``change`` edits the result.

    ``top_k``: entries are drawn, 0 for all; ``spare``: entries that the pool has beyond those that can be seen.
    """
    rng = torch.Generator().manual_seed(seed * 1000 + pos % 997)
    positions = torch.arange(pos, pos + n_tok)
    last = pos + n_tok - 1
    ring = torch.full((RING_SLOTS, ROW.row_bytes), STALE, dtype=torch.uint8)
    first = max(0, pos - WINDOW + 1)
    ring[torch.arange(first, last + 1) % RING_SLOTS] = ROW.pack(torch.randn(last + 1 - first, 512, generator=rng))
    pool = selected = None
    if ratio:
        n = n_entries(last, ratio)
        pool = torch.full((n + spare, ROW.row_bytes), STALE, dtype=torch.uint8)
        pool[:n] = ROW.pack(torch.randn(n, 512, generator=rng))
    if top_k:
        selected = torch.full((n_tok, top_k), -1, dtype=torch.int32)
        for i, position in enumerate(positions.tolist()):
            n = n_entries(position, ratio)
            chosen = torch.randperm(n, generator=rng)[:top_k].sort().values
            selected[i, : len(chosen)] = chosen.to(torch.int32)
    inputs: Inputs = {
        "q": torch.randn(n_tok, n_heads, 512, generator=rng) * 3,
        "cis": torch.view_as_real(rope_angles(positions, rope_frequencies(64, 10000.0, 1.0, 0, 32, 1))).contiguous(),
        "sink": torch.randn(n_heads, generator=rng),
        "ring": ring,
        "pool": pool,
        "selected": selected,
        "pos": torch.tensor([pos], dtype=torch.int32),
    }
    if change:
        change(inputs)
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    return moved | {"window": WINDOW, "ratio": ratio, "eps": EPS}


def sinks(inputs: Inputs) -> None:
    """Sinks that take nothing, half, almost all and everything."""
    inputs["sink"][:] = torch.tensor([-torch.inf, 3.5, 80.0, torch.inf])


def _zero_rows(inputs: Inputs) -> None:
    """The window's rows are zero, and so is a query."""
    inputs["ring"].copy_(ROW.pack(torch.zeros(RING_SLOTS, 512)))
    inputs["q"][0, 1] = 0


def _scales(inputs: Inputs) -> None:
    """Blocks of very different size: those of 1e-10 to 1e-4 beside one of 8, in which the score then lies."""
    size = 10.0 ** torch.tensor([-10.0, -7, -4, -3, -2, 0, 0.9]).repeat_interleave(64)
    for name in ("ring", "pool"):
        n = len(inputs[name])
        rows = torch.randn(n, 512, generator=torch.Generator().manual_seed(n))
        rows[:, :448] *= size
        inputs[name].copy_(ROW.pack(rows))


def _extreme_exponents(inputs: Inputs) -> None:
    """Scales that no writer makes, down to 2^-127, and codes that are subnormal."""
    exponents = torch.tensor([0, 1, 20, 60, 100, 118, 120], dtype=torch.uint8)
    inputs["ring"][:, 448:455] = exponents
    inputs["ring"][:, :448] &= 0x87
    inputs["ring"][:, 384:448] |= 0x38


def _peaked(inputs: Inputs) -> None:
    """Scores up to 90: a row alone has all the weight, in the first tile of one head, the last of another."""
    slots = (int(inputs["pos"]) - torch.tensor([127, 0, 60, 100])) % RING_SLOTS
    rows = ROW.unpack(inputs["ring"][slots])
    inputs["ring"][slots] = ROW.pack(rows * 4 * rows.square().mean(1, keepdim=True).rsqrt())
    rows = ROW.unpack(inputs["ring"][slots])
    cis = torch.view_as_complex(inputs["cis"])[0]
    turned = torch.view_as_complex(rows[:, 448:].unflatten(1, (32, 2)).contiguous()) * cis.conj()
    inputs["q"][0, :4, :448] = rows[:, :448]
    inputs["q"][0, :4, 448:] = torch.view_as_real(turned).flatten(1)


def sizes_of_queries(inputs: Inputs) -> None:
    """Raw queries from 1e-6, where eps shows, to 1e6."""
    inputs["q"] *= 10.0 ** torch.linspace(-6, 6, inputs["q"].shape[1]).unsqueeze(-1)


def _case(name: str, group: Group, n_tok: int, n_heads: int, pos: int, **more: Any) -> Case:
    compare = more.pop("compare", COMPARE)
    make = partial(random_inputs, n_tok=n_tok, n_heads=n_heads, pos=pos, **more)
    ratio, top_k = more.get("ratio", 0), more.get("top_k", 0)
    window = [min(p + 1, WINDOW) for p in range(pos, pos + n_tok)]
    pool = [min(n_entries(p, ratio), top_k or p) for p in range(pos, pos + n_tok)]
    read = window[0] + n_tok - 1 + (min(sum(pool), n_entries(pos, ratio)) if top_k else pool[-1])
    moved = read * ROW.row_bytes + 4 * top_k * n_tok + n_tok * n_heads * 512 * 8
    return Case(name, group, make, compare, bytes_moved=moved, flops=4 * 512 * n_heads * sum(window + pool))


def cases() -> list[Case]:
    """Smoke and edges for the emulation, decode at the dimensions of V4-Flash."""
    smoke = [
        _case("window, 8 tokens across the ring's end", "smoke", 8, 4, 133),
        _case("selected, 8 tokens", "smoke", 8, 4, 60, ratio=4, top_k=16),
        _case("all entries, 2 tokens across an entry", "smoke", 2, 4, 382, ratio=128),
    ]
    edges = [_case(f"{n} rows", "edges", 1, 4, n - 1) for n in (1, 2, 5, 17, 33)]
    edges += [
        _case("127 and more rows", "edges", 4, 4, 126, ratio=128),
        _case("an entry from the first token on", "edges", 8, 5, 1, ratio=4, top_k=16),
        _case("255 to 257 rows", "edges", 8, 4, 507, ratio=4, top_k=256),
        _case("top 128 of more", "edges", 2, 20, 1000, ratio=4, top_k=128),
        _case("capacity of many more rows", "edges", 1, 4, 300, ratio=128, spare=1000),
        _case("several tiles a span", "edges", 1, 4, 128 * 1921 - 2, ratio=128),
        _case("sinks", "edges", 1, 4, 40, change=sinks),
        _case("rows of zeros", "edges", 1, 4, 150, ratio=128, change=_zero_rows),
        _case("sizes of blocks", "edges", 2, 4, 300, ratio=128, change=_scales, compare=_LARGE),
        _case("smallest scales", "edges", 1, 4, 60, change=_extreme_exponents),
        _case("peaked scores", "edges", 1, 4, 200, change=_peaked),
        _case("sizes of queries", "edges", 2, 4, 70, change=sizes_of_queries),
    ]
    decode = [_case("SWA n=1", "decode", 1, 64, 5000)]
    decode += [_case(f"CSA n={n}", "decode", n, 64, 8000, ratio=4, top_k=512) for n in (1, 2, 8)]
    decode += [_case(f"HCA at {k}k tokens n=1", "decode", 1, 64, 1024 * k - 1, ratio=128) for k in (32, 1024)]
    return [*smoke, *edges, *decode]
