"""identify(): every release by what can be in its files, the weak clues and the contradictory ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from weights.builders import gguf_bytes, small_json, small_keys, write

from ds4.weights import Checkpoint, open_checkpoint
from ds4.weights.generation import UNKNOWN, Clue, identify, judge, name_clues

F32 = 0
RATIOS = [0, 0] + [4, 128] * 20 + [4]
DSPARK = {
    "dspark_block_size": 5,
    "dspark_markov_rank": 256,
    "dspark_noise_token_id": 31,
    "dspark_target_layer_ids": [40, 41, 42],
}


def flash(path: Path, tensors: list[str] | None = None, experts: int | list[int] = 256, **keys: Any) -> Checkpoint:
    """A GGUF file of Flash's hidden size and layers, with routers and these tensors (of 32 values)."""
    model: dict[str, Any] = {"block_count": 43, "embedding_length": 4096, "attention.compress_ratios": RATIOS}
    model |= {"expert_count": 256, "expert_used_count": 6, "hash_layer_count": 3, "swiglu_clamp_exp": [10.0] * 43}
    counts = [experts] * 43 if isinstance(experts, int) else experts
    entries, offset = [], 0
    for name in tensors or []:
        entries.append((name, (32,), F32, offset))
        offset += 128
    for layer, count in enumerate(counts):
        entries.append((f"blk.{layer}.ffn_gate_inp.weight", (32, count), F32, offset))
        offset += 128 * count
    metadata = small_keys() | {f"deepseek4.{key}": value for key, value in model.items()} | keys
    return open_checkpoint(write(path, gguf_bytes(metadata, entries, offset)))


