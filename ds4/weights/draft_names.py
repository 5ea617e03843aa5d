"""How the dialects of draft heads name their tensors in a GGUF file.

    antirez MTP      mtp.0.<suffix>, e_proj and h_proj apart
    llama.cpp MTP    blk.N.<suffix> and blk.N.nextn.*, N counted on from the trunk's blocks
    DSpark, native   dspark.S.<suffix>, and nine tensors without a stage: dspark.main_proj.weight, ...
    DSpark, legacy   mtp.S.<suffix>; the nine are in the first or the last stage
    DSpark, dflash   blk.S.<suffix>, and the nine as fc.weight, enc.output_norm.weight, output_norm.weight, ...

Tensor names tell the dialect; the architecture that a file claims does not. Canonical names are the official ones,
``mtp.S.*``, and there the nine are in the first or the last stage.
Source:  spec weights.md 1.1, 3.3 and 3.4.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from ds4.weights import names
from ds4.weights.names import NameTable

Kind = Literal["mtp", "dspark"]

# Canonical suffix of a DSpark tensor without a stage -> first or last stage, name after "dspark.", dflash name.
_FIRST, _LAST = 0, -1
_NINE: dict[str, tuple[int, str, str]] = {
    "main_proj.weight": (_FIRST, "main_proj.weight", "fc.weight"),
    "main_norm.weight": (_FIRST, "main_norm.weight", "enc.output_norm.weight"),
    "norm.weight": (_LAST, "norm.weight", "output_norm.weight"),
    "hc_head_fn": (_LAST, "hc_head_fn.weight", "output_hc_fn.weight"),
    "hc_head_base": (_LAST, "hc_head_base.weight", "output_hc_base.weight"),
    "hc_head_scale": (_LAST, "hc_head_scale.weight", "output_hc_scale.weight"),
    "markov_head.markov_w1.weight": (_LAST, "markov_w1.weight", "markov_w1.weight"),
    "markov_head.markov_w2.weight": (_LAST, "markov_w2.weight", "markov_w2.weight"),
    "confidence_head.proj.weight": (_LAST, "conf_proj.weight", "conf_proj.weight"),
    # Not in the official release; llama.cpp's dialect has a place for it.
    "confidence_head.proj.bias": (_LAST, "conf_proj.bias", "conf_proj.bias"),
}
# The legacy dialect has the canonical names but for the stream collapse, which it spells like an MTP block's.
_LEGACY = names.BLOCK | names.MTP | {suffix: suffix for suffix in _NINE if "hc_head" not in suffix}


@dataclass(frozen=True)
class Dialect:
    """A draft head found in a GGUF file: its kind, the dialect's name for messages, and how that names tensors."""

    kind: Kind
    name: str
    table: NameTable


def recognise(found: Collection[str]) -> Dialect | None:
    """The draft head among a GGUF file's tensor names, None if there is none; trunk tensors beside it do not matter."""
    if "dspark.main_proj.weight" in found:
        return Dialect("dspark", "DSpark (dspark.*)", _staged("dspark", found, 1, "dspark."))
    if "mtp.0.main_proj.weight" in found:
        return Dialect("dspark", "DSpark (mtp.*)", NameTable({}, _blocks("mtp", _LEGACY)))
    if "fc.weight" in found and "markov_w1.weight" in found:
        return Dialect("dspark", "DSpark (dflash)", _staged("blk", found, 2, ""))
    if "mtp.0.e_proj.weight" in found:
        return Dialect("mtp", "MTP (mtp.*)", NameTable({}, _blocks("mtp", names.BLOCK | names.MTP)))
    blocks = (names.split_block(name) for name in found if name.endswith(names.EH_PROJ))
    nextn = sorted(block[1] for block in blocks if block and block[0] == "blk" and block[2] == names.EH_PROJ)
    if not nextn:
        return None
    # A file of nothing but draft blocks gives its one stream collapse the name that a trunk's has.
    whole = {name: f"mtp.0.{canonical}" for name, canonical in names.GLOBAL.items() if canonical.startswith("hc_head")}
    trunk = names.trunk_table(nextn)
    return Dialect("mtp", "MTP (nextn)", NameTable(whole, lambda kind, n: trunk.block(kind, n) if n in nextn else None))


def merged(trunk: NameTable, found: Collection[str]) -> NameTable:
    """The names of a trunk file with those of a DSpark head that was merged into it, if one was."""
    head = recognise(found) if {"dspark.main_proj.weight", "mtp.0.main_proj.weight"} & set(found) else None
    if head is None:
        return trunk
    table = head.table
    return NameTable({**trunk.whole, **table.whole}, lambda kind, n: table.block(kind, n) or trunk.block(kind, n))


def _blocks(kind: str, table: Mapping[str, str]) -> Callable[[str, int], tuple[str, Mapping[str, str]] | None]:
    """``NameTable.block`` of a dialect whose blocks are "<kind>.S."."""
    return lambda found, number: (f"mtp.{number}.", table) if found == kind else None


def _staged(kind: str, found: Collection[str], column: int, prefix: str) -> NameTable:
    """The names of a dialect with stages "<kind>.S." and the nine by ``column`` of their table."""
    stages = [block[1] for name in found if (block := names.split_block(name)) and block[0] == kind]
    stage = {_FIRST: 0, _LAST: max(stages, default=0)}
    whole = {f"{prefix}{entry[column]}": f"mtp.{stage[entry[0]]}.{suffix}" for suffix, entry in _NINE.items()}
    return NameTable(whole, _blocks(kind, names.BLOCK))
