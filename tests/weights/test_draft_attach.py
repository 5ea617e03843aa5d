"""Draft heads and trunks: only fitting ones go together, and then the head runs as if it were in the trunk's file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from weights.builders import gguf_bytes, random_tensors, write
from weights.draft_files import (
    BLOCK,
    CONFIG,
    KINDS,
    by_expert,
    file_names,
    pack,
    random_head,
    refused,
    side_file,
    trunk,
    wide_config,
    write_side_file,
)

from ds4.demo import bundled_model_path
from ds4.kernels.numerics import resolve
from ds4.model.transformer import Transformer
from ds4.mtp.mtp_block import MTPBlock
from ds4.weights import Checkpoint, open_checkpoint
from ds4.weights.draft import DraftHead, attach_draft, open_draft
from ds4.weights.generation import identify


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return trunk(tmp_path_factory.mktemp("bare") / "trunk")


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DraftHead]:
    directory = tmp_path_factory.mktemp("heads")
    return {dialect: open_draft(side_file(directory / f"{dialect}.gguf", dialect)) for dialect in KINDS}


def test_attaching(bare: Checkpoint, heads: dict[str, DraftHead]) -> None:
    ckpt = attach_draft(bare, heads["dspark"])
    assert (ckpt.config.n_mtp_layers, ckpt.config.dspark_block_size) == (3, BLOCK)
    assert ckpt.draft_path == heads["dspark"].path
    assert ckpt.total_bytes == bare.total_bytes + sum(tensor.nbytes for tensor in heads["dspark"].stored)
    assert (bare.config.n_mtp_layers, bare.draft_path, bare.warnings) == (0, None, ())
    assert not any(name.startswith("mtp.") for name in bare.names())
    for name in bare.names():
        assert torch.equal(ckpt.tensor(name).data, bare.tensor(name).data)


def test_an_attached_head_is_no_clue_to_the_trunk(bare: Checkpoint, heads: dict[str, DraftHead]) -> None:
    for dialect in ("antirez", "dspark"):
        assert identify(attach_draft(bare, heads[dialect])).release is None


def test_replacing(bare: Checkpoint, heads: dict[str, DraftHead]) -> None:
    first = attach_draft(bare, heads["dspark"])
    refused(
        lambda: attach_draft(first, heads["antirez"]), str(bare.path), "has a draft head already", "was not asked for"
    )
    second = attach_draft(first, heads["antirez"], replace=True)
    assert second.config.n_mtp_layers == 1
    assert (second.config.dspark_block_size, second.config.dspark_target_layer_ids) == (None, ())
    assert second.names() == attach_draft(bare, heads["antirez"]).names()
    assert second.total_bytes == bare.total_bytes + sum(tensor.nbytes for tensor in heads["antirez"].stored)


def test_open_checkpoint_with_a_draft(tmp_path: Path, bare: Checkpoint) -> None:
    path = side_file(tmp_path / "a.gguf", "antirez")
    ckpt = open_checkpoint(bare.path, draft=path)
    assert ckpt.draft_path == path
    with_own = trunk(
        tmp_path / "own", random_tensors(wide_config(num_nextn_predict_layers=1, compress_ratios=[0, 4, 8, 0]))
    )
    refused(lambda: open_checkpoint(with_own.path, draft=path), "has a draft head already")
    assert open_checkpoint(with_own.path, draft=path, replace_draft=True).draft_path == path


@pytest.mark.parametrize(
    ("dialect", "changes", "parts"),
    [
        ("antirez", {"head_dim": 192}, ["needs", "belongs to another model"]),
        ("antirez", {"hc_mult": 2}, ["mtp.0.hc_attn_fn has shape [24, 1024]", "needs [8, 512]"]),
        ("dspark", {"hidden_size": 128}, ["needs", "belongs to another model"]),
        ("dspark", {"vocab_size": 64}, ["markov_w1.weight has shape [32, 32]", "needs [64, 32]"]),
        ("dspark", {"vocab_size": 16}, ["dspark_noise_token_id = 31 is not below vocab_size = 16"]),
        ("dspark", {"num_hidden_layers": 2}, ["dspark_target_layer_ids = (0, 1, 2) names a layer outside 0..1"]),
        ("antirez", {"num_experts_per_tok": 4, "n_routed_experts": 8}, ["stage 0 has [3] experts", "takes 4"]),
    ],
)
def test_heads_of_other_models(
    tmp_path: Path, heads: dict[str, DraftHead], dialect: str, changes: dict[str, Any], parts: list[str]
) -> None:
    other = trunk(tmp_path / "trunk", {"norm.weight": torch.ones(256)}, **changes)
    refused(lambda: attach_draft(other, heads[dialect]), str(heads[dialect].path), *parts)


def test_defaults_that_do_not_fit(tmp_path: Path, bare: Checkpoint) -> None:
    """The released noise token is in no small vocabulary."""
    head = random_head(CONFIG, "dspark")
    path = write_side_file(tmp_path / "a.gguf", file_names("dspark", head))
    refused(lambda: attach_draft(bare, open_draft(path)), str(path), "dspark_noise_token_id = 128799")


HC = (("fn", (16384, 24)), ("base", (24,)), ("scale", (3,)))
FLASH = {
    "vocab_size": 129280,
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "head_dim": 512,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "compress_ratios": [0, 0] + [4, 128] * 20 + [4],
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
}
PREVIEW = {"compress_ratios": [0, 4, 8, 0]}
NEWER = {"compress_ratios": [0, 4, 8, 0, 0, 0]}


def test_an_mtp_head_is_refused_by_0731(tmp_path: Path, heads: dict[str, DraftHead]) -> None:
    newer = trunk(tmp_path / "trunk", **NEWER)
    for dialect in ("antirez", "nextn"):
        message = refused(
            lambda dialect=dialect: attach_draft(newer, heads[dialect]), "is for V4-Flash preview (an MTP"
        )
        assert "as only the preview has" in message
        assert "compress_ratios has 6 entries, 3 of them for draft stages" in message
        assert message.index(str(heads[dialect].path)) < message.index(str(newer.path))


def test_an_mtp_head_is_refused_by_a_pruned_model(tmp_path: Path, heads: dict[str, DraftHead]) -> None:
    """Even by a pruned preview."""
    tensors = random_tensors(CONFIG)
    for name in [n for n in tensors if n.startswith("layers.1.ffn.experts.2.")]:
        del tensors[name]
    for name in ("layers.1.ffn.gate.weight", "layers.1.ffn.gate.bias"):
        tensors[name] = tensors[name][:2].clone()
    pruned = trunk(tmp_path / "trunk", tensors, **PREVIEW)
    refused(lambda: attach_draft(pruned, heads["antirez"]), "does not match a pruned model", "fewer than 3 experts")
    ckpt = attach_draft(pruned, heads["dspark"])
    assert "was made for more experts" in ckpt.warnings[-1]


def test_a_dspark_head_of_0731_is_refused_by_the_preview(tmp_path: Path) -> None:
    preview = trunk(tmp_path / "trunk", **PREVIEW)
    for path in (
        side_file(tmp_path / "V4-Flash-0731-DSpark.gguf", "dspark"),
        side_file(tmp_path / "a.gguf", "legacy", **{"general.source.url": "deepseek-ai/DeepSeek-V4-Flash-0731"}),
    ):
        message = refused(lambda path=path: attach_draft(preview, open_draft(path)), "is for V4-Flash 0731 (")
        assert "1 of them for draft stages" in message


def test_matching_pairs_have_no_warnings(tmp_path: Path, heads: dict[str, DraftHead]) -> None:
    preview, newer = trunk(tmp_path / "a", **PREVIEW), trunk(tmp_path / "b", **NEWER)
    assert attach_draft(preview, heads["antirez"]).warnings == ()
    path = side_file(tmp_path / "V4-Flash-0731-DSpark.gguf", "dspark")
    assert attach_draft(newer, open_draft(path)).warnings == ()


def test_what_cannot_be_told_is_a_warning(tmp_path: Path, bare: Checkpoint, heads: dict[str, DraftHead]) -> None:
    """A trunk without clues takes any head; a DSpark head without clues goes with any trunk: both kinds had one."""
    preview, newer = trunk(tmp_path / "a", **PREVIEW), trunk(tmp_path / "b", **NEWER)
    for ckpt, dialect in ((bare, "antirez"), (bare, "dspark"), (preview, "dspark"), (newer, "dspark")):
        (warning,) = attach_draft(ckpt, heads[dialect]).warnings
        assert "\n" not in warning
        assert str(heads[dialect].path) in warning
        assert str(ckpt.path) in warning
        assert "few drafts will be accepted" in warning


def test_the_released_dimensions(tmp_path: Path) -> None:
    """A file of nothing but a header with the dimensions of spec weights.md 1.1 and 3.4, and a trunk's config.json: the
    default settings fit, and opening reads headers alone."""
    block = {"attn_q_a": (4096, 1024), "attn_q_b": (1024, 32768), "attn_kv": (4096, 512), "attn_q_a_norm": (1024,)}
    block |= {"attn_output_a": (4096, 1024, 8), "attn_output_b": (8192, 4096), "attn_kv_a_norm": (512,)}
    block |= {"attn_sinks": (64,), "attn_norm": (4096,), "ffn_norm": (4096,), "ffn_gate_inp": (4096, 256)}
    block |= {f"hc_{part}_{name}": dims for part in ("attn", "ffn") for name, dims in HC}
    block |= {"ffn_gate_shexp": (4096, 2048), "ffn_up_shexp": (4096, 2048), "ffn_down_shexp": (2048, 4096)}
    names = {f"dspark.{stage}.{suffix}.weight": dims for stage in range(3) for suffix, dims in block.items()}
    experts = {"gate": (4096, 2048, 256), "up": (4096, 2048, 256), "down": (2048, 4096, 256)}
    names |= {f"dspark.{s}.ffn_{part}_exps.weight": dims for s in range(3) for part, dims in experts.items()}
    names |= {f"dspark.{stage}.exp_probs_b.bias": (256,) for stage in range(3)}
    names |= {"dspark.main_proj.weight": (12288, 4096), "dspark.main_norm.weight": (4096,)}
    names |= {"dspark.norm.weight": (4096,), "dspark.hc_head_fn.weight": (16384, 4), "dspark.hc_head_base.weight": (4,)}
    names |= {"dspark.hc_head_scale.weight": (1,), "dspark.conf_proj.weight": (4352, 1)}
    names |= {f"dspark.markov_{w}.weight": (256, 129280) for w in ("w1", "w2")}
    assert len(names) == 81
    entries, offset = [], 0
    for name, dims in names.items():
        bits, kind = (66, 16) if "_exps" in name else (1024, 0)  # of 256 weights, iq2_xxs and f32
        entries.append((name, dims, kind, offset))
        offset += -(-math.prod(dims) * bits // 256 // 32) * 32
    path = write(tmp_path / "a.gguf", gguf_bytes({}, entries, 0))
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + offset)
    ckpt = attach_draft(trunk(tmp_path / "trunk", {"norm.weight": torch.ones(4096)}, **FLASH), open_draft(path))
    assert ckpt.config.dspark_target_layer_ids == (40, 41, 42)
    assert (ckpt.config.dspark_block_size, ckpt.config.dspark_noise_token_id) == (5, 128799)
    assert ckpt.n_experts("mtp.2") == 256


@pytest.mark.parametrize("dialect", ["antirez", "nextn"])
def test_the_mtp_block_runs_alike(tmp_path: Path, dialect: str) -> None:
    """A side file's head drafts what it drafts inside the trunk's file, bit for bit."""
    head = random_head(CONFIG, "mtp", seed=3, fmt="F32")
    inside = {name: torch.from_numpy(values.copy()) for name, values in by_expert(head).items()}
    whole = trunk(tmp_path / "whole", random_tensors(CONFIG) | inside, **PREVIEW)
    path = side_file(tmp_path / "head.gguf", dialect, head)
    pair = attach_draft(trunk(tmp_path / "bare", **PREVIEW), open_draft(path))
    assert pair.config == whole.config
    generator = torch.Generator().manual_seed(1)
    streams, ids = torch.randn(32, 4, 256, generator=generator), torch.randint(0, 32, (32,), generator=generator)
    logits = []
    for ckpt in (whole, pair):
        with torch.inference_mode():
            block = MTPBlock(ckpt.config, ckpt, Transformer(ckpt.config, ckpt, resolve("exact")))
            logits.append(block.forward_text(streams, ids))
    assert logits[0].isfinite().all()
    assert logits[0].std() > 0
    assert torch.equal(*logits)


def test_a_format_that_a_name_rules_out(tmp_path: Path, bare: Checkpoint) -> None:
    head = random_head(CONFIG, "mtp")
    head["mtp.0.norm.weight"] = pack("Q8_0", (256,), np.random.default_rng(0))
    path = side_file(tmp_path / "a.gguf", "antirez", head)
    refused(
        lambda: open_checkpoint(bare.path, path), f"{path} does not go with {bare.path}", "mtp.0.norm.weight", "q8_0"
    )


def test_the_bundled_head() -> None:
    """A head inside a trunk's GGUF, whose stream collapse is the trunk's: the same tensors as there."""
    ckpt = open_checkpoint(bundled_model_path())
    again = attach_draft(ckpt, open_draft(bundled_model_path()), replace=True)
    assert again.config == ckpt.config
    assert again.warnings == ()
    assert sorted(again.names()) == sorted(ckpt.names())
    for name in ckpt.names():
        assert torch.equal(again.tensor(name).data, ckpt.tensor(name).data)


def test_golden_heads_fit_the_other_trunk(golden: Path) -> None:
    """The two golden trunks have the same dimensions, and configurations of different releases."""
    mtp, dspark = open_checkpoint(golden / "mtp"), open_checkpoint(golden / "dspark")
    refused(lambda: attach_draft(dspark, open_draft(golden / "mtp"), replace=True), "is for V4-Flash preview (an MTP")
    refused(lambda: attach_draft(mtp, open_draft(golden / "dspark")), "has a draft head already")
