"""Which release of V4-Flash a checkpoint or a draft head is, and what in the file says so.

A draft head fits the trunk that it was trained with, and nothing in the shapes tells preview and 0731 apart: what tells
is collected here as clues, the strongest first. Only the preview and Base have an MTP head; DSpark heads exist for
0731, for Vision-Exp and (released a month before 0731) for the preview, so a DSpark head by itself is a weak clue.

Source:  spec weights.md 1.1, 1.2, 3.4, 3.6 and 5; model.md 1.1 and 1.2; chat.md 2.4 (the effort text of the template).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ds4.weights.checkpoint import Checkpoint
from ds4.weights.reap import Reap

Release = Literal["preview", "0731", "Vision-Exp", "Base"]

UNKNOWN = "preview or 0731: nothing in the file tells"

_FLASH = (4096, 43)  # hidden_size and num_hidden_layers
# What a name must contain, tried in this order, to speak for a release; 0731 files are also called 20260731.
_NAME_MARKS: tuple[tuple[str, Release], ...] = (
    (r"vision[-_ ]?exp", "Vision-Exp"),
    (r"0731", "0731"),
    (r"flash[-_ ]base", "Base"),
    (r"preview", "preview"),
)
# Repositories whose name is no part of the name of another release's.
_REPOSITORIES: dict[str, Release] = {
    "deepseek-ai/DeepSeek-V4-Flash": "preview",
    "deepseek-ai/DeepSeek-V4-Flash-DSpark": "preview",
}
_NAME_KEYS = re.compile(r"general\.(name|basename|version|source\..+|base_model\.[0-9]+\..+)|_name_or_path")


@dataclass(frozen=True)
class Clue:
    """One observation: what it is, and the release it speaks for."""

    text: str
    release: Release


@dataclass(frozen=True)
class Generation:
    """What a checkpoint or a draft head was made from.

    name      for people: "V4-Flash 0731 REAP-K160", "demo (not V4-Flash dimensions)"
    evidence  what in the file says so, the strongest first; what contradicts begins with "but"
    release   of a trunk its own, of a draft head that of its trunk; None where nothing tells
    pruned    "REAP-K160" for a trunk with pruned experts, else None
    """

    name: str
    evidence: tuple[str, ...]
    release: Release | None = None
    pruned: str | None = None

    def __str__(self) -> str:
        evidence = [text for text in self.evidence if text not in self.name]
        return f"{self.name} ({'; '.join(evidence)})" if evidence else self.name


def identify(ckpt: Checkpoint) -> Generation:
    """The generation of a checkpoint, from tensor names, shapes and metadata; no weight is read.

    A draft head that was attached from a side file is no clue to its trunk.
    """
    config = ckpt.config
    release, evidence = judge(_trunk_clues(ckpt))
    pruned = ckpt.reap.name if ckpt.reap else None
    cut = _cut(ckpt.reap) if ckpt.reap else ()
    dimensions = (config.hidden_size, config.num_hidden_layers)
    shown = f"hidden size {dimensions[0]}, {dimensions[1]} layers"
    if dimensions != _FLASH:
        return Generation("demo (not V4-Flash dimensions)", (shown, *evidence, *cut), release, pruned)
    name = " ".join(word for word in ("V4-Flash", release, pruned) if word)
    if release is None:
        evidence = (UNKNOWN,)
        name = name if pruned else f"{name} ({UNKNOWN})"
    return Generation(name, (*evidence, *cut), release, pruned)


def judge(clues: Iterable[Clue]) -> tuple[Release | None, tuple[str, ...]]:
    """The release that the first clue speaks for, and all clues as evidence: agreeing ones, then the others."""
    clues = list(clues)
    if not clues:
        return None, ()
    release = clues[0].release
    agreeing = tuple(clue.text for clue in clues if clue.release == release)
    others = tuple(f"but {clue.text}, as in {clue.release}" for clue in clues if clue.release != release)
    return release, agreeing + others


def name_clues(path: Path, metadata: Mapping[str, Any], *, with_parent: bool) -> list[Clue]:
    """Clues in what a file is called: in its metadata, then on disk.

    path         of the file or directory; a hub cache names the repository in a directory further up
    metadata     GGUF key/values or a parsed config.json
    with_parent  whether the directory that holds a file speaks for it, as with ``<model>/model.safetensors``
    """
    found: list[tuple[str, str]] = [
        (f"{key} is {value!r:.100}", value)
        for key, value in metadata.items()
        if isinstance(value, str) and _NAME_KEYS.fullmatch(key)
    ]
    on_disk = [path.name, *([path.parent.name] if with_parent and path.is_file() else [])]
    on_disk += [part.name for part in path.parents if part.name.startswith("models--")]
    found += [(f"the file is called {part!r:.100}", part.replace("--", "/")) for part in on_disk]
    clues = []
    for text, value in found:
        mark = next((release for pattern, release in _NAME_MARKS if re.search(pattern, value, re.IGNORECASE)), None)
        exact = next((r for name, r in _REPOSITORIES.items() if f"/{value}".rstrip("/").endswith(f"/{name}")), None)
        release = mark or exact
        if release:
            clues.append(Clue(text, release))
    return clues


def with_mtp(named: list[Clue], text: str) -> list[Clue]:
    """Clues of a name and an MTP head, the strongest first: 0731 and later have none, but Base has one too."""
    base = [clue for clue in named if clue.release == "Base"]
    return [*base, Clue(text, "preview"), *(clue for clue in named if clue.release != "Base")]


def _trunk_clues(ckpt: Checkpoint) -> Iterable[Clue]:
    """Clues to the release of a trunk, the strongest first."""
    metadata, config = ckpt.metadata, ckpt.config
    vision = next((key for key in metadata if key.startswith("vision_") and metadata[key]), None)
    vision = vision or next((t.name for t in ckpt.tensors() if "exp_probs_b_vl" in t.name), None)
    if vision:
        yield Clue(f"{vision} is there", "Vision-Exp")
    if _has_base_experts(ckpt):
        yield Clue("routed experts are FP8 with F32 scales", "Base")
    own_head = ckpt.draft_path is None
    named = name_clues(ckpt.path, metadata, with_parent=ckpt.container == "safetensors")
    yield from with_mtp(named, "has an MTP draft head") if own_head and "mtp.0.e_proj.weight" in ckpt else named
    if "Beyond maximum" in str(metadata.get("tokenizer.chat_template", "")):
        yield Clue("the chat template knows the effort levels of 0731", "0731")
    note = "; the DSpark release of the preview looks the same"
    if own_head and "mtp.0.main_proj.weight" in ckpt:
        yield Clue(f"has a DSpark draft head (mtp.0.main_proj.weight{note})", "0731")
    elif any(key.startswith("dspark_") and metadata[key] is not None for key in metadata):
        yield Clue(f"has dspark_* settings{note}", "0731")
    ratios = metadata.get("compress_ratios", metadata.get("deepseek4.attention.compress_ratios"))
    stages = len(ratios) - config.num_hidden_layers if isinstance(ratios, list | tuple) else 0
    if stages in (1, 3):
        text = f"compress_ratios has {config.num_hidden_layers + stages} entries, {stages} of them for draft stages"
        yield Clue(text, "preview" if stages == 1 else "0731")


def _has_base_experts(ckpt: Checkpoint) -> bool:
    """FP8 experts as in the Base release; the lossless FP8 recast of the instruct model has scales in E8M0."""
    expert = "layers.0.ffn.experts.0.w1"
    if f"{expert}.weight" not in ckpt or ckpt.stored_as(f"{expert}.weight")[0] != "fp8_block":
        return False
    scale = next((t for t in ckpt.tensors() if t.name.endswith(f"{expert}.scale")), None)
    return scale is not None and scale.nbytes == 4 * math.prod(scale.shape)


def _cut(reap: Reap) -> tuple[str]:
    layers = sum(kept < reap.total for kept in reap.kept)
    return (f"{layers} of {len(reap.kept)} layers have fewer than {reap.total} experts",)
