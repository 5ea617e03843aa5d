"""Pruned models (REAP): how many routed experts each block has, and which slots of a padded layer are alive.

A pruned layer is usually compact: router, bias and experts have as many rows as experts were kept.  Two other forms
exist in GGUF files and are made compact here, so that nothing else has to know them: ``ds4-padded-v1`` keeps all slots
and bars the pruned ones through the selection bias; some writers of ``ds4-compact-v1`` shrink the stacks of experts but
pad router and bias at the end.
Source:  spec weights.md 1.2 and 3.6; the padding and its bias of -1e30 as found in public pruning tools.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from ds4.config import ModelConfig
from ds4.errors import Ds4Error
from ds4.weights.tensor import PackedTensor, row_count

if TYPE_CHECKING:
    from ds4.weights.checkpoint import View

FLASH_EXPERTS = 256  # of an unpruned V4-Flash
_LAYOUTS: dict[str, Literal["compact", "padded"]] = {"ds4-compact-v1": "compact", "ds4-padded-v1": "padded"}
_PRUNED, _DISABLED = 2, 3  # of reap.layer.policy; 0 is untouched, 1 a hash layer left whole
_BARRED = -1e29  # a selection bias below this can only mean "never"; writers use -1e30 or minus infinity


@dataclass(frozen=True)
class Reap:
    """How a pruned checkpoint was pruned.

    layout  how the file stores it
    total   routed experts of an unpruned layer
    kept    routed experts of every trunk layer
    """

    layout: Literal["compact", "padded"]
    total: int
    kept: tuple[int, ...]

    @property
    def name(self) -> str:
        """``REAP-K150``, or with the least and the most where pruned layers differ: ``REAP-K128-180``."""
        pruned = [kept for kept in self.kept if kept < self.total]
        least, most = min(pruned), max(pruned)
        return f"REAP-K{least}" if least == most else f"REAP-K{least}-{most}"


def summary(metadata: Mapping[str, Any], config: ModelConfig, counts: Mapping[str, int], source: str) -> Reap | None:
    """What there is to say of a checkpoint's pruning; None if no layer was pruned.

    metadata  GGUF key/values or the parsed config.json
    counts    of ``expert_counts``
    Error:    Ds4Error for original counts that are no numbers.
    Source:   a file may state the original expert count or the pruned one, so that of V4-Flash is known here.
    """
    flash = (config.hidden_size, config.num_hidden_layers) == (4096, 43)
    originals = _list(metadata, "reap.layer.expert_count", source) if metadata.get("reap.enabled") is True else None
    total = max(config.n_routed_experts, FLASH_EXPERTS if flash else 0, *(originals or ()))
    kept = tuple(counts.get(f"layers.{n}", config.n_routed_experts) for n in range(config.num_hidden_layers))
    layout = _LAYOUTS.get(str(metadata.get("reap.layout")), "compact")
    return Reap(layout, total, kept) if min(kept) < total else None


def expert_counts(views: Mapping[str, View], config: ModelConfig, source: str) -> dict[str, int]:
    """Routed experts of every block that has a router: ``{"layers.3": 150}``.

    Error:   Ds4Error naming two tensors that disagree; or the router, if there are more experts than the configuration
             knows of or fewer than a token takes.  Where experts are tensors of their own, missing ones are no error
             here: the file may be a part of a checkpoint.
    """
    seen: dict[str, list[tuple[str, int, bool]]] = {}
    for name, view in views.items():
        prefix, mark, rest = name.partition(".ffn.")
        if not mark:
            continue
        tensors = seen.setdefault(prefix, [])
        if rest == "gate.weight" and view.shape:
            tensors.insert(0, (view.stored.name, view.shape[0], True))
        elif (rest == "gate.bias" and view.shape) or view.stack:
            tensors.append((view.stored.name, view.shape[0], True))
        elif rest.startswith("experts."):
            number = rest.split(".", 2)[1]
            if number.isdecimal() and len(number) < 8:
                tensors.append((view.stored.name, int(number) + 1, False))
    counts = {}
    for prefix, tensors in seen.items():
        exact = [(name, count) for name, count, whole in tensors if whole]
        if not exact:
            continue
        first, wanted = exact[0]
        for name, count, whole in tensors:
            if count != wanted if whole else count > wanted:
                raise Ds4Error(
                    f"{source}: tensors {first!r:.200} and {name!r:.200} disagree: they are for {wanted} and "
                    f"{count} experts; the file is damaged or was pruned by an unknown tool"
                )
        if f"{prefix}.ffn.gate.weight" in views:
            _check_count(first, wanted, prefix, config, source)
            counts[prefix] = wanted
    return counts


def _check_count(name: str, count: int, prefix: str, config: ModelConfig, source: str) -> None:
    most, least = config.n_routed_experts, config.num_experts_per_tok
    if count < least:
        raise Ds4Error(f"{source}: tensor {name!r:.200} is for {count} experts, but each token takes {least}")
    if count > most and prefix.startswith("layers."):  # a draft block may come from another model
        raise Ds4Error(f"{source}: tensor {name!r:.200} is for {count} experts, but the model has {most}")


@dataclass(frozen=True)
class Plan:
    """The ``reap.*`` metadata of a GGUF file: layout, and policy and experts kept by layer, each None where missing."""

    layout: Literal["compact", "padded"]
    policy: tuple[int, ...] | None
    keep: tuple[int, ...] | None


def read_plan(metadata: Mapping[str, Any], source: str) -> Plan | None:
    """The plan in a GGUF's metadata, None without ``reap.enabled``.

    Error:   Ds4Error for a layout or policy that ds4 does not know, and for layers without any experts.
    """
    if metadata.get("reap.enabled") is not True:
        return None
    layout = metadata.get("reap.layout")
    if not isinstance(layout, str) or layout not in _LAYOUTS:
        raise Ds4Error(f"{source}: reap.layout must be {' or '.join(map(repr, _LAYOUTS))}, not {layout!r:.60}")
    policy, keep = (_list(metadata, f"reap.layer.{name}", source) for name in ("policy", "keep_count"))
    if policy is not None and any(p > _DISABLED for p in policy):
        raise Ds4Error(f"{source}: reap.layer.policy has the unknown entry {max(policy)}; 0 to 3 are known")
    if policy is not None and _DISABLED in policy:
        raise Ds4Error(
            f"{source}: layer {policy.index(_DISABLED)} has all experts disabled (reap.layer.policy 3), which ds4 does "
            "not support"
        )
    return Plan(_LAYOUTS[layout], policy, keep)


def _list(metadata: Mapping[str, Any], key: str, source: str) -> tuple[int, ...] | None:
    values = metadata.get(key)
    if values is None:
        return None
    if not isinstance(values, list) or any(type(v) is not int or not 0 <= v <= 1 << 14 for v in values):
        raise Ds4Error(f"{source}: {key} must be a list of small integers, not {values!r:.60}")
    return tuple(values)


def compact(views: dict[str, View], plan: Plan, n_layers: int, source: str) -> None:
    """Make every layer of a pruned GGUF compact: slots that were pruned disappear from ``views``.

    Only layers with dead slots cost reading: their bias, and where that does not tell, their router.
    Error:   Ds4Error naming the layer if it cannot be told which slots are dead, or the counts disagree.
    """
    for key, values in (("policy", plan.policy), ("keep_count", plan.keep)):
        if values is not None and len(values) < n_layers:
            raise Ds4Error(f"{source}: reap.layer.{key} has {len(values)} entries for {n_layers} layers")
    for layer in range(n_layers):
        prefix = f"layers.{layer}.ffn."
        stacks = [name for w in ("w1", "w3", "w2") if (name := f"{prefix}experts.*.{w}.weight") in views]
        gate = views.get(prefix + "gate.weight")
        if gate is None or len(gate.shape) != 2 or len({views[name].shape[0] for name in stacks}) != 1:
            continue  # what is wrong here, expert_counts will say
        slots, stored = gate.shape[0], views[stacks[0]].shape[0]
        keep = plan.keep[layer] if plan.keep is not None else None
        pruned = plan.policy[layer] == _PRUNED if plan.policy is not None else keep not in (None, slots)
        if stored < slots:
            keep = stored if keep is None else keep
            stacks = []
        elif not pruned or plan.layout != "padded":
            if pruned and keep not in (None, stored):
                raise Ds4Error(f"{source}: layer {layer} has {stored} experts, but reap.layer.keep_count says {keep}")
            continue
        bias = views.get(prefix + "gate.bias")
        if bias is None or bias.shape != (slots,) or keep is None or not 0 < keep <= slots:
            raise Ds4Error(
                f"{source}: layer {layer} has slots of pruned experts, but not what tells them apart: a bias in "
                f"exp_probs_b and a number in reap.layer.keep_count"
            )
        kept = _alive(gate, bias, keep)
        if kept is None or (stored < slots and kept != tuple(range(stored))):
            raise Ds4Error(
                f"{source}: layer {layer} is said to keep {keep} of {slots} experts, but its router and bias do not "
                "tell which"
            )
        for name in (prefix + "gate.weight", prefix + "gate.bias", *stacks):
            view = views[name]
            views[name] = dataclasses.replace(view, shape=(keep, *view.shape[1:]), kept=kept)


def _alive(gate: View, bias: View, keep: int) -> tuple[int, ...] | None:
    """Slots that the router can select: not barred by their bias, or else with a router row that is not zero."""
    alive = _values(bias) > _BARRED
    if int(alive.sum()) != keep:
        alive &= (_values(gate) != 0).any(dim=1)
    kept = tuple(alive.nonzero().flatten().tolist())
    return kept if len(kept) == keep else None


def _values(view: View) -> torch.Tensor:
    data = view.stored.data.view(row_count(view.shape), -1)
    return PackedTensor(view.stored.name, view.stored.format, view.shape, data).dequantize()
