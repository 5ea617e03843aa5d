"""Draft heads in side files: every dialect holds the same tensors, bit for bit; incomplete heads are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from weights.builders import small_keys
from weights.draft_files import (
    BLOCK,
    CONFIG,
    KEYS,
    KINDS,
    NOISE,
    RANK,
    TARGETS,
    Packed,
    by_expert,
    file_names,
    head_shapes,
    is_projection,
    plain,
    random_head,
    refused,
    side_file,
    trunk,
    write_side_file,
)

from ds4.config import ModelConfig
from ds4.weights import Checkpoint, open_checkpoint
from ds4.weights.draft import DraftHead, attach_draft, open_draft

SETTINGS = {key.removeprefix("dspark."): value for key, value in KEYS["legacy"].items()}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return trunk(tmp_path_factory.mktemp("bare") / "trunk")


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DraftHead]:
    directory = tmp_path_factory.mktemp("heads")
    return {dialect: open_draft(side_file(directory / f"{dialect}.gguf", dialect)) for dialect in KINDS}


@pytest.mark.parametrize("dialect", KINDS)
def test_every_tensor_of_every_dialect(bare: Checkpoint, heads: dict[str, DraftHead], dialect: str) -> None:
    """Names, shapes and values; the values come from the gguf package's own decoder and must be the same floats."""
    head, source = heads[dialect], random_head(CONFIG, KINDS[dialect])
    ckpt = attach_draft(bare, head)
    expected = by_expert(source)
    assert {name for name in ckpt.names() if name.startswith("mtp.")} == set(expected) == set(head.shapes())
    for name, values in expected.items():
        tensor = ckpt.expect(name, values.shape)
        assert torch.equal(tensor.dequantize(), torch.from_numpy(values)), name
    formats = {ckpt.stored_as(name)[0] for name in expected}
    assert formats >= {"f32", "q8_0", "bf16", "iq2_xxs", "q4_k"}
    assert (head.kind, head.stages) == (KINDS[dialect], 3 if head.kind == "dspark" else 1)
    assert sum(t.nbytes for t in head.stored) == sum(
        p.data.nbytes + (0 if p.multipliers is None else p.multipliers.nbytes) for p in source.values()
    )


@pytest.mark.parametrize("dialect", ["dspark", "legacy", "dflash"])
def test_dspark_has_81_tensors_and_its_settings(tmp_path: Path, heads: dict[str, DraftHead], dialect: str) -> None:
    path = side_file(tmp_path / "a.gguf", dialect, random_head(CONFIG, "dspark", fmt="F32"))
    assert len(gguf.GGUFReader(path).tensors) == 81 == len(open_draft(path).stored)
    parameters = heads[dialect].parameters
    assert parameters is not None
    assert vars(parameters) == {
        "block_size": BLOCK,
        "markov_rank": RANK,
        "noise_token_id": NOISE,
        "target_layer_ids": TARGETS,
    }


@pytest.mark.parametrize("dialect", KINDS)
def test_the_architecture_does_not_matter(tmp_path: Path, dialect: str) -> None:
    path = side_file(tmp_path / "a.gguf", dialect, architecture="deepseek4-dspark")
    assert open_draft(path).kind == KINDS[dialect]


