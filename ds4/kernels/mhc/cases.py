"""Cases of ``mhc_boundary`` and ``hc_head``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ds4.kernels.cases import Case, Close, Compare, Exact, Group, Inputs
from ds4.kernels.mhc.ref import hc_sinkhorn

HC_EPS = NORM_EPS = 1e-6
ITERS = 20
_DTYPES = {"f32": torch.float32, "f16": torch.float16}
_SCALE = {"boundary": [0.6, -0.7, 1.0], "head": [0.8]}

# Of these the emulation uses a quarter (seeds 0 to 2, all cases); a GPU's rsqrtf and expf are off by 2^-23 more.
_STREAMS = Close(1e-6, 1e-6, "five products of size 1 to 4, added in another order: 5 * 2^-24 of their sum")
_X = Close(
    4e-6, 2e-6, "logits off by some 1e-6, the order of their 4 d terms; weights and norm by as much of their value"
)
_WEIGHTS = Close(2e-6, 2e-6, "logits off by some 1e-6, the gates by a quarter of that; both Sinkhorn forms converge")
_ACTS: dict[str, dict[str, Compare]] = {
    "none": {},
    "bf16": {"rounded": Close(1e-6, 2.0**-7, "x on two sides of a rounding boundary of bf16: one step")},
    "fp8": {
        "codes": Close(2.0**-9, 2.0**-3, "x on two sides of a rounding boundary of e4m3: one step"),
        "exponents": Exact(),  # no block of the seeded cases has its largest value near a power of two times 448
    },
    "int8": {
        "codes": Close(1, 0, "x on two sides of a rounding boundary: one step"),
        "scales": Close(1e-7, 4e-6, "the tolerance of x"),
        "sums": Close(2, 0, "two of 16 codes at most lie so near a boundary"),
    },
}


def random_inputs(
    seed: int,
    device: torch.device,
    *,
    site: str,
    n_tok: int,
    d: int,
    fn: str,
    pending: bool = True,
    change: Callable[[Inputs], None] | None = None,
) -> Inputs:
    """Streams, outputs and logits of size 1; ``site`` is "boundary" or "head", ``change`` edits the result."""
    rng = torch.Generator().manual_seed(seed * 1000 + n_tok)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    n_mix = 24 if site == "boundary" else 4
    _, post, comb = hc_sinkhorn(normal(n_tok, 24), torch.ones(3), normal(24), 4, ITERS, HC_EPS)
    inputs: Inputs = {
        "y": normal(n_tok, d),
        "prev_post": post,
        "prev_comb": comb,
        "streams": normal(n_tok, 4, d),
        "fn": (normal(n_mix, 4 * d) * (4 * d) ** -0.5).to(_DTYPES[fn]),
        "scale": torch.tensor(_SCALE[site]),
        "base": normal(n_mix) * 0.5,
        "norm": 1 + 0.2 * normal(d),
    }
    if not pending:
        inputs |= dict.fromkeys(("y", "prev_post", "prev_comb"))
    inputs |= {"hc_eps": HC_EPS, "norm_eps": NORM_EPS} | ({"sinkhorn_iters": ITERS} if site == "boundary" else {})
    if change:
        change(inputs)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _zeros(inputs: Inputs) -> None:
    """The first token is zero everywhere: norm_eps alone keeps it finite."""
    for name in ("y", "streams"):
        inputs[name][0] = 0


def _spread(inputs: Inputs) -> None:
    """Tokens of very different size; y and streams share the factor, so that none of them vanishes beside the other."""
    size = 10.0 ** torch.arange(-2, len(inputs["y"]) - 2, dtype=torch.float32)
    inputs["y"] *= size.unsqueeze(1)
    inputs["streams"] *= size.view(-1, 1, 1)


def _saturated(inputs: Inputs) -> None:
    """Gates at 0 and 1, and a softmax that is one-hot: its other entries are hc_eps."""
    inputs["base"] = torch.where(inputs["base"] > 0, 40.0, -40.0)
    if len(inputs["base"]) == 24:
        inputs["base"][8:] = (torch.eye(4).roll(1, 0) * 60).flatten()


def _outlier(inputs: Inputs) -> None:
    """One column a thousand times the others: the blocks of small values must keep their own scales."""
    inputs["norm"][3] = 1000.0
    inputs["norm"][32:64] = 0.0


def _counted(inputs: Inputs) -> None:
    """Tokens in the first group and in half of the second."""
    inputs["count"] = torch.tensor([12], dtype=torch.int32)


def _case(name: str, group: Group, site: str, act: str, n_tok: int, d: int, fn: str, **more: Any) -> Case:
    make = partial(random_inputs, site=site, n_tok=n_tok, d=d, fn=fn, **more)
    n_mix = 24 if site == "boundary" else 4
    compare: dict[str, Compare] = {"streams": _STREAMS, "x": _X}
    compare |= ({"post": _WEIGHTS, "comb": _WEIGHTS} if site == "boundary" else {}) | _ACTS[act]
    if more.get("change") is _spread:
        compare["streams"] = Close(1e-3, 1e-6, "streams of size 1000 at most, as above of their size")
    if more.get("change") is _counted:
        compare = {key: replace(one, open_where_nan=True) for key, one in compare.items() if isinstance(one, Close)}
    # streams, y and x in FP32: twice 4 d, and d each
    moved = n_mix * 4 * d * _DTYPES[fn].itemsize + n_tok * 10 * d * 4
    return Case(name, group, make, compare, bytes_moved=moved, flops=2 * n_tok * d * (n_mix * 4 + 40))


def _cases(site: str, act: str) -> list[Case]:
    case = partial(_case, site=site, act=act)
    smoke = [case(f"{fn} 8 tokens", "smoke", n_tok=8, d=256, fn=fn) for fn in _DTYPES]
    smoke += [case("nothing pending", "smoke", n_tok=3, d=256, fn="f32", pending=False)]
    if act == "bf16":
        smoke += [case("groups of 8 tokens", "smoke", n_tok=24, d=256, fn="f32", change=_counted)]
    edges = [
        case("one token", "edges", n_tok=1, d=128, fn="f16"),
        case("more than 8 tokens", "edges", n_tok=11, d=128, fn="f32"),
        case("two blocks of columns, the last one partly used", "edges", n_tok=2, d=640, fn="f32"),
        case("more chunks than one load covers", "edges", n_tok=2, d=4224, fn="f16"),
        case("zeros", "edges", n_tok=2, d=128, fn="f32", change=_zeros),
        case("sizes from 0.01 to 1000", "edges", n_tok=6, d=128, fn="f32", change=_spread),
        case("saturated gates", "edges", n_tok=2, d=128, fn="f32", change=_saturated),
        case("outlier", "edges", n_tok=2, d=128, fn="f32", change=_outlier),
    ]
    if act != "fp8":
        edges += [case(f"d = {d}", "edges", n_tok=2, d=d, fn="f32") for d in (32, 96)]
    decode = [case(f"{fn} n={n}", "decode", n_tok=n, d=4096, fn=fn) for fn in _DTYPES for n in (1, 2, 8)]
    return [*smoke, *edges, *decode]


def boundary_cases(act: str) -> list[Case]:
    """Smoke and edges for the emulation, decode at the dimensions of V4-Flash; ``act`` as in ``mhc_boundary``."""
    return _cases("boundary", act)


def head_cases() -> list[Case]:
    """The same for ``hc_head``."""
    return _cases("head", "none")
