"""Weights whose block scales are tensors of their own: which stored tensors belong together, and as what format.

    <base>.weight  I8 or U8 [out, in / 2]   <base>.scale  F8_E8M0 [out, in / 32]          -> mxfp4_official
    <base>.weight  F8_E4M3 [out, in]        <base>.scale  F8_E8M0, F32 or BF16, one       -> fp8_block
                                            per 128 x 128; or .weight_scale, or
                                            .weight_scale_inv, which multiplies like them
    <base>.weight  U8 [out, in / 2]         <base>.weight_scale    F8_E4M3 [out, in / 16] -> nvfp4_modelopt
                                            <base>.weight_scale_2  F32, one number, multiplies
                                            <base>.input_scale     for 4-bit activations; not used
    <base>.weight_packed  U8 [out, in / 2]  <base>.weight_scale    F8_E4M3 [out, in / 16] -> nvfp4_modelopt
                                            <base>.weight_global_scale  F32, one number, divides
                                            <base>.input_global_scale   for 4-bit activations; not used

Every weight is judged by its own dtype and companions, never by config.json: releases mix these kinds.
Source:  spec weights.md 1, 2.1 and 2.2.
"""

from __future__ import annotations

import math

from ds4.errors import Ds4Error
from ds4.weights.checkpoint import View
from ds4.weights.formats import FORMATS
from ds4.weights.storage import StoredTensor

# What a reader calls elements that are no weight by themselves -> the dtype, for messages.
RAW = {"e4m3": "F8_E4M3", "e8m0": "F8_E8M0", "i8": "I8", "u8": "U8"}

_FP8_SCALES = ("scale", "weight_scale", "weight_scale_inv")


def group(stored: dict[str, StoredTensor]) -> dict[str, View]:
    """Find out what belongs together.

    stored   tensors by canonical name as the safetensors reader gives them, raw elements with the format names of RAW.
             Every grouped tensor is replaced by one with its final format: a weight's, or for its companions that,
             a dot, and what they are: ``fp8_block.scale``
    returns  the weights and all that needs no companion, by canonical name, in the order of ``stored``
    Error:   Ds4Error for a companion that is missing, of the wrong dtype or shape, or without a weight, and for
             weights that ds4 does not read.
    """
    grouped: dict[str, View] = {}
    for name, tensor in list(stored.items()):
        if name.endswith(".weight_packed"):
            grouped[name] = _packed(name, tensor, stored)
        elif tensor.format in RAW and name.endswith(".weight"):
            grouped[name] = _weight(name, tensor, stored)
    views: dict[str, View] = {}
    for name, tensor in stored.items():
        if name in grouped:
            views[name.removesuffix("_packed")] = grouped[name]
        elif tensor.format in RAW:
            raise _error(tensor, f"has dtype {RAW[tensor.format]}, but belongs to no weight that ds4 can read")
        elif "." not in tensor.format:
            views[name] = View(tensor, tensor.shape)
    return views


