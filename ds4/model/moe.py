"""Expert layer: router, routed experts, shared expert (spec model.md 2.7)."""

from __future__ import annotations

from torch import Tensor

from ds4.config import ModelConfig
from ds4.errors import Ds4Error
from ds4.kernels.moe import Expert, moe
from ds4.kernels.route import route
from ds4.model.context import Context
from ds4.model.params import Params, small


class MoE:
    """Hash-routed (``hash_routed``) or bias-routed experts with a shared expert."""

    def __init__(self, config: ModelConfig, params: Params, prefix: str, *, hash_routed: bool) -> None:
        d, inter = config.hidden_size, config.moe_intermediate_size
        self.top_k = config.num_experts_per_tok
        self.route_scale = config.routed_scaling_factor
        self.limit = config.swiglu_limit
        n_experts = params.n_experts(prefix.removesuffix(".ffn"))
        self.gate = small(params, f"{prefix}.gate.weight", (n_experts, d))
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
        """f32 ``[n_rows, d]`` -> f32 ``[n_rows, d]``."""
        ids, weights = route(
            x,
            self.gate,
            bias=self.bias,
            tid2eid=self.tid2eid,
            tokens=ctx.ids,
            top_k=self.top_k,
            route_scale=self.route_scale,
            rows=ctx.rows,
        )
        live = slice(None) if ctx.launch.decode else ctx.launch.row_slice
        return moe(
            x,
            ids,
            weights,
            self.experts,
            self.shared,
            limit=self.limit,
            numerics=ctx.numerics,
            rows=ctx.rows,
            live=live,
        )
