"""``ds4 convert``: what it prints, its errors, and that the results talk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from test_cli_errors import fails
from weights.converting import save_small

from ds4.cli import main
from ds4.engine import LLM
from ds4.weights import open_checkpoint, recipes
from ds4.weights.convert import convert

DEMO = Path(__file__).resolve().parent.parent / "ds4" / "demo" / "demo.gguf"
PROMPT = "What is the capital of France? One word."


def run(*arguments: object, columns: int = 80):
    return CliRunner().invoke(main, ["convert", *(str(a) for a in arguments)], env={"COLUMNS": str(columns)})


def test_options_offer_what_there_is():
    choices = {p.name: p.type.choices for p in main.commands["convert"].params if hasattr(p.type, "choices")}
    assert tuple(choices["experts"]) == recipes.EXPERTS
    assert tuple(choices["dense"]) == recipes.DENSE


@pytest.mark.parametrize("columns", [80, 60])
def test_summary_fits_the_terminal(tmp_path, columns):
    source = save_small(tmp_path / "in", **{"layers.0.extra.weight": torch.ones(2, 2)})
    result = run(source, tmp_path / "out.gguf", "--experts", "q8_0", columns=columns)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    assert all(line == line.rstrip() for line in lines)
    text = " ".join(result.stdout.split())
    assert "experts f32 -> q8_0: rounded, relative error up to 0." in text
    assert "(all 36 tensors), 589.8 kB -> 156.7 kB" in text
    assert "dense f32: unchanged (all 35 tensors)" in text
    assert "LM head f32: unchanged (1 tensor), 8.2 kB" in text
    assert "tokenizer none in the source" in text
    assert "left out layers.0.extra.weight: ds4 does not know it" in text
    assert "note llama.cpp does not load this file" in text


def test_summary_of_a_lossless_cast(tmp_path):
    run(save_small(tmp_path / "in"), tmp_path / "mx", "--experts", "mxfp4")
    result = run(tmp_path / "mx", tmp_path / "nv", "--experts", "nvfp4")
    assert "experts    mxfp4_official -> nvfp4_modelopt: lossless (all 36 tensors)" in result.stdout


def test_json(tmp_path):
    source = save_small(tmp_path / "in")
    result = run(source, tmp_path / "out", "--experts", "mxfp4", "--json")
    record = json.loads(result.stdout)
    assert record["container"] == "safetensors"
    assert record["file_bytes"] == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    experts = record["lines"][0]
    assert (experts["group"], experts["source"], experts["target"]) == ("experts", "f32", "mxfp4_official")
    assert experts["tensors"] == len(experts["inexact"]) == 36
    assert experts["max_relative_error"] == max(experts["inexact"].values())
    assert record["tokenizer"] is False


def test_shard_size(tmp_path):
    source = save_small(tmp_path / "in")
    assert run(source, tmp_path / "out", "--shard-size", "0.5MB").exit_code == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    fails(run(source, tmp_path / "out.gguf", "--shard-size", "1GB"), "--shard-size is for a directory")


def test_errors_are_one_line(tmp_path):
    source = save_small(tmp_path / "in")
    fails(run(source, tmp_path / "out.gguf", "--dense", "fp8"), "--dense fp8", "GGUF has no FP8")
    fails(run(source, tmp_path / "out", "--experts", "q4_k"), "--experts", "q4_k")
    fails(run(tmp_path / "absent.gguf", tmp_path / "out"), "absent.gguf", "no such file")
    fails(run(source, source), "is the checkpoint that is to be converted")
    (tmp_path / "out.gguf").write_text("old")
    fails(run(source, tmp_path / "out.gguf"), "out.gguf", "exists already", "--force")
    assert (tmp_path / "out.gguf").read_text() == "old"


@pytest.fixture(scope="module")
def demo_answer():
    return LLM(DEMO, ctx=64).logits(LLM(DEMO).encode_prompt(PROMPT))


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_the_bundled_model_as_safetensors_and_back_computes_the_same(tmp_path, demo_answer, out):
    """Its weights are kept bit for bit, the tokenizer gives the same ids, and so the logits are the same bits."""
    assert run(DEMO, tmp_path / out).exit_code == 0
    result = run(tmp_path / out, tmp_path / "back.gguf")
    assert result.exit_code == 0, result.stderr
    for path in (tmp_path / out, tmp_path / "back.gguf"):
        llm = LLM(path, ctx=64)
        ids = llm.encode_prompt(PROMPT)
        assert ids == LLM(DEMO).encode_prompt(PROMPT)
        assert torch.equal(llm.logits(ids), demo_answer)


def test_the_chat_format_survives_a_new_name(tmp_path):
    """What a GGUF calls itself tells which effort levels it knows; a directory of another name still does."""
    ckpt = open_checkpoint(DEMO)
    assert LLM(DEMO).generation == "preview"
    ckpt.metadata["general.name"] = "Demo 0731"
    convert(ckpt, tmp_path / "out", recipes.Recipe(), tokenizer={})
    assert LLM(tmp_path / "out").generation == "0731"


def test_generate_from_a_converted_model(tmp_path):
    assert run(DEMO, tmp_path / "out", "--experts", "mxfp4", "--dense", "fp8").exit_code == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["layers.1.attn.wkv.weight"].dtype == torch.float8_e4m3fn
    result = CliRunner().invoke(main, ["generate", PROMPT, "-m", str(tmp_path / "out"), "-n", "8", "--device", "cpu"])
    assert result.stdout == "Paris.\n"
