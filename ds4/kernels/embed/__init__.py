"""The start of a decode step: embedding rows into the residual streams, and the step's rotary tables."""

from ds4.kernels.embed.op import embed

__all__ = ["embed"]
