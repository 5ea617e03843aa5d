"""open_checkpoint: a GGUF file or a safetensors checkpoint as named, lazy, packed tensors.

Opening costs time proportional to the headers; no weight is read until somebody touches its data.
Source:  spec weights.md 5.
"""

from __future__ import annotations

import os
from pathlib import Path

from ds4.errors import Ds4Error
from ds4.weights import gguf, safetensors
from ds4.weights.checkpoint import Checkpoint
from ds4.weights.draft import attach_draft, open_draft
from ds4.weights.gguf_open import open_gguf, part_set
from ds4.weights.safetensors_open import open_safetensors
from ds4.weights.storage import MappedFile


def open_checkpoint(
    path: str | os.PathLike[str], draft: str | os.PathLike[str] | None = None, *, replace_draft: bool = False
) -> Checkpoint:
    """Open a GGUF file or part, a safetensors file or shard, or a directory that holds one checkpoint of either kind.

    draft          a draft head in a file of its own, see ``ds4.weights.draft``
    replace_draft  whether it may take the place of one that the checkpoint has
    Error:         Ds4Error, one line, for everything that can be wrong with the files.
    """
    ckpt = _open(Path(path).expanduser())
    return ckpt if draft is None else attach_draft(ckpt, open_draft(draft), replace=replace_draft)


def _open(path: Path) -> Checkpoint:
    if not path.exists():
        raise Ds4Error(f"{path}: no such file or directory")
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if ggufs and not any(path.glob("*.safetensors")) and not (path / safetensors.INDEX).exists():
            sets = {part_set(file) for file in ggufs}
            if len(ggufs) > 1 and (len(sets) > 1 or None in sets):
                raise Ds4Error(f"{path}: holds {len(ggufs)} GGUF files; name one of them")
            return open_gguf(ggufs[0])
        return open_safetensors(path)
    if path.name == safetensors.INDEX:
        return open_safetensors(path)
    if not path.is_file():
        raise Ds4Error(f"{path}: is neither a file nor a directory")
    with_magic = MappedFile(path).map[:4] == gguf.MAGIC
    if with_magic or path.suffix == ".gguf":
        return open_gguf(path)
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    raise Ds4Error(f"{path}: is neither a GGUF nor a .safetensors file")
