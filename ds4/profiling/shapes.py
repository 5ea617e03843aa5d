"""A model's decode step without its weights: real shapes on torch's meta device, so that 80 GB need no memory."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor

from ds4.kernels.numerics import DEFAULT_GROUP, GROUPS
from ds4.kernels.packing import Planes
from ds4.model.device_params import DeviceParams, Progress
from ds4.model.transformer import Transformer
from ds4.weights.checkpoint import Checkpoint
from ds4.weights.dense_cache import Weight
from ds4.weights.tensor import PackedTensor

META = torch.device("meta")
_EXPERT = re.compile(r"(.*\.ffn\.experts\.)\d+(\.w[123]\.weight)")


class ShapeParams(DeviceParams):
    """``DeviceParams`` that reads no weight: planes and tables of the right shapes and types, on torch's meta device
    without values.

    Raises Ds4Error as DeviceParams does.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device | str = META, progress: Progress | None = None
    ) -> None:
        super().__init__(checkpoint, device, progress)
        self._firsts: dict[str, tuple[PackedTensor, tuple[str, tuple[int, ...], int]]] = {}

    def expect(self, name: str, shape: tuple[int, ...]) -> Weight:
        if name.endswith(".tid2eid"):
            self.checkpoint.expect(name, shape)
            return self.table(name, shape)
        return super().expect(name, shape)

    def table(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A layer's experts by token, i64 [*shape], which the network checks; here the same for all tokens."""
        return torch.arange(shape[1], device="cpu").expand(shape)

    def stored(self, name: str, shape: tuple[int, ...]) -> PackedTensor:
        expert = _EXPERT.fullmatch(name)
        if expert is None:
            return super().stored(name, shape)
        # A multiplier is a value in the file: 33,000 pages to read. The first expert's stands for all.
        first = f"{expert[1]}0{expert[2]}"
        if first not in self._firsts:
            self._firsts[first] = super().stored(first, shape), self.checkpoint.stored_as(first)
        tensor, about = self._firsts[first]
        return super().stored(name, shape) if self.checkpoint.stored_as(name) != about else replace(tensor, name=name)

    def pack(self, tensor: PackedTensor, planes: Planes, at: int = 0) -> None:
        """Nothing: there are no bytes to pack."""


def shape_model(checkpoint: Checkpoint) -> Transformer:
    """The network of a checkpoint on torch's meta device, as it would be on a GPU. Raises Ds4Error as DeviceParams."""
    model = Transformer(checkpoint.config, ShapeParams(checkpoint), GROUPS[DEFAULT_GROUP], META)
    for block in model.blocks:
        if block.moe.tid2eid is not None:
            block.moe.tid2eid = block.moe.tid2eid.to(META)
    return model
