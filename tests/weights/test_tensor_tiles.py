"""Parts of a packed tensor: rows by index, tiles of rows, and the memory they are decoded into."""

from __future__ import annotations

import pytest
import torch

from ds4.errors import Ds4Error
from ds4.weights import tensor as tensor_module
from ds4.weights.formats import FORMATS
from ds4.weights.tensor import PackedTensor, empty

N_ROWS, N_COLS = 300, 256
BY_QUANTISER = ("f32", "f16", "bf16", "q8_0", "nvfp4")
BY_BYTES = {"mxfp4": 0, "iq2_xxs": 0, "q2_k": 80, "q4_k": 0}
"""Where the block scale is; its bytes are set so that it is finite."""
BY_PARTS = ("mxfp4_official", "nvfp4_modelopt", "fp8_block")
ALL = (*BY_QUANTISER, *BY_BYTES, *BY_PARTS)


def packed(fmt: str, n_rows: int = N_ROWS, n_cols: int = N_COLS, scale: float = 1.0) -> PackedTensor:
    """Random finite weights in a format."""
    form, g = FORMATS[fmt], torch.Generator().manual_seed(7)
    if fmt in BY_QUANTISER:
        data = form.quantize(torch.randn(n_rows, n_cols, generator=g))
        return PackedTensor("w", fmt, (n_rows, n_cols), data, scale)
    data = torch.randint(0, 120, (n_rows, form.row_bytes(n_cols)), generator=g, dtype=torch.uint8)
    if fmt in BY_BYTES:
        blocks = data.view(n_rows, -1, form.block_bytes)
        first, width = BY_BYTES[fmt], 1 if fmt == "mxfp4" else 4
        blocks[..., first : first + width] = torch.tensor([60, 40, 20, 36][:width], dtype=torch.uint8)
        return PackedTensor("w", fmt, (n_rows, n_cols), data, scale)
    n_scales = -(-n_cols // (128 if fmt == "fp8_block" else form.block))
    scales = torch.randint(100, 120, (-(-n_rows // form.row_block), n_scales), generator=g, dtype=torch.uint8)
    return PackedTensor("w", fmt, (n_rows, n_cols), data, scale, {"scale": scales})


IDS = torch.tensor([299, 0, 128, 127, 0, 255, 256])
"""Both sides of the 128-row blocks of fp8_block, the ends, and one row twice."""


@pytest.mark.parametrize("fmt", ALL)
def test_rows_by_index_are_those_of_the_whole(fmt: str) -> None:
    w = packed(fmt, scale=0.5 if fmt == "nvfp4" else 1.0)
    whole = w.dequantize()
    rows = w.take_rows(IDS)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, whole[IDS])
    assert not torch.equal(rows, whole[IDS.flip(0)])


def test_rows_of_a_column_slice() -> None:
    w = packed("q8_0")
    half = w.data.shape[1] // 2
    right = PackedTensor("w", "q8_0", (N_ROWS, N_COLS // 2), w.data[:, half:])
    assert torch.equal(right.take_rows(IDS), w.dequantize()[IDS, N_COLS // 2 :])


def test_integer_rows_keep_their_type() -> None:
    values = torch.arange(60, dtype=torch.int32).view(20, 3)
    w = PackedTensor("table", "i32", (20, 3), values.view(torch.uint8))
    assert torch.equal(w.take_rows(torch.tensor([7, 3])), values[[7, 3]])


def test_no_other_row_is_decoded() -> None:
    w = packed("fp8_block")
    w.parts["scale"][1] = 255  # not a number, for rows 128 to 255
    w.take_rows(torch.tensor([0, 127, 256]))
    with pytest.raises(Ds4Error, match="not a finite number"):
        w.take_rows(torch.tensor([0, 128]))


@pytest.mark.parametrize("bad", [-1, N_ROWS])
def test_a_row_out_of_range_is_an_error(bad: int) -> None:
    with pytest.raises(IndexError, match="outside 0 to 299"):
        packed("fp8_block").take_rows(torch.tensor([0, bad]))


def test_rows_need_two_dimensions() -> None:
    w = PackedTensor("norm", "f32", (8,), torch.zeros(1, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="two dimensions"):
        w.take_rows(torch.tensor([0]))


@pytest.mark.parametrize("fmt", ALL)
@pytest.mark.parametrize(("first", "last"), [(0, None), (5, 290), (127, 129), (9, 9)])
def test_tiles_cover_the_rows_once(fmt: str, first: int, last: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_module, "_TILE", 7 * N_COLS)
    w = packed(fmt)
    whole, at = w.dequantize(), first
    for rows, tile in w.tiles(first, last):
        assert rows.start == at
        assert 0 < len(tile) == rows.stop - rows.start <= 7
        assert torch.equal(tile, whole[rows])
        at = rows.stop
    assert at == (N_ROWS if last is None else last)


def test_memory_for_products_is_aligned() -> None:
    for n in (1, 17, 1000, 3 << 20):
        x = empty((n, 3))
        assert x.shape == (n, 3)
        assert x.data_ptr() % 64 == 0
        assert x.is_contiguous()
        x.fill_(1.0)
        assert x.sum() == 3 * n