def config_only(path: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> Checkpoint:
    """A safetensors directory of Flash's hidden size and layers."""
    path.mkdir(parents=True)
    flash_fields = {"hidden_size": 4096, "num_hidden_layers": 43, "compress_ratios": RATIOS, "num_hash_layers": 3}
    flash_fields |= {"n_routed_experts": 256, "num_experts_per_tok": 6}
    (path / "config.json").write_text(json.dumps(small_json(**flash_fields | changes)))
    save_file({"norm.weight": torch.ones(4096)} | (tensors or {}), path / "model.safetensors")
    return open_checkpoint(path)


def test_nothing_tells(tmp_path: Path) -> None:
    found = identify(flash(tmp_path / "a.gguf"))
    assert found.name == f"V4-Flash ({UNKNOWN})"
    assert found.evidence == ("preview or 0731: nothing in the file tells",)
    assert (found.release, found.pruned) == (None, None)


@pytest.mark.parametrize(
    ("name", "release", "evidence"),
    [
        ("DeepSeek-V4-Flash-Q2-imatrix-0731", "0731", "the file is called"),
        ("DeepseekV4-Flash-20260731-MXFP4", "0731", "the file is called"),
        ("V4-Flash-Base-Q4", "Base", "the file is called"),
        ("DeepSeek-V4-Flash-Vision-Exp-Q2_K", "Vision-Exp", "the file is called"),
        ("v4-flash-preview", "preview", "the file is called"),
        ("DeepSeek-V4-Flash-Q2", None, UNKNOWN),
    ],
)
def test_file_names(tmp_path: Path, name: str, release: str | None, evidence: str) -> None:
    found = identify(flash(tmp_path / f"{name}.gguf"))
    assert found.release == release
    assert found.evidence[0].startswith(evidence)
    assert found.name == (f"V4-Flash {release}" if release else f"V4-Flash ({UNKNOWN})")


@pytest.mark.parametrize(
    ("key", "value", "release"),
    [
        ("general.name", "DeepSeek V4 Flash 0731", "0731"),
        ("general.version", "0731", "0731"),
        ("general.base_model.0.repo_url", "https://huggingface.co/deepseek-ai/DeepSeek-V4-Flash", "preview"),
        ("general.base_model.0.repo_url", "https://huggingface.co/deepseek-ai/DeepSeek-V4-Flash-DSpark/", "preview"),
        ("general.base_model.0.repo_url", "https://huggingface.co/deepseek-ai/DeepSeek-V4-Flash-0731", "0731"),
        ("general.base_model.0.repo_url", "https://huggingface.co/someone/DeepSeek-V4-Flash", None),
        ("general.description", "not the 0731 weights", None),
        ("tokenizer.chat_template", "{{ 'Reasoning Effort: Beyond maximum' }}", "0731"),
        ("deepseek4.attention.compress_ratios", [*RATIOS, 0], "preview"),
        ("deepseek4.attention.compress_ratios", [*RATIOS, 0, 0, 0], "0731"),
        ("deepseek4.attention.compress_ratios", [*RATIOS, 0, 0], None),
    ],
)
def test_metadata(tmp_path: Path, key: str, value: Any, release: str | None) -> None:
    assert identify(flash(tmp_path / "a.gguf", **{key: value})).release == release


def test_draft_head_in_the_file(tmp_path: Path) -> None:
    found = identify(flash(tmp_path / "a.gguf", ["mtp.0.e_proj.weight"]))
    assert found.name == "V4-Flash preview"
    assert found.evidence == ("has an MTP draft head",)
    dspark = {"mtp.0.main_proj.weight": torch.ones(2, 6)}
    found = identify(config_only(tmp_path / "b", dspark, **DSPARK, compress_ratios=[*RATIOS, 0, 0, 0]))
    assert found.name == "V4-Flash 0731"
    assert "the DSpark release of the preview looks the same" in found.evidence[0]
    assert found.evidence[1] == "compress_ratios has 46 entries, 3 of them for draft stages"


def test_base_has_an_mtp_head_too(tmp_path: Path) -> None:
    found = identify(flash(tmp_path / "V4-Flash-Base-Q8_0.gguf", ["mtp.0.e_proj.weight"]))
    assert found.name == "V4-Flash Base"
    assert found.evidence[-1] == "but has an MTP draft head, as in preview"


def test_draft_settings_without_a_head(tmp_path: Path) -> None:
    found = identify(config_only(tmp_path / "a", **DSPARK))
    assert found.release == "0731"
    assert found.evidence[0].startswith("has dspark_* settings")


def test_a_name_outweighs_a_dspark_head(tmp_path: Path) -> None:
    """The DSpark release of the preview has the tensors and settings of 0731."""
    cache = tmp_path / "models--deepseek-ai--DeepSeek-V4-Flash-DSpark" / "snapshots" / "0123abcd"
    found = identify(config_only(cache, {"mtp.0.main_proj.weight": torch.ones(2, 6)}, **DSPARK))
    assert found.name == "V4-Flash preview"
    assert found.evidence[0] == "the file is called 'models--deepseek-ai--DeepSeek-V4-Flash-DSpark'"
    assert found.evidence[1].startswith("but has a DSpark draft head")
    assert found.evidence[1].endswith("as in 0731")


def test_vision(tmp_path: Path) -> None:
    assert identify(config_only(tmp_path / "a", vision_n_layers=32, **DSPARK)).name == "V4-Flash Vision-Exp"
    found = identify(flash(tmp_path / "b.gguf", ["blk.3.exp_probs_b_vl.bias"]))
    assert found.name == "V4-Flash Vision-Exp"
    assert found.evidence == ("blk.3.exp_probs_b_vl.bias is there",)


@pytest.mark.parametrize(("scale", "release"), [(torch.float32, "Base"), (torch.float8_e8m0fnu, None)])
def test_fp8_experts(tmp_path: Path, scale: torch.dtype, release: str | None) -> None:
    """Base and the FP8 recast of the instruct model differ in the dtype of the scales."""
    expert = "layers.0.ffn.experts.0.w1"
    weights = {f"{expert}.weight": torch.ones(64, 4096).to(torch.float8_e4m3fn)}
    weights[f"{expert}.scale"] = torch.ones(1, 32).to(scale)
    found = identify(config_only(tmp_path / "a", weights))
    assert found.release == release
    if release:
        assert found.name == "V4-Flash Base"


def test_pruned(tmp_path: Path) -> None:
    found = identify(flash(tmp_path / "a.gguf", experts=[256] * 3 + [150] * 40))
    assert (found.name, found.release, found.pruned) == ("V4-Flash REAP-K150", None, "REAP-K150")
    assert found.evidence == (UNKNOWN, "40 of 43 layers have fewer than 256 experts")
    found = identify(config_only(tmp_path / "DeepSeek-V4-Flash-0731-REAP", n_routed_experts=160, **DSPARK))
    assert found.name == "V4-Flash 0731 REAP-K160"
    assert identify(flash(tmp_path / "c.gguf", experts=256)).pruned is None


def test_other_dimensions(tmp_path: Path) -> None:
    tensors = [("mtp.0.e_proj.weight", (32,), F32, 0)]
    found = identify(open_checkpoint(write(tmp_path / "a.gguf", gguf_bytes(small_keys(), tensors, 128))))
    assert found.name == "demo (not V4-Flash dimensions)"
    assert found.release == "preview"
    assert found.evidence[0] == "hidden size 64, 3 layers"


def test_contradictions_are_told(tmp_path: Path) -> None:
    found = identify(flash(tmp_path / "V4-0731.gguf", ["mtp.0.e_proj.weight"]))
    assert found.release == "preview"
    assert found.evidence[-1] == "but the file is called 'V4-0731.gguf', as in 0731"
    assert str(found).startswith("V4-Flash preview (has an MTP draft head")


def test_judge() -> None:
    assert judge([]) == (None, ())
    clues = [Clue("a", "0731"), Clue("b", "preview"), Clue("c", "0731")]
    assert judge(clues) == ("0731", ("a", "c", "but b, as in preview"))


def test_name_of_the_directory(tmp_path: Path) -> None:
    """The directory speaks for the safetensors in it, but not for a GGUF, and not the one above a directory."""
    directory = tmp_path / "V4-Flash-0731"
    directory.mkdir()
    file = write(directory / "model.safetensors", b"x")
    inner = directory / "quantised"
    inner.mkdir()
    assert [clue.release for clue in name_clues(file, {}, with_parent=True)] == ["0731"]
    assert [clue.release for clue in name_clues(directory, {}, with_parent=True)] == ["0731"]
    assert name_clues(file, {}, with_parent=False) == []
    assert name_clues(inner, {}, with_parent=True) == []


def test_golden_checkpoints(golden: Path) -> None:
    names = {name: identify(open_checkpoint(golden / name)) for name in ("tiny", "mtp", "dspark")}
    assert {found.name for found in names.values()} == {"demo (not V4-Flash dimensions)"}
    assert [found.release for found in names.values()] == ["preview", "preview", "0731"]
