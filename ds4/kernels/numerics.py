"""Which of the official code's roundings are simulated: five independent switches and three named groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds4.errors import Ds4Error


@dataclass(frozen=True)
class Numerics:
    """Rounding switches (spec model.md 5.7); all off is plain FP32 arithmetic.

    ``act_fp8``: activations of the linears that the official checkpoint stores in FP8 or FP4 are rounded to e4m3 with a
    power-of-two scale per 128. ``kv_fp8``: KV rows, 448 non-RoPE values, e4m3 per 64. ``kv_rope_bf16``: their RoPE part
    in bf16; with both a row packs into 584 bytes. ``index_rotate`` / ``index_fp4``: Hadamard rotation and FP4 rounding
    of indexer queries and keys. ``bf16``: the official code's bf16 rounding points everywhere else.
    """

    act_fp8: bool = False
    kv_fp8: bool = False
    kv_rope_bf16: bool = False
    index_rotate: bool = False
    index_fp4: bool = False
    bf16: bool = False

    def rd(self, x: Tensor) -> Tensor:
        """``x`` rounded to bf16 when the official rounding points are on, else ``x`` itself."""
        return x.to(torch.bfloat16).to(torch.float32) if self.bf16 else x


GROUPS: dict[str, Numerics] = {
    "official": Numerics(act_fp8=True, kv_fp8=True, kv_rope_bf16=True, index_rotate=True, index_fp4=True, bf16=True),
    "serve": Numerics(kv_fp8=True, kv_rope_bf16=True, index_rotate=True, index_fp4=True),
    "exact": Numerics(),
}
DEFAULT_GROUP = "serve"


def resolve(numerics: str | Numerics | None) -> Numerics:
    """A :class:`Numerics` from a group's name; None is the default group. Raises Ds4Error for an unknown name."""
    if isinstance(numerics, Numerics):
        return numerics
    group = GROUPS.get(numerics or DEFAULT_GROUP)
    if group is None:
        raise Ds4Error(f"numerics: unknown group {numerics!r}; choose one of {', '.join(GROUPS)}")
    return group
