"""Which format each tensor gets in a converted checkpoint.

A recipe names a format for two groups of tensors, whose sizes decide how fast and how good a model is:

    experts  the routed experts, of the trunk and of draft blocks
    dense    what the released checkpoints store in FP8: the attention projections, the indexer's wq_b, the shared
             expert, and the projections of draft heads; and the LM head, but for FP8, in which no release has it

Everything else (embedding, router, compressors, hyper-connections, norms, tables) keeps its values, and its format
where the container has it.  In a GGUF, vectors, position tables and hyper-connections are F32, as llama.cpp's converter
writes them.
Source:  spec weights.md 1, 3.2 and 6.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ds4.errors import Ds4Error
from ds4.weights.formats import FORMATS
from ds4.weights.names import expert_of

Container = Literal["gguf", "safetensors"]
Group = Literal["experts", "dense", "LM head", "other"]

EXPERTS = ("nvfp4", "mxfp4", "q8_0", "bf16", "keep")
DENSE = ("q8_0", "bf16", "f16", "fp8", "keep")

# Name on the command line -> format, by container.
_CHOICES: dict[Container, dict[str, str]] = {
    "gguf": {name: name for name in ("nvfp4", "mxfp4", "q8_0", "bf16", "f16")},
    "safetensors": {
        "nvfp4": "nvfp4_modelopt",
        "mxfp4": "mxfp4_official",
        "fp8": "fp8_block",
        "bf16": "bf16",
        "f16": "f16",
    },
}
_ELSE = {
    ("gguf", "fp8"): "a GGUF has no FP8 type; use q8_0, or bf16, which loses nothing",
    ("safetensors", "q8_0"): "safetensors has no Q8_0; use {}, or keep, which stores F32",
}
# What stays as it is -> the format that the other container has for it, without loss.  Safetensors has none of GGUF's
# block types, so that all those are decoded to F32.
_KEPT: dict[Container, dict[str, str]] = {
    "gguf": {
        "mxfp4_official": "mxfp4",
        "nvfp4_modelopt": "nvfp4",
        "nvfp4_sleepy": "nvfp4",
        "fp8_block": "bf16",
        "i64": "i32",
    },
    "safetensors": {
        "mxfp4": "mxfp4_official",
        "nvfp4": "nvfp4_modelopt",
        "nvfp4_sleepy": "nvfp4_modelopt",
        "i32": "i64",
    },
}
_SAFETENSORS = ("f32", "f16", "bf16", "i64", "mxfp4_official", "nvfp4_modelopt", "fp8_block")
_DENSE_NAME = re.compile(
    r".+\.(attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)|ffn\.shared_experts\.w[123]|[eh]_proj|main_proj)\.weight"
)
_F32_IN_GGUF = re.compile(r".*(hc_(attn|ffn|head)_(fn|base|scale)|\.ape)")


@dataclass(frozen=True)
class Recipe:
    """What was asked for: one of EXPERTS, and one of DENSE."""

    experts: str = "keep"
    dense: str = "keep"

    def check(self, container: Container) -> None:
        """Raise Ds4Error, naming the option, for a format that the container does not have."""
        for option, chosen, others in (("experts", self.experts, EXPERTS), ("dense", self.dense, DENSE)):
            if chosen not in others:
                raise ValueError(f"--{option} is one of {', '.join(others)}, not {chosen!r}")
            if chosen != "keep" and chosen not in _CHOICES[container]:
                known = " or ".join(name for name in others if name in _CHOICES[container])
                raise Ds4Error(f"--{option} {chosen}: {_ELSE[container, chosen].format(known)}")


def group_of(name: str) -> Group:
    """The group that a canonical tensor belongs to."""
    if expert_of(name):
        return "experts"
    if name == "head.weight":
        return "LM head"
    return "dense" if _DENSE_NAME.fullmatch(name) else "other"


def target_format(
    name: str, source: str, shape: tuple[int, ...], recipe: Recipe, container: Container, *, f32_scales: bool = False
) -> str:
    """The format of one tensor in the converted checkpoint.

    name, source, shape  canonical name, format as stored, logical shape
    f32_scales           an fp8_block tensor with F32 scales: its values need more bits than BF16 has
    returns  a key of ``FORMATS`` that the container has
    Error:   Ds4Error naming the tensor and the option for rows that the format's blocks do not divide, and for a stored
             type that ds4 cannot decode and the container does not have.
    """
    group = group_of(name)
    chosen = {"experts": recipe.experts, "dense": recipe.dense, "LM head": recipe.dense}.get(group, "keep")
    option = "experts" if group == "experts" else "dense"
    if group == "LM head" and chosen == "fp8":
        chosen = "keep"
    if chosen != "keep":
        target = _CHOICES[container][chosen]
    elif container == "gguf" and source in FORMATS and source != "i32" and _is_f32(name, source, shape):
        target = "f32"
    else:
        target = _kept(name, source, container)
        if source == "fp8_block" and target == "bf16" and f32_scales:
            target = "f32"
    block = FORMATS[target].block if target in FORMATS else 1
    if shape and shape[-1] % block:
        raise Ds4Error(
            f"tensor {name}: rows of {shape[-1]} are no multiple of the {target} block {block}; use --{option} bf16"
        )
    if source not in FORMATS and target != source:
        raise Ds4Error(f"tensor {name} has type {source}, which ds4 cannot decode, so it cannot become {target}")
    return target


def _is_f32(name: str, source: str, shape: tuple[int, ...]) -> bool:
    floats = FORMATS[source].block == 1 and not source.startswith("i")
    return floats and (len(shape) < 2 or _F32_IN_GGUF.fullmatch(name) is not None)


def _kept(name: str, source: str, container: Container) -> str:
    """The format that keeps the values of a stored one."""
    if source in _KEPT[container]:
        return _KEPT[container][source]
    if container == "gguf":
        return source
    return source if source in _SAFETENSORS else "f32"
