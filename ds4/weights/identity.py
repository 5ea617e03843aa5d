"""Which checkpoint this is, found out without reading all of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from ds4.weights.checkpoint import Checkpoint

SAMPLES, SAMPLE_BYTES = 256, 4096


def fingerprint(checkpoint: Checkpoint, *, draft: bool = False) -> str:
    """Identity of a checkpoint's trunk, or of its draft head: 64 hexadecimal digits.

    SHA-256 over the configuration, the names, formats and shapes of all tensors, and up to 4 KiB from the middle of at
    most 256 of them, evenly chosen: at most 1 MiB is read, whatever the size. Where the files lie does not matter. Two
    checkpoints of one shape that differ only in tensors that were not chosen, or only elsewhere in them, look the same.
    """
    config = {k: v for k, v in asdict(checkpoint.config).items() if k.startswith(("dspark_", "n_mtp_")) == draft}
    groups = sorted(g for g in checkpoint.stored_groups() if g[0].startswith("mtp.") == draft)
    digest = hashlib.sha256(json.dumps([config, groups], sort_keys=True).encode())
    for name, _, shape, _ in groups[:: -(-len(groups) // SAMPLES) or 1]:
        tensor = checkpoint.tensor(name.replace("*", str(shape[0] // 2)) if "*" in name else name)
        digest.update(repr(tensor.scale).encode())
        digest.update(tensor.data[tensor.data.shape[0] // 2][:SAMPLE_BYTES].numpy().tobytes())
    return digest.hexdigest()
