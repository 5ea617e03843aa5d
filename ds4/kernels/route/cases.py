"""Cases of ``route``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ds4.kernels.cases import Case, Close, Compare, Exact, Group, Inputs

# Scores differ by the order of an FP32 sum (2e-6 of it at most for these sizes, kernels against references), and the
# square root of softplus and the quotient do not enlarge that beyond a few units in the last place.
_WEIGHTS = Close(2e-6, 1e-5, "FP32 dot products summed in another order, then sqrt(softplus) and a quotient")
COMPARE: dict[str, Compare] = {"ids": Exact(), "weights": _WEIGHTS}
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def _spread(scores: torch.Tensor) -> float:
    """Smallest gap between two of the values in a row of f32 [n, e]."""
    ordered = scores.sort(dim=1).values
    return float((ordered[:, 1:] - ordered[:, :-1]).min()) if scores.shape[1] > 1 else torch.inf


def random_inputs(
    seed: int,
    device: torch.device,
    *,
    n_tok: int,
    hidden: int,
    n_experts: int,
    top_k: int,
    gate: str,
    hashed: bool = False,
    biased: bool = True,
) -> Inputs:
    """Inputs whose selection scores lie far enough apart that no order of summation can change the choice."""
    for attempt in range(seed * 1000, seed * 1000 + 1000):
        rng = torch.Generator().manual_seed(attempt)
        x = torch.randn(n_tok, hidden, generator=rng)
        weight = (torch.randn(n_experts, hidden, generator=rng) * (2.0 / hidden**0.5)).to(_DTYPES[gate])
        bias = torch.randn(n_experts, generator=rng) * 0.1 if biased and not hashed else None
        scores = torch.nn.functional.softplus(x.double() @ weight.double().T).sqrt()
        if hashed or n_experts > 64 or _spread(scores + (0 if bias is None else bias)) > 1e-5:
            break
    inputs: Inputs = {"x": x, "gate": weight, "bias": bias, "tid2eid": None, "tokens": None}
    if hashed:
        table = torch.stack([torch.randperm(n_experts, generator=rng)[:top_k] for _ in range(32)])
        inputs["tid2eid"] = table.to(torch.int32)
        inputs["tokens"] = torch.randint(0, 32, (n_tok,), generator=rng, dtype=torch.int32)
    elif n_experts > 64:
        _separate(inputs, scores)
    return _on(device, inputs, top_k, 1.5)


def _on(device: torch.device, inputs: Inputs, top_k: int, route_scale: float) -> Inputs:
    """All inputs of a call, the tensors on ``device``."""
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    return moved | {"top_k": top_k, "route_scale": route_scale}


def _separate(inputs: Inputs, scores: torch.Tensor) -> None:
    """With many experts near ties are certain: a bias that grows by 1e-3 an expert in a drawn order parts the rows.

    The bias is the same for all tokens, so each row's own gaps are checked in the end: those below 1e-5 among the first
    few dozen of a row get widened by doubling the bias.
    """
    n_experts = scores.shape[1]
    order = torch.randperm(n_experts, generator=torch.Generator().manual_seed(n_experts))
    bias = torch.empty(n_experts, dtype=torch.float64)
    bias[order] = torch.arange(n_experts, dtype=torch.float64) * 1e-3
    while True:
        top = (scores + bias.float()).sort(dim=1, descending=True).values[:, :40]
        if float((top[:, :-1] - top[:, 1:]).min()) > 1e-5:
            inputs["bias"] = bias.float()
            return
        bias = bias * 1.37 + 1e-4


def _ties(seed: int, device: torch.device) -> Inputs:
    """All scores equal, so that ids are 0, 1, 2, ...; a bias of exact halves makes groups of ties."""
    x = torch.ones(3, 64)
    bias = torch.tensor([0.0, 0.5, 0.5, 0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 0.0])
    inputs = {"x": x, "gate": torch.zeros(10, 64), "bias": bias, "tid2eid": None, "tokens": None}
    return _on(device, inputs, 5, 2.5)


def _extreme(seed: int, device: torch.device) -> Inputs:
    """Logits from -80, where the score is next to nothing, to 80, where softplus is the identity; biases of -inf."""
    n_experts = 12
    x = torch.zeros(2, 32)
    x[:, 0] = torch.tensor([1.0, -1.0])
    gate = torch.zeros(n_experts, 32)
    gate[:, 0] = torch.linspace(-80, 80, n_experts)
    bias = torch.linspace(0, 0.01, n_experts)
    bias[::5] = -torch.inf
    inputs = {"x": x, "gate": gate, "bias": bias, "tid2eid": None, "tokens": None}
    return _on(device, inputs, 4, 1.5)


def _case(name: str, group: Group, make: Callable[[int, torch.device], Inputs], shape: tuple[int, ...]) -> Case:
    n_tok, rows, hidden, item = shape
    moved = rows * hidden * item + n_tok * hidden * 4
    return Case(name, group, make, COMPARE, bytes_moved=moved, flops=2 * n_tok * rows * hidden)


def _random(
    name: str,
    group: Group,
    n_tok: int,
    hidden: int,
    n_experts: int,
    top_k: int,
    gate: str,
    *,
    hashed: bool = False,
    biased: bool = True,
) -> Case:
    make = partial(
        random_inputs,
        n_tok=n_tok,
        hidden=hidden,
        n_experts=n_experts,
        top_k=top_k,
        gate=gate,
        hashed=hashed,
        biased=biased,
    )
    rows = n_tok * top_k if hashed else n_experts
    return _case(name, group, make, (n_tok, rows, hidden, _DTYPES[gate].itemsize))


def cases() -> list[Case]:
    """Smoke and edges for the emulation, decode at the dimensions of V4-Flash and its pruned variants."""
    smoke = [_random(f"{gate} 8 tokens", "smoke", 8, 256, 16, 6, gate) for gate in _DTYPES]
    smoke += [_random(f"{gate} hashed 8 tokens", "smoke", 8, 256, 16, 6, gate, hashed=True) for gate in _DTYPES]
    smoke += [_random("more experts than lanes", "smoke", 3, 64, 70, 6, "bf16")]
    edges = [
        _random("odd number of experts", "edges", 2, 264, 7, 3, "f32"),
        _random("no bias", "edges", 2, 64, 8, 2, "f32", biased=False),
        _random("one expert of one", "edges", 1, 32, 1, 1, "f16"),
        _random("width of one chunk", "edges", 2, 8, 4, 2, "bf16"),
        _case("ties", "edges", _ties, (3, 10, 64, 4)),
        _case("extreme logits", "edges", _extreme, (2, 12, 32, 4)),
    ]
    decode = [_random(f"{gate} n={n}", "decode", n, 4096, 256, 6, gate) for gate in ("bf16", "f16") for n in (1, 2, 8)]
    decode += [_random(f"REAP-{n} n=1", "decode", 1, 4096, n, 6, "bf16") for n in (150, 160)]
    decode += [_random(f"hashed bf16 n={n}", "decode", n, 4096, 256, 6, "bf16", hashed=True) for n in (1, 2)]
    return [*smoke, *edges, *decode]
