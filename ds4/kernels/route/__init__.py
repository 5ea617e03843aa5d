"""Router: which experts a token goes to, and with what weight."""

from ds4.kernels.route.ref import route, route_weights

__all__ = ["route", "route_weights"]
