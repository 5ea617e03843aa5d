"""Sizes of the state: ring lengths, pool capacities, bytes. Pure arithmetic (spec model.md 6; design.md)."""

from __future__ import annotations

from dataclasses import dataclass

from ds4.config import ModelConfig
from ds4.kv.rows import FloatRow, PackedKey, PackedRow, RowFormat

MAX_DRAFT = 8
"""Tokens of a decode step, of which all may have to be undone."""

MAX_UNDONE = 2 * MAX_DRAFT
"""How many tokens may be undone: those of a step, and of one launched behind it before it was known what the first one
chose. Every ring has this many slots more than its readers look back."""


@dataclass(frozen=True)
class LayerSpec:
    """Shapes of one layer's state; ``lookback``: raw rows the compressor still needs, its rings have a few more."""

    ratio: int
    ring_slots: int
    lookback: int
    state_slots: int
    state_width: int
    key_state_width: int

    @property
    def has_index(self) -> bool:
        return self.key_state_width > 0


def layer_spec(config: ModelConfig, ratio: int, max_draft: int = MAX_UNDONE) -> LayerSpec:
    """State shapes of a layer with this compress ratio (0 for the sliding layers and every draft block); ``max_draft``
    tokens can be undone."""
    overlap = 2 if ratio == 4 else 1
    return LayerSpec(
        ratio=ratio,
        ring_slots=config.sliding_window + max_draft,
        lookback=overlap * ratio,
        state_slots=overlap * ratio + max_draft if ratio else 0,
        state_width=overlap * config.head_dim if ratio else 0,
        key_state_width=2 * config.index_head_dim if ratio == 4 else 0,
    )


@dataclass(frozen=True)
class RowFormats:
    """How KV rows and indexer keys are stored."""

    row: RowFormat
    key: RowFormat

    @staticmethod
    def of(config: ModelConfig, *, kv_fp8: bool, kv_rope_bf16: bool, index_fp4: bool) -> RowFormats:
        """Packed rows where the simulated rounding makes packing lossless, FP32 rows otherwise."""
        nope = config.head_dim - config.qk_rope_head_dim
        row: RowFormat
        if kv_fp8 and kv_rope_bf16:
            row = PackedRow(nope, config.qk_rope_head_dim)
        else:
            row = FloatRow(config.head_dim, nope if kv_fp8 else 0)
        key = PackedKey(config.index_head_dim) if index_fp4 else FloatRow(config.index_head_dim)
        return RowFormats(row, key)


def pool_bytes_per_token(config: ModelConfig, formats: RowFormats) -> float:
    """Bytes of compressed rows and indexer keys per token of context, all layers."""
    total = 0.0
    for ratio in config.compress_ratios:
        if ratio:
            total += formats.row.row_bytes / ratio
        if ratio == 4:
            total += formats.key.row_bytes / ratio
    return total


def cache_bytes(config: ModelConfig, formats: RowFormats, ctx: int, max_draft: int = MAX_UNDONE) -> int:
    """Bytes of the whole state of one session at capacity ``ctx``, rings and compressor state included."""
    total = 0
    for ratio in config.compress_ratios:
        spec = layer_spec(config, ratio, max_draft)
        total += spec.ring_slots * formats.row.row_bytes
        if ratio:
            total += (ctx // ratio) * formats.row.row_bytes + spec.state_slots * 2 * spec.state_width * 4
        if spec.has_index:
            total += (ctx // ratio) * formats.key.row_bytes + spec.state_slots * 2 * spec.key_state_width * 4
    return total
