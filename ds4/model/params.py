"""Where the network takes its weights from: a checkpoint, or plain tensors when it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from ds4.weights.dense_cache import Weight
from ds4.weights.tensor import PackedTensor


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
    w = params.expect(name, shape)
    if isinstance(w, PackedTensor):
        w = w.dequantize()
    return w if w.is_floating_point() else w.to(torch.int64)
