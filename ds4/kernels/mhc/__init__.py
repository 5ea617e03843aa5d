"""Manifold-constrained hyper-connections: mixing the residual streams around a sublayer."""

from ds4.kernels.mhc.ref import hc_collapse, hc_expand, hc_mix, hc_sinkhorn, mhc_boundary

__all__ = ["hc_collapse", "hc_expand", "hc_mix", "hc_sinkhorn", "mhc_boundary"]
