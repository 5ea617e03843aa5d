"""Opening a GGUF file: its metadata, and its tensors under their canonical names.

Source:  spec weights.md 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ds4.config import ModelConfig
from ds4.errors import Ds4Error
from ds4.weights import gguf, names
from ds4.weights.checkpoint import Checkpoint, View, draft_stages
from ds4.weights.formats import FORMATS
from ds4.weights.storage import MappedFile, StoredTensor
from ds4.weights.tensor import row_count

_HC_HEAD = ("hc_head_fn", "hc_head_scale", "hc_head_base")


def open_gguf(path: Path) -> Checkpoint:
    metadata, stored = gguf.read_gguf(MappedFile(path))
    if metadata.get("split.count", 1) not in (0, 1):
        raise Ds4Error(
            f"{path}: is one part of {metadata['split.count']}; join the parts with llama-gguf-split --merge"
        )
    by_name = {tensor.name: tensor for tensor in stored}
    # llama.cpp counts draft blocks in block_count and marks them by their nextn tensors; the key may be a leftover.
    nextn = sorted({b[1] for n in by_name if (b := names.split_block(n)) and b[0] == "blk" and b[2] == names.EH_PROJ})
    n_layers = metadata.get("deepseek4.block_count", 0)
    if nextn and (type(n_layers) is not int or nextn != list(range(n_layers - len(nextn), n_layers))):
        raise Ds4Error(f"{path}: draft blocks {nextn} are not the last of deepseek4.block_count = {n_layers!r:.40}")
    views: dict[str, View] = {}
    for tensor in stored:
        for name, view in gguf_views(tensor, by_name, nextn):
            if name in views:
                raise Ds4Error(f"{path}: both {views[name].stored.name!r} and {tensor.name!r:.200} hold tensor {name}")
            views[name] = view
    if nextn:  # this form has one stream collapse, which trunk and draft block share
        views |= {f"mtp.0.{part}": views[part] for part in _HC_HEAD if part in views and f"mtp.0.{part}" not in views}
    config = ModelConfig.from_gguf(
        metadata, source=str(path), n_mtp_layers=draft_stages(set(views)), n_nextn_blocks=len(nextn)
    )
    return Checkpoint(path, "gguf", config, metadata, stored, views, None)


def gguf_views(tensor: StoredTensor, by_name: dict[str, StoredTensor], nextn: list[int]) -> Iterator[tuple[str, View]]:
    """Canonical names of one GGUF tensor, with how each is cut from it; nothing for a tensor that ds4 does not know."""
    scale = by_name.get(tensor.name.removesuffix(".weight") + ".scale") if tensor.format == "nvfp4" else None
    if scale is not None and scale.format != "f32":
        raise Ds4Error(f"{tensor.file.path}: tensor {scale.name!r:.200} must be f32, not {scale.format}")
    if tensor.name in names.GLOBAL:
        yield names.GLOBAL[tensor.name], View(tensor, tensor.shape, scale=scale)
        return
    block = names.split_block(tensor.name)
    if block is None:
        return
    kind, number, suffix = block
    draft = kind == "mtp" or number in nextn
    prefix = f"mtp.{nextn.index(number) if kind == 'blk' else number}." if draft else f"layers.{number}."
    n_scales = row_count((*scale.shape, 1)) if scale is not None else 1
    if suffix in names.EXPERTS:
        if len(tensor.shape) != 3:
            raise Ds4Error(
                f"{tensor.file.path}: tensor {tensor.name!r:.200} must have 3 dimensions, not {list(tensor.shape)}"
            )
        if n_scales not in (1, tensor.shape[0]):
            raise Ds4Error(
                f"{tensor.file.path}: {tensor.name!r:.200} has {tensor.shape[0]} experts but {n_scales} scales"
            )
        for expert in range(tensor.shape[0]):
            name = f"{prefix}ffn.experts.{expert}.{names.EXPERTS[suffix]}.weight"
            yield name, View(tensor, tensor.shape[1:], expert=expert, scale=scale)
        return
    if n_scales != 1:
        raise Ds4Error(f"{tensor.file.path}: {tensor.name!r:.200} has {n_scales} scales, expected 1")
    if suffix == names.EH_PROJ and kind == "blk":
        *lead, n_cols = tensor.shape
        if len(tensor.shape) != 2 or n_cols % (2 * FORMATS[tensor.format].block):
            raise Ds4Error(
                f"{tensor.file.path}: {tensor.name!r:.200} {list(tensor.shape)} cannot be split into two halves"
            )
        for half, name in enumerate(("e_proj", "h_proj")):
            yield f"{prefix}{name}.weight", View(tensor, (*lead, n_cols // 2), half=half, scale=scale)
        return
    table = names.BLOCK | names.MTP if kind == "mtp" else names.BLOCK
    canonical = table.get(suffix)
    if canonical is None and draft and kind == "blk":
        canonical = names.NEXTN.get(suffix.removeprefix("nextn.")) if suffix.startswith("nextn.") else None
    if canonical is None:
        return
    shape = tensor.shape
    if canonical == "attn.wo_a.weight" and len(shape) == 3:  # groups as a dimension of their own
        shape = (shape[0] * shape[1], shape[2])
    yield prefix + canonical, View(tensor, shape, scale=scale)
