"""``ds4 convert`` and the file system: shards, refusals, targets that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from weights.builders import random_tensors, small_config
from weights.converting import run, save_small

from ds4.errors import Ds4Error
from ds4.weights import encode, open_checkpoint, writing

ROOT = Path(__file__).resolve().parents[2]


def test_shards(tmp_path: Path) -> None:
    source = save_small(tmp_path / "in")
    run(source, tmp_path / "out", "mxfp4", "fp8", shard_bytes=200_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    total = 0
    for file in files:
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118, it is no dictionary
                tensor = opened.get_tensor(name)
                assert index["weight_map"].pop(name) == file
                total += tensor.numel() * tensor.element_size()
        raw = (tmp_path / "out" / file).read_bytes()
        assert len(raw) < 220_000
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        assert header.pop("__metadata__") == {"format": "pt"}
        for entry in header.values():  # readers map the file and look at it as numbers of that size
            assert (8 + length + entry["data_offsets"][0]) % {"F32": 4, "I64": 8}.get(entry["dtype"], 1) == 0
    assert not index["weight_map"]
    assert index["metadata"]["total_size"] == total
    run(source, tmp_path / "one.safetensors", "mxfp4", "fp8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "in", "one.safetensors", "out"]
    one, many = open_checkpoint(tmp_path / "one.safetensors"), open_checkpoint(tmp_path / "out")
    assert one.config == many.config
    assert set(one.names()) == set(many.names())
    assert all(torch.equal(one.tensor(n).dequantize(), many.tensor(n).dequantize()) for n in one.names())


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    run(save_small(tmp_path / "in"), tmp_path / "out.gguf", progress=lambda done, total: seen.append((done, total)))
    size = (tmp_path / "out.gguf").stat().st_size
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize(
    ("out", "experts", "dense", "problem"),
    [
        ("a.gguf", "keep", "fp8", "--dense fp8: a GGUF has no FP8"),
        ("a", "q8_0", "keep", "--experts q8_0: safetensors has no Q8_0; use nvfp4 or mxfp4 or bf16"),
        ("a", "keep", "q8_0", "--dense q8_0: safetensors has no Q8_0; use bf16 or f16 or fp8"),
        ("in", "keep", "keep", "is the checkpoint that is to be converted"),
        (".", "keep", "keep", "or holds it"),
        ("in/model.safetensors", "keep", "keep", "is the checkpoint"),
        ("in/other.safetensors", "keep", "keep", "config.json would replace"),
        ("there.gguf", "keep", "keep", "exists already; give another OUT, or --force"),
        ("there", "keep", "keep", "exists already"),
        ("thesis", "keep", "keep", "holds 'thesis.tex', which is no part of a checkpoint"),
        ("file", "keep", "keep", "is a file already"),
        ("absent/a.gguf", "keep", "keep", "cannot be written: No such file"),
    ],
)
def test_refusals(tmp_path: Path, out: str, experts: str, dense: str, problem: str) -> None:
    source = save_small(tmp_path / "in")
    for name in ("there", "thesis"):
        (tmp_path / name).mkdir()
    for name in ("there.gguf", "there/config.json", "thesis/thesis.tex", "thesis/config.json", "file"):
        (tmp_path / name).write_text("old")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    for force in (False, True):
        if force and "exists already" in problem:
            continue
        with pytest.raises(Ds4Error, match=problem) as caught:
            run(source, tmp_path / out, experts, dense, force=force)
        assert "\n" not in str(caught.value)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    assert open_checkpoint(source).config == small_config()


def test_force_replaces(tmp_path: Path) -> None:
    source = save_small(tmp_path / "in")
    for out in (tmp_path / "out.gguf", tmp_path / "out", tmp_path / "one.safetensors"):
        run(source, out)
        run(source, out, "q8_0" if out.suffix == ".gguf" else "mxfp4", force=True)
        assert open_checkpoint(out).tensor("layers.0.ffn.experts.0.w1.weight").format in ("q8_0", "mxfp4_official")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_links_and_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a link points to is replaced; "." is the directory that it stands for."""
    source = save_small(tmp_path / "in")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "b" / "real.gguf")
    run(source, tmp_path / "link.gguf")
    assert open_checkpoint(tmp_path / "b" / "real.gguf").config == small_config()
    (tmp_path / "link.gguf").unlink()
    (tmp_path / "b" / "real.gguf").unlink()
    run(source, tmp_path / "link")
    run(source, tmp_path / "link", "mxfp4", force=True)
    assert (tmp_path / "link").is_symlink()
    assert open_checkpoint(tmp_path / "a").tensor("layers.0.ffn.experts.0.w1.weight").format == "mxfp4_official"
    monkeypatch.chdir(tmp_path / "b")
    run(source, Path("."))
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint(tmp_path / "b").config == small_config()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "in", "link"]