def official_head(
    config: ModelConfig, kind: str, seed: int = 0
) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
    """A head in the official formats: tensors to save, and canonical name -> values (FP8 tiles, MXFP4, BF16, F32)."""
    rng = np.random.default_rng(seed)
    files: dict[str, torch.Tensor] = {}
    values: dict[str, np.ndarray] = {}
    codes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    for stacked, shape in head_shapes(config, kind).items():
        for expert in range(shape[0]) if "*" in stacked else [0]:
            name, base = stacked.replace("*", str(expert)), stacked.replace("*", str(expert)).removesuffix("weight")
            if "*" in stacked:
                rows, columns = shape[1:]
                raw = rng.integers(0, 256, (rows, columns // 2), dtype=np.uint8)
                scale = rng.integers(118, 128, (rows, columns // 32), dtype=np.uint8)
                files[name] = torch.from_numpy(raw.view(np.int8))
                files[base + "scale"] = torch.from_numpy(scale).view(torch.float8_e8m0fnu)
                both = np.stack([codes[raw & 15], codes[raw >> 4]], axis=-1).reshape(rows, columns)
                values[name] = both * np.repeat(np.exp2(scale.astype(np.float32) - 127), 32, axis=1)
            elif is_projection(name) or ".shared_experts." in name:
                weight = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(torch.float8_e4m3fn)
                grid = tuple(-(-n // 128) for n in shape)
                scale = rng.integers(118, 128, grid, dtype=np.uint8)
                files[name], files[base + "scale"] = weight, torch.from_numpy(scale).view(torch.float8_e8m0fnu)
                wide = np.kron(np.exp2(scale.astype(np.float32) - 127), np.ones((128, 128), np.float32))
                values[name] = weight.float().numpy() * wide[: shape[0], : shape[1]]
            else:
                dtype = torch.bfloat16 if name.endswith("norm.weight") or ".markov_" in name else torch.float32
                files[name] = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(dtype)
                values[name] = files[name].float().numpy()
    return files, values


@pytest.mark.parametrize("kind", ["mtp", "dspark"])
def test_safetensors(tmp_path: Path, bare: Checkpoint, kind: str) -> None:
    """Official formats; only ``mtp.*``, then also a trunk beside it in shards."""
    files, expected = official_head(CONFIG, kind)
    settings = {f"dspark_{key}": value for key, value in SETTINGS.items() if key in ("block_size", "markov_rank")}
    settings |= {"dspark_noise_token_id": NOISE, "dspark_target_layer_ids": list(TARGETS)}
    (tmp_path / "config.json").write_text(json.dumps(settings if kind == "dspark" else {}))
    save_file(files, tmp_path / "head.safetensors")
    ckpt = attach_draft(bare, open_draft(tmp_path / "head.safetensors"))
    assert {name for name in ckpt.names() if name.startswith("mtp.")} == set(expected)
    for name, values in expected.items():
        assert torch.equal(ckpt.expect(name, values.shape).dequantize(), torch.from_numpy(values)), name
    assert ckpt.config.dspark_target_layer_ids == (TARGETS if kind == "dspark" else ())
    save_file({"norm.weight": torch.ones(256)}, tmp_path / "trunk.safetensors")
    index = dict.fromkeys(files, "head.safetensors") | {"norm.weight": "trunk.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    again = open_draft(tmp_path)
    assert again.shapes() == {name: values.shape for name, values in expected.items()}
    assert {tensor.file.path.name for tensor in again.stored} == {"head.safetensors"}


def test_safetensors_without_a_config(tmp_path: Path) -> None:
    files, _ = official_head(CONFIG, "dspark")
    save_file(files, tmp_path / "head.safetensors")
    parameters = open_draft(tmp_path / "head.safetensors").parameters
    assert parameters is not None
    assert (parameters.block_size, parameters.noise_token_id) == (5, 128799)
    assert parameters.target_layer_ids == (40, 41, 42)
    assert parameters.markov_rank == RANK


def test_a_directory_with_one_gguf(tmp_path: Path) -> None:
    side_file(tmp_path / "a.gguf", "antirez")
    assert open_draft(tmp_path).kind == "mtp"
    side_file(tmp_path / "b.gguf", "dspark")
    refused(lambda: open_draft(tmp_path), str(tmp_path), "holds 2 GGUF files")


def test_dspark_merged_into_the_trunk(tmp_path: Path) -> None:
    """``dspark.*`` and ``mtp.*`` beside the trunk's own names, which dflash's would collide with."""
    head = random_head(CONFIG, "dspark")
    keys = small_keys() | {"deepseek4.embedding_length": 256, "deepseek4.expert_feed_forward_length": 256}
    keys.pop("general.architecture")
    for dialect in ("dspark", "legacy"):
        tensors = {"token_embd.weight": plain(32, 256), "output_hc_base.weight": plain(4)}
        tensors |= {"blk.0.attn_norm.weight": plain(256)} | dict(file_names(dialect, head))
        path = write_side_file(tmp_path / f"{dialect}.gguf", tensors, keys | KEYS[dialect])
        ckpt = open_checkpoint(path)
        for name, values in by_expert(head).items():
            assert torch.equal(ckpt.expect(name, values.shape).dequantize(), torch.from_numpy(values)), name
        assert {"embed.weight", "hc_head_base", "layers.0.attn_norm.weight"} < set(ckpt.names())
        c = ckpt.config
        assert (c.n_mtp_layers, c.dspark_block_size, c.dspark_markov_rank) == (3, BLOCK, RANK)
        assert (c.dspark_noise_token_id, c.dspark_target_layer_ids) == (NOISE, TARGETS)
        assert open_draft(path).shapes() == {name: values.shape for name, values in by_expert(head).items()}


SPELLINGS = [
    {"deepseek4.dspark_block_size": 7, "deepseek4.dspark_noise_token_id": 3},
    {"dspark.layer_count": 3, "dspark.block_size": 7, "dspark.mask_token_id": 3},
    {"deepseek4-dspark.dspark.block_size": 7, "deepseek4-dspark.dspark.noise_token_id": 3},
]


@pytest.mark.parametrize("keys", SPELLINGS, ids=[next(iter(keys)) for keys in SPELLINGS])
def test_spellings_of_settings(tmp_path: Path, keys: dict[str, Any]) -> None:
    head = random_head(CONFIG, "dspark")
    parameters = open_draft(write_side_file(tmp_path / "a.gguf", file_names("dspark", head), keys)).parameters
    assert parameters is not None
    assert (parameters.block_size, parameters.noise_token_id) == (7, 3)
    assert parameters.target_layer_ids == (40, 41, 42)


def test_another_programs_mask_token_is_no_setting(tmp_path: Path) -> None:
    """Only the dflash dialect keeps the noise token there."""
    head = random_head(CONFIG, "dspark")
    keys = {"tokenizer.ggml.mask_token_id": 3}
    parameters = open_draft(write_side_file(tmp_path / "a.gguf", file_names("dspark", head), keys)).parameters
    assert parameters is not None
    assert parameters.noise_token_id == 128799


@pytest.mark.parametrize(
    ("dialect", "keys", "problem"),
    [
        ("dspark", {"deepseek4.dspark.layer_count": 2}, "layer_count is 2, but the file holds 3 DSpark stages"),
        ("dspark", {"deepseek4.dspark.markov_rank": 16}, "markov_rank is 16, but the file holds 32 DSpark Markov"),
        ("legacy", {"dspark.target_layer_ids": [1, 2]}, "has 2 layers of 256, but mtp.0.main_proj.weight has 768"),
        ("legacy", {"dspark.block_size": 0}, "dspark.block_size must be a positive integer, not 0"),
        ("legacy", {"dspark.block_size": "5"}, "dspark.block_size must be a positive integer, not '5'"),
        ("legacy", {"dspark.target_layer_ids": [0, 1, -2]}, "must be a list of layer numbers"),
        ("dflash", {"dflash.target_layers": [0, 1, 2]}, "must be a list of layer numbers"),
        ("legacy", {"deepseek4.dspark.block_size": 6}, "contradict each other"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, dialect: str, keys: dict[str, Any], problem: str) -> None:
    path = side_file(tmp_path / "a.gguf", dialect, **keys)
    refused(lambda: open_draft(path), str(path), problem)


@pytest.mark.parametrize("dialect", KINDS)
def test_incomplete_heads(tmp_path: Path, dialect: str) -> None:
    """Without any one of its tensors a head is refused by name, or not recognised for want of what marks it."""
    head = random_head(CONFIG, KINDS[dialect], fmt="F32")
    names = dict(file_names(dialect, head))
    canonical = {id(packed): name.replace("*", "0") for name, packed in head.items()}
    marks = {"dspark.main_proj.weight", "mtp.0.main_proj.weight", "fc.weight", "markov_w1.weight"}
    marks |= {"mtp.0.e_proj.weight", "blk.3.nextn.eh_proj.weight"}
    again = re.compile(r"mtp\.[12]\.(attn|ffn|hc_attn|hc_ffn|exp).*(?<!norm\.weight)")  # as in stage 0
    for missing, packed in names.items():
        if again.fullmatch(canonical.get(id(packed), "")):
            continue
        path = write_side_file(tmp_path / "a.gguf", {n: p for n, p in names.items() if n != missing}, KEYS[dialect])
        message = refused(lambda path=path: open_draft(path), str(path))
        if missing in marks:
            assert "holds no draft head" in message
        else:
            assert f"is incomplete: tensor {canonical[id(packed)]} is missing" in message


def test_experts_that_are_missing(tmp_path: Path) -> None:
    files, _ = official_head(CONFIG, "mtp")
    del files["mtp.0.ffn.experts.2.w2.weight"], files["mtp.0.ffn.experts.2.w2.scale"]
    save_file(files, tmp_path / "head.safetensors")
    refused(lambda: open_draft(tmp_path / "head.safetensors"), "tensor mtp.0.ffn.experts.2.w2.weight is missing")


def test_files_that_are_no_head(tmp_path: Path, bare: Checkpoint) -> None:
    refused(lambda: open_draft(tmp_path / "nope.gguf"), "no such file")
    path = write_side_file(tmp_path / "a.gguf", {"token_embd.weight": plain(32, 256)})
    refused(lambda: open_draft(path), str(path), "holds no draft head", "mtp.0.e_proj.weight")
    refused(lambda: open_draft(bare.path), str(bare.path), "holds no draft head")
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    refused(lambda: open_draft(tmp_path / "b.gguf"), "b.gguf", "too early")


def test_a_bias_of_the_confidence_head(tmp_path: Path) -> None:
    """llama.cpp's dialect has a place for one, and for the matrix without its only row."""
    for dialect, prefix in (("dspark", "dspark."), ("dflash", "")):
        head = random_head(CONFIG, "dspark")
        row = head["mtp.2.confidence_head.proj.weight"]
        head["mtp.2.confidence_head.proj.weight"] = Packed(row.kind, row.data[0])
        tensors = dict(file_names(dialect, head)) | {f"{prefix}conf_proj.bias": plain(1)}
        shapes = open_draft(write_side_file(tmp_path / "a.gguf", tensors)).shapes()
        assert shapes["mtp.2.confidence_head.proj.bias"] == (1,)
        assert shapes["mtp.2.confidence_head.proj.weight"] == (1, 256 + RANK)


def test_golden_heads(golden: Path) -> None:
    """Heads taken out of whole checkpoints: the same tensors, the settings of config.json."""
    for name, kind, stages in (("mtp", "mtp", 1), ("dspark", "dspark", 3)):
        ckpt, head = open_checkpoint(golden / name), open_draft(golden / name)
        assert (head.kind, head.stages) == (kind, stages)
        again = attach_draft(ckpt, head, replace=True)
        assert again.config == ckpt.config
        assert again.total_bytes == ckpt.total_bytes
        assert sorted(again.names()) == sorted(ckpt.names())
        source = load_file(golden / name / "model.safetensors")
        assert set(head.shapes()) == {tensor for tensor in source if tensor.startswith("mtp.")}
        for tensor in head.shapes():
            assert torch.equal(again.tensor(tensor).dequantize(), source[tensor].float())
    assert head.parameters is not None
    assert vars(head.parameters) == {
        "block_size": 5,
        "markov_rank": 32,
        "noise_token_id": 511,
        "target_layer_ids": (2, 3, 4),
    }
