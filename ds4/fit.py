"""Whether a checkpoint fits a memory at a context length: ``ds4 inspect --memory 128GiB --ctx 1M``.

Source:  weights as stored (they stay packed); state by ds4.kv.spec (spec model.md 6).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ds4.config import ModelConfig
from ds4.kv.spec import RowFormats, cache_bytes

ALLOWANCE_BYTES = 2 << 30
"""Set aside for the CUDA context, compiled kernels, graphs, activations and logits; not measured on a GPU yet."""


@dataclass(frozen=True)
class Fit:
    """Bytes that a model needs at a context of ``ctx`` tokens, and what a memory of ``memory_bytes`` has room for.

    max_ctx   longest context that fits, at most the model's own; 0 when weights and allowance alone are too much
    """

    ctx: int
    memory_bytes: int
    weights_bytes: int
    state_bytes: int
    allowance_bytes: int
    max_ctx: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.state_bytes + self.allowance_bytes

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.memory_bytes

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"total_bytes": self.total_bytes, "fits": self.fits}


def fit(config: ModelConfig, weights_bytes: int, ctx: int, memory_bytes: int) -> Fit:
    """The bill for one session at ``ctx`` tokens, with packed rows (584 bytes a KV row, 68 a key)."""
    formats = RowFormats.of(config, kv_fp8=True, kv_rope_bf16=True, index_fp4=True)

    def fits(n: int) -> bool:
        return weights_bytes + cache_bytes(config, formats, n) + ALLOWANCE_BYTES <= memory_bytes

    low, high = 0, config.max_position_embeddings
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return Fit(ctx, memory_bytes, weights_bytes, cache_bytes(config, formats, ctx), ALLOWANCE_BYTES, low)
