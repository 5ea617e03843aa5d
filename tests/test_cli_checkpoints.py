"""The ``ds4`` command with real checkpoints: ``ds4 inspect`` in both forms, and files that are no good."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from test_cli_errors import fails
from weights.builders import gguf_bytes, random_tensors, small_config, small_json, small_keys
from weights.draft_files import side_file, trunk

from ds4.cli import main

DEMO = Path(__file__).resolve().parent.parent / "ds4" / "demo"


def run(*arguments: object, columns: int = 80):
    return CliRunner().invoke(main, [str(a) for a in arguments], env={"COLUMNS": str(columns)})


@pytest.fixture
def checkpoint(tmp_path):
    """A small checkpoint in official naming, without a tokenizer; call it with changes to its tensors."""

    def make(**changes: torch.Tensor | None) -> Path:
        tensors = random_tensors(small_config())
        for name, tensor in changes.items():
            tensors.pop(name)
            if tensor is not None:
                tensors[name] = tensor
        (tmp_path / "config.json").write_text(json.dumps(small_json()))
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    return make


@pytest.mark.parametrize("columns", [80, 50])
def test_inspect_fits_the_terminal(checkpoint, columns):
    result = run("inspect", checkpoint(), columns=columns)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    assert all(line == line.rstrip() for line in lines)
    text = " ".join(result.stdout.split())
    for part in ("layers 3: 1 swa, 1 csa, 1 hca; 1 hash-routed", "experts 3 routed, 2 per token", "draft head mtp"):
        assert part in text
    for part in ("type tensors values size share", "f32", "weights read per token", "LM head", "total"):
        assert part in text
    assert "layers.0.attn.wkv.weight" not in text


@pytest.mark.parametrize("columns", [80, 50])
def test_inspect_lists_tensors(checkpoint, columns):
    result = run("inspect", checkpoint(), "--tensors", columns=columns)
    assert max(map(len, result.stdout.splitlines())) <= columns
    assert "128x64" in result.stdout
    if columns == 80:
        names = [line.split()[0] for line in result.stdout.splitlines() if line]
        assert set(random_tensors(small_config())) <= set(names)


def test_inspect_json(checkpoint):
    path = checkpoint()
    record = json.loads(run("inspect", path, "--json").stdout)
    assert record["path"] == str(path)
    assert record["total_bytes"] == sum(row["bytes"] for row in record["types"])
    assert "tensors" not in record
    record = json.loads(run("inspect", path, "--json", "--tensors").stdout)
    assert {t["name"] for t in record["tensors"]} == set(random_tensors(small_config()))


def test_inspect_bundled_model():
    found = sorted(DEMO.glob("*.gguf"))
    if not found:
        pytest.skip("the bundled model does not exist yet (ds4/demo/*.gguf)")
    result = run("inspect", found[0])
    assert result.exit_code == 0, result.stderr
    assert "gguf, architecture deepseek4" in result.stdout
    assert "nvfp4" in result.stdout


@pytest.mark.parametrize("columns", [80, 50])
def test_inspect_says_whether_it_fits(checkpoint, columns):
    result = run("inspect", checkpoint(), "--memory", "8GiB", "--ctx", "32k", columns=columns)
    assert result.exit_code == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= columns
    text = " ".join(result.stdout.split())
    assert "memory at 32,768 tokens" in text
    assert "fits; longest context 1,048,576 tokens" in text
    result = run("inspect", checkpoint(), "--memory", "1GiB", "--json")
    assert result.exit_code == 1
    record = json.loads(result.stdout)["fit"]
    assert (record["fits"], record["ctx"], record["memory_bytes"]) == (False, 1 << 20, 1 << 30)


@pytest.mark.parametrize(("dialect", "kind", "stages"), [("antirez", "mtp", 1), ("dflash", "dspark", 3)])
def test_inspect_with_a_draft_head_from_its_own_file(tmp_path, dialect, kind, stages):
    """What nothing in the files tells is a warning, in the table and for programs."""
    model = trunk(tmp_path / "model").path
    draft = side_file(tmp_path / "draft.gguf", dialect)
    assert json.loads(run("inspect", model, "--json").stdout)["draft"] is None
    record = json.loads(run("inspect", model, "--draft", draft, "--json").stdout)
    assert (record["draft"]["kind"], record["draft"]["stages"], record["draft"]["path"]) == (kind, stages, str(draft))
    assert len(record["warnings"]) == 1
    text = " ".join(run("inspect", model, "--draft", draft, columns=60).stdout.split())
    assert f"draft head {kind}, stages: {stages}" in text
    assert "warning" in text


def test_inspect_refuses_a_draft_head_of_another_release(tmp_path):
    model = trunk(tmp_path / "model", _name_or_path="deepseek-ai/DeepSeek-V4-Flash-0731").path
    draft = side_file(tmp_path / "draft.gguf", "antirez")
    fails(run("inspect", model, "--draft", draft), "draft.gguf", "0731", "preview")
    fails(run("inspect", model, "--draft", tmp_path / "no.gguf"), "no.gguf", "no such file")


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("--memory", "12 parsecs", "size of memory"),
        ("--memory", "0GB", "size of memory"),
        ("--ctx", "-5", "number of tokens"),
        ("--ctx", "2M", "the model's context ends at 1048576 tokens"),
    ],
)
def test_inspect_refuses_quantities(checkpoint, option, value, word):
    fails(run("inspect", checkpoint(), option, value), option, word)


def test_inspect_verify(checkpoint):
    result = run("inspect", checkpoint(), "--verify")
    assert result.exit_code == 0, result.stderr
    assert " ".join(result.stdout.split()).endswith("defects 0")
    result = run("inspect", checkpoint(**{"norm.weight": torch.full((64,), float("nan"))}), "--verify")
    assert result.exit_code == 1
    assert "norm.weight: 64 of 64 values are not finite" in " ".join(result.stdout.split())


def test_inspect_read_speed(checkpoint):
    record = json.loads(run("inspect", checkpoint(), "--read-speed", "--json").stdout)["read_speed"]
    assert record["bytes"] > 0
    assert record["ratio"] == pytest.approx(record["load_gb_s"] / record["read_gb_s"], rel=1e-3)
    assert "ratio" in run("inspect", checkpoint(), "--read-speed").stdout


def test_missing_file(tmp_path):
    fails(run("inspect", tmp_path / "no.gguf"), "no.gguf", "no such file")


def test_directory_without_weights(tmp_path):
    fails(run("inspect", tmp_path), str(tmp_path))


def test_directory_with_config_but_no_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(small_json()))
    fails(run("inspect", tmp_path), str(tmp_path))


@pytest.mark.parametrize("keep", [0, 4, 7, 100, -1])
def test_truncated_safetensors(checkpoint, keep):
    path = checkpoint()
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    fails(run("inspect", path), "model.safetensors")


def test_corrupt_safetensors_header(checkpoint):
    path = checkpoint()
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:40] = bytes(range(32))
    file.write_bytes(data)
    fails(run("inspect", path), "model.safetensors")


def test_broken_config(checkpoint):
    path = checkpoint()
    (path / "config.json").write_text('{"hidden_size": \n')
    fails(run("inspect", path), "config.json")
    (path / "config.json").write_text(json.dumps(small_json(model_type="llama", architectures=["LlamaForCausalLM"])))
    fails(run("inspect", path), "llama")


TENSOR = ("token_embd.weight", (64, 32), 0, 0)


@pytest.mark.parametrize(
    ("keys", "tensors", "magic", "cut", "word"),
    [
        ({}, [TENSOR], b"GGUX", None, "model.gguf"),
        ({}, [TENSOR], b"GGUF", 10, "model.gguf"),
        ({}, [TENSOR], b"GGUF", 700, "model.gguf"),
        ({}, [TENSOR], b"GGUF", -1, "token_embd.weight"),
        ({}, [("token_embd.weight", (64, 32), 99, 0)], b"GGUF", None, "type"),
        ({"general.architecture": "llama"}, [TENSOR], b"GGUF", None, "llama"),
    ],
)
def test_bad_gguf(tmp_path, keys, tensors, magic, cut, word):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes(small_keys() | keys, tensors, 64 * 32 * 4, magic=magic)[:cut])
    fails(run("inspect", path), word)
    fails(run("generate", "hi", "-m", path, "--device", "cpu"), word)


def test_missing_tensor(checkpoint):
    path = checkpoint(**{"layers.1.attn.wkv.weight": None})
    fails(run("generate", "hi", "-m", path, "--device", "cpu"), "layers.1.attn.wkv.weight", "missing")


def test_wrong_shape(checkpoint):
    path = checkpoint(**{"layers.1.attn.wkv.weight": torch.zeros(128, 32)})
    fails(run("generate", "hi", "-m", path, "--device", "cpu"), "layers.1.attn.wkv.weight", "shape")


def test_no_tokenizer(checkpoint):
    fails(run("generate", "hi", "-m", checkpoint(), "--device", "cpu"), "tokenizer")


def test_prompt_longer_than_the_context():
    if not list(DEMO.glob("*.gguf")):
        pytest.skip("the bundled model does not exist yet (ds4/demo/*.gguf)")
    fails(run("generate", "one two three " * 50, "--ctx", "32", "--device", "cpu"), "context")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu():
    if not list(DEMO.glob("*.gguf")):
        pytest.skip("the bundled model does not exist yet (ds4/demo/*.gguf)")
    fails(run("generate", "hi", "--device", "cuda"), "device")
