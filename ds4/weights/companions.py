"""Weights whose block scales are tensors of their own: which stored tensors belong together, and as what format.

    <base>.weight  I8 or U8 [out, in / 2]   <base>.scale         F8_E8M0 [out, in / 32]          -> mxfp4_official
    <base>.weight  F8_E4M3 [out, in]        <base>.scale         F8_E8M0 or F32, one per 128x128 -> fp8_block
    <base>.weight  U8 [out, in / 2]         <base>.weight_scale  F8_E4M3 [out, in / 16]          -> nvfp4_modelopt
                                            <base>.weight_scale_2  F32, one number, multiplies
                                            <base>.input_scale     for 4-bit activations; not used

Every weight is judged by its own dtype and companions, never by config.json: releases mix these kinds.
Source:  spec weights.md 1 and 2.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from ds4.errors import Ds4Error
from ds4.weights.formats import FORMATS
from ds4.weights.storage import StoredTensor

# What a reader calls elements that are no weight by themselves -> the dtype, for messages.
RAW = {"e4m3": "F8_E4M3", "e8m0": "F8_E8M0", "i8": "I8", "u8": "U8"}


@dataclass(frozen=True)
class Group:
    """A weight with what belongs to it.

    weight      with its format, and its logical shape
    parts       by the names in ``Format.parts``
    multiplier  of all values, where there is one
    unused      what belongs to the weight but is not needed to decode it
    """

    weight: StoredTensor
    parts: dict[str, StoredTensor] = field(default_factory=dict)
    multiplier: StoredTensor | None = None
    unused: tuple[StoredTensor, ...] = ()


def group(stored: dict[str, StoredTensor]) -> tuple[list[StoredTensor], dict[str, Group]]:
    """Find out what belongs together.

    stored   tensors by name as the safetensors reader gives them, raw elements with the format names of RAW
    returns  the same tensors in the same order with their final formats (a companion's is its weight's, a dot, and
             what it is: ``fp8_block.scale``); and the weights by name
    Error:   Ds4Error for a companion that is missing, of the wrong dtype or shape, or without a weight.
    """
    groups: dict[str, Group] = {}
    final = dict(stored)
    for name, tensor in stored.items():
        if name.endswith(".weight") and tensor.format in RAW:
            found = _group(tensor, stored)
            groups[name] = found
            final[name] = found.weight
            companions = found.parts | ({"multiplier": found.multiplier} if found.multiplier else {})
            for role, part in [*companions.items(), *(("unused", t) for t in found.unused)]:
                final[part.name] = replace(part, format=f"{found.weight.format}.{role}")
    for name, tensor in final.items():
        if tensor.format in RAW:
            raise _error(tensor, f"has dtype {RAW[tensor.format]}, but belongs to no weight that ds4 can read")
        if "." not in tensor.format and name not in groups:
            groups[name] = Group(tensor)
    return list(final.values()), {name: groups[name] for name in stored if name in groups}


def _group(weight: StoredTensor, stored: dict[str, StoredTensor]) -> Group:
    """The group of a weight of raw elements."""
    if len(weight.shape) != 2:
        raise _error(weight, f"has dtype {RAW[weight.format]}, so it must be a matrix, not {list(weight.shape)}")
    base = weight.name.removesuffix("weight")
    n_rows, n_bytes = weight.shape
    if weight.format == "e4m3":
        tile = FORMATS["fp8_block"].row_block
        scale = _companion(weight, stored, base + "scale", ("e8m0", "f32"), (-(-n_rows // tile), -(-n_bytes // tile)))
        return Group(replace(weight, format="fp8_block"), {"scale": scale})
    if weight.format == "e8m0":
        raise _error(weight, "has dtype F8_E8M0, which is for scales and not for weights")
    shape = (n_rows, 2 * n_bytes)
    if weight.format == "u8" and base + "weight_scale" in stored:
        scale = _companion(weight, stored, base + "weight_scale", ("e4m3",), _blocks(weight, "nvfp4_modelopt"))
        multiplier = _companion(weight, stored, base + "weight_scale_2", ("f32",), None)
        unused = tuple(stored[n] for n in (base + "input_scale",) if n in stored)
        return Group(replace(weight, format="nvfp4_modelopt", shape=shape), {"scale": scale}, multiplier, unused)
    scale = _companion(weight, stored, base + "scale", ("e8m0",), _blocks(weight, "mxfp4_official"))
    return Group(replace(weight, format="mxfp4_official", shape=shape), {"scale": scale})


def _blocks(weight: StoredTensor, fmt: str) -> tuple[int, int]:
    """Shape of the scales of a weight of 4-bit codes, one a block."""
    form = FORMATS[fmt]
    n_rows, n_bytes = weight.shape
    if n_bytes % form.block_bytes:
        raise _error(weight, f"has rows of {2 * n_bytes}, not a multiple of the {fmt} block {form.block}")
    return n_rows, n_bytes // form.block_bytes


def _companion(
    weight: StoredTensor, stored: dict[str, StoredTensor], name: str, formats: tuple[str, ...], shape: tuple | None
) -> StoredTensor:
    """A companion, checked; shape None stands for one number in any shape."""
    found = stored.get(name)
    if found is None:
        raise _error(weight, f"has dtype {RAW[weight.format]} and needs {name.rpartition('.')[2]!r}, which is missing")
    if found.format not in formats:
        names = " or ".join(RAW.get(f, f.upper()) for f in formats)
        raise _error(found, f"must be {names}, not {RAW.get(found.format, found.format.upper())}")
    if (math.prod(found.shape) != 1) if shape is None else (found.shape != shape):
        expected = "a single number" if shape is None else list(shape)
        raise _error(found, f"has shape {list(found.shape)}; its weight of {list(weight.shape)} needs {expected}")
    return found


def _error(tensor: StoredTensor, problem: str) -> Ds4Error:
    return Ds4Error(f"{tensor.file.path}: tensor {tensor.name!r:.200} {problem}")
