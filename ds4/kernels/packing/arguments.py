"""One matrix of any of several formats among an operation's inputs: ``format``, and its planes under their names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ds4.kernels.cases import Inputs
from ds4.kernels.entry import POINTERS
from ds4.kernels.packing import PACKINGS

_POINTER = {dtypes[0]: kind for kind, dtypes in POINTERS.items()}


def plane_params(name: str) -> tuple[tuple[str, str], ...]:
    """The parameters of a kernel for a matrix of the format ``name``: (plane, pointer type), in the planes' order."""
    return tuple((plane.name, _POINTER[plane.dtype]) for plane in PACKINGS[name].planes)


def planes_among(inputs: Inputs, formats: Sequence[str], operation: str) -> dict[str, Tensor]:
    """The planes among the inputs. Raises ValueError for a format that is none of ``formats``."""
    if inputs["format"] not in formats:
        raise ValueError(f"{operation}: no kernel for {inputs['format']}; there are: {', '.join(formats)}")
    return {plane.name: inputs[plane.name] for plane in PACKINGS[inputs["format"]].planes}
