"""The order in which the experts' kernels read codes: by the lane of a warp that multiplies them.

Of a chunk of 128 weights lane t = 0..3 takes weights 32 b + 8 t .. 32 b + 8 t + 7 of each block b = 0..3
(ds4/kernels/include/mma_rows.cuh).  Four-bit codes of eight weights are one i32 word.  All is reversible bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 128
CHUNK_BYTES = CHUNK // 2  # of four-bit codes


def by_lane(words: Tensor) -> Tensor:
    """i32 [n, 16 c]: of each chunk's words those of lane t become words 4 t .. 4 t + 3, by block; its own inverse."""
    return words.unflatten(1, (-1, 4, 4)).transpose(2, 3).flatten(1)


def move_bits(words: Tensor, places: Sequence[int]) -> Tensor:
    """i32 or i64 [...], new: bit i of every word moves to bit ``places[i]``, a permutation of all bits."""
    masks: dict[int, int] = {}
    for bit, place in enumerate(places):
        masks[place - bit] = masks.get(place - bit, 0) | 1 << place
    moved, sign = torch.zeros_like(words), len(places) - 1
    for distance, mask in masks.items():
        shifted = words << distance if distance >= 0 else words >> -distance
        moved |= shifted.bitwise_and_(mask - (mask >> sign << sign + 1))
    return moved


def inverse(places: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes ``places``."""
    return tuple(sorted(range(len(places)), key=lambda bit: places[bit]))


# Code i of eight nibbles: neighbours 16 bits apart, 4 bits from pair to pair.
_NIBBLES = tuple(16 * (i % 2) + 4 * (i // 2) + bit for i in range(8) for bit in range(4))


def nibbles_by_lane(codes: Tensor) -> Tensor:
    """Codes in pairs, u8 [n, K / 2], byte j with weight 2 j low and 2 j + 1 high; K whole chunks -> u8 [n, K / 2]."""
    return move_bits(by_lane(codes.view(torch.int32)), _NIBBLES).view(torch.uint8)


def nibble_pairs(codes: Tensor) -> Tensor:
    """Inverse of :func:`nibbles_by_lane`."""
    return by_lane(move_bits(codes.view(torch.int32), inverse(_NIBBLES))).view(torch.uint8)


# Bits of e2m1 code i, mantissa, two of exponent and sign, where fp4_weights.cuh needs few instructions to make two BF16
# numbers of codes 2 j and 2 j + 1; those of odd codes are 16 further on. The sign of pair 2 comes by rotation.
_E2M1_PAIRS = ((0, 1, 2, 9), (4, 5, 6, 13), (10, 11, 12, 19), (14, 7, 8, 15))
_E2M1 = tuple((place + 16 * (i % 2)) % 32 for i in range(8) for place in _E2M1_PAIRS[i // 2])


def e2m1_by_lane(codes: Tensor) -> Tensor:
    """Codes in pairs, u8 [n, K / 2], byte j with weight 2 j low, 2 j + 1 high -> u8 [n, K / 2 up to whole chunks]."""
    whole = F.pad(codes, (0, -codes.shape[1] % CHUNK_BYTES))
    return move_bits(by_lane(whole.view(torch.int32)), _E2M1).view(torch.uint8)


def e2m1_pairs(codes: Tensor, n_cols: int) -> Tensor:
    """Inverse of :func:`e2m1_by_lane`: u8 [n, n_cols / 2]."""
    return by_lane(move_bits(codes.view(torch.int32), inverse(_E2M1))).view(torch.uint8)[:, : n_cols // 2].contiguous()


def two_bit_places(fields: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """For :func:`move_bits`: codes of two bits that lane t takes of a chunk's 32 bytes, byte l with weight 32 b + l of
    block b in bits 2 b and 2 b + 1, so its bytes 8 t .. 8 t + 7 as one i64.

    fields  of block b = 0, 1 and pair j = 0..3 of neighbours, where in 16 bits, in twos; b = 2, 3 go to the upper word
    """
    return tuple(
        32 * (b // 2) + 16 * (i % 2) + 2 * fields[b % 2][i // 2] + bit
        for i in range(8)
        for b in range(4)
        for bit in range(2)
    )
