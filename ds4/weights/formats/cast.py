"""Casts between the layouts of 4-bit weights, on packed bytes: lossless wherever the target can hold the values.

MXFP4 has a power-of-two scale for 32 weights; NVFP4 an e4m3 scale for 16, and a multiplier for the whole tensor.  Their
codes are the same, so that a cast moves nibbles and rewrites scales.  From MXFP4 to NVFP4 the multiplier is
2^(k_max - 8), k_max being the largest exponent of a block that is not all zeros, and e4m3 holds every power of two from
2^-9 to 2^8: blocks down to 17 octaves below the largest keep their codes.  The way back is exact where both halves of a
block have the same power of two.  All other blocks are rounded anew, and those whose values changed are reported.
Source:  spec weights.md 2.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ds4.errors import Ds4Error
from ds4.weights.formats import mxfp4, nvfp4, nvfp4_sleepy
from ds4.weights.formats.block_scale import (
    decode_e2m1_pairs,
    e4m3_table,
    e8m0_to_f32,
    finite,
    look_up,
    pairs_to_runs,
    runs_to_pairs,
)
from ds4.weights.formats.nvfp4 import GROUP
from ds4.weights.formats.plain import elements
from ds4.weights.formats.tiling import columns_to_pairs

MXFP4 = ("mxfp4", "mxfp4_official")
NVFP4 = ("nvfp4", "nvfp4_modelopt", "nvfp4_sleepy")
_TILE = 1 << 20  # weights cast at a time


@dataclass(frozen=True, eq=False)
class Cast:
    """A weight in another format.

    format      the target, a key of ``FORMATS``
    data        uint8 [n_rows, row_bytes]
    parts       by the names in ``Format.parts``
    multiplier  of all values (PackedTensor.scale); 1 for MXFP4
    inexact     i64 [n, 2], (row, first column) of each group of weights whose values changed; a group is a block of the
                target format, 32 or 16 weights
    """

    format: str
    data: Tensor
    parts: dict[str, Tensor]
    multiplier: float
    inexact: Tensor

    @property
    def n_inexact(self) -> int:
        """Groups of weights whose values changed; 0 says that the cast is lossless."""
        return self.inexact.shape[0]


def nvfp4_multiplier(source: str, data: Tensor, *parts: Tensor) -> float:
    """The multiplier with which :func:`cast_fp4` casts an MXFP4 tensor to NVFP4: 2^(k_max - 8), or 1 for zeros alone.

    Tensors that have to share one take the largest of theirs.  Arguments and errors as for :func:`cast_fp4`.
    """
    if source not in MXFP4:
        raise ValueError(f"{source}: only MXFP4 needs a multiplier to become NVFP4")
    largest = 0.0
    for start in _starts(data):
        codes, factor = _read(source, *_rows(data, parts, start))
        largest = max(largest, float((factor * _any_code(codes)).max()))
    return largest * 2.0**-8 or 1.0


def cast_fp4(
    source: str, target: str, data: Tensor, *parts: Tensor, scale: float = 1.0, multiplier: float | None = None
) -> Cast:
    """Cast packed rows between any two of the formats MXFP4 and NVFP4.

    source, target  keys of ``FORMATS``, each one of MXFP4 or NVFP4 above; target's blocks must divide the rows
    data, parts     as for ``Format.dequantize`` of the source: uint8 [n_rows, row_bytes]; scales [n_rows, n]
    scale           the source's own multiplier (PackedTensor.scale)
    multiplier      the target's, to share one between tensors; None takes :func:`nvfp4_multiplier` from MXFP4, and
                    ``scale`` from NVFP4.  MXFP4 has none
    returns         Cast; zeros keep the sign of their code, which ggml's formats read as +0
    Order:          a block that the target holds with the codes it has keeps them; others are rounded by the target's
                    quantiser, so that nothing but values out of reach changes
    Error:          Ds4Error for a block scale that is not finite, or a ``scale`` that is negative or not finite;
                    ValueError for other formats and for a ``multiplier`` that the target cannot have
    """
    if source not in MXFP4 + NVFP4 or target not in MXFP4 + NVFP4:
        raise ValueError(f"{source} to {target}: only {' '.join(MXFP4 + NVFP4)} can be cast")
    if not (math.isfinite(scale) and scale >= 0):
        raise Ds4Error(f"has a multiplier of {scale}; the file is damaged")
    if target in MXFP4:
        if multiplier not in (None, 1.0):
            raise ValueError(f"{target} has no multiplier, so it cannot be {multiplier}")
        multiplier = 1.0
    elif multiplier is None:
        multiplier = nvfp4_multiplier(source, data, *parts) * (scale or 1.0) if source in MXFP4 else scale
    elif not (math.isfinite(multiplier) and multiplier > 0):
        raise ValueError(f"a multiplier must be finite and above 0, not {multiplier}")
    ratio = 1.0 if multiplier == scale else scale / multiplier
    rewrite = _to_mxfp4 if target in MXFP4 else _to_nvfp4
    pieces = []
    for start in _starts(data):
        codes, factor = _read(source, *_rows(data, parts, start))
        codes, scales, changed = rewrite(codes, factor * ratio)
        rows, columns = changed.nonzero(as_tuple=True)
        width = codes.shape[1] * 2 // changed.shape[1]
        pieces.append((*_write(target, codes, scales), torch.stack((rows + start, columns * width), dim=1)))
    packed, *rest, inexact = (torch.cat(column) for column in zip(*pieces, strict=True))
    return Cast(target, packed, {"scale": rest[0]} if rest else {}, multiplier, inexact)


def _starts(data: Tensor) -> range:
    """First rows of the tiles that a cast works on, of :func:`_tile_rows` rows each."""
    return range(0, max(1, data.shape[0]), _tile_rows(data))


def _tile_rows(data: Tensor) -> int:
    return max(1, _TILE // max(1, 2 * data.shape[1]))


def _rows(data: Tensor, parts: tuple[Tensor, ...], start: int) -> tuple[Tensor, ...]:
    return tuple(tensor[start : start + _tile_rows(data)] for tensor in (data, *parts))


def _read(source: str, data: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
    """Codes u8 [n_rows, n / 2] in the official order and the scales of each 16 weights, f64 [n_rows, n / 16], >= 0."""
    n_rows = data.shape[0]
    if source in MXFP4:
        if source == "mxfp4":
            blocks = data.reshape(n_rows, -1, mxfp4.BLOCK_BYTES)
            codes, exponent = runs_to_pairs(blocks[..., 1:]).flatten(1), blocks[..., 0]
        else:
            codes, exponent = data, parts[0]
        return codes, finite(e8m0_to_f32(exponent)).double().repeat_interleave(mxfp4.BLOCK // GROUP, dim=1)
    if source == "nvfp4":
        blocks = data.reshape(n_rows, -1, nvfp4.BLOCK_BYTES)
        codes = runs_to_pairs(blocks[..., 4:].unflatten(-1, (4, 8))).flatten(1)
        return codes, nvfp4.scale_values(blocks[..., :4].reshape(n_rows, -1)).double()
    if source == "nvfp4_sleepy":
        blocks = data.reshape(n_rows, -1, nvfp4_sleepy.BLOCK_BYTES)
        codes = blocks[..., : nvfp4_sleepy.CODE_BYTES].flatten(1)
        byte = blocks[..., nvfp4_sleepy.CODE_BYTES :].reshape(n_rows, -1)
    else:
        codes, byte = data, parts[0]
    signed = finite(look_up(e4m3_table(data.device), byte)).double()
    # No writer makes negative scales; should one occur, the sign goes into the codes.
    flip = torch.signbit(signed).to(torch.uint8) * 0x88
    return (codes.unflatten(1, (-1, GROUP // 2)) ^ flip.unsqueeze(-1)).flatten(1), signed.abs()


def _to_nvfp4(codes: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale bytes u8 [n_rows, n / 16] and the groups whose values changed, bool [n_rows, n / 16].

    codes   u8 [n_rows, n / 2], official order; wanted  f64 [n_rows, n / 16], the scales they belong to, >= 0
    """
    byte = nvfp4.nearest_scale(wanted)
    again = nvfp4.scale_values(byte) != wanted
    changed = torch.zeros_like(again)
    if again.any():
        old = decode_e2m1_pairs(codes.unflatten(1, (-1, GROUP // 2))[again]).double() * wanted[again].unsqueeze(-1)
        new_codes, byte[again] = nvfp4.encode_groups(_clamped(old))
        pairs = columns_to_pairs(new_codes)
        codes = codes.clone()
        codes.unflatten(1, (-1, GROUP // 2))[again] = pairs
        new = decode_e2m1_pairs(pairs) * nvfp4.scale_values(byte[again]).unsqueeze(-1)
        changed[again] = (new != old).any(-1)
    return codes, byte, changed


def _to_mxfp4(codes: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`_to_nvfp4`, with scale bytes and changes of blocks, [n_rows, n / 32]."""
    live = (_any_code(codes) & (wanted > 0)).unflatten(1, (-1, 2))
    # A group with a scale of 0 is one of zeros, whatever its codes.
    groups = codes.unflatten(1, (-1, GROUP // 2))
    codes = torch.where(live.flatten(1).unsqueeze(-1), groups, groups & 0x88).flatten(1)
    halves = wanted.unflatten(1, (-1, 2))
    common = torch.where(live[..., 0], halves[..., 0], halves[..., 1])
    mantissa, exponent = torch.frexp(common)
    exponent += 127 - 1  # mantissas are from 1/2 to 1
    fits = (mantissa == 0.5) & (exponent >= 0) & (exponent <= 254)
    byte = (exponent * fits).to(torch.uint8)
    again = live.any(-1) & ~(fits & ((halves[..., 0] == halves[..., 1]) | ~live.all(-1)))
    changed = torch.zeros_like(again)
    if again.any():
        blocks = codes.view(*byte.shape, mxfp4.OFFICIAL_BLOCK_BYTES)
        values = decode_e2m1_pairs(blocks[again]).double().unflatten(1, (2, GROUP)) * halves[again].unsqueeze(-1)
        old = values.flatten(1)
        new_codes, byte[again] = mxfp4.encode_blocks(_clamped(old))
        blocks[again] = columns_to_pairs(new_codes)
        new = decode_e2m1_pairs(blocks[again]).double() * e8m0_to_f32(byte[again]).unsqueeze(-1)
        changed[again] = (new != old).any(-1)
    return codes, byte, changed


def _clamped(values: Tensor) -> Tensor:
    """f64 -> f32, beyond whose range neither format reaches."""
    largest = torch.finfo(torch.float32).max
    return values.clamp(-largest, largest).to(torch.float32)


def _write(target: str, codes: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
    """(data, *parts) of codes u8 [n_rows, n / 2] in the official order and scale bytes u8 [n_rows, n_blocks]."""
    if target in ("mxfp4_official", "nvfp4_modelopt"):
        return codes, scales
    n_rows = codes.shape[0]
    if target == "mxfp4":
        runs = pairs_to_runs(codes.view(n_rows, -1, mxfp4.OFFICIAL_BLOCK_BYTES))
        return (torch.cat((scales.unsqueeze(-1), runs), dim=-1).flatten(1),)
    if target == "nvfp4":
        runs = pairs_to_runs(codes.view(n_rows, -1, GROUP // 2)).view(n_rows, -1, nvfp4.BLOCK // 2)
        return (torch.cat((scales.view(n_rows, -1, nvfp4.BLOCK // GROUP), runs), dim=-1).flatten(1),)
    natural = codes.view(n_rows, -1, nvfp4_sleepy.CODE_BYTES)
    return (torch.cat((natural, scales.view(n_rows, natural.shape[1], -1)), dim=-1).flatten(1),)


def _any_code(codes: Tensor) -> Tensor:
    """bool [n_rows, n / 16]: whether a group has a code other than 0 and -0."""
    return (elements(codes, torch.int64) & 0x7777777777777777) != 0
