"""Experts of a layer of V4-Flash as random bytes on a device, and how many of them there is room for.

Used by scripts/bench_moe.py. The weights are those of no model: any codes there are, with scales of one magnitude.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds4.errors import Ds4Error
from ds4.kernels.cases import Inputs
from ds4.kernels.entry import Constants, Entry
from ds4.kernels.moe.cases import random_planes, spread
from ds4.kernels.moe.op import MOE_DOWN, MOE_UP, down_constants, up_constants
from ds4.kernels.packing import PACKINGS, Planes

# Experts' name -> formats of w1 and w3, of w2, of the shared expert: the checkpoints there are, then others.
MIXTURES = {
    "nvfp4": ("nvfp4", "nvfp4", "q8_0"),
    "mxfp4": ("mxfp4_official", "mxfp4_official", "fp8_block"),
    "iq2_xxs": ("iq2_xxs", "q2_k", "q8_0"),
    "q4_k": ("q4_k", "q4_k", "q8_0"),
    "q8_0": ("q8_0", "q8_0", "q8_0"),
    "fp8_block": ("fp8_block", "fp8_block", "fp8_block"),
    "bf16": ("bf16", "bf16", "q8_0"),
}
ROUTINGS = ("uniform", "same", "skewed")
N_TOKS = (1, 2, 4, 8)
MEMORY = 0.8  # of what is free, for weights
COLD = 2  # times the L2 cache: what a launch in every layer reads, at least
_TILE = 1 << 26  # weights made at a time


@dataclass(frozen=True)
class Plan:
    """What is measured: an expert is two matrices [inter, d] and one [d, inter]. ``turns``: launches in each layer."""

    d: int = 4096
    inter: int = 2048
    top_k: int = 6
    layers: int = 3
    experts: int = 256
    n_toks: tuple[int, ...] = N_TOKS
    routings: tuple[str, ...] = ROUTINGS[:2]
    turns: int = 8
    repeats: int = 5

    def matrix_bytes(self, fmt: str, part: str) -> int:
        """Weights of one expert: w1 and w3 ("up"), or w2 ("down")."""
        packing = PACKINGS[fmt]
        return 2 * packing.nbytes(self.inter, self.d) if part == "up" else packing.nbytes(self.d, self.inter)

    def weight_bytes(self, mixture: str, part: str, n_experts: int) -> int:
        """Weights of so many experts and the shared one."""
        up, down, shared = MIXTURES[mixture]
        return sum(
            n_experts * self.matrix_bytes({"up": up, "down": down}[one], one) + self.matrix_bytes(shared, one)
            for one in part.split("+")
        )

    def activation_bytes(self, part: str, n_tok: int) -> int:
        """x, ids, weights and mid of the one, mid, ids and y of the other."""
        slots = self.top_k + 1
        each = {"up": self.d + 2 * self.top_k + slots * self.inter, "down": slots * self.inter + self.top_k + self.d}
        return 4 * n_tok * sum(each[one] for one in part.split("+"))

    def kernels(self, mixture: str) -> list[tuple[Entry, Constants]]:
        """What is launched on a mixture's layers."""
        up, down, shared = MIXTURES[mixture]
        sizes = {"hidden": self.d, "inter": self.inter, "top_k": self.top_k}
        return [
            one
            for n_tok in self.n_toks
            for one in (
                (MOE_UP.entries[0], up_constants((up, up, shared, shared), n_tok=n_tok, **sizes)),
                (MOE_DOWN.entries[0], down_constants((down, shared), n_tok=n_tok, **sizes)),
            )
        ]


def resident(mixture: str, plan: Plan, free_bytes: int, l2_bytes: int) -> tuple[int, int, str]:
    """(layers, experts of each, what is missing): what fits the memory. Raises Ds4Error where no token's experts do.

    Layers: the plan's, and as many as leave nothing of the last launch in a layer in the L2 cache.
    """
    budget = int(MEMORY * free_bytes)
    wanted = max(plan.layers, -(-COLD * l2_bytes // plan.weight_bytes(mixture, "down", plan.top_k)))
    layers = min(wanted, budget // plan.weight_bytes(mixture, "up+down", plan.experts))
    if layers:
        return layers, plan.experts, "" if layers == wanted else f"{layers} of {wanted} layers: no memory for more"
    shared = plan.weight_bytes(mixture, "up+down", 0)
    experts = (budget - shared) // (plan.weight_bytes(mixture, "up+down", 1) - shared)
    if experts < plan.top_k:
        raise Ds4Error(f"{mixture}: {free_bytes / 1e9:.1f} GB of free memory are too few for {plan.top_k} experts")
    return 1, experts, f"1 of {wanted} layers, {experts} of {plan.experts} experts: no memory for more"


def random_matrix(rng: torch.Generator, name: str, fmt: str, shape: tuple[int, int], n_experts: int | None) -> Inputs:
    """A matrix's inputs of ``moe_up`` or ``moe_down`` on the generator's device: of experts, or None: the shared one.

    Multipliers bring its products with vectors of spread 1 to a spread of 1.
    """
    (rows, cols), count = shape, n_experts or 1
    planes = Planes.allocate(PACKINGS[fmt], rows * count, cols, rng.device)
    at_a_time = max(1, _TILE // (rows * cols))
    with rng.device:
        for first in range(0, count, at_a_time):
            last = min(count, first + at_a_time)
            part = planes.rows(first * rows, last * rows)
            for key, values in random_planes(rng, fmt, part.n_rows, cols).items():
                part.tensors[key].copy_(values)
    factor = 1 / (spread(fmt, dict(planes.tensors), cols) * cols**0.5)
    scale = factor if n_experts is None else torch.full((n_experts,), factor, device=rng.device)
    tensors = {f"{name}_{key}": tensor for key, tensor in planes.tensors.items()}
    return {f"{name}_format": fmt, f"{name}_scale": scale, **tensors}


def random_layer(rng: torch.Generator, mixture: str, plan: Plan, n_experts: int) -> Inputs:
    """The weights of a layer, as both operations take them."""
    up, down, shared = MIXTURES[mixture]
    rows, found = {"up": (plan.inter, plan.d), "down": (plan.d, plan.inter)}, Inputs()
    for name, fmt, part in (("w1", up, "up"), ("w3", up, "up"), ("w2", down, "down")):
        found |= random_matrix(rng, name, fmt, rows[part], n_experts)
        found |= random_matrix(rng, f"s{name}", shared, rows[part], None)
    return found


def random_ids(rng: torch.Generator, routing: str, n_tok: int, top_k: int, n_experts: int) -> Tensor:
    """i32 [n_tok, top_k]: a token's experts are distinct."""
    share = torch.ones(n_experts)
    if routing == "skewed":
        share = torch.arange(1, n_experts + 1)[torch.randperm(n_experts, generator=rng)] ** -0.5
    ids = torch.multinomial(share.expand(n_tok, -1), top_k, generator=rng).to(torch.int32)
    return torch.stack([ids[0].roll(t) for t in range(n_tok)]) if routing == "same" else ids
