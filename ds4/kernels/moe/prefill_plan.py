"""How the experts' products of the prefill form are launched: what expert_gemm.cuh computes from tiles and formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ds4.kernels.picks import Pick, candidates, default_pick, pick, shared_bytes

_TILE_ROWS = 16  # mma_rows.cuh: kTileRows
_WIDE = ("f32", "f16", "bf16", "q6_k")  # expert_gemm.cuh: kWide


@dataclass(frozen=True)
class ExpertPlan:
    """A launch: its pick, and the formats of the matrices that make a row of results, two of them for gate and up.

    Raises ValueError for a pick that no kernel takes with these formats.
    """

    pick: Pick
    formats: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.pick not in candidates(self.formats):
            what = f"{self.pick.tokens} in {self.pick.stages} stages with {' and '.join(self.formats)}"
            raise ValueError(f"moe: tiles of {what}: there is no such launch")

    @property
    def warps(self) -> int:
        """Of a block."""
        tokens = self.pick.tokens
        return 8 if tokens >= 64 or "iq2_xxs" in self.formats else 4 if tokens >= 32 else 2

    @property
    def rows(self) -> int:
        """Rows of results that a block owns."""
        deep = 2 if self.pick.tokens >= 128 and not any(fmt in _WIDE for fmt in self.formats) else 1
        return _TILE_ROWS * deep * self.warps // len(self.formats)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return max(shared_bytes(self.pick, self.formats), 2 * self.pick.tokens * (self.rows + 8))


@dataclass(frozen=True)
class Product:
    """What a launch multiplies: the kernel's name among the picks, the formats of the matrices of an expert, of
    ``n_rows`` rows of ``n_cols`` each, and how many experts share the pairs."""

    kernel: str
    formats: tuple[str, ...]
    n_rows: int
    n_cols: int
    n_experts: int = 1

    def pick(self, n_pairs: int, device: torch.device) -> Pick:
        """For pairs that all experts have the same number of; the largest tile at most that a block has memory for."""
        n_tok = -(-n_pairs // self.n_experts)

        def blocks(tokens: int) -> int:
            rows = ExpertPlan(_fitting(Pick(tokens, 2), self.formats), self.formats).rows
            return self.n_experts * -(-self.n_rows // rows) * -(-n_tok // tokens)

        sizes = {"n_cols": self.n_cols, "n_rows": self.n_rows * len(self.formats)}
        found = pick(self.kernel, **sizes, formats=self.formats, n_tok=n_tok, device=device, blocks=blocks)
        return _fitting(found, self.formats)

    def plan(self, n_pairs: int, tile: int | None, device: torch.device) -> ExpertPlan:
        """With the tile that pairs were grouped by, or the picked one. Raises ValueError where no kernel takes it."""
        found = self.pick(n_pairs, device)
        if tile not in (None, found.tokens):
            found = Pick(tile, default_pick(tile).stages)
        return ExpertPlan(found, self.formats)


def _fitting(wanted: Pick, formats: Sequence[str]) -> Pick:
    """``wanted``, or the largest smaller tile that there is a launch for."""
    possible = candidates(formats)
    while wanted not in possible and wanted.tokens > 8:
        wanted = Pick(wanted.tokens // 2, 2)
    return wanted


def expert_tile(
    up: Sequence[str], down: str, *, d: int, inter: int, n_experts: int, n_pairs: int, device: torch.device
) -> int:
    """The tile for ``moe_group``, ``moe_up_gemm`` and ``moe_down_gemm``.

    up, down  formats of w1 and w3 and of w2
    n_pairs   tokens of a chunk * top_k
    Error:    Ds4Error for a file of picks that cannot be used
    """
    routed = (Product("moe_up", tuple(up), inter, d, n_experts), Product("moe_down", (down,), d, inter, n_experts))
    return min(product.pick(n_pairs, device).tokens for product in routed)
