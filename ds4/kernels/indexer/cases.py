"""Cases of ``index_score`` and ``index_topk``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ds4.kernels.cases import Case, Close, Compare, Exact, Group, Inputs
from ds4.kernels.common import apply_rope, hadamard, rope_angles, rope_frequencies
from ds4.kv.rows import PackedKey

KEY = PackedKey(128)
RATIO = 4
# Products are exact. A dot product is 8 FP32 additions of partial sums below 40 (the makers give it a spread of 10),
# each off by 2^-23 of that where tensor cores truncate: 4e-5. Weights times scale add up to 0.6 over the heads.
_SCORES = Close(2e-5, 1e-5, "FP32 sums in another order, truncated by tensor cores", open_where_nan=True)
_MARGIN = 2e-5  # of the step of FP4: far above the rounding of rotated queries, 1e-6
_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # where the nearest E2M1 code changes
_STALE = 0xFF


def _near_ties(q: Tensor, cis: Tensor) -> Tensor:
    """Bool [n, h]: queries f32 [n, h, 128] of which another order of additions could round a value differently."""
    rotated = hadamard(apply_rope(q, torch.view_as_complex(cis).unsqueeze(1))).unflatten(-1, (-1, 32))
    amax = rotated.abs().amax(-1, keepdim=True)
    scale = torch.exp2(torch.ceil(torch.log2(amax / 6)))
    to_middle = ((rotated / scale).abs().unsqueeze(-1) - torch.tensor(_MIDDLES)).abs().amin(-1)
    fill = amax / (6 * scale)  # above 1/2 and at most 1; beyond either end the scale is another
    return (to_middle < _MARGIN).any(-1).any(-1) | ((fill > 1 - _MARGIN) | (fill < 0.5 + _MARGIN)).flatten(1).any(
        1, True
    )


def queries(rng: torch.Generator, n_tok: int, n_heads: int, pos: int) -> tuple[Tensor, Tensor]:
    """q f32 [n_tok, n_heads, 128] without near ties, cis f32 [n_tok, 32, 2]."""
    frequencies = rope_frequencies(64, 160000.0, 16.0, 65536, 32.0, 1.0)
    cis = torch.view_as_real(rope_angles(torch.arange(pos, pos + n_tok), frequencies)).contiguous()
    q = torch.randn(n_tok, n_heads, 128, generator=rng)
    while (redo := _near_ties(q, cis)).any():
        q[redo] = torch.randn(int(redo.sum()), 128, generator=rng)
    return q, cis


def score_inputs(
    seed: int,
    device: torch.device,
    *,
    n_tok: int,
    n_heads: int,
    pos: int,
    n_entries: int,
    top_k: int,
    change: Callable[[Inputs], None] | None = None,
) -> Inputs:
    """Random queries, weights and keys; keys that no token sees are stale. ``change`` edits the result."""
    rng = torch.Generator().manual_seed(seed)
    q, cis = queries(rng, n_tok, n_heads, pos)
    keys = torch.randint(0, 256, (n_entries, KEY.row_bytes), generator=rng, dtype=torch.uint8)
    keys[:, 64:] = 124 + keys[:, 64:] % 3
    keys[(pos + n_tok) // RATIO :] = _STALE
    weights = torch.randn(n_tok, n_heads, generator=rng)
    inputs: Inputs = {"q": q, "cis": cis, "weights": weights, "keys": keys, "pos": torch.tensor([pos]).int()}
    if change:
        change(inputs)
    moved = {name: value.to(device) for name, value in inputs.items()}
    return moved | {"weight_scale": (128 * n_heads) ** -0.5, "top_k": top_k}


def _uneven_scales(inputs: Inputs) -> None:
    """Block scales of a key up to 2^127 apart, a key of zeros, keys of the smallest scales, weights of both signs."""
    keys = inputs["keys"]
    keys[::3, 64:66] = torch.tensor([0, 127], dtype=torch.uint8)
    keys[1::3, 66] = 90
    keys[2] = 0
    keys[3, 64:] = 1
    keys[4, 64:] = 0
    keys[5, 64:] = torch.tensor([126, 116, 106, 96], dtype=torch.uint8)
    inputs["weights"][:, ::2] *= -1


def _plain_queries(inputs: Inputs) -> None:
    """Queries of zeros, of one value only (all columns of its rotation are equal), and weights of zero."""
    inputs["q"][0] = 0
    inputs["q"][1, :, 1:] = 0
    inputs["q"][1, :, 0] = 1.1
    inputs["weights"][2] = 0


def _score(name: str, group: Group, **sizes: Any) -> Case:
    n_tok, n_heads, seen = sizes["n_tok"], sizes["n_heads"], (sizes["pos"] + sizes["n_tok"]) // RATIO
    scored = seen if seen > sizes["top_k"] else 0
    return Case(
        name,
        group,
        partial(score_inputs, **sizes),
        {"scores": _SCORES},
        bytes_moved=4 + (scored > 0) * n_tok * n_heads * 516 + scored * (KEY.row_bytes + 4 * n_tok),
        flops=2 * n_tok * n_heads * 128 * scored,
    )


def score_cases() -> list[Case]:
    """Smoke and edges for the emulation, decode at the dimensions of V4-Flash."""
    small = {"n_heads": 8, "top_k": 16}
    smoke = [
        _score("8 tokens", "smoke", n_tok=8, pos=4 * 40 - 3, n_entries=45, **small),
        _score("a prompt's tokens", "edges", n_tok=70, pos=4 * 10, n_entries=45, **small),
        _score("1 token", "smoke", n_tok=1, pos=4 * 70 + 1, n_entries=70, **small),
    ]
    edges = [
        _score("64 heads", "edges", n_tok=2, n_heads=64, pos=4 * 33 - 2, n_entries=40, top_k=32),
        _score("5 heads", "edges", n_tok=3, n_heads=5, pos=4 * 32, n_entries=33, top_k=16),
        _score("some tokens see top_k", "edges", n_tok=7, pos=4 * 16 + 1, n_entries=64, **small),
        _score("all tokens see top_k", "edges", n_tok=3, pos=4 * 16, n_entries=64, **small),
        _score("nothing to see", "edges", n_tok=3, pos=0, n_entries=1, **small),
        _score("uneven scales", "edges", n_tok=2, pos=4 * 63 + 3, n_entries=64, change=_uneven_scales, **small),
        _score("plain queries", "edges", n_tok=4, pos=4 * 30, n_entries=31, change=_plain_queries, **small),
    ]
    edges += [_score(f"{n} entries", "edges", n_tok=5, pos=4 * n - 3, n_entries=n + 1, **small) for n in (17, 32, 257)]
    flash = {"n_heads": 64, "top_k": 512}
    decode = [
        _score(f"{n} entries n={n_tok}", "decode", n_tok=n_tok, pos=4 * n - n_tok, n_entries=n, **flash)
        for n, n_tok in ((2048, 1), (4096, 2), (32768, 1), (32768, 2), (32768, 8), (262144, 1))
    ]
    return [*smoke, *edges, *decode]


Draw = Callable[[torch.Generator, int, int], Tensor]


def _spread(rng: torch.Generator, n_tok: int, n_entries: int) -> Tensor:
    return torch.randn(n_tok, n_entries, generator=rng)


def _integers(rng: torch.Generator, n_tok: int, n_entries: int) -> Tensor:
    """Few values, so that ties cross the cut."""
    return torch.randint(-3, 4, (n_tok, n_entries), generator=rng).float()


def _equal(rng: torch.Generator, n_tok: int, n_entries: int) -> Tensor:
    return torch.full((n_tok, n_entries), -0.5)


def _close(rng: torch.Generator, n_tok: int, n_entries: int) -> Tensor:
    """Neighbouring numbers of FP32: only the last digit of the key differs."""
    return (torch.randint(0x3F800000, 0x3F800100, (n_tok, n_entries), generator=rng)).int().view(torch.float32)


def _special(rng: torch.Generator, n_tok: int, n_entries: int) -> Tensor:
    """Zeros of both signs, infinities, denormals and NaN of both signs."""
    values = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 3.4e38, -3.4e38])
    values = torch.cat((values, torch.tensor([-1, 0x7F800001]).int().view(torch.float32)))
    return values[torch.randint(0, len(values), (n_tok, n_entries), generator=rng)]


def _lowest(rng: torch.Generator, n_tok: int, n_entries: int) -> Tensor:
    """-inf but for a few numbers, so that -inf has to be chosen."""
    return torch.where(torch.rand(n_tok, n_entries, generator=rng) < 0.02, 1.0, -torch.inf)


def topk_inputs(
    seed: int, device: torch.device, *, n_tok: int, pos: int, n_entries: int, top_k: int, draw: Draw = _spread
) -> Inputs:
    """Scores of the entries that each token sees; behind them are infinities."""
    rng = torch.Generator().manual_seed(seed)
    scores = draw(rng, n_tok, n_entries)
    for t in range(n_tok):
        scores[t, (pos + t + 1) // RATIO :] = torch.inf
    return {"scores": scores.to(device), "pos": torch.tensor([pos], dtype=torch.int32, device=device), "top_k": top_k}


def _topk(name: str, group: Group, **sizes: Any) -> Case:
    n_tok, top_k = sizes["n_tok"], sizes["top_k"]
    seen = [(sizes["pos"] + t + 1) // RATIO for t in range(n_tok)]
    moved = 4 + sum(4 * n for n in seen if n > top_k) + 4 * n_tok * top_k
    compare: dict[str, Compare] = {"selected": Exact()}
    return Case(name, group, partial(topk_inputs, **sizes), compare, bytes_moved=moved)


def topk_cases() -> list[Case]:
    """Smoke and edges for the emulation, with all sizes around top_k and slices; decode at V4-Flash's top_k."""
    smoke = [
        _topk("a prompt's tokens", "edges", n_tok=70, pos=4 * 10, n_entries=45, top_k=16, draw=_integers),
        _topk("8 tokens", "smoke", n_tok=8, pos=4 * 40 - 3, n_entries=45, top_k=16, draw=_integers),
        _topk("1 token", "smoke", n_tok=1, pos=4 * 300, n_entries=600, top_k=128),
    ]
    draws = {"spread": _spread, "ties": _integers, "equal": _equal, "close": _close, "special": _special}
    draws |= {"lowest": _lowest}
    around = (
        (0, 16),
        (1, 16),
        (4, 16),
        (16, 16),
        (32, 16),
        (127, 128),
        (129, 128),
        (255, 128),
        (2047, 512),
        (2051, 16),
    )
    edges = [  # 8 tokens from here on see n, n + 1 and n + 2
        _topk(f"{n} to {n + 2} of {n + 3}, top {k}", "edges", n_tok=8, pos=4 * n + 2, n_entries=n + 3, top_k=k)
        for n, k in around
    ]
    edges += [
        _topk(f"{name}, top {k}", "edges", n_tok=2, pos=4 * 700 + 2, n_entries=703, top_k=k, draw=draw)
        for name, draw in draws.items()
        for k in (1, 512)
    ]
    edges += [
        _topk("two slices", "edges", n_tok=2, pos=4 * 16384 + 2, n_entries=16390, top_k=512, draw=_integers),
        _topk("ties in all of three slices", "edges", n_tok=1, pos=4 * 33000, n_entries=50000, top_k=1024, draw=_equal),
    ]
    decode = [
        _topk(f"{n} entries n={n_tok}", "decode", n_tok=n_tok, pos=4 * n - n_tok, n_entries=n, top_k=512)
        for n, n_tok in ((2048, 1), (16384, 1), (16384, 2), (65536, 8), (262144, 1))
    ]
    decode.append(
        _topk("262144 ties", "decode", n_tok=2, pos=4 * 262144 - 3, n_entries=262144, top_k=512, draw=_integers)
    )
    return [*smoke, *edges, *decode]
