"""Where the network takes its weights from: a checkpoint, or plain tensors when it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from ds4.weights.dense_cache import Weight
from ds4.weights.tensor import PackedTensor

_STORED = {"f16": torch.float16, "bf16": torch.bfloat16}


class Params(Protocol):
    """Named weights in the official naming; ``expect`` raises Ds4Error for a missing tensor or a wrong shape."""

    def expect(self, name: str, shape: tuple[int, ...]) -> Weight: ...

    def n_experts(self, prefix: str) -> int: ...

    def __contains__(self, name: object) -> bool: ...


class TensorParams:
    """Weights held as torch tensors (training, tests)."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def expect(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._tensors[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
        return tensor

    def n_experts(self, prefix: str) -> int:
        return self._tensors[f"{prefix}.ffn.gate.weight"].shape[0]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors


def small(params: Params, name: str, shape: tuple[int, ...]) -> Tensor:
    """A small tensor held as dense f32 (norms, biases, mHC parameters); integer tables become i64."""
    w = _plain(params.expect(name, shape), torch.float32)
    return w if w.is_floating_point() else w.to(torch.int64)


def table(params: Params, name: str, shape: tuple[int, ...], kept: tuple[torch.dtype, ...] = ()) -> Tensor:
    """A plain matrix that a kernel reads as it is stored, where that is one of ``kept``; on the CPU and else f32."""
    w = params.expect(name, shape)
    stored = _STORED.get(getattr(w, "format", "f32"), torch.float32)
    return _plain(w, stored if w.device.type != "cpu" and stored in kept else torch.float32)


def _plain(w: Weight, dtype: torch.dtype) -> Tensor:
    if isinstance(w, PackedTensor):
        return w.dequantize(dtype)
    assert isinstance(w, Tensor)
    return w
