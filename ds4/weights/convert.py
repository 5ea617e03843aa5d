"""Converting a checkpoint: to another container, to other formats, one tensor at a time.

Sizes and places are computed first, from headers; then every tensor is read, encoded and written in small tiles, and
the finished file is opened and compared with the plan before it appears under its name.
Source:  spec weights.md 1 to 4 and 6; what is kept and what is rounded: recipes.py and encode.py.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ds4.errors import Ds4Error
from ds4.weights.checkpoint import Checkpoint
from ds4.weights.convert_report import Report, summarise
from ds4.weights.formats.cast import MXFP4, NVFP4
from ds4.weights.formats.ggml_other import UNDECODABLE
from ds4.weights.gguf_keys import carried_keys, model_keys
from ds4.weights.gguf_write import Plan, is_known, plan_gguf, without_draft_multiplier
from ds4.weights.recipes import Container, Recipe, target_format
from ds4.weights.replacement import Replacement, check_space
from ds4.weights.safetensors_write import config_json, plan_safetensors, text_files
from ds4.weights.storage import StoredTensor
from ds4.weights.tensor import PackedTensor
from ds4.weights.writing import Item, Layout, Progress, open_written, write_items

SHARD_BYTES = 5_000_000_000
_FORGET_BYTES = 1 << 26  # bytes written between two reminders that the pages of the source may go
# What a conversion writes, so that --force replaces no directory that holds anything else.
_OUR_FILES = re.compile(r".+\.safetensors|.*\.json|tokenizer\.model|.+\.jinja|LICENSE|README\.md")
_COLLAPSE = ("hc_head_fn", "hc_head_scale", "hc_head_base")


def container_of(out: Path) -> Container:
    """What a target's name asks for: ``x.gguf`` is a GGUF, anything else safetensors."""
    return "gguf" if out.suffix.lower() == ".gguf" else "safetensors"


