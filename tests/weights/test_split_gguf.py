"""GGUFs in several parts: any part, or their directory, opens all; everything that does not fit together is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from weights.builders import gguf_with, small_keys, write

from ds4.errors import Ds4Error
from ds4.weights import open_checkpoint

F32, I32 = 0, 26
VALUES = np.arange(64, dtype=np.float32)


def part(number: int, count: int, tensors: list[str], **changes: Any) -> bytes:
    """Part ``number`` (from 1), as llama.cpp writes it: the first has all metadata, the others only the split keys."""
    keys = small_keys() if number == 1 else {}
    keys |= {"split.no": number - 1, "split.count": count, "split.tensors.count": 3}
    keys = {key: value for key, value in (keys | changes).items() if value is not None}
    return gguf_with(keys, {name: (F32, (64,), (VALUES + number).tobytes()) for name in tensors})


def three_parts(directory: Path, **changes: bytes) -> list[Path]:
    """A set of three parts, some of them replaced: ``p2=b"..."``."""
    parts = {
        "p1": part(1, 3, ["output_norm.weight"]),
        "p2": part(2, 3, ["blk.0.attn_norm.weight"]),
        "p3": part(3, 3, ["blk.1.attn_norm.weight"]),
    } | changes
    return [write(directory / f"m-0000{n}-of-00003.gguf", parts[f"p{n}"]) for n in (1, 2, 3)]


def refused(path: Path, named: Path | None = None) -> str:
    """The message for ``path``, which must be one line about the part ``named``."""
    with pytest.raises(Ds4Error) as error:
        open_checkpoint(path)
    message = str(error.value)
    assert message.startswith(f"{named or path}: ")
    assert "\n" not in message
    return message


def test_any_part_opens_all(tmp_path: Path) -> None:
    for opened in (*three_parts(tmp_path), tmp_path):
        ckpt = open_checkpoint(opened)
        assert ckpt.names() == ["norm.weight", "layers.0.attn_norm.weight", "layers.1.attn_norm.weight"]
        assert ckpt.config.hidden_size == 64
        assert ckpt.metadata["split.no"] == 0
        assert ckpt.total_bytes == 3 * 256
        for number, name in enumerate(ckpt.names(), 1):
            assert torch.equal(ckpt.tensor(name).dequantize(), torch.from_numpy(VALUES + number))


def test_first_part_without_tensors(tmp_path: Path) -> None:
    paths = three_parts(tmp_path, p1=part(1, 3, []), p2=part(2, 3, ["blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"]))
    assert len(open_checkpoint(paths[2])) == 3


def test_one_part_is_a_whole(tmp_path: Path) -> None:
    keys = small_keys() | {"split.no": 0, "split.count": 1, "split.tensors.count": 1}
    path = write(tmp_path / "whatever.gguf", gguf_with(keys, {"output_norm.weight": (F32, (64,), VALUES.tobytes())}))
    assert open_checkpoint(path).names() == ["norm.weight"]


DAMAGE = [
    ("split.count is 4, but part 2 of 3 must have 3", 2, {"p2": part(2, 4, ["blk.0.attn_norm.weight"])}),
    ("split.count is None, but part 3", 3, {"p3": part(3, 3, [], **{"split.count": None})}),
    ("split.no is 2, but part 2 of 3 must have 1", 2, {"p2": part(3, 3, ["blk.0.attn_norm.weight"])}),
    ("split.no is None, but part 2", 2, {"p2": part(2, 3, [], **{"split.no": None})}),
    ("split.tensors.count is 2, but part 3 of 3 must have 3", 3, {"p3": part(3, 3, [], **{"split.tensors.count": 2})}),
    ("tensor 'output_norm.weight' is in m-00001-of-00003.gguf too", 3, {"p3": part(3, 3, ["output_norm.weight"])}),
    ("is not a GGUF file", 2, {"p2": b"something else"}),
    ("the file is empty", 3, {"p3": b""}),
]


@pytest.mark.parametrize(("problem", "number", "changes"), DAMAGE, ids=[problem for problem, _, _ in DAMAGE])
def test_parts_that_do_not_belong_together(tmp_path: Path, problem: str, number: int, changes: dict) -> None:
    paths = three_parts(tmp_path, **changes)
    assert problem in refused(paths[0], paths[number - 1])
    assert problem in refused(tmp_path, paths[number - 1])


def test_number_of_tensors(tmp_path: Path) -> None:
    paths = three_parts(tmp_path, p3=part(3, 3, []))
    assert "the 3 parts have 2 tensors, but split.tensors.count says 3" in refused(paths[1])
    without = {"split.tensors.count": None}
    paths = three_parts(tmp_path, p1=part(1, 3, [], **without), p2=part(2, 3, [], **without))
    assert "split.tensors.count is None" in refused(paths[1], paths[0])


def test_missing_part(tmp_path: Path) -> None:
    first, second, third = three_parts(tmp_path)
    second.unlink()
    for path in (first, third, tmp_path):
        assert "part 2 of 3 is missing; put it beside the others" in refused(path, second)
    first.unlink()
    assert "part 1 of 3 is missing" in refused(third, first)


def test_renamed_part(tmp_path: Path) -> None:
    for name in ("model.gguf", "m-00001-of-00004.gguf"):
        path = write(tmp_path / name, part(1, 3, []))
        assert "is one part of 3, so its name must end in -00001-of-00003.gguf or the like" in refused(path)


@pytest.mark.parametrize("count", [-1, "3", [3], 2.5], ids=repr)
def test_impossible_count(tmp_path: Path, count: Any) -> None:
    keys = small_keys() | {"split.no": 0, "split.tensors.count": 0, "split.count": count}
    assert "is one part of" in refused(write(tmp_path / "m-00001-of-00003.gguf", gguf_with(keys, {})))


def test_directories_of_several_things(tmp_path: Path) -> None:
    three_parts(tmp_path)
    other = write(tmp_path / "n-00001-of-00003.gguf", part(1, 3, []))
    assert "holds 4 GGUF files; name one of them" in refused(tmp_path)
    other.rename(tmp_path / "m-00001-of-00002.gguf")
    assert "holds 4 GGUF files; name one of them" in refused(tmp_path)
    (tmp_path / "m-00001-of-00002.gguf").rename(tmp_path / "draft.gguf")
    assert "holds 4 GGUF files; name one of them" in refused(tmp_path)


def test_parts_of_the_gguf_package(tmp_path: Path) -> None:
    """A model split by another implementation."""
    keys = small_keys()
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "deepseek4", split_max_tensors=2)
    for key, value in keys.items():
        if key != "general.architecture":
            kind = gguf.GGUFValueType.get_type(value)
            sub = gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
            writer.add_key_value(key, value, kind, sub_type=sub)
    rng = np.random.default_rng(0)
    tensors = {f"blk.{n}.attn_q_a.weight": rng.standard_normal((64, 64), np.float32) for n in range(3)}
    tensors |= {f"blk.{n}.attn_norm.weight": rng.standard_normal(64, np.float32) for n in range(2)}
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert len(list(tmp_path.iterdir())) == 3
    ckpt = open_checkpoint(tmp_path)
    assert {t.name for t in ckpt.tensors()} == set(tensors)
    for n in range(3):
        values = ckpt.tensor(f"layers.{n}.attn.wq_a.weight").dequantize()
        assert torch.equal(values, torch.from_numpy(tensors[f"blk.{n}.attn_q_a.weight"]))
