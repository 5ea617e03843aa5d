"""Draft heads in files of their own: opening them in every dialect, and attaching them to a trunk that they fit.

A head and its trunk must agree in all dimensions, which the shapes show, and come from the same release, which only
clues show (``ds4.weights.generation``): where these are missing, the pair is accepted with a warning. A wrong pair
would still generate the trunk's text, but most drafts would be thrown away.
Source:  spec weights.md 1.1, 3.3 and 3.4; model.md 7.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds4.config import ModelConfig
from ds4.errors import Ds4Error
from ds4.weights import companions, draft_names, gguf, safetensors
from ds4.weights.checkpoint import Checkpoint, View
from ds4.weights.draft_names import Kind
from ds4.weights.draft_settings import DSparkSettings, configured, dspark_settings
from ds4.weights.generation import UNKNOWN, Generation, identify, judge, name_clues, with_mtp
from ds4.weights.gguf_open import read_parts, translate
from ds4.weights.safetensors_open import official_name
from ds4.weights.storage import MappedFile, StoredTensor

_WHAT = "an MTP or DSpark side file has tensors like mtp.0.e_proj.weight or dspark.main_proj.weight"


@dataclass(frozen=True, eq=False)
class DraftHead:
    """An open draft head, complete but not yet compared with a trunk.

    path        the file
    kind        "mtp" (one token at a time, preview only) or "dspark" (a block of tokens)
    dialect     how the file names things, for messages
    stages      blocks
    views       canonical name, ``mtp.S.*`` -> how to cut it from the file (see ``Checkpoint``)
    stored      the file's tensors that these views use, in file order
    parameters  settings of a DSpark head, None for MTP
    generation  its ``release`` is that of the trunk it was made for, None if nothing tells
    """

    path: Path
    kind: Kind
    dialect: str
    stages: int
    views: Mapping[str, View]
    stored: tuple[StoredTensor, ...]
    parameters: DSparkSettings | None
    generation: Generation

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical shape by canonical name, routed experts one by one."""
        return view_shapes(self.views)


def view_shapes(views: Mapping[str, View]) -> dict[str, tuple[int, ...]]:
    """Logical shape by canonical name, stacks of experts taken apart."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, view in views.items():
        if view.stack:
            shapes |= {name.replace("*", str(expert)): view.shape[1:] for expert in range(view.shape[0])}
        else:
            shapes[name] = view.shape
    return shapes


def open_draft(path: str | os.PathLike[str]) -> DraftHead:
    """Open a draft head: a GGUF side file in any dialect, or safetensors; whatever else the file holds is ignored.

    path     a file, or a directory with one GGUF file or a safetensors checkpoint (of which only ``mtp.*`` is opened)
    Error:   Ds4Error, one line, naming the file: it is damaged, holds no draft head, or an incomplete one.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise Ds4Error(f"{path}: no such file or directory")
    if path.is_dir() and not any(path.glob("*.safetensors")):
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise Ds4Error(f"{path}: holds {len(files)} GGUF files and no safetensors; name the draft head's file")
        path = files[0]
    if path.is_file() and (path.suffix == ".gguf" or MappedFile(path).map[:4] == gguf.MAGIC):
        metadata, stored = read_parts(path)
        dialect = draft_names.recognise({tensor.name for tensor in stored})
        if dialect is None:
            raise Ds4Error(f"{path}: holds no draft head; {_WHAT}")
        views = {name: view for name, view in translate(stored, dialect.table).items() if name.startswith("mtp.")}
        return _head(path, dialect.kind, f"GGUF, {dialect.name}", views, stored, metadata)
    views, stored, metadata = _safetensors(path)
    kind: Kind = "dspark" if "mtp.0.main_proj.weight" in views else "mtp"
    return _head(path, kind, "safetensors", views, stored, metadata)


def attach_draft(ckpt: Checkpoint, head: DraftHead, *, replace: bool = False) -> Checkpoint:
    """The checkpoint with this draft head: its ``mtp.*`` tensors and settings; the one given stays as it is.

    replace  whether a head that the checkpoint has already may be left out for this one
    returns  a Checkpoint whose ``warnings`` say what could not be made sure
    Error:   Ds4Error naming both files: the checkpoint has a head already, a shape does not fit, or the head was made
             for another release or for the unpruned model.
    Source:  spec weights.md 3.3 for what must not be paired; model.md 7.1 and 7.2 for the shapes.
    """
    if ckpt.config.n_mtp_layers and not replace:
        raise Ds4Error(
            f"{ckpt.path}: has a draft head already, of {ckpt.config.n_mtp_layers} stages; "
            f"{head.path} would have to replace it, which was not asked for"
        )
    config = configured(ckpt.config, head.stages, head.parameters, str(head.path))
    _check_shapes(head, config, ckpt.path)
    warnings = _check_generation(ckpt, head)
    try:
        attached = ckpt.with_draft(head.path, config, list(head.stored), head.views)
    except Ds4Error as error:
        raise Ds4Error(f"{head.path} does not go with {error}") from None
    attached.warnings = (*ckpt.warnings, *warnings)
    return attached


