"""What all layers of one forward call share: the launch, rotary angles, window mask, numerics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds4.config import ModelConfig
from ds4.kernels.common import rope_angles, rope_frequencies
from ds4.kernels.launch import Launch
from ds4.kernels.numerics import Numerics
from ds4.kernels.proj import Rows


class Rope:
    """Frequencies of the two rotary tables: plain (sliding layers, draft blocks) and compressed (YaRN)."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        n = config.qk_rope_head_dim
        fast, slow = config.rope_beta_fast, config.rope_beta_slow
        with torch.device("cpu"):  # the same bits whatever the device: a power is not computed alike everywhere
            plain = rope_frequencies(n, config.rope_theta, 1.0, 0, fast, slow)
            compressed = rope_frequencies(
                n, config.compress_rope_theta, config.rope_factor, config.rope_original_max_position, fast, slow
            )
        self.plain, self.compressed = plain.to(device), compressed.to(device)

    def frequencies(self, ratio: int) -> Tensor:
        return self.compressed if ratio else self.plain


@dataclass(frozen=True, eq=False)
class Context:
    """One forward call. ``cis_plain`` / ``cis_compressed`` complex64 ``[n_rows, n_rope / 2]``; ``window_mask`` bool
    ``[n_rows, window + n_rows]`` over the keys ``tile_start - window ..`` (prefill form only)."""

    launch: Launch
    rope: Rope
    numerics: Numerics
    cis_plain: Tensor
    cis_compressed: Tensor
    window_mask: Tensor | None
    ids: Tensor

    @property
    def rows(self) -> Rows:
        return self.launch.rows if self.launch.decode else None

    def cis(self, ratio: int) -> Tensor:
        return self.cis_compressed if ratio else self.cis_plain


def make_context(config: ModelConfig, rope: Rope, numerics: Numerics, launch: Launch, ids: Tensor) -> Context:
    """Context of a launch; ``ids`` i64 ``[n_rows]`` are the input tokens of its rows (0 where there is none)."""
    mask = None
    if not launch.decode:
        key_pos = torch.arange(launch.tile_start - config.sliding_window, launch.tile_start + launch.n_rows)
        back = launch.pos.unsqueeze(1) - key_pos
        mask = (back >= 0) & (back < config.sliding_window) & (key_pos >= 0)
    return Context(
        launch,
        rope,
        numerics,
        rope_angles(launch.pos, rope.plain),
        rope_angles(launch.pos, rope.compressed),
        mask,
        ids,
    )
