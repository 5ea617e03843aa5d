"""Pruned models: fewer experts, a different number in every layer, in each form that files have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from weights.builders import gguf_model, gguf_with, random_tensors, small_config, small_json, small_keys, write

from ds4.errors import Ds4Error
from ds4.kernels.numerics import resolve
from ds4.model.params import Params, TensorParams
from ds4.model.transformer import Transformer
from ds4.weights import open_checkpoint
from ds4.weights.checkpoint import Checkpoint
from ds4.weights.reap import Reap

E = 7
KEPT = {1: (0, 2, 3, 6), 2: (1, 4, 5)}  # experts that survive; layer 0 is hash-routed and stays whole
CONFIG = small_config(n_routed_experts=E, num_nextn_predict_layers=0)
REAP_KEYS = {
    "reap.enabled": True,
    "reap.layout": "ds4-compact-v1",
    "reap.plan.path": "plan.json",
    "reap.layer.policy": [1, 2, 2],
    "reap.layer.expert_count": [E, E, E],
    "reap.layer.keep_count": [E, 4, 3],
}


def keys(**changes: Any) -> dict[str, Any]:
    """Metadata of a pruned file; names of changes are without ``reap.``, dots as underscores; None leaves one out."""
    named = {"enabled": "reap.enabled", "layout": "reap.layout", "policy": "reap.layer.policy"}
    named |= {"keep_count": "reap.layer.keep_count", "expert_count": "reap.layer.expert_count"}
    out = small_keys() | {"deepseek4.expert_count": E} | REAP_KEYS | {named[k]: v for k, v in changes.items()}
    return {key: value for key, value in out.items() if value is not None}


def whole() -> dict[str, torch.Tensor]:
    """A model whose router never selects the experts that are to go."""
    tensors = random_tensors(CONFIG)
    for layer, kept in KEPT.items():
        bias = tensors[f"layers.{layer}.ffn.gate.bias"]
        bias[[e for e in range(E) if e not in kept]] = -50.0
    return tensors


def pruned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same model without them: every layer's experts renumbered, router and bias cut."""
    out = {}
    for name, values in tensors.items():
        parts = name.split(".")
        kept = KEPT.get(int(parts[1])) if name.startswith("layers.") else None
        if kept and ".ffn.experts." in name:
            if int(parts[4]) in kept:
                parts[4] = str(kept.index(int(parts[4])))
                out[".".join(parts)] = values
        else:
            out[name] = values[list(kept)] if kept and ".ffn.gate." in name else values
    return out


def logits(params: Params) -> torch.Tensor:
    """Prefill of 24 tokens, then two decode steps: f32 [27, vocab]."""
    ids = torch.randint(32, (27,), generator=torch.Generator().manual_seed(3)).tolist()
    model = Transformer(CONFIG, params, resolve("exact"))
    cache = model.new_cache(64)
    with torch.no_grad():
        prefill = model.prefill(ids[:24], 0, cache, all_logits=True)
        return torch.cat((prefill, model.decode(ids[24:25], 24, cache), model.decode(ids[25:], 25, cache)))