def _safetensors(path: Path) -> tuple[dict[str, View], list[StoredTensor], dict[str, Any]]:
    """Views and stored tensors of all ``mtp.*`` in safetensors files, and the parsed config.json where there is one."""
    directory, shards, weight_map = safetensors.find_shards(path)
    if weight_map is not None:
        wanted = {shard for name, shard in weight_map.items() if (official_name(name) or "").startswith("mtp.")}
        shards = [shard for shard in shards if shard.name in wanted]
    stored: dict[str, StoredTensor] = {}
    for shard in shards:
        for tensor in safetensors.read_safetensors(MappedFile(shard)):
            name = official_name(tensor.name)
            if name is None or not name.startswith("mtp."):
                continue
            if name in stored:
                raise Ds4Error(f"{shard}: tensor {tensor.name!r:.200} occurs twice, also as {stored[name].name!r:.200}")
            stored[name] = tensor
    if not {"mtp.0.e_proj.weight", "mtp.0.main_proj.weight"} & set(stored):
        raise Ds4Error(f"{path}: holds no draft head; {_WHAT}")
    config_file = directory / "config.json"
    metadata = safetensors.read_json(config_file) if config_file.is_file() else {}
    views = companions.group(stored)
    return views, list(stored.values()), metadata if isinstance(metadata, dict) else {}


def _head(
    path: Path, kind: Kind, dialect: str, views: dict[str, View], stored: list[StoredTensor], metadata: dict[str, Any]
) -> DraftHead:
    """A DraftHead, once it is known to be complete."""
    for name, view in views.items():
        if len(view.shape) == 1 and name.endswith("confidence_head.proj.weight"):  # a matrix of one row
            views[name] = dataclasses.replace(view, shape=(1, *view.shape))
    stages = 1 + max(int(name.split(".")[1]) for name in views)
    shapes = view_shapes(views)
    for name in _expected_names(kind, stages, shapes):
        if name not in shapes:
            raise Ds4Error(f"{path}: the {kind} draft head ({dialect}) is incomplete: tensor {name} is missing")
    parameters = dspark_settings(metadata, shapes, stages, path) if kind == "dspark" else None
    used = {id(tensor) for view in views.values() for tensor in view.tensors()}
    generation = _head_generation(path, kind, metadata, with_parent=dialect == "safetensors")
    kept = tuple(tensor for tensor in stored if id(tensor) in used)
    return DraftHead(path, kind, dialect, stages, views, kept, parameters, generation)


def _head_generation(path: Path, kind: Kind, metadata: dict[str, Any], *, with_parent: bool) -> Generation:
    """Whose head it is; see ``ds4.weights.generation`` for why a DSpark head does not say so by itself."""
    clues = name_clues(path, metadata, with_parent=with_parent)
    release, evidence = judge(with_mtp(clues, "an MTP head, as only the preview has") if kind == "mtp" else clues)
    name = "MTP head" if kind == "mtp" else "DSpark head"
    of = f"V4-Flash {release}" if release else "an unknown release"
    return Generation(f"{name} of {of}", evidence, release)


