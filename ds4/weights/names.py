"""GGUF names <-> canonical names (those of the official safetensors), one table.

Source:  spec weights.md 1, 3.2, 3.3 and 3.5.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# Outside the blocks: GGUF name -> canonical name.
GLOBAL = {
    "token_embd.weight": "embed.weight",
    "output.weight": "head.weight",
    "output_norm.weight": "norm.weight",
    "output_hc_fn.weight": "hc_head_fn",
    "output_hc_base.weight": "hc_head_base",
    "output_hc_scale.weight": "hc_head_scale",
}
# Inside a block: suffix after "blk.N." or "mtp.S." -> suffix after "layers.N." or "mtp.S.".
BLOCK = {
    "attn_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "hc_attn_fn.weight": "hc_attn_fn",
    "hc_attn_base.weight": "hc_attn_base",
    "hc_attn_scale.weight": "hc_attn_scale",
    "hc_ffn_fn.weight": "hc_ffn_fn",
    "hc_ffn_base.weight": "hc_ffn_base",
    "hc_ffn_scale.weight": "hc_ffn_scale",
    "attn_q_a.weight": "attn.wq_a.weight",
    "attn_q_a_norm.weight": "attn.q_norm.weight",
    "attn_q_b.weight": "attn.wq_b.weight",
    "attn_kv.weight": "attn.wkv.weight",
    "attn_kv_a_norm.weight": "attn.kv_norm.weight",
    "attn_sinks.weight": "attn.attn_sink",
    "attn_output_a.weight": "attn.wo_a.weight",
    "attn_output_b.weight": "attn.wo_b.weight",
    "attn_compressor_kv.weight": "attn.compressor.wkv.weight",
    "attn_compressor_gate.weight": "attn.compressor.wgate.weight",
    "attn_compressor_ape.weight": "attn.compressor.ape",
    "attn_compressor_norm.weight": "attn.compressor.norm.weight",
    "indexer.attn_q_b.weight": "attn.indexer.wq_b.weight",
    "indexer.proj.weight": "attn.indexer.weights_proj.weight",
    "indexer_compressor_kv.weight": "attn.indexer.compressor.wkv.weight",
    "indexer_compressor_gate.weight": "attn.indexer.compressor.wgate.weight",
    "indexer_compressor_ape.weight": "attn.indexer.compressor.ape",
    "indexer_compressor_norm.weight": "attn.indexer.compressor.norm.weight",
    "ffn_gate_inp.weight": "ffn.gate.weight",
    "exp_probs_b.bias": "ffn.gate.bias",
    "ffn_gate_tid2eid.weight": "ffn.gate.tid2eid",
    "ffn_gate_shexp.weight": "ffn.shared_experts.w1.weight",
    "ffn_up_shexp.weight": "ffn.shared_experts.w3.weight",
    "ffn_down_shexp.weight": "ffn.shared_experts.w2.weight",
}
# Stacks of routed experts: suffix -> which matrix of "ffn.experts.E.".
EXPERTS = {"ffn_gate_exps.weight": "w1", "ffn_up_exps.weight": "w3", "ffn_down_exps.weight": "w2"}
# What a draft (MTP) block has besides, in the antirez spelling "mtp.S.<suffix>".
MTP = {
    "e_proj.weight": "e_proj.weight",
    "h_proj.weight": "h_proj.weight",
    "enorm.weight": "enorm.weight",
    "hnorm.weight": "hnorm.weight",
    "norm.weight": "norm.weight",
    "hc_head_fn.weight": "hc_head_fn",
    "hc_head_base.weight": "hc_head_base",
    "hc_head_scale.weight": "hc_head_scale",
}
# The same in the llama.cpp spelling "blk.N.nextn.<suffix>"; eh_proj is e_proj and h_proj side by side.
NEXTN = {
    "enorm.weight": "enorm.weight",
    "hnorm.weight": "hnorm.weight",
    "shared_head_norm.weight": "norm.weight",
}
EH_PROJ = "nextn.eh_proj.weight"
# The sleepy dialect's way of saying that a tensor is nvfp4_sleepy, and where its multipliers are: instead of ".weight".
SLEEPY = ".nvfp4_weight"
SLEEPY_SCALE = ".nvfp4_scale_2"

_BLOCK_NAME = re.compile(r"([a-z]+)\.(0|[1-9][0-9]{0,3})\.(.+)")
_EXPERT_NAME = re.compile(r"((?:layers|mtp)\.[0-9]+\.)ffn\.experts\.([0-9]+)\.(w[123])\.weight")
_TO_GGUF = {canonical: gguf for gguf, canonical in (BLOCK | MTP).items()}
_GLOBAL_TO_GGUF = {canonical: gguf for gguf, canonical in GLOBAL.items()}
_EXPERTS_TO_GGUF = {matrix: gguf for gguf, matrix in EXPERTS.items()}


@dataclass(frozen=True)
class NameTable:
    """How a dialect names its tensors.

    whole   GGUF name -> canonical name, for tensors outside of the blocks
    block   what "blk" and 3 of "blk.3.<suffix>" stand for: the canonical prefix ("layers.3.") and the names of single
            tensors in such a block (suffix -> canonical suffix); None for a block that is not wanted.  Stacks of
            experts and ``EH_PROJ`` are known without being in that table.
    """

    whole: Mapping[str, str]
    block: Callable[[str, int], tuple[str, Mapping[str, str]] | None]


def trunk_table(nextn: list[int]) -> NameTable:
    """The names of a trunk and its draft blocks: antirez's ``mtp.S.``, llama.cpp's ``blk.N.`` for N in ``nextn``."""
    draft = BLOCK | {f"nextn.{suffix}": canonical for suffix, canonical in NEXTN.items()}
    antirez = BLOCK | MTP

    def block(kind: str, number: int) -> tuple[str, Mapping[str, str]] | None:
        if kind == "mtp":
            return f"mtp.{number}.", antirez
        if kind != "blk":
            return None
        return (f"mtp.{nextn.index(number)}.", draft) if number in nextn else (f"layers.{number}.", BLOCK)

    return NameTable(GLOBAL, block)


def split_block(name: str) -> tuple[str, int, str] | None:
    """``("blk", number, suffix)`` of a GGUF tensor inside a block of any kind, None for any other name."""
    match = _BLOCK_NAME.fullmatch(name)
    return (match[1], int(match[2]), match[3]) if match else None


def to_gguf(name: str) -> tuple[str, int | None] | None:
    """Where the writer puts a canonical name: ``(GGUF name, None)`` or ``(stack name, expert)``; None if unknown.

    Draft blocks keep the antirez spelling, ``mtp.S.<suffix>``, beside the trunk's ``blk.N.<suffix>``.
    """
    if name in _GLOBAL_TO_GGUF:
        return _GLOBAL_TO_GGUF[name], None
    match = _EXPERT_NAME.fullmatch(name)
    if match:
        return match[1].replace("layers.", "blk.") + _EXPERTS_TO_GGUF[match[3]], int(match[2])
    kind, _, rest = name.partition(".")
    number, _, suffix = rest.partition(".")
    if kind not in ("layers", "mtp") or not number.isdecimal() or suffix not in _TO_GGUF:
        return None
    if kind == "layers" and _TO_GGUF[suffix] in MTP:
        return None
    return f"{'blk' if kind == 'layers' else 'mtp'}.{number}.{_TO_GGUF[suffix]}", None


def expert_of(name: str) -> tuple[str, int, str] | None:
    """``("layers.3.", expert, "w1")`` of a canonical routed-expert name, None for any other."""
    match = _EXPERT_NAME.fullmatch(name)
    return (match[1], int(match[2]), match[3]) if match else None


def stack_of(name: str) -> str | None:
    """``layers.3.ffn.experts.*.w1.weight``, the name of a whole stack, of a canonical routed-expert name; or None."""
    match = _EXPERT_NAME.fullmatch(name)
    return f"{match[1]}ffn.experts.*.{match[3]}.weight" if match else None