def opened(tmp_path: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> Checkpoint:
    return open_checkpoint(write(tmp_path / "a.gguf", gguf_with(keys(**changes), gguf_model(tensors))))


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal but for the order in which a router with fewer rows, or a weight in other memory, is multiplied in f32."""
    worst = ((actual - expected).norm(dim=1) / expected.norm(dim=1)).max().item()
    return worst < 1e-5


@pytest.fixture(scope="module")
def reference() -> torch.Tensor:
    return logits(TensorParams(whole()))


def test_compact(tmp_path: Path, reference: torch.Tensor) -> None:
    ckpt = opened(tmp_path, pruned(whole()))
    assert ckpt.reap == Reap("compact", E, (7, 4, 3))
    assert ckpt.reap.name == "REAP-K3-4"
    assert [ckpt.n_experts(f"layers.{n}") for n in range(3)] == [7, 4, 3]
    assert "layers.1.ffn.experts.3.w2.weight" in ckpt
    assert "layers.1.ffn.experts.4.w2.weight" not in ckpt
    assert close(logits(ckpt), reference)
    # Not by chance: with other experts the logits are others.
    worse = whole()
    worse["layers.2.ffn.gate.bias"] = worse["layers.2.ffn.gate.bias"].roll(1)
    assert not close(logits(TensorParams(worse)), reference)


@pytest.mark.parametrize("changes", [{}, {"policy": None}, {"keep_count": None}, {"expert_count": None}], ids=repr)
def test_optional_keys(tmp_path: Path, changes: dict) -> None:
    assert opened(tmp_path, pruned(whole()), **changes).reap == Reap("compact", E, (7, 4, 3))


def test_without_metadata(tmp_path: Path) -> None:
    """Pruned all the same: the tensors say so."""
    names = ("enabled", "layout", "policy", "keep_count", "expert_count")
    ckpt = opened(tmp_path, pruned(whole()), **dict.fromkeys(names))
    assert ckpt.reap == Reap("compact", E, (7, 4, 3))
    assert opened(tmp_path, whole(), **dict.fromkeys(names)).reap is None


@pytest.mark.parametrize("bar", [-1e30, float("-inf"), None], ids=["-1e30", "-inf", "zero rows"])
def test_padded(tmp_path: Path, bar: float | None, reference: torch.Tensor) -> None:
    """All slots are there; a selection bias of -1e30, or router rows of zeros, bar the dead ones."""
    tensors = whole()
    generator = torch.Generator().manual_seed(9)
    for layer, kept in KEPT.items():
        dead = [e for e in range(E) if e not in kept]
        tensors[f"layers.{layer}.ffn.gate.weight"][dead] = 0.0
        # Without a bar in the bias, a row of zeros scores sqrt(ln 2) and would be selected.
        tensors[f"layers.{layer}.ffn.gate.bias"][dead] = 0.5 if bar is None else bar
        for e in dead:
            for w in ("w1", "w2", "w3"):
                experts = tensors[f"layers.{layer}.ffn.experts.{e}.{w}.weight"]
                experts.copy_(torch.randn(experts.shape, generator=generator))
    ckpt = opened(tmp_path, tensors, layout="ds4-padded-v1")
    assert ckpt.reap == Reap("padded", E, (7, 4, 3))
    compact = pruned(tensors)
    assert set(ckpt.names()) == set(compact)
    for name, values in compact.items():
        assert ckpt.stored_as(name)[1] == tuple(values.shape)
        assert torch.equal(ckpt.tensor(name).dequantize(), values.int() if "tid2eid" in name else values), name
    assert close(logits(ckpt), reference)


@pytest.mark.parametrize("bar", [-1e30, None], ids=["-1e30", "zero rows"])
def test_compact_with_padded_router(tmp_path: Path, bar: float | None, reference: torch.Tensor) -> None:
    """Stacks have the survivors only, router and bias are padded at the end."""
    tensors = pruned(whole())
    for layer, kept in KEPT.items():
        p, n = f"layers.{layer}.ffn.gate.", E - len(kept)
        tensors[p + "weight"] = torch.cat((tensors[p + "weight"], torch.zeros(n, 64)))
        tensors[p + "bias"] = torch.cat((tensors[p + "bias"], torch.full((n,), 0.5 if bar is None else bar)))
    ckpt = opened(tmp_path, tensors)
    assert ckpt.reap == Reap("compact", E, (7, 4, 3))
    assert torch.equal(ckpt.tensor("layers.1.ffn.gate.bias").dequantize(), pruned(whole())["layers.1.ffn.gate.bias"])
    assert close(logits(ckpt), reference)
    tensors["layers.1.ffn.gate.bias"] = tensors["layers.1.ffn.gate.bias"].flip(0)  # the padding comes first
    tensors["layers.1.ffn.gate.weight"] = tensors["layers.1.ffn.gate.weight"].flip(0)
    with pytest.raises(Ds4Error, match="layer 1 is said to keep 4 of 7 experts, but its router and bias do not tell"):
        opened(tmp_path, tensors)


def alive(tensors: dict[str, torch.Tensor]) -> None:
    """Nothing bars the dead slots of layer 1."""
    tensors["layers.1.ffn.gate.bias"][:] = 0.0
    tensors["layers.2.ffn.gate.bias"][tensors["layers.2.ffn.gate.bias"] < -1] = -1e30


def barred(tensors: dict[str, torch.Tensor]) -> None:
    for layer in KEPT:
        bias = tensors[f"layers.{layer}.ffn.gate.bias"]
        bias[bias < -1] = -1e30


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    barred(tensors)
    tensors["layers.1.ffn.gate.bias"][2] = torch.nan


def no_bias(tensors: dict[str, torch.Tensor]) -> None:
    barred(tensors)
    del tensors["layers.2.ffn.gate.bias"]


PADDED_ERRORS: list[tuple[str, Any, dict]] = [
    ("layer 1 is said to keep 4 of 7 experts, but its router and bias do not tell which", alive, {}),
    ("layer 1 is said to keep 4 of 7 experts", not_a_number, {}),
    ("layer 2 is said to keep 2 of 7 experts", barred, {"keep_count": [7, 4, 2]}),
    ("layer 1 has slots of pruned experts, but not what tells them apart", barred, {"keep_count": None}),
    ("layer 1 has slots of pruned experts, but not what tells them apart", barred, {"keep_count": [7, 0, 3]}),
    ("layer 1 has slots of pruned experts, but not what tells them apart", barred, {"keep_count": [7, 8, 3]}),
    ("layer 2 has slots of pruned experts, but not what tells them apart", no_bias, {}),
    ("layer 0 has slots of pruned experts, but not what tells them apart", barred, {"policy": [2, 2, 2]}),
]


@pytest.mark.parametrize(
    ("problem", "change", "changes"), PADDED_ERRORS, ids=[str(n) for n in range(len(PADDED_ERRORS))]
)
def test_padded_that_does_not_tell(tmp_path: Path, problem: str, change: Any, changes: dict) -> None:
    tensors = whole()
    change(tensors)
    with pytest.raises(Ds4Error) as error:
        opened(tmp_path, tensors, layout="ds4-padded-v1", **changes)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_padded_stacks_that_disagree(tmp_path: Path) -> None:
    tensors = whole()
    barred(tensors)
    del tensors["layers.1.ffn.experts.6.w2.weight"]
    with pytest.raises(Ds4Error, match=r"ffn_gate_inp.* and .*ffn_down_exps\.weight' disagree: they are for 7 and 6"):
        opened(tmp_path, tensors, layout="ds4-padded-v1")


METADATA_ERRORS = [
    ("reap.layout must be 'ds4-compact-v1' or 'ds4-padded-v1', not None", {"layout": None}),
    ("reap.layout must be 'ds4-compact-v1' or 'ds4-padded-v1', not 'v2'", {"layout": "v2"}),
    ("reap.layout must be", {"layout": [1]}),
    ("reap.layer.policy has the unknown entry 4", {"policy": [0, 4, 0]}),
    ("reap.layer.policy has 2 entries for 3 layers", {"policy": [1, 2]}),
    ("reap.layer.keep_count has 1 entries for 3 layers", {"keep_count": [7]}),
    ("reap.layer.keep_count must be a list of small integers, not 7", {"keep_count": 7}),
    ("reap.layer.policy must be a list of small integers", {"policy": ["a"]}),
    ("reap.layer.expert_count must be a list of small integers", {"expert_count": [-1]}),
    ("layer 2 has all experts disabled (reap.layer.policy 3), which ds4 does not support", {"policy": [1, 2, 3]}),
    ("layer 1 has 4 experts, but reap.layer.keep_count says 5", {"keep_count": [7, 5, 3]}),
]


@pytest.mark.parametrize(("problem", "changes"), METADATA_ERRORS, ids=[problem for problem, _ in METADATA_ERRORS])
def test_metadata_errors(tmp_path: Path, problem: str, changes: dict) -> None:
    with pytest.raises(Ds4Error) as error:
        opened(tmp_path, pruned(whole()), **changes)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_layer_of_nothing(tmp_path: Path) -> None:
    tensors = {"blk.2.ffn_gate_inp.weight": (0, (0, 64), b"")}
    path = write(tmp_path / "a.gguf", gguf_with(keys(policy=[1, 2, 3]), tensors))
    with pytest.raises(Ds4Error, match=r"empty dimension: \[0, 64\]; layers without experts .* are not supported"):
        open_checkpoint(path)


def test_disabled_reap_is_ignored(tmp_path: Path) -> None:
    ckpt = opened(tmp_path, whole(), enabled=False, layout="v2", policy="x")
    assert ckpt.reap is None


def test_safetensors(tmp_path: Path, reference: torch.Tensor) -> None:
    """A different number in each layer; config.json states the largest."""
    save_file({name: values.contiguous() for name, values in pruned(whole()).items()}, tmp_path / "model.safetensors")
    settings = small_json(n_routed_experts=E, num_nextn_predict_layers=0)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    ckpt = open_checkpoint(tmp_path)
    assert ckpt.reap == Reap("compact", E, (7, 4, 3))
    assert close(logits(ckpt), reference)
    (tmp_path / "config.json").write_text(json.dumps(settings | {"n_routed_experts": 6}))
    with pytest.raises(Ds4Error, match=r"'layers\.0\.ffn\.gate\.weight' is for 7 experts, but the model has 6"):
        open_checkpoint(tmp_path)


def test_safetensors_that_disagree(tmp_path: Path) -> None:
    tensors = pruned(whole())
    tensors["layers.1.ffn.experts.4.w1.weight"] = tensors["layers.1.ffn.experts.3.w1.weight"].clone()
    save_file({name: values.contiguous() for name, values in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(small_json(n_routed_experts=E, num_nextn_predict_layers=0)))
    with pytest.raises(Ds4Error, match=r"'layers\.1\.ffn\.experts\.4\.w1\.weight' disagree: they are for 4 and 5"):
        open_checkpoint(tmp_path)


def test_names() -> None:
    assert Reap("compact", 256, (256, 256, 256, *[150] * 40)).name == "REAP-K150"
    assert Reap("compact", 256, (160,) * 43).name == "REAP-K160"
    assert Reap("padded", 256, (256, 128, 180, 150)).name == "REAP-K128-180"


def test_flash_with_fewer_experts_in_its_config(tmp_path: Path) -> None:
    """A pruned V4-Flash may state the pruned count only; nothing but its dimensions tells."""
    changes = {"deepseek4.expert_count": 160, "deepseek4.embedding_length": 4096, "deepseek4.block_count": 43}
    changes |= {"deepseek4.attention.compress_ratios": [0] * 46, "deepseek4.swiglu_clamp_exp": 10.0}
    router = {"blk.7.ffn_gate_inp.weight": (0, (160, 64), bytes(160 * 64 * 4))}
    ckpt = open_checkpoint(write(tmp_path / "a.gguf", gguf_with(small_keys() | changes, router)))
    assert ckpt.reap == Reap("compact", 256, (160,) * 43)
