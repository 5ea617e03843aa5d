"""The memory bill: state by the cache's own arithmetic, and the longest context that fits."""

from __future__ import annotations

import pytest
from weights.builders import small_config

from ds4.fit import ALLOWANCE_BYTES, fit
from ds4.kv.spec import RowFormats, cache_bytes

GIB = 1 << 30


def test_bill():
    config = small_config()
    formats = RowFormats.of(config, kv_fp8=True, kv_rope_bf16=True, index_fp4=True)
    bill = fit(config, 5 * GIB, 4096, 8 * GIB)
    assert bill.state_bytes == cache_bytes(config, formats, 4096)
    assert bill.total_bytes == 5 * GIB + bill.state_bytes + ALLOWANCE_BYTES
    assert bill.fits
    assert bill.max_ctx == config.max_position_embeddings
    assert bill.to_dict()["fits"] is True


@pytest.mark.parametrize("spare", [0, 1, 1000, 12_345_678])
def test_longest_context(spare):
    config = small_config()
    formats = RowFormats.of(config, kv_fp8=True, kv_rope_bf16=True, index_fp4=True)
    memory = GIB + ALLOWANCE_BYTES + cache_bytes(config, formats, 0) + spare
    longest = fit(config, GIB, 4096, memory).max_ctx
    assert fit(config, GIB, max(1, longest), memory).fits or longest == 0
    assert not fit(config, GIB, longest + 1, memory).fits


def test_weights_that_do_not_fit():
    bill = fit(small_config(), 9 * GIB, 16, 8 * GIB)
    assert not bill.fits
    assert bill.max_ctx == 0
