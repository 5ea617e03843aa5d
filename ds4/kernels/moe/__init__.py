"""Routed experts and the shared expert."""

from ds4.kernels.moe.ref import EXPERT_ROWS, Expert, moe, moe_tiles, swiglu

__all__ = ["EXPERT_ROWS", "Expert", "moe", "moe_tiles", "swiglu"]