@pytest.mark.parametrize(
    ("changes", "dense", "problem"),
    [
        (
            {"layers.1.attn.wkv.weight": torch.full((128, 64), float("nan"))},
            "q8_0",
            "wkv.weight.*holds infinities",
        ),
        ({"layers.1.attn.wkv.weight": torch.full((128, 64), 1e6)}, "f16", "wkv.weight holds 1e.06"),
    ],
)
def test_values_that_cannot_be_stored(tmp_path: Path, changes: dict, dense: str, problem: str) -> None:
    source = save_small(tmp_path / "in", **changes)
    with pytest.raises(Ds4Error, match=problem):
        run(source, tmp_path / "out.gguf", dense=dense)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_tables_too_large_for_a_gguf_and_rows_that_no_block_divides(tmp_path: Path) -> None:
    values = random_tensors(small_config())
    table = values["layers.0.ffn.gate.tid2eid"].clone()
    table[0, 0] = 1 << 40
    with pytest.raises(Ds4Error, match=r"tid2eid holds integers that do not fit i32"):
        run(save_small(tmp_path / "a", **{"layers.0.ffn.gate.tid2eid": table}), tmp_path / "out.gguf")
    odd = {"layers.0.attn.wq_a.weight": values["layers.0.attn.wq_a.weight"][:, :60].contiguous()}
    with pytest.raises(
        Ds4Error, match=r"wq_a.weight: rows of 60 are no multiple of the q8_0 block 32; use --dense bf16"
    ):
        run(save_small(tmp_path / "b", **odd), tmp_path / "out.gguf", dense="q8_0")
    assert not (tmp_path / "out.gguf").exists()


def test_experts_of_different_formats_cannot_be_stacked(tmp_path: Path) -> None:
    half = random_tensors(small_config())["layers.0.ffn.experts.1.w1.weight"].half()
    source = save_small(tmp_path / "in", **{"layers.0.ffn.experts.1.w1.weight": half})
    with pytest.raises(Ds4Error, match="experts differ in format or shape"):
        run(source, tmp_path / "out.gguf")
    run(source, tmp_path / "out.gguf", "bf16")


# Whole or not at all.