def _weight(name: str, weight: StoredTensor, stored: dict[str, StoredTensor]) -> View:
    """The group of a ``<base>.weight`` of raw elements."""
    base = name.removesuffix("weight")
    n_rows, n_bytes = _matrix(weight)
    if weight.format == "e8m0":
        raise _error(weight, "has dtype F8_E8M0, which is for scales and not for weights")
    if weight.format == "e4m3":
        tile = FORMATS["fp8_block"].row_block
        names = [base + suffix for suffix in _FP8_SCALES if base + suffix in stored]
        if len(names) > 1:
            raise _error(weight, f"has both {_last(names[0])!r} and {_last(names[1])!r}; it can have one of them")
        fmt, kinds = "fp8_block", ("e8m0", "f32", "bf16")
        grid = -(-n_rows // tile), -(-n_bytes // tile)
        scale = _companion(weight, stored, names[0] if names else base + "scale", kinds, grid, "fp8_block.scale")
        return View(_final(stored, name, fmt, weight.shape), weight.shape, parts={"scale": scale})
    if weight.format == "u8" and base + "weight_scale" in stored:
        return _nvfp4(name, base, weight, stored, "weight_scale_2", "input_scale")
    fmt, shape = "mxfp4_official", (n_rows, 2 * n_bytes)
    scale = _companion(weight, stored, base + "scale", ("e8m0",), _blocks(weight, fmt), "mxfp4_official.scale")
    return View(_final(stored, name, fmt, shape), shape, parts={"scale": scale})


def _packed(name: str, weight: StoredTensor, stored: dict[str, StoredTensor]) -> View:
    """The group of a ``<base>.weight_packed``, which compressed-tensors uses for codes of any kind."""
    base = name.removesuffix("weight_packed")
    if weight.format == "i32":
        raise _error(
            weight, "holds INT4 weights (W4A16), which ds4 does not read; take a release with FP8, MXFP4 or NVFP4"
        )
    if weight.format != "u8":
        raise _error(weight, f"must be U8, not {_dtype(weight)}")
    if base + "weight" in stored:
        raise _error(weight, f"is a second form of {stored[base + 'weight'].name!r:.200}; the file is damaged")
    _matrix(weight)
    return _nvfp4(name, base, weight, stored, "weight_global_scale", "input_global_scale")


def _nvfp4(
    name: str, base: str, weight: StoredTensor, stored: dict[str, StoredTensor], whole: str, unused: str
) -> View:
    """The group of 4-bit codes with e4m3 scales, a scale of the ``whole`` weight, and perhaps an ``unused`` tensor."""
    fmt = "nvfp4_modelopt"
    divides = whole == "weight_global_scale"
    role = "nvfp4_modelopt.divisor" if divides else "nvfp4_modelopt.multiplier"
    scale = _companion(weight, stored, base + "weight_scale", ("e4m3",), _blocks(weight, fmt), "nvfp4_modelopt.scale")
    multiplier = _companion(weight, stored, base + whole, ("f32",), None, role)
    if base + unused in stored:
        _final(stored, base + unused, "nvfp4_modelopt.unused")
    shape = weight.shape[0], 2 * weight.shape[1]
    return View(_final(stored, name, fmt, shape), shape, scale=multiplier, divides=divides, parts={"scale": scale})


def _matrix(weight: StoredTensor) -> tuple[int, int]:
    if len(weight.shape) != 2:
        raise _error(weight, f"has dtype {_dtype(weight)}, so it must be a matrix, not {list(weight.shape)}")
    return weight.shape[0], weight.shape[1]


def _blocks(weight: StoredTensor, fmt: str) -> tuple[int, int]:
    """Shape of the scales of a weight of 4-bit codes, one a block."""
    form = FORMATS[fmt]
    n_rows, n_bytes = weight.shape
    if n_bytes % form.block_bytes:
        raise _error(weight, f"has rows of {2 * n_bytes}, not a multiple of the {fmt} block {form.block}")
    return n_rows, n_bytes // form.block_bytes


def _companion(
    weight: StoredTensor,
    stored: dict[str, StoredTensor],
    name: str,
    kinds: tuple[str, ...],
    shape: tuple[int, int] | None,
    fmt: str,
) -> StoredTensor:
    """A companion, checked, with its final format; shape None stands for one number in any shape."""
    found = stored.get(name)
    if found is None:
        raise _error(weight, f"has dtype {_dtype(weight)} and needs {_last(name)!r}, which is missing")
    if found.format not in kinds:
        names = " or ".join(RAW.get(kind, kind.upper()) for kind in kinds)
        raise _error(found, f"must be {names}, not {_dtype(found)}")
    if (math.prod(found.shape) != 1) if shape is None else (found.shape != shape):
        expected = "a single number" if shape is None else list(shape)
        raise _error(found, f"has shape {list(found.shape)}; its weight of {list(weight.shape)} needs {expected}")
    return _final(stored, name, fmt)


def _final(stored: dict[str, StoredTensor], name: str, fmt: str, shape: tuple[int, ...] | None = None) -> StoredTensor:
    """Replace a tensor by one of this format (and shape)."""
    t = stored[name]
    # Not dataclasses.replace, which takes three times as long: a checkpoint has more than 100,000 of these.
    stored[name] = StoredTensor(t.name, fmt, t.shape if shape is None else shape, t.file, t.offset, t.nbytes)
    return stored[name]


def _dtype(tensor: StoredTensor) -> str:
    return RAW.get(tensor.format, tensor.format.upper())


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _error(tensor: StoredTensor, problem: str) -> Ds4Error:
    return Ds4Error(f"{tensor.file.path}: tensor {tensor.name!r:.200} {problem}")
