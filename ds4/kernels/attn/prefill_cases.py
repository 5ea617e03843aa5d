"""Cases of ``attn_prefill``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ds4.kernels.attn.cases import EPS, ROW, STALE, WINDOW, n_entries, sinks, sizes_of_queries
from ds4.kernels.cases import Case, Close, Compare, Group, Inputs
from ds4.kernels.common import rope_angles, rope_frequencies

# Sums in another order move a score by 1e-6, and one in thousands of the weights is then rounded the other way: by 2^-8
# of it as a rule, 2^-7 at most. With hundreds of rows of size 1 the largest share of a row times its values is 0.2, so
# that o moves by 8e-4 (measured 1e-4 over 12 seeds); with few rows it is about as large as o. The result is rounded to
# bf16, whose last place is 2^-7 of it at most. Rows from `count` on are open.
_REASON = "a weight rounded the other way, 2^-8 of 0.2, and the last place of a bf16"
COMPARE: dict[str, Compare] = {"o": Close(8e-4, 2**-7, _REASON, open_where_nan=True)}


def random_inputs(
    seed: int,
    device: torch.device,
    *,
    n_rows: int,
    n_heads: int,
    pos: int,
    count: int | None = None,
    ratio: int = 0,
    top_k: int = 0,
    spare: int = 3,
    change: Callable[[Inputs], None] | None = None,
) -> Inputs:
    """Rows of size 1 whose scores spread by 1; what must not be read is stale. ``change`` edits the result.

    ``count``: tokens of the chunk, None for ``n_rows`` without the tensor. ``top_k``: entries are drawn, 0 for all;
    ``spare``: entries that the pool has beyond those that can be seen.
    """
    rng = torch.Generator().manual_seed(seed * 1000 + pos % 997)
    positions = torch.arange(pos, pos + n_rows)
    end = pos + (n_rows if count is None else count)
    rows = torch.full((WINDOW + n_rows, ROW.row_bytes), STALE, dtype=torch.uint8)
    seen = torch.arange(max(0, pos - WINDOW), end) - pos + WINDOW
    rows[seen] = ROW.pack(torch.randn(len(seen), 512, generator=rng))
    pool = selected = None
    if ratio:
        n = n_entries(end - 1, ratio)
        pool = torch.full((n + spare, ROW.row_bytes), STALE, dtype=torch.uint8)
        pool[:n] = ROW.pack(torch.randn(n, 512, generator=rng))
    if top_k:
        selected = torch.full((n_rows, top_k), -1, dtype=torch.int32)
        for i in range(end - pos):
            chosen = torch.randperm(n_entries(pos + i, ratio), generator=rng)[:top_k].sort().values
            selected[i, : len(chosen)] = chosen.to(torch.int32)
    inputs: Inputs = {
        "q": (torch.randn(n_rows, n_heads, 512, generator=rng) * 3).to(torch.bfloat16),
        "cis": torch.view_as_real(rope_angles(positions, rope_frequencies(64, 10000.0, 1.0, 0, 32, 1))).contiguous(),
        "sink": torch.randn(n_heads, generator=rng),
        "rows": rows,
        "pool": pool,
        "selected": selected,
        "pos": torch.tensor([pos], dtype=torch.int32),
        "count": None if count is None else torch.tensor([count], dtype=torch.int32),
    }
    if change:
        change(inputs)
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    return moved | {"window": WINDOW, "ratio": ratio, "eps": EPS}


def _zero_rows(inputs: Inputs) -> None:
    """The rows are zero, and so is a query."""
    inputs["rows"].copy_(ROW.pack(torch.zeros(len(inputs["rows"]), 512)))
    inputs["q"][0, 1] = 0


def _scales(inputs: Inputs) -> None:
    """Blocks of very different size, each row's own: from 1e-8 to 30."""
    for name in ("rows", "pool"):
        rng = torch.Generator().manual_seed(len(inputs[name]))
        size = 10.0 ** (torch.rand(len(inputs[name]), 7, generator=rng) * 9.5 - 8)
        rows = torch.randn(len(inputs[name]), 512, generator=rng)
        rows[:, :448] *= size.repeat_interleave(64, dim=1)
        inputs[name].copy_(ROW.pack(rows))