def convert(
    ckpt: Checkpoint,
    out: Path,
    recipe: Recipe,
    *,
    tokenizer: Mapping[str, Any],
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Report:
    """Write ``ckpt`` to ``out``, which appears whole or not at all.

    out          ``x.gguf``; ``x.safetensors``, one file with config.json and the tokenizer beside it; or a directory
    tokenizer    for a GGUF its ``tokenizer.*`` keys (those of a GGUF source are taken over anyway), otherwise its
                 files, name -> bytes
    force        replace what is there, if it is a file or a directory that holds nothing but a checkpoint
    shard_bytes  for a directory: tensor bytes in one file, at most
    Error:       Ds4Error, one line: a target that exists, is the source or does not fit the disk; a recipe that the
                 container cannot hold; tensors that cannot be encoded or whose disk cannot be written.
    """
    container = container_of(out)
    recipe.check(container)
    place, is_file = Replacement(out), _is_file(out)
    place.put_back()
    _check_target(ckpt, out, () if container == "gguf" else ("config.json", *tokenizer), force)
    names = [name for name in ckpt.names() if container == "safetensors" or is_known(name)]
    items = {name: _item(ckpt, name, recipe, container) for name in sorted(names, key=_natural)}
    if container == "gguf":
        job = _to_gguf(ckpt, place.target.name, items, tokenizer)
    else:
        job = _to_safetensors(ckpt, place.target.name if is_file else None, items, tokenizer, shard_bytes)
    check_space(out, job.size)
    with place:
        for name, contents in job.texts.items():
            (place.work / name).write_bytes(contents)
        forget = _forgetter(ckpt.tensors())
        every = (*job.items.values(), *job.extra)
        written = write_items(place.work, job.layout, every, progress=progress, on_write=forget)
        _check_written(place.work / place.target.name if is_file else place.work, ckpt, job.items, out)
        place.commit_files() if is_file else place.commit_directory()
    lines = summarise(ckpt, job.items, written)
    left_out = (*(name for name in ckpt.names() if name not in items), *ckpt.unused())
    return Report(out, container, ckpt.total_bytes, job.size, lines, left_out, (*place.swept, *job.notes))


@dataclass(frozen=True)
class _Job:
    """All that is to be written.

    layout  of the tensors
    items   canonical tensors by name
    extra   others, which are taken over as they are
    texts   small files besides, ready to write
    notes   for the report
    """

    layout: Layout
    items: Mapping[str, Item]
    extra: tuple[Item, ...] = ()
    texts: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return self.layout.size + sum(map(len, self.texts.values()))


def _natural(name: str) -> list[Any]:
    """Sorts layer 9 before layer 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]


def _item(ckpt: Checkpoint, name: str, recipe: Recipe, container: Container) -> Item:
    source, shape, _ = ckpt.stored_as(name)
    if source in UNDECODABLE:
        raise Ds4Error(f"{ckpt.path}: tensor {name} has type {source}, which ds4 cannot decode and so cannot convert")
    f32_scales = source == "fp8_block" and ckpt.tensor(name).parts["scale"].dtype == torch.float32
    try:
        target = target_format(name, source, shape, recipe, container, f32_scales=f32_scales)
    except Ds4Error as error:
        raise Ds4Error(f"{ckpt.path}: {error}") from None
    with_multiplier = True
    if source in NVFP4 and target == "nvfp4":  # copied, so that a multiplier of 1 need not be stored
        with_multiplier = ckpt.tensor(name).scale != 1.0
    return Item(name, partial(ckpt.tensor, name), target, shape, with_multiplier, f32_scales and target == source)


def _to_gguf(ckpt: Checkpoint, file_name: str, items: Mapping[str, Item], tokenizer: Mapping[str, Any]) -> _Job:
    shared = _shares_collapse(ckpt)
    if shared:
        packed = {name for name in items if ckpt.stored_as(name)[0] in MXFP4 + NVFP4}
        items = {name: item if name in packed else without_draft_multiplier(item) for name, item in items.items()}
    try:
        plan = plan_gguf(items, ckpt.config, shared_collapse=shared)
    except ValueError as error:
        raise Ds4Error(f"{ckpt.path}: cannot be written as a GGUF: {error}") from None
    keys = carried_keys(ckpt.metadata) if ckpt.container == "gguf" else {}
    if keys.get("reap.enabled") is True:
        keys["reap.layout"] = "ds4-compact-v1"  # slots of pruned experts have not been taken over
    keys |= model_keys(ckpt.config, _name(ckpt), plan.n_weights, plan.n_nextn) | dict(tokenizer)
    kept = {item.name: item for item in plan.items}
    return _Job(plan.layout(file_name, keys), kept, notes=_llama_cpp(ckpt, plan))


def _shares_collapse(ckpt: Checkpoint) -> bool:
    """Whether the only draft block has no stream collapse (hc_head) of its own, or one that equals the trunk's."""
    own = [part for part in _COLLAPSE if f"mtp.0.{part}" in ckpt]
    if ckpt.config.n_mtp_layers != 1 or any(part not in ckpt for part in own):
        return not own
    return all(torch.equal(ckpt.tensor(f"mtp.0.{p}").dequantize(), ckpt.tensor(p).dequantize()) for p in own)


def _llama_cpp(ckpt: Checkpoint, plan: Plan) -> tuple[str, ...]:
    """What llama.cpp makes of the file, where it is not what ds4 does."""
    scales = [entry.name for entry in plan.entries if entry.name.endswith("_exps.scale")]
    if ckpt.config.n_mtp_layers and not plan.n_nextn:
        return ("llama.cpp does not load this file: its form of a draft head has no place for this one (ds4 does)",)
    if any(name.startswith(f"blk.{ckpt.config.num_hidden_layers}.") for name in scales):
        return ("llama.cpp does not load this file: it has no multipliers of NVFP4 weights in draft blocks (ds4 has)",)
    if scales:
        return ("llama.cpp loads this file but ignores the multipliers of its NVFP4 weights: use mxfp4 or q8_0 for it",)
    return ()


def _to_safetensors(
    ckpt: Checkpoint, file_name: str | None, items: Mapping[str, Item], tokenizer: Mapping[str, bytes], shard_bytes: int
) -> _Job:
    extra = tuple(_input_scales(ckpt, items))
    every = sorted((*items.values(), *extra), key=lambda item: _natural(item.name))
    layout = plan_safetensors(every, shard_bytes, file_name=file_name)
    base = ckpt.metadata if ckpt.container == "safetensors" else {}
    texts = text_files(layout, config_json(ckpt.config, base, _name(ckpt), items.values()))
    return _Job(layout, items, extra, {**texts, **tokenizer})


def _input_scales(ckpt: Checkpoint, items: Mapping[str, Item]) -> Iterator[Item]:
    """The activation scales of weights that stay in the modelopt layout; ds4 makes no use of them, others do."""
    for stored in ckpt.tensors():
        base = stored.name.removesuffix("input_scale")
        weight = items.get(base + "weight")
        if stored.format != "nvfp4_modelopt.unused" or base == stored.name or stored.nbytes != 4:
            continue
        if weight is not None and weight.format == "nvfp4_modelopt":
            scale = PackedTensor(stored.name, "f32", stored.shape, stored.data.view(1, -1))
            yield Item(stored.name, partial(_same, scale), "f32", stored.shape)


def _same(tensor: PackedTensor) -> PackedTensor:
    return tensor


def _name(ckpt: Checkpoint) -> str:
    """What the model calls itself, or else what it is called."""
    stem = ckpt.path.name if ckpt.path.is_dir() else ckpt.path.stem
    return str(ckpt.metadata.get("general.name") or ckpt.metadata.get("_name_or_path") or stem)


def _check_target(ckpt: Checkpoint, out: Path, files: Iterable[str], force: bool) -> None:
    """Raise Ds4Error unless ``out`` may be written; ``files`` come beside a single file."""
    sources = {file.path.resolve() for file in {t.file for t in ckpt.tensors()}}
    target = out.resolve()
    if target in sources or target == ckpt.path.resolve() or any(target in path.parents for path in sources):
        raise Ds4Error(f"{out}: is the checkpoint that is to be converted, or holds it; give another OUT")
    as_directory = not _is_file(out)
    if out.exists() and out.is_dir() != as_directory:
        kind = "a directory" if out.is_dir() else "a file"
        raise Ds4Error(f"{out}: is {kind} already; OUT is x.gguf, x.safetensors or a directory")
    if as_directory:
        found = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
        foreign = [name for name in found if not _OUR_FILES.fullmatch(name)]
        if foreign:
            raise Ds4Error(f"{out}: holds {foreign[0]!r:.80}, which is no part of a checkpoint; give another OUT")
        taken = [out] if found else []
    else:
        if files and ckpt.container == "safetensors" and any(path.parent == target.parent for path in sources):
            raise Ds4Error(f"{out}: its config.json would replace that of its source; choose another directory")
        taken = [path for path in (out, *(out.parent / name for name in files)) if path.exists()]
    if taken and not force:
        raise Ds4Error(f"{taken[0]}: exists already; give another OUT, or --force to replace it")


def _is_file(out: Path) -> bool:
    """Whether a target's name asks for a single file."""
    return out.suffix.lower() in (".gguf", ".safetensors")


def _forgetter(stored: Iterable[StoredTensor]) -> Callable[[int], None]:
    """A callback that tells the system from time to time that what was read of the mapped source may leave memory."""
    maps = list({id(t.file): t.file.map for t in stored}.values())
    advice = getattr(mmap, "MADV_DONTNEED", None)
    last = 0

    def forget(written: int) -> None:
        nonlocal last
        if advice is not None and written - last >= _FORGET_BYTES:
            last = written
            for mapped in maps:
                mapped.madvise(advice)

    return forget


def _check_written(written: Path, ckpt: Checkpoint, items: Mapping[str, Item], out: Path) -> None:
    """Raise Ds4Error unless what was written opens as planned."""
    found = open_written(written, ckpt.config, out)
    for item in items.values():
        if found.stored_as(item.name)[:2] != (item.format, item.shape):
            raise Ds4Error(f"{out}: would not hold {item.name} as {item.format}; nothing was written")
