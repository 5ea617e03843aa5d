"""Router: which experts a token goes to, and with what weight."""

from ds4.kernels.route.op import route

__all__ = ["route"]
