"""Cases of ``route_select``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ds4.kernels.cases import Case, Close, Compare, Exact, Group, Inputs

_N_EXPERTS, _TOP_K, _VOCAB = 70, 6, 32  # of all that the emulation runs: experts in three rounds of a warp, one short
_WEIGHTS = Close(0, 2e-6, "exponential, logarithm, root and quotient of FP32: some places of 2^-24 each", True)
COMPARE: dict[str, Compare] = {"ids": Exact(), "weights": _WEIGHTS}


def _inputs(logits: Tensor, bias: Tensor | None, count: int | None, device: torch.device) -> Inputs:
    given = {"logits": logits, "bias": bias, "count": None if count is None else torch.tensor([count]).int()}
    inputs: Inputs = {name: None if value is None else value.to(device) for name, value in given.items()}
    return inputs | {"tid2eid": None, "tokens": None, "top_k": _TOP_K, "route_scale": 1.5}


def _random(
    seed: int,
    device: torch.device,
    *,
    n_rows: int,
    n_experts: int = _N_EXPERTS,
    count: int | None = None,
    biased: bool = True,
    hashed: bool = False,
) -> Inputs:
    """Selection scores that no rounding can exchange: in each row multiples of 1 / 64 in an order of its own."""
    rng = torch.Generator().manual_seed(seed)
    wanted = 1 + torch.stack([torch.randperm(n_experts, generator=rng) + 1 for _ in range(n_rows)]).double() / 64
    bias = torch.rand(n_experts, generator=rng) if biased and not hashed else torch.zeros(n_experts)
    logits = torch.log(torch.expm1((wanted - bias).square())).float()
    inputs = _inputs(logits, bias if biased and not hashed else None, count, device)
    if hashed:
        table = torch.stack([torch.randperm(n_experts, generator=rng)[:_TOP_K] for _ in range(_VOCAB)])
        inputs["tid2eid"] = table.int().to(device)
        inputs["tokens"] = torch.randint(0, _VOCAB, (n_rows,), generator=rng, dtype=torch.int32).to(device)
    return inputs


def _ties(seed: int, device: torch.device) -> Inputs:
    """Equal logits in the first row, a few values in the others; biases of exact halves, or of -inf."""
    logits = torch.zeros(9, _N_EXPERTS)
    logits[1:] = torch.arange(_N_EXPERTS) % torch.arange(1, 9)[:, None]
    bias = (torch.arange(_N_EXPERTS) % 5 == 3) / 2
    bias[::7] = -torch.inf
    return _inputs(logits, bias, None, device)


def _extreme(seed: int, device: torch.device) -> Inputs:
    """Logits from -80, where the score is next to nothing, to 3e38, where softplus is the identity."""
    logits = torch.linspace(-80, 80, _N_EXPERTS).repeat(3, 1)
    logits[1] = logits[1].flip(0)
    logits[2, 40:] = torch.linspace(21, 3e38, _N_EXPERTS - 40)
    return _inputs(logits, None, 3, device)


def cases() -> list[Case]:
    """Learned and hashed choices; ``decode`` at the dimensions of V4-Flash."""

    def case(name: str, group: Group, n_rows: int, *, n_experts: int = _N_EXPERTS, **options: Any) -> Case:
        make = partial(_random, n_rows=n_rows, n_experts=n_experts, **options)
        read = n_rows * 4 * (_TOP_K if options.get("hashed") else n_experts)
        return Case(name, group, make, COMPARE, read + 8 * n_rows * _TOP_K)

    return [
        case("11 of 19 tokens", "smoke", 19, count=11),
        case("hashed, 11 of 19 tokens", "smoke", 19, count=11, hashed=True),
        case("one token, no bias", "edges", 1, biased=False),
        case("one of 8", "edges", 8, count=1),
        case("8 hashed tokens", "edges", 8, hashed=True),
        Case("ties", "edges", _ties, COMPARE, 9 * 4 * _N_EXPERTS),
        Case("extreme logits", "edges", _extreme, COMPARE, 3 * 4 * _N_EXPERTS),
        case("4096 tokens", "decode", 4096, n_experts=256),
        case("4096 hashed tokens", "decode", 4096, n_experts=256, hashed=True),
    ]
