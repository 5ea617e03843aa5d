"""A checkpoint's network in torch and through kernels, side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from cuemu.backend import CpuBackend

from ds4.kernels.numerics import resolve
from ds4.kv.cache import KVCache
from ds4.model.device_params import DeviceParams
from ds4.model.steps import Decoder
from ds4.model.transformer import Transformer
from ds4.weights import open_checkpoint

CTX = 512


@dataclass
class Pair:
    """One checkpoint as the torch network and as the network whose decode step is kernels, on the CPU both."""

    path: Path
    torch_model: Transformer = field(init=False)
    model: Transformer = field(init=False)

    def __post_init__(self) -> None:
        checkpoint = open_checkpoint(self.path)
        self.config = checkpoint.config
        self.torch_model = Transformer(self.config, checkpoint, resolve("serve"))
        self.model = Transformer(self.config, DeviceParams(checkpoint, "cpu"), resolve("serve"))

    def ids(self, n: int) -> list[int]:
        vocab = min(self.config.vocab_size, 900)
        return torch.randint(5, vocab, (n,), generator=torch.Generator().manual_seed(0)).tolist()

    def cache(self) -> KVCache:
        """A cache for kernels, which write no decoded ring."""
        return self.model.new_cache(CTX, decoded=False)

    def decoder(self, cache: KVCache) -> Decoder:
        return Decoder(self.model, cache, CpuBackend())