def _expected_names(kind: Kind, stages: int, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Canonical names of a complete head with as many experts as its routers say."""
    for stage in range(stages):
        router = shapes.get(f"mtp.{stage}.ffn.gate.weight", ())
        experts = range(router[0] if router else 1)
        for suffix in _stage_shapes(kind, stage, stages, None):
            numbers = experts if "*" in suffix else range(1)
            yield from (f"mtp.{stage}.{suffix.replace('*', str(number))}" for number in numbers)


def _stage_shapes(kind: Kind, stage: int, stages: int, config: ModelConfig | None) -> dict[str, tuple[int, ...]]:
    """Shapes in one stage by canonical suffix, "*" for each expert and 0 for their number; without a config only the
    names are right.  Source: spec model.md 2 (block), 7.1 and 7.2."""
    c = config
    d, m, inter = (c.hidden_size, c.hc_mult, c.moe_intermediate_size) if c else (0, 0, 0)
    heads, width, vocab = (c.num_attention_heads, c.head_dim, c.vocab_size) if c else (0, 0, 0)
    q_rank, groups, o_rank = (c.q_lora_rank, c.o_groups, c.o_lora_rank) if c else (0, 1, 0)
    shapes: dict[str, tuple[int, ...]] = {"attn_norm.weight": (d,), "ffn_norm.weight": (d,)}
    for part in ("attn", "ffn"):
        shapes |= {f"hc_{part}_fn": ((2 + m) * m, m * d), f"hc_{part}_base": ((2 + m) * m,), f"hc_{part}_scale": (3,)}
    shapes |= {
        "attn.wq_a.weight": (q_rank, d),
        "attn.q_norm.weight": (q_rank,),
        "attn.wq_b.weight": (heads * width, q_rank),
        "attn.wkv.weight": (width, d),
        "attn.kv_norm.weight": (width,),
        "attn.attn_sink": (heads,),
        "attn.wo_a.weight": (groups * o_rank, heads * width // groups),
        "attn.wo_b.weight": (d, groups * o_rank),
        "ffn.gate.weight": (0, d),
        "ffn.gate.bias": (0,),
    }
    for expert in ("shared_experts", "experts.*"):
        shapes |= {f"ffn.{expert}.{w}.weight": (d, inter) if w == "w2" else (inter, d) for w in ("w1", "w2", "w3")}
    if kind == "mtp":
        shapes |= {"e_proj.weight": (d, d), "h_proj.weight": (d, d), "enorm.weight": (d,), "hnorm.weight": (d,)}
    elif stage == 0:
        taps = len(c.dspark_target_layer_ids) if c else 0
        shapes |= {"main_proj.weight": (d, taps * d), "main_norm.weight": (d,)}
    if kind == "mtp" or stage == stages - 1:
        shapes |= {"norm.weight": (d,), "hc_head_fn": (m, m * d), "hc_head_base": (m,), "hc_head_scale": (1,)}
    if kind == "dspark" and stage == stages - 1:
        rank = (c.dspark_markov_rank or 0) if c else 0
        shapes |= {f"markov_head.markov_{w}.weight": (vocab, rank) for w in ("w1", "w2")}
        shapes["confidence_head.proj.weight"] = (1, d + rank)
    return shapes


def _check_shapes(head: DraftHead, config: ModelConfig, trunk: Path) -> None:
    """Raise Ds4Error for the first tensor whose shape does not fit the trunk."""
    shapes = head.shapes()
    for stage in range(head.stages):
        experts = shapes[f"mtp.{stage}.ffn.gate.weight"][:1]
        if experts < (config.num_experts_per_tok,):
            raise Ds4Error(
                f"{head.path}: stage {stage} has {list(experts)} experts, but each token takes "
                f"{config.num_experts_per_tok} in {trunk}"
            )
        expected = _stage_shapes(head.kind, stage, head.stages, config)
        expected |= {"ffn.gate.weight": (*experts, config.hidden_size), "ffn.gate.bias": experts}
        for name, shape in shapes.items():
            suffix = name.removeprefix(f"mtp.{stage}.")
            wanted = expected.get(re.sub(r"^ffn\.experts\.[0-9]+\.", "ffn.experts.*.", suffix))
            if suffix != name and wanted not in (None, shape):
                raise Ds4Error(
                    f"{head.path}: tensor {name} has shape {list(shape)}, but {trunk} needs {list(wanted or ())}; "
                    "the draft head belongs to another model"
                )


def _check_generation(ckpt: Checkpoint, head: DraftHead) -> tuple[str, ...]:
    """Raise Ds4Error for a head that was made for another trunk; warnings where that cannot be told."""
    trunk, made_for = identify(ckpt), head.generation
    if head.kind == "mtp" and trunk.pruned:
        raise Ds4Error(
            f"{head.path}: an MTP head does not match a pruned model, and {ckpt.path} is {trunk.pruned} "
            f"({trunk.evidence[-1]}); run it without a draft head"
        )
    known = made_for.release and trunk.release
    if known and made_for.release != trunk.release:
        raise Ds4Error(
            f"{head.path} is for {_of_release(made_for)}, but {ckpt.path} is {_of_release(trunk)}; use the draft head "
            "of that release, or none"
        )
    warnings = []
    if not known:
        warnings.append(
            f"{head.path} is for {_of_release(made_for)}, and {ckpt.path} is {_of_release(trunk)}; if these are not "
            "the same release, few drafts will be accepted"
        )
    if ckpt.reap and head.shapes()["mtp.0.ffn.gate.weight"][0] > min(ckpt.reap.kept):
        warnings.append(f"{head.path} was made for more experts than {ckpt.path} has; fewer drafts may be accepted")
    return tuple(warnings)


def _of_release(generation: Generation) -> str:
    """Which release it is, and why."""
    if generation.release is None:
        return f"V4-Flash ({UNKNOWN})"
    return f"V4-Flash {generation.release} ({'; '.join(generation.evidence)})"
