"""Sizes of the state, against the arithmetic of spec model.md 6.3 and against what is allocated."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ds4.kv.cache import KVCache
from ds4.kv.rows import FloatRow, PackedKey, PackedRow
from ds4.kv.spec import RowFormats, cache_bytes, layer_spec, pool_bytes_per_token
from ds4.weights.published import FLASH

PACKED = RowFormats(PackedRow(448, 64), PackedKey(128))
WINDOW_BYTES = 43 * 128 * 584
"""The table's windows: 128 rows in each of 43 layers."""


def test_flash_schedule() -> None:
    FLASH.validate("test")
    assert [FLASH.compress_ratios.count(r) for r in (0, 4, 128)] == [2, 21, 20]


def test_formats_follow_the_roundings() -> None:
    """Packed only where the roundings simulated are those the packed row has anyway."""

    def formats(kv_fp8: bool, kv_rope_bf16: bool, index_fp4: bool) -> RowFormats:
        return RowFormats.of(FLASH, kv_fp8=kv_fp8, kv_rope_bf16=kv_rope_bf16, index_fp4=index_fp4)

    assert formats(True, True, True) == PACKED
    assert formats(False, False, False) == RowFormats(FloatRow(512), FloatRow(128))
    assert formats(True, False, True) == RowFormats(FloatRow(512, 448), PackedKey(128))
    assert formats(False, True, False).row == FloatRow(512)


def test_bytes_per_token() -> None:
    """21 layers of (584 + 68) / 4 and 20 of 584 / 128."""
    assert pool_bytes_per_token(FLASH, PACKED) == 3514.25


@pytest.mark.parametrize(("ctx", "gib"), [(8 << 10, 30.5 / 1024), (128 << 10, 442 / 1024), (1 << 20, 3.43)])
def test_totals_of_the_table(ctx: int, gib: float) -> None:
    """The table counts 43 x 128 x 584 bytes of windows plus the pools, to three digits."""
    total = WINDOW_BYTES + pool_bytes_per_token(FLASH, PACKED) * ctx
    assert total / 2**30 == pytest.approx(gib, rel=2e-3)


@pytest.mark.parametrize("ctx", [0, 127, 128, 8192, 1 << 20])
def test_whole_state(ctx: int) -> None:
    """Beyond the table: compressor state (12,206,080 bytes in the official layout) and 16 slots more in every ring,
    which is what undoing two steps of 8 tokens costs."""
    draft = 16 * (43 * 584 + 21 * 2 * 4 * (1024 + 256) + 20 * 2 * 4 * 512)
    pools = 21 * (ctx // 4) * (584 + 68) + 20 * (ctx // 128) * 584
    assert cache_bytes(FLASH, PACKED, ctx) == WINDOW_BYTES + 12_206_080 + draft + pools
    assert cache_bytes(FLASH, PACKED, ctx, max_draft=0) == WINDOW_BYTES + 12_206_080 + pools


def test_layer_shapes() -> None:
    sliding, csa, hca = (layer_spec(FLASH, r) for r in (0, 4, 128))
    assert (sliding.ring_slots, sliding.state_slots, sliding.has_index) == (144, 0, False)
    assert (csa.state_slots, csa.state_width, csa.key_state_width, csa.has_index) == (8 + 16, 1024, 256, True)
    assert (hca.state_slots, hca.state_width, hca.has_index) == (128 + 16, 512, False)


@pytest.mark.parametrize("ctx", [100, 1024])
def test_arithmetic_is_what_gets_allocated(ctx: int) -> None:
    small = replace(FLASH, num_hidden_layers=4, compress_ratios=(0, 4, 128, 4))
    for formats in (PACKED, RowFormats(FloatRow(512), FloatRow(128))):
        assert KVCache(small, formats, ctx).nbytes() == cache_bytes(small, formats, ctx)
