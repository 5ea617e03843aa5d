"""Torch reference of sampling on the device: the filters and the draw of ds4/sampling.py, with sums of integers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ds4.kernels.head.ref import greedy

_MASK64 = (1 << 64) - 1
_E_ONE, _P_ONE = 2.0**46, 2.0**62  # what stands for 1 in the sums of E and of P
_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
_INTEGERS = ("top_k", "seed")


def sample_params(
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """i64 [6] on the CPU, what the kernels read: FP64 numbers by their bits, integers as they are.

    Meaning and ranges are those of ``ds4.sampling.SamplingParams``, which checks them.
    """
    numbers = torch.tensor([temperature, 0.0, top_p, min_p, repetition_penalty, 0.0], dtype=torch.float64)
    params = numbers.view(torch.int64).clone()
    params[_FIELDS.index("top_k")] = top_k
    params[_FIELDS.index("seed")] = seed
    return params


def unpacked(params: Tensor) -> dict[str, float | int]:
    """The parameters by name."""
    numbers = params.view(torch.float64)
    return {name: (params if name in _INTEGERS else numbers)[i].item() for i, name in enumerate(_FIELDS)}


def sample(
    logits: Tensor, pos: Tensor, params: Tensor, first_seen: Tensor | None, drafted: Tensor | None, stream: int
) -> dict[str, Tensor]:
    """token and status i32 ``[n]``, probs f32 ``[n, vocab]`` of logits f32 ``[n, vocab]``, as ``op.sample`` says."""
    p = unpacked(params)
    first = int(pos) + (int(drafted) if drafted is not None else 0) + 1
    rows = []
    for at, row in enumerate(logits, first):
        if first_seen is not None:
            seen = first_seen < at
            penalty = p["repetition_penalty"]
            row = torch.where(seen, torch.where(row > 0, row / penalty, row * penalty), row)
        found = {name: value[0] for name, value in greedy(row[None]).items()}
        if p["temperature"] == 0 or found["status"]:
            probs = torch.zeros_like(row)
            probs[int(found["token"])] = 1.0
        else:
            probs = _probs(row, p)
            found["token"] = torch.tensor(draw(scaled(probs), uniform(int(p["seed"]), at, stream)), dtype=torch.int32)
        rows.append((found["token"], found["status"], probs))
    token, status, probs = (torch.stack(column) for column in zip(*rows, strict=True))
    return {"token": token, "status": status, "probs": probs}


def _probs(row: Tensor, p: dict[str, float | int]) -> Tensor:
    """f32 ``[vocab]``: what is drawn from; 0 where a filter took it away. ``row`` after the penalty, finite maximum."""
    order = torch.sort(row, descending=True, stable=True).indices
    e = torch.exp((row[order].double() - row[order[0]].double()) / p["temperature"])
    mass = (e * _E_ONE + 0.5).long()
    n = int(p["top_k"]) if 0 < p["top_k"] < len(row) else len(row)
    if p["top_p"] < 1:
        sums = mass[:n].cumsum(0)
        want = max(1, min(math.ceil(p["top_p"] * float(sums[-1])), int(sums[-1])))
        n = int(torch.searchsorted(sums, want)) + 1
    if p["min_p"] > 0:
        n = min(n, int((e >= p["min_p"]).sum()))
    kept = mass[:n]
    probs = torch.zeros_like(row)
    probs[order[:n]] = (kept.double() / kept.sum().double()).float()
    return probs


def scaled(probs: Tensor) -> Tensor:
    """i64: integers in place of probabilities f32 or f64, whose sums do not depend on the order."""
    return (probs.double() * _P_ONE).long()


def draw(shares: Tensor, number: float) -> int:
    """The first id at which the running sum of ``shares`` i64 passes ``number`` times their sum, which is above 0."""
    sums = shares.cumsum(0)
    target = min(int(number * float(sums[-1])), int(sums[-1]) - 1)
    return int(torch.searchsorted(sums, target, right=True))


def uniform(seed: int, position: int, stream: int) -> float:
    """In [0, 1): the upper 53 bits of splitmix64 over seed, position and stream."""
    state = _splitmix64(_splitmix64(seed & _MASK64) ^ (position & _MASK64))
    return (_splitmix64(state ^ (stream & _MASK64)) >> 11) * 2.0**-53


def _splitmix64(value: int) -> int:
    """One step of splitmix64 (Steele, Lea and Flood 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
