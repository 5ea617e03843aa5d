"""Row formats (spec model.md 6.1, 6.2): sizes, layout, and packing that loses nothing beyond the official rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from ds4.kv.rows import FloatRow, PackedKey, PackedRow, RowFormat
from ds4.weights.formats import block_scale

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)
ROW, KEY = PackedRow(448, 64), PackedKey(128)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def values(n: int) -> st.SearchStrategy[Tensor]:
    elements = st.one_of(st.floats(-(2.0**15), 2.0**15, width=32), st.floats(-4, 4, width=32))
    arrays = hnp.arrays(np.float32, (3, n), elements=elements, fill=elements)
    return st.builds(lambda a, k: torch.from_numpy(a) * 2.0**k, arrays, st.integers(-30, 60))


def fake_quantised(row_format: RowFormat, x: Tensor) -> Tensor:
    """What the official code keeps in its bf16 cache."""
    if isinstance(row_format, PackedKey):
        return block_scale.round_e2m1(x, 32)
    return torch.cat((block_scale.round_e4m3(x[:, :448], 64), x[:, 448:].bfloat16().float()), dim=1)


def test_sizes() -> None:
    assert ROW.row_bytes == 584
    assert KEY.row_bytes == 68
    assert PackedRow(64, 64).row_bytes == 64 + 8 + 128  # one scale, padded to eight bytes
    assert FloatRow(512).row_bytes == 2048


def test_row_layout() -> None:
    """448 codes, 7 scales, one byte of padding, 64 bf16 values (spec model.md 6.1)."""
    x = torch.randn(2, 512, generator=torch.Generator().manual_seed(0))
    x[:, 64:128] *= 2.0**10
    row = ROW.pack(x)
    assert row.shape == (2, 584)
    assert row.dtype == torch.uint8
    codes, exponent = block_scale.quantize_e4m3(x[:, :448], 64)
    assert torch.equal(row[:, :448], codes.view(torch.uint8))
    assert torch.equal(row[:, 448:455], exponent)
    assert (row[:, 455] == 0).all()
    assert torch.equal(row[:, 456:].contiguous().view(torch.bfloat16), x[:, 448:].bfloat16())


def test_key_layout() -> None:
    """64 bytes of two codes each, the even element in the low nibble, then 4 scales (spec model.md 6.2)."""
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    key = KEY.pack(x)
    codes, exponent = block_scale.quantize_e2m1(x, 32)
    assert torch.equal(key[:, :64] & 15, codes[:, 0::2])
    assert torch.equal(key[:, :64] >> 4, codes[:, 1::2])
    assert torch.equal(key[:, 64:], exponent)


@pytest.mark.parametrize("row_format", [ROW, KEY], ids=["row", "key"])
@PROPERTY
@given(data=st.data())
def test_packing_is_the_official_rounding(row_format: RowFormat, data: st.DataObject) -> None:
    """Bit for bit, and no more than once: unpacked values pack to the same values again.

    The bytes need not be the same again: where rounding brings a block's largest value down to 448 2^k, the second
    packing finds the scale one step smaller and the codes accordingly larger, for equal values.
    """
    x = data.draw(values(512 if row_format is ROW else 128))
    unpacked = row_format.unpack(row_format.pack(x))
    assert torch.equal(bits(unpacked), bits(fake_quantised(row_format, x)))
    again = row_format.pack(unpacked)
    assert torch.equal(bits(row_format.unpack(again)), bits(unpacked))
    assert torch.equal(row_format.pack(row_format.unpack(again)), again)


def test_repacking_gives_the_same_bytes_where_scales_stay() -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    x[:, :448:64] = 400  # rounds to 384 or 416: the same scale before and after
    row = ROW.pack(x)
    assert torch.equal(ROW.pack(ROW.unpack(row)), row)
    x[:, :448:64] = 460  # scale 2, rounds to 448, which the second packing stores with scale 1
    row = ROW.pack(x)
    again = ROW.pack(ROW.unpack(row))
    assert (row[:, 448:455].to(int) - again[:, 448:455].to(int) == 1).all()
    assert torch.equal(ROW.unpack(again), ROW.unpack(row))


@PROPERTY
@given(values(512))
def test_float_rows_store_what_they_are_given(x: Tensor) -> None:
    assert torch.equal(bits(FloatRow(512).unpack(FloatRow(512).pack(x))), bits(x))
    rounded = FloatRow(512, 448)
    expected = torch.cat((block_scale.round_e4m3(x[:, :448], 64), x[:, 448:]), dim=1)
    assert torch.equal(bits(rounded.unpack(rounded.pack(x))), bits(expected))


def test_rows_are_packed_independently() -> None:
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(2)) * torch.tensor([[1e-3], [1], [1e3], [0], [7]])
    for row_format, width in ((ROW, 512), (KEY, 128), (FloatRow(512), 512)):
        packed = row_format.pack(x[:, :width])
        for i in range(5):
            assert torch.equal(row_format.pack(x[i : i + 1, :width])[0], packed[i])
            assert torch.equal(row_format.unpack(packed[i : i + 1])[0], row_format.unpack(packed)[i])
