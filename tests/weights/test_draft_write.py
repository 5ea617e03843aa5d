"""Writing a DSpark head as a side file: it opens again as the same head, here and with the gguf package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor
from weights.draft_files import BLOCK, CONFIG, NOISE, RANK, TARGETS, by_expert, random_head, refused, trunk

from ds4.weights.draft import attach_draft, open_draft
from ds4.weights.gguf_write import write_draft_gguf

HEADED = replace(
    CONFIG,
    n_mtp_layers=3,
    dspark_block_size=BLOCK,
    dspark_markov_rank=RANK,
    dspark_noise_token_id=NOISE,
    dspark_target_layer_ids=TARGETS,
)


def entries(fmt: str) -> list[tuple[str, Tensor, str]]:
    """A random head; matrices of experts in ``fmt``."""
    values = by_expert(random_head(CONFIG, "dspark", fmt="F32"))
    return [(n, torch.from_numpy(v), fmt if ".ffn.experts." in n else "f32") for n, v in values.items()]


@pytest.mark.parametrize(("fmt", "error"), [("f32", 0.0), ("q8_0", 0.01), ("nvfp4", 0.12)])
def test_round_trip(tmp_path: Path, fmt: str, error: float) -> None:
    path = write_draft_gguf(tmp_path / "a.gguf", HEADED, entries(fmt), name="small head of the preview")
    head = open_draft(path)
    assert (head.kind, head.stages, head.generation.release) == ("dspark", 3, "preview")
    ckpt = attach_draft(trunk(tmp_path / "trunk"), head)
    assert ckpt.config == HEADED
    for name, values, expected_format in entries(fmt):
        tensor = ckpt.expect(name, tuple(values.shape))
        assert tensor.format == expected_format
        assert (tensor.dequantize() - values).norm() <= (error if expected_format == fmt else 0.0) * values.norm()
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.name"].contents() == "small head of the preview"
    assert reader.fields["deepseek4.dspark.stage_count"].contents() == 3
    assert not [t.name for t in reader.tensors if t.name.endswith(".scale") and "hc_" not in t.name]


def test_an_incomplete_head_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_text("what was here before")
    tensors = [entry for entry in entries("f32") if not entry[0].endswith("markov_w2.weight")]
    refused(lambda: write_draft_gguf(path, HEADED, tensors, name="x"), "a.gguf", "markov_w2.weight is missing")
    assert path.read_text() == "what was here before"
    assert list(tmp_path.iterdir()) == [path]
