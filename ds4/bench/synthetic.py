"""Models of random weights in the formats and dimensions of the public checkpoints, made where they are used.

A decode step reads of them what it reads of the real ones: the bytes, the layouts, other experts for every token. What
they say means nothing. Weights are any codes there are, scaled so that a product with a vector of spread 1 has a spread
of about 1: through 43 layers all activations stay finite, and routers choose by the token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ds4.engine import LLM, current_gpu
from ds4.errors import Ds4Error
from ds4.fit import Planner, free_bytes
from ds4.kernels.moe.cases import random_planes, spread
from ds4.kernels.packing import PACKINGS, Planes
from ds4.kernels.packing.planes import tile_rows
from ds4.model.params import Params
from ds4.profiling.shapes import ShapeParams
from ds4.weights.checkpoint import Checkpoint
from ds4.weights.published import FLASH, recipe, shrunk, without_file
from ds4.weights.tensor import PackedTensor

SEED = 3
SCORE_SPREAD = 0.12
"""How much a routing score changes where the chance to be chosen changes by e: scores sqrt(softplus(x)) of normal x
have a slope of 0.29 where 6 of 256 begin, and x itself an exponential tail of about 0.4 there."""
_MINIMA = {"q2_k": 1.5, "q4_k": 7.5}
"""d scale code - dmin minimum has a mean of 0 where dmin is d times the mean code: scales and minima are alike."""
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class SyntheticParams(ShapeParams):
    """Random weights of a checkpoint that has none (``ds4.weights.published.without_file``), on ``device``.

    ``skew``: experts are chosen about as often as their rank to the power of -skew; 0: evenly.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | str,
        progress: Callable[[int, int], None] | None = None,
        *,
        skew: float = 0.0,
    ) -> None:
        super().__init__(checkpoint, device, progress)
        self.skew = skew
        self._rng = torch.Generator(self.device).manual_seed(SEED)
        self._factors: dict[tuple[str, int, float], float] = {}

    def stored(self, name: str, shape: tuple[int, ...]) -> PackedTensor:
        """A matrix without values, which ``pack`` makes; anything else with them."""
        tensor = super().stored(name, shape)
        if len(shape) == 2 and name.endswith(".weight") and not name.endswith(".gate.weight"):
            multiplied = tensor.format.startswith("nvfp4")
            return replace(tensor, scale=self._factor(tensor.format, shape[1], name)) if multiplied else tensor
        with self.device:
            values = self._values(name, shape).to(_DTYPES[tensor.format])
        return replace(tensor, data=values.view(tensor.data.shape[0], -1).view(torch.uint8))

    def pack(self, tensor: PackedTensor, planes: Planes, at: int = 0) -> None:
        """Fill the matrix's rows, a few at a time."""
        n_rows, n_cols = tensor.shape
        fmt, factor = tensor.format, self._factor(tensor.format, n_cols, tensor.name)
        step = tile_rows(planes.packing, n_cols, self.device)
        for first in range(0, n_rows, step):
            part = planes.rows(at + first, at + min(first + step, n_rows))
            for key, values in self._random(fmt, part.n_rows, n_cols).items():
                part.tensors[key].copy_(scaled(fmt, key, values, factor))

    def _factor(self, fmt: str, n_cols: int, name: str) -> float:
        """What random planes have to be multiplied by; measured once for all matrices that are alike."""
        wanted = 1.0 if name.startswith("embed.") else n_cols**-0.5
        key = fmt, n_cols, wanted
        if key not in self._factors:
            rows = max(plane.row_block for plane in PACKINGS[fmt].planes)
            self._factors[key] = wanted / spread(fmt, self._random(fmt, max(rows, 64), n_cols), n_cols)
        return self._factors[key]

    def _random(self, fmt: str, n_rows: int, n_cols: int) -> dict[str, Tensor]:
        """Planes of any codes there are, of some spread or other, about a mean of 0."""
        with self.device:
            made = random_planes(self._rng, fmt, n_rows, n_cols)
        if fmt in _MINIMA:
            made["d"][:, 1::2] *= _MINIMA[fmt]
        return made

    def _values(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Values of what is no packed matrix."""
        normal = torch.randn(shape, generator=self._rng)
        if name.endswith("norm.weight"):
            return 1 + 0.1 * normal
        if name.endswith((".gate.weight", "_fn")):
            return normal * shape[1] ** -0.5
        if name.endswith(".gate.bias"):
            return SCORE_SPREAD * self._log_shares(shape[0])
        return normal if name.endswith(".attn_sink") else 0.1 * normal

    def table(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Distinct experts for every token, drawn by their shares."""
        n_experts = self.n_experts(name.removesuffix(".ffn.gate.tid2eid"))
        with self.device:
            uniform = torch.rand((shape[0], n_experts), generator=self._rng).clamp_(1e-9, 1 - 1e-7)
            keys = self._log_shares(n_experts) - torch.log(-torch.log(uniform))
            return keys.topk(shape[1], dim=1).indices

    def _log_shares(self, n_experts: int) -> Tensor:
        """Logarithms of the experts' shares, in an order of each layer's own, up to a constant."""
        ranks = torch.randperm(n_experts, generator=self._rng) + 1
        return -self.skew * ranks.log()


def scaled(fmt: str, plane: str, values: Tensor, factor: float) -> Tensor:
    """A plane of random_planes for weights ``factor`` times as large. NVFP4 has a multiplier beside its planes instead,
    MXFP4 powers of two only."""
    if values.dtype.is_floating_point:
        return values * factor
    if fmt.startswith("mxfp4") and plane == "scales":
        return values + round(torch.tensor(factor).log2().item())
    return values


class SyntheticLLM(LLM):
    """An LLM of random weights, without tokenizer and draft head; options as LLM's."""

    weights_in_file = False

    def __init__(self, checkpoint: Checkpoint, *, skew: float = 0.0, **options: Any) -> None:
        self._made, self._skew = checkpoint, skew
        super().__init__(**options)

    def _open(self, path: Any, draft_model: Any) -> Checkpoint:
        return self._made

    def _params(self, device: torch.device, on_load: Callable[[int, int], None] | None) -> Params:
        return SyntheticParams(self.checkpoint, device, on_load, skew=self._skew)


@dataclass(frozen=True)
class Synthetic:
    """Which model: a recipe of ds4.weights.published, layers (None: as many as fit), experts a layer (None: all), the
    skew of the routing, and what widths are divided by."""

    recipe: str
    layers: int | None = None
    experts: int | None = None
    skew: float = 0.0
    shrink: int = 1

    def checkpoint(self, layers: int = FLASH.num_hidden_layers) -> Checkpoint:
        """Without a file, with so many layers. Raises Ds4Error for an unknown recipe and sizes that make no model."""
        config = shrunk(FLASH, layers, self.experts or FLASH.n_routed_experts, self.shrink)
        return without_file(config, recipe(self.recipe), f"synthetic {self.recipe}")

    def fitting(self, device: str, ctx: int, sessions: int) -> Checkpoint:
        """With the layers asked for, or those that there is memory for. Raises Ds4Error where that is none."""
        if self.layers is not None:
            return self.checkpoint(self.layers)
        free, whole = free_bytes(current_gpu() if device == "cuda" else torch.device("cpu")), self.checkpoint()
        bill = Planner(whole, device, sessions=sessions, in_file=False).fit(ctx, free)
        beside = bill.total_bytes - bill.weights_bytes
        for layers in range(FLASH.num_hidden_layers, 0, -1):
            found = self.checkpoint(layers)
            if found.total_bytes * bill.weights_bytes / whole.total_bytes + beside <= free:
                return found
        raise Ds4Error(f"--synthetic {self.recipe}: not even one layer fits {free / 1e9:.1f} GB; lower --ctx")
