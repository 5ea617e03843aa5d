"""Opening a GGUF file, or the parts of one: its metadata, and its tensors under their canonical names.

Source:  spec weights.md 3.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds4.config import ModelConfig
from ds4.errors import Ds4Error
from ds4.weights import gguf, names, reap
from ds4.weights.checkpoint import Checkpoint, View, draft_stages
from ds4.weights.draft_names import merged
from ds4.weights.draft_settings import of_trunk
from ds4.weights.formats import FORMATS
from ds4.weights.names import NameTable
from ds4.weights.storage import MappedFile, StoredTensor
from ds4.weights.tensor import row_count

_HC_HEAD = ("hc_head_fn", "hc_head_scale", "hc_head_base")
_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file of architecture ``deepseek4``, or all parts of a split one by any of them.

    Error:   Ds4Error, one line, naming the file and what is wrong in it.
    """
    metadata, stored = read_parts(path)
    plan = reap.read_plan(metadata, str(path))
    nextn = _nextn_blocks(metadata, stored, path)
    views = translate(stored, merged(names.trunk_table(nextn), {tensor.name for tensor in stored}))
    if nextn:  # this form has one stream collapse, which trunk and draft block share
        views |= {f"mtp.0.{part}": views[part] for part in _HC_HEAD if part in views and f"mtp.0.{part}" not in views}
    config = ModelConfig.from_gguf(
        metadata,
        source=str(path),
        n_mtp_layers=draft_stages(set(views)),
        n_nextn_blocks=len(nextn) or _absent_nextn_blocks(metadata, stored),
    )
    if plan is not None:
        reap.compact(views, plan, config.num_hidden_layers, str(path))
    config = of_trunk(config, metadata, views, path)
    return Checkpoint(path, "gguf", config, metadata, stored, views, None)


def part_set(path: Path) -> tuple[str, str] | None:
    """What the names of all parts of a split GGUF share: (name, number of parts); None for another file."""
    match = _PART.fullmatch(path.name)
    return (match[1], match[3]) if match else None


def read_parts(path: Path) -> tuple[dict[str, Any], list[StoredTensor]]:
    """``gguf.read_gguf`` of a file, or of all parts of the split GGUF that it belongs to, found by their names.

    returns  the metadata of the first part, and the tensors of all in their order
    Error:   Ds4Error naming the part that is missing, does not belong to the others or repeats a tensor.
    """
    opened = gguf.read_gguf(MappedFile(path))
    count = opened[0].get("split.count", 1)
    if count in (0, 1):
        return opened
    match = _PART.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise Ds4Error(
            f"{path}: is one part of {count!r:.40}, so its name must end in -00001-of-{count!s:0>5.9}.gguf or the like "
            "for the others to be found"
        )
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, Any] = {}
    for number in range(1, count + 1):
        part = path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}.gguf")
        if part.name != path.name and not part.is_file():
            raise Ds4Error(f"{part}: part {number} of {count} is missing; put it beside the others")
        keys, stored = opened if part.name == path.name else gguf.read_gguf(MappedFile(part))
        metadata = metadata or keys
        for key, wanted in (
            ("split.count", count),
            ("split.no", number - 1),
            ("split.tensors.count", metadata.get("split.tensors.count")),
        ):
            if keys.get(key) != wanted or type(wanted) is not int:
                raise Ds4Error(
                    f"{part}: {key} is {keys.get(key)!r:.40}, but part {number} of {count} must have {wanted!r:.40}"
                )
        for tensor in stored:
            if tensor.name in tensors:
                raise Ds4Error(f"{part}: tensor {tensor.name!r:.200} is in {tensors[tensor.name].file.path.name} too")
            tensors[tensor.name] = tensor
    if len(tensors) != metadata["split.tensors.count"]:
        raise Ds4Error(
            f"{path}: the {count} parts have {len(tensors)} tensors, but split.tensors.count says "
            f"{metadata['split.tensors.count']}; one of them is damaged or from another set"
        )
    return metadata, list(tensors.values())


def _nextn_blocks(metadata: dict[str, Any], stored: list[StoredTensor], path: Path) -> list[int]:
    """llama.cpp's draft blocks: counted in block_count, marked by their nextn tensors; the key may be a leftover."""
    blocks = (names.split_block(tensor.name) for tensor in stored)
    nextn = sorted({b[1] for b in blocks if b and b[0] == "blk" and b[2] == names.EH_PROJ})
    n_layers = metadata.get("deepseek4.block_count", 0)
    if nextn and (type(n_layers) is not int or nextn != list(range(n_layers - len(nextn), n_layers))):
        raise Ds4Error(f"{path}: draft blocks {nextn} are not the last of deepseek4.block_count = {n_layers!r:.40}")
    return nextn