def full_disk(*_: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("out", ["out.gguf", "out", "out.safetensors"])
@pytest.mark.parametrize("problem", [full_disk, KeyboardInterrupt])
def test_breaking_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, problem: Any) -> None:
    source = save_small(tmp_path / "in")
    pwrite, count = os.pwrite, 0

    def failing(descriptor: int, data: Any, offset: int) -> int:
        nonlocal count
        count += 1
        if count == 30:
            if problem is KeyboardInterrupt:
                raise KeyboardInterrupt
            return problem()
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(writing.os, "pwrite", failing)
    expected = KeyboardInterrupt if problem is KeyboardInterrupt else Ds4Error
    with pytest.raises(expected, match="No space left on device" if expected is Ds4Error else None):
        run(source, tmp_path / out)
    assert count == 30
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_failed_replacement_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_small(tmp_path / "in")
    for out in ("out.gguf", "out"):
        run(source, tmp_path / out)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(writing.os, "pwrite", full_disk)
    for out in ("out.gguf", "out"):
        with pytest.raises(Ds4Error, match="No space left"):
            run(source, tmp_path / out, "bf16", force=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(writing.os, "pwrite", None)
    with pytest.raises(Ds4Error, match=r"out.gguf: needs 0.00\d+ GB, but .* has 0.001 GB free"):
        run(save_small(tmp_path / "in"), tmp_path / "out.gguf")


KILLED = """
import os, signal, sys
from pathlib import Path
from ds4.weights import open_checkpoint, writing
from ds4.weights.convert import convert
from ds4.weights.recipes import Recipe

count = 0
encode = writing.encode

def encode_some(*arguments, **options):
    global count
    count += 1
    if count == 40:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(*arguments, **options)

writing.encode = encode_some
convert(open_checkpoint(sys.argv[1]), Path(sys.argv[2]), Recipe(), tokenizer={})
"""


def test_killed_in_the_middle(tmp_path: Path) -> None:
    """Nothing is at OUT; the next run removes what is left beside it, says so, and succeeds."""
    source, out = save_small(tmp_path / "in"), "out"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(source), str(tmp_path / out)], env=env)
    assert killed.returncode == -signal.SIGKILL
    left = tmp_path / f".{out}.ds4-part"
    assert sorted(tmp_path.iterdir()) == sorted([source, left])
    report = run(source, tmp_path / out)
    assert report.notes[0] == f"removed {left}, which an interrupted run had left"
    assert sorted(tmp_path.iterdir()) == sorted([source, tmp_path / out])
    assert open_checkpoint(tmp_path / out).config == small_config()


def test_killed_between_the_two_renames_of_a_directory(tmp_path: Path) -> None:
    source = save_small(tmp_path / "in")
    old = save_small(tmp_path / ".out.ds4-old")
    with pytest.raises(Ds4Error, match="exists already"):  # it is back, so that it is not replaced unasked
        run(source, tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").config == small_config()
    assert not old.exists()
    save_small(old)
    report = run(source, tmp_path / "out", force=True)
    assert report.notes == (f"removed {old}, which an interrupted run had left",)
    assert not old.exists()


def test_two_at_once(tmp_path: Path) -> None:
    source = save_small(tmp_path / "in")
    problems: list[str] = []

    def meanwhile(_done: int, _total: int) -> None:
        if not problems:
            with pytest.raises(Ds4Error, match="another process is writing it") as caught:
                run(source, tmp_path / "out.gguf")
            problems.append(str(caught.value))

    run(source, tmp_path / "out.gguf", progress=meanwhile)
    assert len(problems) == 1
    assert open_checkpoint(tmp_path / "out.gguf").config == small_config()


def test_memory_holds_a_tile_whatever_the_tensors_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_small(tmp_path / "in")
    plain = {out: (run(source, tmp_path / out, experts, "bf16"), (tmp_path / out).read_bytes())[1]
             for out, experts in (("a.gguf", "nvfp4"), ("b.gguf", "keep"))}  # fmt: skip
    largest = 0
    pwrite = os.pwrite

    def watching(descriptor: int, data: Any, offset: int) -> int:
        nonlocal largest
        if offset:  # the header is written in one piece
            largest = max(largest, len(data))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(writing.os, "pwrite", watching)
    monkeypatch.setattr(encode, "_TILE", 1024)
    monkeypatch.setattr(encode, "_TILE_BYTES", 1024)
    for out, experts in (("a.gguf", "nvfp4"), ("b.gguf", "keep")):
        largest = 0
        run(source, tmp_path / out, experts, "bf16", force=True)
        assert (tmp_path / out).read_bytes() == plain[out]
        assert largest <= 4096
