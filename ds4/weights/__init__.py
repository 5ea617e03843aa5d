"""Checkpoints: ``open_checkpoint(path)`` gives named, lazy, packed tensors from GGUF or safetensors files."""

from ds4.weights.checkpoint import Checkpoint
from ds4.weights.opening import open_checkpoint
from ds4.weights.tensor import PackedTensor

__all__ = ["Checkpoint", "PackedTensor", "open_checkpoint"]
