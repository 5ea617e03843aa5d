"""``ds4 inspect --verify``: read every scale of a checkpoint and look for what no header shows.

That tensors lie inside their files and do not overlap is checked whenever a checkpoint is opened. Here the bytes are
read: scales (and unquantised values) must be finite, hash-routing tables must name experts that exist.
Source:  spec weights.md 1 to 4 (where each format keeps its scales).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ds4.errors import Ds4Error
from ds4.weights.checkpoint import Checkpoint
from ds4.weights.formats import INTEGER_FORMATS
from ds4.weights.formats.ggml_other import UNDECODABLE
from ds4.weights.formats.plain import elements
from ds4.weights.storage import StoredTensor
from ds4.weights.tensor import PackedTensor, row_count

_CHUNK = 1 << 24  # bytes looked at at a time


def _f16_finite(data: torch.Tensor) -> torch.Tensor:
    return elements(data, torch.float16).isfinite()


def _bf16_finite(data: torch.Tensor) -> torch.Tensor:
    return elements(data, torch.bfloat16).isfinite()


def _f32_finite(data: torch.Tensor) -> torch.Tensor:
    return elements(data, torch.float32).isfinite()


def _e8m0_finite(data: torch.Tensor) -> torch.Tensor:
    return data != 0xFF


def _e4m3_finite(data: torch.Tensor) -> torch.Tensor:
    return (data & 0x7F) != 0x7F


Finite = Callable[[torch.Tensor], torch.Tensor]

# Format -> (bytes of a block, where in it the scales are, what tells finite ones).
_SCALES: dict[str, tuple[int, slice, Finite]] = {
    "f32": (4, slice(0, 4), _f32_finite),
    "f16": (2, slice(0, 2), _f16_finite),
    "bf16": (2, slice(0, 2), _bf16_finite),
    "q8_0": (34, slice(0, 2), _f16_finite),
    "q2_k": (84, slice(80, 84), _f16_finite),
    "q4_k": (144, slice(0, 4), _f16_finite),
    "q6_k": (210, slice(208, 210), _f16_finite),
    "iq2_xxs": (66, slice(0, 2), _f16_finite),
    "mxfp4": (17, slice(0, 1), _e8m0_finite),
    "nvfp4_sleepy": (144, slice(128, 144), _e4m3_finite),
    "fp8_block": (1, slice(0, 1), _e4m3_finite),
}
# Formats whose blocks hold nothing that could be not finite: ggml's NVFP4 reads 0x7f as 0, codes are just codes.
_CODES = {"nvfp4", "mxfp4_official", "nvfp4_modelopt", *INTEGER_FORMATS}
# What other tensors keep for a weight: item size -> what tells finite ones; a byte is e4m3 for NVFP4, else e8m0.
_PARTS: dict[int, Finite] = {4: _f32_finite, 2: _bf16_finite}


@dataclass(frozen=True)
class Report:
    """Result of ``verify``: what was read, and one sentence for each tensor that is not in order."""

    n_tensors: int
    n_scales: int
    n_tables: int
    defects: tuple[str, ...]


def verify(ckpt: Checkpoint, progress: Callable[[int, int], None] | None = None) -> Report:
    """Read every scale and table of a checkpoint.

    progress  called with (bytes passed, bytes in all)
    returns   Report; a checkpoint is in order when it has no defects.  Never raises for what it finds in the data.
    """
    defects: list[str] = []
    n_scales = done = n_tensors = 0
    total = ckpt.total_bytes
    for tensor in ckpt.tensors():
        try:
            bad, seen = _bad_scales(tensor)
        except Ds4Error as error:  # a format that is checked by decoding it
            bad, seen = 0, 0
            defects.append(str(error).removeprefix("tensor "))
        n_scales += seen
        if bad:
            what = "values" if tensor.format in ("f32", "f16", "bf16", "fp8_block") else "scales"
            defects.append(f"{tensor.name}: {bad} of {seen} {what} are not finite")
        n_tensors += 1
        done += tensor.nbytes
        if progress:
            progress(done, total)
    tables = [name for name in ckpt.names() if name.endswith(".gate.tid2eid")]
    for name in tables:
        problem = _bad_table(ckpt, name)
        if problem:
            defects.append(f"{name}: {problem}")
    return Report(n_tensors, n_scales, len(tables), tuple(defects))


def _bad_scales(tensor: StoredTensor) -> tuple[int, int]:
    """(scales that are not finite, scales looked at) of one stored tensor."""
    fmt, _, role = tensor.format.partition(".")
    if role or fmt not in _SCALES:
        if not role:
            return (0, 0) if fmt in _CODES or not fmt else _bad_values(tensor)
        size = tensor.nbytes // max(1, math.prod(tensor.shape))
        finite = _PARTS.get(size, _e4m3_finite if fmt.startswith("nvfp4") else _e8m0_finite)
        block, where = size, slice(0, size)
    else:
        block, where, finite = _SCALES[fmt]
    bad = seen = 0
    for chunk in _chunks(tensor, block):
        good = finite(chunk[:, where].contiguous())
        bad += int(good.numel() - good.sum())
        seen += good.numel()
    return bad, seen


def _chunks(tensor: StoredTensor, block: int) -> Iterator[torch.Tensor]:
    blocks = tensor.data.view(-1, block)
    step = max(1, _CHUNK // block)
    for first in range(0, blocks.shape[0], step):
        yield blocks[first : first + step]


def _bad_values(tensor: StoredTensor) -> tuple[int, int]:
    """The same for a format without an entry above, by decoding it; (0, 0) where ds4 cannot."""
    if tensor.format in UNDECODABLE:
        return 0, 0
    rows = tensor.data.view(row_count(tensor.shape), -1)
    packed = PackedTensor(tensor.name, tensor.format, (rows.shape[0], tensor.shape[-1]), rows)
    bad = seen = 0
    for _, values in packed.tiles():
        good = values.isfinite()
        bad += int(good.numel() - good.sum())
        seen += good.numel()
    return bad, seen


def _bad_table(ckpt: Checkpoint, name: str) -> str | None:
    """What is wrong with a table of expert ids, or None."""
    ids = ckpt.tensor(name).dequantize().to(torch.int64)
    n_experts = ckpt.n_experts(name.removesuffix(".ffn.gate.tid2eid"))
    outside = int(((ids < 0) | (ids >= n_experts)).sum())
    if outside:
        return f"{outside} of {ids.numel()} expert ids are not in 0 to {n_experts - 1}"
    ordered = ids.sort(dim=1).values
    twice = int((ordered[:, 1:] == ordered[:, :-1]).any(dim=1).sum())
    return f"{twice} of {ids.shape[0]} tokens name an expert twice" if twice else None