def _absent_nextn_blocks(metadata: dict[str, Any], stored: list[StoredTensor]) -> int:
    """Draft blocks counted in block_count that were left out of the file, all of them."""
    n_layers, n_nextn = metadata.get("deepseek4.block_count"), metadata.get("deepseek4.nextn_predict_layers")
    if type(n_layers) is not int or type(n_nextn) is not int or n_nextn < 1:
        return 0
    present = {b[1] for tensor in stored if (b := names.split_block(tensor.name)) and b[0] == "blk"}
    return n_nextn if present and max(present) == n_layers - n_nextn - 1 else 0


def translate(stored: list[StoredTensor], table: NameTable) -> dict[str, View]:
    """Canonical name -> how to cut the tensor from the stored ones, for all that the table knows.

    A stack of experts is one entry, see ``View.stack``.
    Error:   Ds4Error naming the file and the tensor: two for one name, a wrong number of dimensions or of multipliers.
    """
    by_name = {tensor.name: tensor for tensor in stored}
    views: dict[str, View] = {}
    for tensor in stored:
        for name, view in gguf_views(tensor, by_name, table):
            if name in views:
                raise _error(tensor, f"and {views[name].stored.name!r:.200} both hold {name}")
            views[name] = view
    return views


def gguf_views(tensor: StoredTensor, by_name: dict[str, StoredTensor], table: NameTable) -> Iterator[tuple[str, View]]:
    """Canonical names of one GGUF tensor, with how each is cut from it; nothing for a tensor that the table lacks."""
    if tensor.name in table.whole:
        yield table.whole[tensor.name], _plain_view(tensor, by_name)
        return
    block = names.split_block(tensor.name)
    place = table.block(block[0], block[1]) if block else None
    if block is None or place is None:
        return
    prefix, canonical = place
    suffix = block[2]
    if suffix.endswith(names.SLEEPY):
        suffix = suffix.removesuffix(names.SLEEPY) + ".weight"
    if suffix in names.EXPERTS:
        yield f"{prefix}ffn.experts.*.{names.EXPERTS[suffix]}.weight", _stack_view(tensor, by_name)
    elif suffix == names.EH_PROJ:
        whole = _plain_view(tensor, by_name)
        *lead, n_cols = tensor.shape or (0,)
        if len(tensor.shape) != 2 or n_cols % (2 * FORMATS[tensor.format].block):
            raise _error(tensor, f"{list(tensor.shape)} cannot be split into two halves")
        for half, name in enumerate(("e_proj", "h_proj")):
            yield f"{prefix}{name}.weight", View(tensor, (*lead, n_cols // 2), half=half, scale=whole.scale)
    elif suffix in canonical:
        view = _plain_view(tensor, by_name)
        if canonical[suffix] == "attn.wo_a.weight" and len(view.shape) == 3:  # groups as a dimension of their own
            view = View(tensor, (view.shape[0] * view.shape[1], view.shape[2]), scale=view.scale)
        yield prefix + canonical[suffix], view


def _stack_view(tensor: StoredTensor, by_name: dict[str, StoredTensor]) -> View:
    """A stack of experts with a multiplier for each, or one for all, where its format has them."""
    scale, n_scales = _multipliers(tensor, by_name)
    if len(tensor.shape) != 3:
        raise _error(tensor, f"must have 3 dimensions, not {list(tensor.shape)}")
    if n_scales not in (1, tensor.shape[0]):
        raise _error(tensor, f"has {tensor.shape[0]} experts but {n_scales} scales")
    return View(tensor, tensor.shape, scale=scale, stack=True)


def _plain_view(tensor: StoredTensor, by_name: dict[str, StoredTensor]) -> View:
    scale, n_scales = _multipliers(tensor, by_name)
    if n_scales != 1:
        raise _error(tensor, f"has {n_scales} scales, expected 1")
    return View(tensor, tensor.shape, scale=scale)


def _multipliers(tensor: StoredTensor, by_name: dict[str, StoredTensor]) -> tuple[StoredTensor | None, int]:
    """The tensor of multipliers that belongs to a weight, None for none, and how many there are."""
    if tensor.format == "nvfp4":
        scale = by_name.get(tensor.name.removesuffix(".weight") + ".scale")
    elif tensor.format == "nvfp4_sleepy":
        name = tensor.name.removesuffix(names.SLEEPY) + names.SLEEPY_SCALE
        scale = by_name.get(name)
        if scale is None:
            raise _error(tensor, f"needs the multipliers {name!r:.200}, which are missing")
    else:
        return None, 1
    if scale is None:
        return None, 1
    if scale.format != "f32":
        raise _error(scale, f"must be f32, not {scale.format}")
    return scale, row_count((*scale.shape, 1))


def _error(tensor: StoredTensor, problem: str) -> Ds4Error:
    return Ds4Error(f"{tensor.file.path}: tensor {tensor.name!r:.200} {problem}")
