"""Final collapse of the streams, norm and language-model head."""

from ds4.kernels.head.ref import hc_head, head

__all__ = ["hc_head", "head"]
