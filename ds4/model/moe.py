"""Expert layer: router, routed experts, shared expert (spec model.md 2.7)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ds4.config import ModelConfig
from ds4.errors import Ds4Error
from ds4.kernels.cases import Inputs
from ds4.kernels.moe import Expert, moe, moe_tiles
from ds4.kernels.moe.op import MOE_DOWN, MOE_UP
from ds4.kernels.packing import PlaneMatrix
from ds4.kernels.route.op import ROUTE
from ds4.kernels.route.ref import route
from ds4.kernels.threads import each
from ds4.model.context import Context
from ds4.model.params import Params, small, table
from ds4.model.steps import StepBuilder
from ds4.weights.dense_cache import Weight


class MoE:
    """Hash-routed (``hash_routed``) or bias-routed experts with a shared expert."""

    def __init__(self, config: ModelConfig, params: Params, prefix: str, *, hash_routed: bool) -> None:
        d, inter = config.hidden_size, config.moe_intermediate_size
        self.top_k = config.num_experts_per_tok
        self.route_scale = config.routed_scaling_factor
        self.limit = config.swiglu_limit
        n_experts = params.n_experts(prefix.removesuffix(".ffn"))
        self.gate = table(params, f"{prefix}.gate.weight", (n_experts, d), (torch.float16, torch.bfloat16))
        self.bias = self.tid2eid = None
        if hash_routed:
            self.tid2eid = small(params, f"{prefix}.gate.tid2eid", (config.vocab_size, self.top_k))
            ids = self.tid2eid.sort(dim=1).values
            if ids.min() < 0 or ids.max() >= n_experts or bool((ids[:, 1:] == ids[:, :-1]).any()):
                raise Ds4Error(
                    f"tensor {prefix}.gate.tid2eid: expert ids must be 0 to {n_experts - 1}, all different in a row; "
                    "the checkpoint is damaged or was pruned without it"
                )
        else:
            self.bias = small(params, f"{prefix}.gate.bias", (n_experts,))

        def expert(name: str) -> Expert:
            w1, w3, w2 = (params.expect(f"{prefix}.{name}.{w}.weight", s) for w, s in shapes)
            return Expert(w1, w3, w2)

        shapes = (("w1", (inter, d)), ("w3", (inter, d)), ("w2", (d, inter)))
        self.experts = [expert(f"experts.{e}") for e in range(n_experts)]
        self.shared = expert("shared_experts")

    def __call__(self, x: Tensor, ctx: Context) -> Tensor:
        """f32 ``[n_rows, d]`` -> f32 ``[n_rows, d]``, in the decode form (elsewhere for all rows)."""
        ids, weights = self._route(x, ctx)
        numerics, rows = ctx.numerics, ctx.rows
        return moe(x, ids, weights, self.experts, self.shared, limit=self.limit, numerics=numerics, rows=rows)

    def prefill(self, xs: Sequence[Tensor], ctxs: Sequence[Context]) -> list[Tensor]:
        """Successive tiles f32 ``[n_rows, d]`` -> f32 ``[n_rows, d]`` each; an expert takes the tokens of all."""
        ids, weights = zip(*each(self._route, xs, ctxs), strict=True)
        live, n = [ctx.launch.row_slice for ctx in ctxs], ctxs[0].numerics
        return moe_tiles(xs, ids, weights, live, self.experts, self.shared, limit=self.limit, numerics=n)

    def _route(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        return route(
            x,
            self.gate,
            bias=self.bias,
            hash_ids=None if self.tid2eid is None else self.tid2eid[ctx.ids],
            top_k=self.top_k,
            route_scale=self.route_scale,
            rows=ctx.rows,
        )

    def step(self, x: Tensor, s: StepBuilder) -> Tensor:
        """Launches of the decode step: f32 ``[n_tok, d]`` -> f32 ``[n_tok, d]``."""
        where, up, down = self.kernel_inputs
        tokens = None if where["tid2eid"] is None else s.tokens
        picked = s.add(ROUTE, {"x": x, **where, "tokens": tokens})
        mid = s.add(MOE_UP, {"x": x, **picked, **up})["mid"]
        return s.add(MOE_DOWN, {"mid": mid, "ids": picked["ids"], **down})["y"]

    @cached_property
    def kernel_inputs(self) -> tuple[Inputs, Inputs, Inputs]:
        """What router, up and down projection read besides activations; made once, as steps of all lengths share it."""
        hashed = None if self.tid2eid is None else self.tid2eid.to(torch.int32)
        where: Inputs = {"gate": self.gate, "bias": self.bias, "tid2eid": hashed}
        where |= {"top_k": self.top_k, "route_scale": self.route_scale}
        up = self._arena("w1", [e.w1 for e in self.experts]) | self._arena("w3", [e.w3 for e in self.experts])
        up |= self._alone("sw1", self.shared.w1) | self._alone("sw3", self.shared.w3) | {"limit": self.limit}
        down = self._arena("w2", [e.w2 for e in self.experts]) | self._alone("sw2", self.shared.w2)
        return where, up, down

    @staticmethod
    def _arena(name: str, matrices: Sequence[Weight]) -> Inputs:
        """The experts' matrices of one kind as inputs of the kernels: their arena and their multipliers, if any."""
        found = [w for w in matrices if isinstance(w, PlaneMatrix)]
        arena = found[0].arena
        assert arena is not None
        scales = None
        if any(w.scale != 1 for w in found):
            scales = torch.tensor([w.scale for w in found], dtype=torch.float32, device=found[0].device)
        planes = {f"{name}_{key}": plane for key, plane in arena.tensors.items()}
        return {**planes, f"{name}_format": found[0].format, f"{name}_scale": scales}

    @staticmethod
    def _alone(name: str, w: Weight) -> Inputs:
        """A single matrix as inputs of the kernels."""
        assert isinstance(w, PlaneMatrix)
        planes = {f"{name}_{key}": plane for key, plane in w.planes.tensors.items()}
        return {**planes, f"{name}_format": w.format, f"{name}_scale": w.scale}