def _extreme_scales(inputs: Inputs) -> None:
    """Scales that no writer makes, down to 2^-127 and up to 2^7, and codes that are subnormal."""
    inputs["rows"][:, 448:455] = torch.tensor([0, 1, 20, 60, 100, 118, 134], dtype=torch.uint8)
    inputs["rows"][:, :448] &= 0x87
    inputs["rows"][:, 320:384] |= 0x38


def _rising(inputs: Inputs) -> None:
    """Scores that rise over the rows from -20 to 20 in one head, fall in another, and are peaks of 30 in a third: a
    query in one column has that column of the rows as scores."""
    n = len(inputs["rows"])
    rows = torch.randn(n, 512, generator=torch.Generator().manual_seed(n))
    rows[:, 0] = torch.linspace(-20, 20, n)
    rows[:, 1] = torch.where(torch.arange(n) % 40 == 7, 30.0, 0.0)
    inputs["rows"].copy_(ROW.pack(rows))
    inputs["q"][:] = 0
    for head, (column, sign) in enumerate([(0, 1.0), (0, -1.0), (1, 1.0)]):
        inputs["q"][:, head, column] = sign


def _case(name: str, group: Group, n_rows: int, n_heads: int, pos: int, **more: Any) -> Case:
    compare = more.pop("compare", COMPARE)
    make = partial(random_inputs, n_rows=n_rows, n_heads=n_heads, pos=pos, **more)
    ratio, top_k = more.get("ratio", 0), more.get("top_k", 0)
    live = more.get("count") or n_rows
    window = [min(p + 1, WINDOW) for p in range(pos, pos + live)]
    pool = [min(n_entries(p, ratio), top_k or p + 1) for p in range(pos, pos + live)]
    read = window[0] + live - 1 + min(sum(pool), n_entries(pos + live - 1, ratio))
    moved = read * ROW.row_bytes + 4 * top_k * live + live * n_heads * 512 * 4
    return Case(name, group, make, compare, bytes_moved=moved, flops=4 * 512 * n_heads * sum(window + pool))


def cases() -> list[Case]:
    """Smoke and edges for the emulation, decode at the dimensions of V4-Flash."""
    smoke = [  # the first one also runs under sanitizers
        _case("selected, 5 of 7 tokens", "smoke", 7, 4, 126, ratio=4, top_k=33, count=5),
        _case("window, 3 tokens", "smoke", 3, 4, 126),
        _case("all entries, 3 tokens across an entry", "smoke", 3, 4, 254, ratio=128),
    ]
    edges = [
        _case("first token", "edges", 1, 4, 0, ratio=4, top_k=16),
        _case("an entry from the fourth token on", "edges", 8, 8, 1, ratio=4, top_k=16, count=6),
        _case("3 to 4 entries, none of them chosen by HCA", "edges", 2, 4, 13, ratio=128, count=1),
        _case("all of the list is there", "edges", 2, 20, 258, ratio=4, top_k=64),
        _case("room for 64 tokens, 68 heads", "edges", 64, 68, 300, ratio=4, top_k=16, count=1),
        _case("many tiles", "edges", 1, 4, 128 * 500, ratio=128, count=1),
        _case("sinks", "edges", 1, 4, 40, change=sinks),
        _case("rows of zeros", "edges", 1, 4, 150, change=_zero_rows),
        _case("sizes of blocks", "edges", 1, 4, 300, ratio=128, change=_scales),
        _case("smallest and largest scales", "edges", 1, 4, 60, change=_extreme_scales),
        _case("scores that rise and fall", "edges", 2, 4, 200, change=_rising),
        _case("sizes of queries", "edges", 1, 4, 70, change=sizes_of_queries),
    ]
    decode = [_case(f"SWA n={n}", "decode", n, 64, 8000) for n in (64, 4096)]
    decode += [_case(f"CSA n={n}", "decode", n, 64, 8000, ratio=4, top_k=512) for n in (8, 64, 512, 4096)]
    decode += [_case(f"HCA n={n}", "decode", n, 64, 1024 * k - n, ratio=128) for k, n in ((32, 512), (1024, 64))]
    return [*smoke, *edges, *decode]
