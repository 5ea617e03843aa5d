"""Writing a ``deepseek4`` GGUF file: llama.cpp's metadata keys and names.

An MTP block goes in as one more block, ``blk.N.nextn.*``, which llama.cpp loads; that form has no place for a stream
collapse (hc_head) of the block's own, so a block that has one is written as ``mtp.S.*``, which only ds4 loads.  So are
DSpark stages.

Source:  spec weights.md 3.1 to 3.4.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ds4.config import ModelConfig
from ds4.weights import names
from ds4.weights.draft import open_draft
from ds4.weights.formats import FORMATS, INTEGER_FORMATS
from ds4.weights.gguf_keys import dspark_keys, header_bytes, model_keys
from ds4.weights.replacement import Replacement, check_space
from ds4.weights.tensor import PackedTensor, row_count
from ds4.weights.writing import MULTIPLIER, FileLayout, Item, Layout, Place, open_written, write_items

_ALIGNMENT = 32
_NEXTN = {canonical: suffix for suffix, canonical in names.NEXTN.items()}
# What a DSpark stage has besides a block and an MTP head's tensors; in a GGUF it keeps its name.
_DSPARK = (
    "main_proj.weight",
    "main_norm.weight",
    "markov_head.markov_w1.weight",
    "markov_head.markov_w2.weight",
    "confidence_head.proj.weight",
    "confidence_head.proj.bias",
)


def write_gguf(
    path: str | os.PathLike[str],
    config: ModelConfig,
    tensors: Iterable[tuple[str, torch.Tensor, str]],
    *,
    tokenizer_metadata: Mapping[str, Any],
    name: str,
    extra: Mapping[str, Any] | None = None,
    multipliers: bool = True,
) -> Path:
    """Quantise tensors and write them with ``config`` as one GGUF file; the file appears whole or not at all.

    tensors             (canonical name, values, format name): floats of any float type for float and block formats,
                        integers for i32; shapes as in the official checkpoint.  Experts come one by one and are
                        stacked; those of one stack must agree in shape and format.  nvfp4
                        weights get a multiplier each, stored as ``<base>.scale``.
    tokenizer_metadata  full GGUF keys, ``tokenizer.ggml.tokens`` and so on; bos and eos ids come from ``config``
                        unless given here
    name                ``general.name``
    extra               further keys; int, float, bool, str or a list of one of them
    multipliers         False: nvfp4 weights are written without one, so that readers which ignore ``<base>.scale``
                        (llama.cpp's deepseek4 graph does) get them right; only for weights that suit it
    returns  the path written
    Error:   ValueError for tensors that cannot be written (unknown name or format, gaps in a stack, not finite, wrong
             row length); Ds4Error if the file cannot be written, or would not open again with the same config.
    """
    path = Path(path)
    items: dict[str, Item] = {}
    for canonical, values, fmt in tensors:
        if canonical in items:
            raise ValueError(f"{canonical}: given twice")
        items[canonical] = _item(canonical, values, fmt, multipliers)
    shared = not any(canonical.startswith("mtp.0.hc_head_") for canonical in items)
    if shared and config.n_mtp_layers == 1:
        items = {canonical: without_draft_multiplier(item) for canonical, item in items.items()}
    plan = plan_gguf(items, config, shared_collapse=shared)
    keys = model_keys(config, name, plan.n_weights, plan.n_nextn)
    place = Replacement(path)
    layout = plan.layout(place.target.name, keys | dict(tokenizer_metadata) | dict(extra or {}))
    check_space(path, layout.size)
    with place:
        write_items(place.work, layout, plan.items)
        open_written(place.work / place.target.name, config, path)
        place.commit_files()
    return path


def write_draft_gguf(
    path: str | os.PathLike[str], config: ModelConfig, tensors: Iterable[tuple[str, torch.Tensor, str]], *, name: str
) -> Path:
    """Quantise the tensors of a DSpark head and write them as a side file, which goes with a trunk of ``config``.

    config   with the head's settings; of it only these are written
    tensors  as for ``write_gguf``, all of them ``mtp.*``; no tensor gets a multiplier
    Error:   as ``write_gguf``; Ds4Error too if the head is not complete
    """
    path = Path(path)
    items = {canonical: _item(canonical, values, fmt, False) for canonical, values, fmt in tensors}
    plan = plan_gguf(items, config, shared_collapse=False)
    place = Replacement(path)
    layout = plan.layout(place.target.name, dspark_keys(config, name))
    check_space(path, layout.size)
    with place:
        write_items(place.work, layout, plan.items)
        open_draft(place.work / place.target.name)
        place.commit_files()
    return path


def without_draft_multiplier(item: Item) -> Item:
    """The item; one of a draft block that is quantised anew gets no multiplier: llama.cpp, which skips such a block's
    weights, would count their ``.scale`` tensors as unknown ones and refuse the file."""
    return replace(item, with_multiplier=False) if item.name.startswith("mtp.") else item


def _item(name: str, values: torch.Tensor, fmt: str, with_multiplier: bool) -> Item:
    """Values to be written, checked; ValueError for values that the format cannot hold."""
    form = FORMATS.get(fmt)
    if form is None or form.quantize is None or form.ggml_type is None:
        raise ValueError(f"{name}: ds4 cannot write format {fmt!r}")
    if not values.dim() or not values.numel() or values.shape[-1] % form.block:
        raise ValueError(f"{name}: shape {list(values.shape)} does not fit {fmt}, whose blocks hold {form.block}")
    if values.is_floating_point() == (fmt in INTEGER_FORMATS):
        raise ValueError(f"{name}: {values.dtype} values cannot be stored as {fmt}")
    if values.is_floating_point() and not values.isfinite().all():
        raise ValueError(f"{name}: holds infinities or not-a-numbers")

    def load() -> PackedTensor:
        dtype = torch.float32 if values.is_floating_point() else torch.int64
        rows = values.detach().to("cpu", dtype).reshape(-1, values.shape[-1]).contiguous()
        stored = "f32" if dtype == torch.float32 else "i64"
        return PackedTensor(name, stored, tuple(values.shape), rows.view(torch.uint8))

    return Item(name, load, fmt, tuple(values.shape), with_multiplier)


@dataclass(frozen=True)
class Entry:
    """One tensor of the file."""

    name: str
    format: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return row_count(self.shape) * FORMATS[self.format].row_bytes(self.shape[-1])


@dataclass(frozen=True)
class Plan:
    """What goes into a GGUF file and where, all but the metadata.

    items    what is written, without draft weights that llama.cpp's form has no place for
    entries  the file's tensors in their order
    places   item -> role -> place
    n_nextn  draft blocks in llama.cpp's form
    """

    items: tuple[Item, ...]
    entries: tuple[Entry, ...]
    places: Mapping[str, Mapping[str, Place]]
    n_nextn: int

    def layout(self, file_name: str, keys: Mapping[str, Any]) -> Layout:
        """The file, with a header that holds these keys."""
        header = header_bytes(keys, [(entry.name, entry.format, entry.shape) for entry in self.entries])
        offsets, end = {}, _padded(len(header))
        for entry in self.entries:
            offsets[entry.name] = end
            end += _padded(entry.n_bytes)
        return Layout((FileLayout(file_name, header, offsets, end),), self.places)

    @property
    def n_weights(self) -> Counter[str]:
        """Weights of each format."""
        counts: Counter[str] = Counter()
        for item in self.items:
            counts[item.format] += math.prod(item.shape)
        return counts


def plan_gguf(items: Mapping[str, Item], config: ModelConfig, *, shared_collapse: bool) -> Plan:
    """Give every item a place in a GGUF file.

    items            by canonical name, in the order of the file
    shared_collapse  the draft block has no stream collapse of its own, or one that equals the trunk's
    Error:           ValueError for an unknown name, experts with gaps, or a stack of different formats or shapes
    """
    nextn = config.num_hidden_layers if _fits_nextn(items, config, shared_collapse) else None
    stacks: dict[str, dict[int | None, Item]] = {}
    for item in items.values():
        place = _gguf_name(item.name, nextn)
        if place is not None:
            stacks.setdefault(place[0], {})[place[1]] = item
    entries: list[Entry] = []
    places: dict[str, dict[str, Place]] = {}
    for name, stack in stacks.items():
        _check_stack(name, stack)
        first = next(iter(stack.values()))
        shape = first.shape if None in stack else (len(stack), *first.shape)
        halves = name.endswith(names.EH_PROJ)
        if halves:
            shape = (first.shape[0], 2 * first.shape[1])
        entries.append(Entry(name, first.format, shape))
        with_multiplier = any(_has_multiplier(item) for item in stack.values())
        if with_multiplier:
            entries.append(Entry(_scale_name(name), "f32", (len(stack),)))
        for expert, item in stack.items():
            if halves:
                places[item.name] = {"": Place(name, (expert or 0) * item.row_bytes, 2 * item.row_bytes)}
            else:
                places[item.name] = {"": Place(name, (expert or 0) * item.data_bytes)}
            if with_multiplier:
                places[item.name][MULTIPLIER] = Place(_scale_name(name), 4 * (expert or 0))
    kept = tuple(item for item in items.values() if item.name in places)
    return Plan(kept, tuple(entries), places, int(nextn is not None))


def _fits_nextn(items: Mapping[str, Item], config: ModelConfig, shared_collapse: bool) -> bool:
    """Whether the draft head is one that llama.cpp's form can hold."""
    if config.n_mtp_layers != 1 or not shared_collapse or "mtp.0.e_proj.weight" not in items:
        return False
    e, h = items["mtp.0.e_proj.weight"], items.get("mtp.0.h_proj.weight")
    if h is None or _has_multiplier(e) or _has_multiplier(h):
        return False
    return (e.format, e.shape) == (h.format, h.shape)


def _has_multiplier(item: Item) -> bool:
    return item.with_multiplier and FORMATS[item.format].multiplier is not None


def _gguf_name(name: str, nextn: int | None) -> tuple[str, int | None] | None:
    """(stored tensor, expert or half in it) of a canonical name; None for what llama.cpp's form leaves out.

    nextn  the number of the block that the draft head becomes, None where it stays ``mtp.S.*``
    """
    _, _, suffix = name.removeprefix("mtp.").partition(".")
    if nextn is not None and name.startswith("mtp.0."):
        if suffix.startswith("hc_head_"):
            return None
        if suffix in ("e_proj.weight", "h_proj.weight"):
            return f"blk.{nextn}.{names.EH_PROJ}", int(suffix.startswith("h"))
        if suffix in _NEXTN:
            return f"blk.{nextn}.nextn.{_NEXTN[suffix]}", None
    place = names.to_gguf(name)
    if place is None and name.startswith("mtp.") and suffix in _DSPARK:
        return name, None
    if place is None:
        raise ValueError(f"{name}: no GGUF name is known for this tensor")
    if nextn is not None and name.startswith("mtp.0."):
        return f"blk.{nextn}.{place[0].removeprefix('mtp.0.')}", place[1]
    return place


def is_known(name: str) -> bool:
    """Whether a GGUF has a name for a canonical tensor."""
    try:
        return _gguf_name(name, None) is not None
    except ValueError:
        return False


def _check_stack(name: str, stack: Mapping[int | None, Item]) -> None:
    if set(stack) not in ({None}, set(range(len(stack)))):
        raise ValueError(f"{name}: experts are not 0..{len(stack) - 1} without gaps")
    if len({(item.format, item.shape) for item in stack.values()}) > 1:
        raise ValueError(f"{name}: experts differ in format or shape")


def _scale_name(name: str) -> str:
    return name.removesuffix(".weight") + ".scale"


def _padded(n: int) -> int:
    return -(-n // _ALIGNMENT) * _ALIGNMENT
