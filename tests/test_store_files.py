"""Session files that do not fit, are damaged, or were being written when the process died."""

from __future__ import annotations

import fcntl
import json
import os
import random
import subprocess
import sys
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ds4.demo import bundled_model_path
from ds4.engine import LLM, Session
from ds4.errors import Ds4Error
from ds4.store import Saved, save
from ds4.weights import open_checkpoint
from ds4.weights.identity import fingerprint

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 21


@cache
def llm() -> LLM:
    torch.set_num_threads(1)
    return LLM(ctx=128)


@cache
def session() -> Session:
    made = llm().session()
    made.prefill(list(range(5, 5 + TOKENS)))
    return made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    session().save(tmp_path / "a.session")
    return tmp_path / "a.session"


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, str]], None]) -> None:
    """Write the file again as it is, but for ``change(tensors, metadata)``."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def put_record(metadata: dict[str, str], text: str) -> None:
    metadata |= {"record": text, "crc32": str(zlib.crc32(text.encode()))}


def refused(path: Path, *words: str, model: LLM | None = None, ctx: int | None = None) -> None:
    """One line with these words."""
    with pytest.raises(Ds4Error) as error:
        (model or llm()).load_session(path, ctx)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    for word in words:
        assert word in message, message


def test_notes_and_record(tmp_path: Path) -> None:
    notes = {"messages": [{"role": "user", "content": 'é"\n\ud800'}]}
    save(session(), tmp_path / "a", notes)
    record = Saved(tmp_path / "a").record
    assert record.notes == notes
    assert (record.tokens, record.undone, record.ctx, record.model) == (TOKENS, 0, 128, "demo.gguf")


def test_another_checkpoint(path: Path, golden: Path) -> None:
    refused(path, "another checkpoint (demo.gguf), not to tiny", model=LLM(golden / "tiny", ctx=128))


def test_the_same_checkpoint_elsewhere_and_one_changed_weight(path: Path, tmp_path: Path) -> None:
    data = bytearray(bundled_model_path().read_bytes())
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(data)
    assert LLM(copy, ctx=128).load_session(path).ids == session().ids
    tensor = llm().checkpoint.tensor("layers.1.attn.wq_a.weight")
    row = tensor.data[tensor.data.shape[0] // 2]
    at = row.data_ptr() - next(llm().checkpoint.tensors()).file.bytes.data_ptr()
    data[at + 40] ^= 1
    copy.write_bytes(data)
    refused(path, "another checkpoint", model=LLM(copy, ctx=128))


def test_fingerprints_of_trunk_and_head_are_apart(tmp_path: Path) -> None:
    """A head changed leaves the trunk as it was."""
    checkpoint = open_checkpoint(bundled_model_path())
    trunk, head = fingerprint(checkpoint), fingerprint(checkpoint, draft=True)
    row = checkpoint.tensor("mtp.0.e_proj.weight").data
    at = row[row.shape[0] // 2].data_ptr() - next(checkpoint.tensors()).file.bytes.data_ptr()
    data = bytearray(bundled_model_path().read_bytes())
    data[at] ^= 1
    (tmp_path / "a.gguf").write_bytes(data)
    changed = open_checkpoint(tmp_path / "a.gguf")
    assert fingerprint(changed) == trunk
    assert fingerprint(changed, draft=True) != head
    session().save(tmp_path / "a.session")
    restored = LLM(tmp_path / "a.gguf", ctx=128).load_session(tmp_path / "a.session")
    assert restored.drafter is None
    assert restored.ids == session().ids


def test_other_numerics(path: Path) -> None:
    refused(path, "other numerics than this model's; choose --numerics serve", model=LLM(ctx=128, numerics="exact"))


def test_a_context_that_is_too_small(path: Path) -> None:
    refused(path, f"ctx: {path} holds 21 tokens, the context is 20; raise --ctx above 21", ctx=20)
    assert llm().load_session(path, TOKENS).position == TOKENS


def test_another_version(path: Path) -> None:
    rewrite(path, lambda tensors, metadata: metadata.update(version="3"))
    refused(path, "has version 3 of the format, this ds4 reads 2")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no session file, or a damaged one"),
        (b"Dear diary, this is text and nothing else.", "no session file, or a damaged one"),
        (None, "no such file"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "a").write_bytes(content)
    refused(tmp_path / "a", words)


def test_a_directory_and_a_checkpoint(tmp_path: Path, golden: Path) -> None:
    refused(tmp_path, "cannot be read")
    refused(golden / "tiny" / "model.safetensors", "is a safetensors file, but no session")


# What is damaged


def test_every_length_but_the_right_one(path: Path) -> None:
    data = path.read_bytes()
    generator = random.Random(20261121)
    for n in (7, 8, 300, len(data) - 1, *(generator.randrange(len(data)) for _ in range(60))):
        path.write_bytes(data[:n])
        refused(path, "damaged")
    path.write_bytes(data + b"x")
    refused(path, "damaged")


def test_a_flipped_bit_is_noticed(path: Path) -> None:
    """Anywhere: in a tensor, its name, the record, the checksums; half of the trials are in the header."""
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    generator = random.Random(20261121)
    used = len(data[:header].rstrip())  # behind it the header is filled up with spaces, which mean nothing
    for trial in range(200):
        at = generator.randrange(used) if trial % 2 else generator.randrange(header, len(data))
        data[at] ^= 1 << (bit := generator.randrange(8))
        path.write_bytes(data)
        refused(path)
        data[at] ^= 1 << bit
    path.write_bytes(data)
    llm().load_session(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, metadata: tensors.pop("layers.1.keys"),
        lambda tensors, metadata: tensors.pop("ids"),
        lambda tensors, metadata: tensors.pop("draft.tail.streams"),
        lambda tensors, metadata: tensors.update({"layers.0.ring": tensors["layers.0.ring"][1:].contiguous()}),
        lambda tensors, metadata: tensors.update({"layers.1.state": tensors["layers.1.state"].view(torch.int32)}),
        lambda tensors, metadata: tensors.update({"ids": tensors["ids"] + 2000}),
        lambda tensors, metadata: metadata.pop("record"),
        lambda tensors, metadata: metadata.update(record=json.dumps({"tokens": 21})),
        lambda tensors, metadata: put_record(metadata, '{"tokens": 21}'),
        lambda tensors, metadata: put_record(metadata, "[]"),
        lambda tensors, metadata: put_record(metadata, metadata["record"].replace('"tokens": 21', '"tokens": "x"')),
        lambda tensors, metadata: put_record(metadata, metadata["record"].replace('"tokens": 21', '"tokens": -1')),
        lambda tensors, metadata: put_record(metadata, metadata["record"].replace('"undone": 0', '"undone": 17')),
    ],
)
def test_a_file_with_parts_changed(path: Path, change: Callable[[dict[str, Any], dict[str, str]], None]) -> None:
    rewrite(path, change)
    refused(path, "damaged")


# Writing


def left(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir())


def test_a_failed_save_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(Ds4Error, match=r"a\.session: cannot be written: No space left on device"):
        llm().session().save(path)
    assert path.read_bytes() == before
    assert left(path) == ["a.session"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(Ds4Error, match="no: cannot be written: No such file or directory"):
        session().save(tmp_path / "not" / "there" / "no")
    with pytest.raises(Ds4Error, match="cannot be written: Is a directory"):
        session().save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_writers(path: Path) -> None:
    folder = path.with_name(".a.session.saving")
    folder.mkdir()
    other = os.open(folder, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(Ds4Error, match=r"a\.session: another process is writing it"):
        session().save(path)
    os.close(other)
    (folder / "left behind by a process that died").write_text("x")
    session().save(path)
    assert left(path) == ["a.session"]


def test_a_new_file_has_ordinary_permissions(path: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


KILLS = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from ds4.engine import LLM
from pathlib import Path

path = Path(sys.argv[1])
llm, generator = LLM(ctx=640), random.Random(20261121)
sessions = []
for n in (300, 600):
    sessions.append(llm.session())
    sessions[-1].prefill([5 + i % 900 for i in range(n)])
sessions[0].save(path)
seconds = time.perf_counter()
for _ in range(4):
    sessions[1].save(path)
seconds = (time.perf_counter() - seconds) / 4
middle = 0
for _ in range(40):
    child = os.fork()
    if not child:
        for i in range(10**6):
            sessions[i % 2].save(path)
    time.sleep(generator.uniform(0, 4 * seconds))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    middle += (path.parent / f".{path.name}.saving").exists()
    found = llm.load_session(path)
    for name, tensor in sessions[found.position == 600].cache.live(found.position).items():
        assert torch.equal(found.cache.live(found.position)[name], tensor), name
sessions[0].save(path)
assert [p.name for p in path.parent.iterdir()] == [path.name]
print(middle)
"""


def test_killed_while_saving(tmp_path: Path) -> None:
    """40 processes killed at random moments: the file is always whole, and nothing stays behind the next save."""
    result = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path / "a.session")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 5, "too few were killed in the middle of a save"
