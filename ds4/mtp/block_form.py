"""Matrix products of all rows of a draft block at once, and its expert layer.

The decode form multiplies row by row, so that a token's bits do not depend on its neighbours. A draft block is always
computed whole, and what it drafts is verified: its rows can share a product. BLAS gains little from that, as it puts a
matrix in an order of its own at every call; oneDNN takes one that was put in order before (docs/experiments.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ds4.config import ModelConfig
from ds4.kernels.moe import swiglu
from ds4.kernels.numerics import Numerics
from ds4.kernels.proj.ref import ACT_BLOCK
from ds4.model.context import Context
from ds4.model.moe import MoE
from ds4.model.params import Params
from ds4.weights.dense_cache import TILED_BYTES, Weight, tiles
from ds4.weights.formats import block_scale

ORDERS = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
"""Whether torch has the operations that its compiler uses for oneDNN; without them these are BLAS products."""


class BlockProduct:
    """``x @ w^T``: f32 ``[n, k]`` -> f32 ``[n, m]``, n being the same at every call.

    weights  count as one, stacked along their rows, or side by side along their columns (``dim`` 1)
    rows     first and last + 1 of the stack's rows to multiply by; None: all
    What is small in FP32 is decoded at the first call and kept; the rest is decoded tile by tile at every call.
    Raises ValueError for weights side by side that are not small.
    """

    def __init__(self, *weights: Weight, rows: tuple[int, int] | None = None, dim: int = 0) -> None:
        self.weights, self.dim = weights, dim
        self.rows = rows or (0, weights[0].shape[0] if dim else sum(w.shape[0] for w in weights))
        n_cols = sum(w.shape[1] for w in weights) if dim else weights[0].shape[1]
        self.shape = (self.rows[1] - self.rows[0], n_cols)
        self._kept: Tensor | None = None

    @property
    def is_small(self) -> bool:
        """Whether the weights are kept; plain tensors always are."""
        return isinstance(self.weights[0], Tensor) or 4 * self.shape[0] * self.shape[1] <= TILED_BYTES

    def __call__(self, x: Tensor) -> Tensor:
        if not self.is_small:
            return self._tiled(x)
        if self._kept is None:
            self._kept = self._ordered(x.shape[0])
        if self._kept.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x, self._kept, None, "none", [], "")
        return F.linear(x, self._kept)

    def proj(self, x: Tensor, numerics: Numerics) -> Tensor:
        """With the roundings of ``ds4.kernels.proj.proj``."""
        return numerics.rd(self(block_scale.round_e4m3(x, ACT_BLOCK) if numerics.act_fp8 else x))

    def _ordered(self, n: int) -> Tensor:
        w = torch.cat([_decoded(w) for w in self.weights], dim=self.dim)[slice(*self.rows)]
        return torch.ops.mkldnn._reorder_linear_weight(w, n) if ORDERS and w.device.type == "cpu" else w

    def _tiled(self, x: Tensor) -> Tensor:
        if self.dim:
            raise ValueError("weights side by side are not multiplied tile by tile")
        first, last = self.rows
        out = x.new_empty(x.shape[0], last - first)
        for part, tile in tiles(self.weights, first, last):
            torch.mm(x, tile.t(), out=out[:, part.start - first : part.stop - first])
        return out


def _decoded(w: Weight) -> Tensor:
    """f32 ``[m, k]``."""
    return w.float() if isinstance(w, Tensor) else torch.cat([tile for _, tile in w.tiles()])


class BlockMoE(MoE):
    """The expert layer of a draft block, in two products.

    Every row goes through every expert, with the weight 0 where its router did not choose it: of eight experts, each
    row of the bundled head has chosen six. Where a layer's experts together are not small, or roundings between the
    slots are simulated, it is computed in the prefill form.
    """

    def __init__(self, config: ModelConfig, params: Params, prefix: str, *, hash_routed: bool) -> None:
        super().__init__(config, params, prefix, hash_routed=hash_routed)
        every = [*self.experts, self.shared]
        self._gate_up = BlockProduct(*(e.w1 for e in every), *(e.w3 for e in every))
        self._down = BlockProduct(*(e.w2 for e in every), dim=1)

    def __call__(self, x: Tensor, ctx: Context) -> Tensor:
        """f32 ``[n, d]`` -> f32 ``[n, d]``, for all rows."""
        n = ctx.numerics
        if n.bf16 or n.act_fp8 or not self._gate_up.is_small:
            return super().__call__(x, ctx)
        ids, weights = self._route(x, ctx)
        chosen = x.new_zeros(x.shape[0], len(self.experts)).scatter_(1, ids, weights)
        slots = F.pad(chosen, (0, 1), value=1.0).unsqueeze(2)  # the shared expert comes last
        gate, up = self._gate_up(x).chunk(2, dim=1)
        a = swiglu(gate, up, self.limit).unflatten(1, (slots.shape[1], -1))
        return self._down((a * slots).flatten(1))
