"""DeviceParams: a checkpoint's weights on a device, matrices in the planes that kernels read.

A matrix is packed once, when the network asks for it, a few rows at a time straight from the memory-mapped file: the
peak is the model's own size and a small buffer. The experts of a layer go into one arena a matrix kind, because one
launch reads several of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import torch

from ds4.errors import Ds4Error
from ds4.kernels.packing import Packing, PlaneMatrix, Planes, pack_rows, packing_of
from ds4.weights.checkpoint import Checkpoint
from ds4.weights.dense_cache import Weight
from ds4.weights.tensor import PackedTensor

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) after every weight; the total counts the whole file."""

_MATRIX = re.compile(
    r"(?:.*\.)?(?:embed|head|wq_a|wq_b|wkv|wgate|wo_a|wo_b|weights_proj|w1|w2|w3|e_proj|h_proj|main_proj"
    r"|markov_w1|markov_w2)\.weight"
)
_EXPERT = re.compile(r"(?P<layer>.*)\.ffn\.experts\.(?P<index>\d+)\.(?P<matrix>w[123])\.weight")


class DeviceParams:
    """``Params`` (ds4.model.params) of a checkpoint on ``device``.

    Matrices are :class:`PlaneMatrix`, everything else PackedTensor with its bytes on the device.
    Raises Ds4Error, naming the tensor, for a missing one, a wrong shape, a format that no kernel reads, or experts of
    one layer in several formats.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str, progress: Progress | None = None) -> None:
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        self._progress = progress
        self._done = 0
        self._arenas: dict[str, tuple[Packing, Planes]] = {}

    def expect(self, name: str, shape: tuple[int, ...]) -> Weight:
        """The weight on the device; packed matrices are new at every call, so each is asked for once."""
        tensor = self.stored(name, shape)
        found: Weight
        expert = _EXPERT.fullmatch(name)
        if expert is not None:
            found = self._expert(tensor, expert["layer"], int(expert["index"]), expert["matrix"])
        elif _MATRIX.fullmatch(name):
            found = self._matrix(tensor)
        else:
            parts = {key: part.to(self.device) for key, part in tensor.parts.items()}
            found = replace(tensor, data=tensor.data.to(self.device), parts=parts)
        self._done += tensor.nbytes
        if self._progress is not None:
            self._progress(self._done, self.checkpoint.total_bytes)
        return found

    def _matrix(self, tensor: PackedTensor) -> PlaneMatrix:
        n_rows, n_cols = tensor.shape
        planes = Planes.allocate(packing_of(tensor), n_rows, n_cols, self.device)
        self.pack(tensor, planes)
        return PlaneMatrix(tensor.name, planes, tensor.scale)

    def stored(self, name: str, shape: tuple[int, ...]) -> PackedTensor:
        """The weight in the checkpoint."""
        return self.checkpoint.expect(name, shape)

    def pack(self, tensor: PackedTensor, planes: Planes, at: int = 0) -> None:
        """Pack a matrix into rows ``at ..`` of planes on the device."""
        pack_rows(tensor, planes, at=at)

    def _expert(self, tensor: PackedTensor, layer: str, index: int, matrix: str) -> PlaneMatrix:
        n_rows, n_cols = tensor.shape
        packing, key = packing_of(tensor), f"{layer}.ffn.{matrix}"
        if key not in self._arenas:
            n_all = self.n_experts(layer) * n_rows
            self._arenas[key] = packing, Planes.allocate(packing, n_all, n_cols, self.device)
        first, arena = self._arenas[key]
        if packing.planes != first.planes:
            raise Ds4Error(
                f"tensor {tensor.name} is stored as {tensor.format}, others of its layer as {first.format}: on a GPU "
                "the experts of a layer share one format; use --device cpu"
            )
        self.pack(tensor, replace(arena, packing=packing), at=index * n_rows)
        planes = replace(arena.rows(index * n_rows, (index + 1) * n_rows), packing=packing)
        return PlaneMatrix(tensor.name, planes, tensor.scale, arena, index)

    def n_experts(self, prefix: str) -> int:
        return self.checkpoint.n_experts(prefix)

    def __contains__(self, name: object) -> bool:
        return name in self.checkpoint
