"""Damaged checkpoints: small valid files of every container, and ways to break their headers.

An input is one seed with one or a few mutations, all decided by its number. Opening it must end in a checkpoint or in
one line of Ds4Error: anything else is a crash. The same code serves the tests (a small budget) and
``scripts/fuzz_headers.py`` (the full one).
"""

from __future__ import annotations

import json
import random
import signal
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
from safetensors.torch import save
from weights.builders import gguf_model, gguf_with, random_tensors, small_config, small_json, small_keys
from weights.draft_files import side_file

from ds4.errors import Ds4Error
from ds4.weights import open_checkpoint
from ds4.weights.check import verify
from ds4.weights.describe import describe
from ds4.weights.draft import open_draft

SECONDS = 20  # an input that takes longer hangs; a valid one takes milliseconds

# Numbers that overflow, wrap or meet a limit somewhere.
_EDGES = [0, 1, 2, 3, 7, 8, 31, 32, 63, 64, 255, 256, 65535, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32]
_EDGES += [1 << 40, (1 << 53) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1]


@dataclass(frozen=True)
class Seed:
    """A valid checkpoint: its files, those whose headers are broken, and what opens it."""

    name: str
    files: dict[str, bytes]
    targets: tuple[str, ...]
    opens: Callable[[Path], object]


@dataclass
class Tally:
    """What became of the inputs."""

    inputs: int = 0
    opened: int = 0
    rejected: int = 0
    crashes: list[str] = field(default_factory=list)
    messages: Counter[str] = field(default_factory=Counter)


class Hang(Exception):
    """An input took longer than SECONDS."""


def _whole(path: Path) -> None:
    """Everything that ``ds4 inspect --verify`` does."""
    ckpt = open_checkpoint(path)
    describe(ckpt)
    verify(ckpt)


def _gguf_seed() -> Seed:
    tensors = {n: t for n, t in random_tensors(small_config()).items() if not n.startswith("mtp.")}
    keys = small_keys() | {"tokenizer.ggml.tokens": ["a", "bc", "d" * 40] * 5, "general.name": "fuzz"}
    data = gguf_with(keys, gguf_model(tensors))
    return Seed("gguf", {"m.gguf": data}, ("m.gguf",), lambda folder: _whole(folder / "m.gguf"))


def _mixed_gguf_seed() -> Seed:
    """Block formats, the sleepy dialect and REAP keys; most tensors are missing, which only a model would mind."""
    keys = small_keys() | {"reap.enabled": True, "reap.layout": "ds4-compact-v1", "reap.layer.keep_count": [3, 2, 2]}
    keys |= {"deepseek4.embedding_length": 256, "deepseek4.expert_feed_forward_length": 256}
    tensors = {
        "blk.1.ffn_gate_exps.nvfp4_weight": (40, (2, 256, 256), bytes(2 * 256 * 144)),
        "blk.1.ffn_gate_exps.nvfp4_scale_2": (0, (2,), bytes(8)),
        "blk.1.ffn_down_exps.weight": (10, (2, 256, 256), bytes(2 * 256 * 84)),
        "blk.1.ffn_gate_inp.weight": (1, (2, 256), bytes(1024)),
        "blk.1.exp_probs_b.bias": (0, (2,), bytes(8)),
        "blk.0.ffn_gate_tid2eid.weight": (26, (32, 2), struct.pack("<64i", *([0, 1] * 32))),
        "blk.0.ffn_gate_inp.weight": (1, (3, 256), bytes(1536)),
        "output.weight": (8, (32, 256), bytes(32 * 8 * 34)),
    }
    return Seed("mixed gguf", {"m.gguf": gguf_with(keys, tensors)}, ("m.gguf",), lambda f: _whole(f / "m.gguf"))


def _split_gguf_seed() -> Seed:
    tensors = list(gguf_model({n: t for n, t in random_tensors(small_config()).items() if n[:4] != "mtp."}).items())
    files = {}
    for part in (0, 1):
        split = {"split.no": part, "split.count": 2, "split.tensors.count": len(tensors)}
        keys = (small_keys() if part == 0 else {}) | split
        files[f"m-0000{part + 1}-of-00002.gguf"] = gguf_with(keys, dict(tensors[part::2]))
    return Seed("split gguf", files, tuple(files), _whole)


def _safetensors_seed() -> Seed:
    """FP8, MXFP4 and NVFP4 weights with their companions, in two shards with an index."""
    tensors = random_tensors(small_config())
    fp8, e8m0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
    tensors["layers.0.attn.wkv.weight"] = torch.zeros(128, 64, dtype=fp8)
    tensors["layers.0.attn.wkv.scale"] = torch.full((1, 1), 127, dtype=torch.uint8).view(e8m0)
    for expert in range(3):
        base = f"layers.1.ffn.experts.{expert}.w1."
        tensors[base + "weight"] = torch.zeros(64, 32, dtype=torch.int8)
        tensors[base + "scale"] = torch.full((64, 2), 127, dtype=torch.uint8).view(e8m0)
        base = f"layers.2.ffn.experts.{expert}.w1."
        tensors[base + "weight"] = torch.zeros(64, 32, dtype=torch.uint8)
        tensors[base + "weight_scale"] = torch.zeros(64, 4, dtype=fp8)
        tensors[base + "weight_scale_2"] = torch.tensor(1.0)
    names = list(tensors)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in (0, 1)}
    files = {shard: save({n: tensors[n] for n in held}) for shard, held in shards.items()}
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    files["config.json"] = json.dumps(small_json()).encode()
    return Seed("safetensors", files, tuple(files), _whole)


def _draft_seed(folder: Path, dialect: str) -> Seed:
    data = side_file(folder / "draft.gguf", dialect).read_bytes()
    return Seed(f"draft {dialect}", {"d.gguf": data}, ("d.gguf",), lambda f: open_draft(f / "d.gguf"))


def seeds(folder: Path) -> list[Seed]:
    """Every seed; ``folder`` is for files that are written on the way."""
    drafts = [_draft_seed(folder, dialect) for dialect in ("antirez", "dflash")]
    return [_gguf_seed(), _mixed_gguf_seed(), _split_gguf_seed(), _safetensors_seed(), *drafts]


# Mutations


def header_size(name: str, data: bytes) -> int:
    """Bytes of the header, so that most mutations hit it and not the weights."""
    if name.endswith(".json"):
        return len(data)
    if name.endswith(".safetensors"):
        return min(len(data), 8 + int.from_bytes(data[:8], "little"))
    return min(len(data), data.rfind(b"weight") + 64)


def mutated(name: str, data: bytes, rng: random.Random) -> bytes:
    """The file with one to four mutations."""
    for _ in range(rng.choice((1, 1, 1, 1, 1, 1, 2, 3))):
        size = max(1, header_size(name, data))
        text = not name.endswith(".gguf")
        data = rng.choice(_TEXT if text and rng.random() < 0.7 else _BINARY)(data, size, rng)
    return data


def _flip(data: bytes, size: int, rng: random.Random) -> bytes:
    at = rng.randrange(size)
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] if data else b"\0"


def _number(data: bytes, size: int, rng: random.Random) -> bytes:
    """A little-endian integer of 4 or 8 bytes replaced by one from _EDGES; in a GGUF most land on a length."""
    width = rng.choice((4, 8))
    at = rng.randrange(max(1, size - width))
    return data[:at] + (rng.choice(_EDGES) & (1 << 8 * width) - 1).to_bytes(width, "little") + data[at + width :]


def _field(data: bytes, size: int, rng: random.Random) -> bytes:
    """The same for a field that holds a small number: a length, a count, a type, a dimension or an offset."""
    width = rng.choice((4, 8))
    places = [at for at in range(4, min(size, 20000) - width) if data[at] and not any(data[at + 1 : at + width])]
    if not places:
        return data
    at = rng.choice(places)
    return data[:at] + (rng.choice(_EDGES) & (1 << 8 * width) - 1).to_bytes(width, "little") + data[at + width :]


def _cut(data: bytes, size: int, rng: random.Random) -> bytes:
    return data[: rng.choice((rng.randrange(size), rng.randrange(len(data) + 1)))]


def _splice(data: bytes, size: int, rng: random.Random) -> bytes:
    """A piece of the header copied over another one, inserted, or left out."""
    start, length, at = rng.randrange(size), rng.randrange(1, 200), rng.randrange(size)
    piece = data[start : start + length]
    return rng.choice(
        (data[:at] + piece + data[at + length :], data[:at] + piece + data[at:], data[:at] + data[at + length :])
    )


def _noise(data: bytes, size: int, rng: random.Random) -> bytes:
    at, length = rng.randrange(size), rng.randrange(1, 64)
    return data[:at] + rng.randbytes(length) + data[at + length :]


_TOKENS = [b"null", b"-1", b"1e999", b"NaN", b"18446744073709551616", b'"F32"', b'"I8"', b'"F8_E8M0"', b"[]", b"{}"]
_TOKENS += [
    b"[" * 3000,
    b'""',
    b"true",
    b'"../../x"',
    b"[0, 99999999999999]",
    b"[99999999999, 99999999999]",
    b'"\\ud800"',
]


def _json_value(data: bytes, size: int, rng: random.Random) -> bytes:
    """One value of the JSON text replaced by another token, and the length in front of it mended."""
    places = [at for at in range(size - 1) if data[at : at + 1] in b":,[" and data[at + 1 : at + 2] not in b" "]
    if not places:
        return data
    at = rng.choice(places) + 1
    end = at
    while end < size and data[end : end + 1] not in (b",", b"]", b"}"):
        end += 1
    token = rng.choice(_TOKENS)
    return _mended(data[:at] + token + data[end:], size + len(token) - (end - at), len(data) > size)


def _json_swap(data: bytes, size: int, rng: random.Random) -> bytes:
    """Two pieces of the JSON text between commas exchanged or one doubled."""
    pieces = data[:size].split(b",")
    i, j = rng.randrange(len(pieces)), rng.randrange(len(pieces))
    if rng.random() < 0.5:
        pieces[i], pieces[j] = pieces[j], pieces[i]
    else:
        pieces.insert(i, pieces[j])
    joined = b",".join(pieces)
    return _mended(joined + data[size:], len(joined), len(data) > size)


def _mended(data: bytes, size: int, is_safetensors: bool) -> bytes:
    return struct.pack("<Q", max(0, size - 8)) + data[8:] if is_safetensors else data


_BINARY = (_flip, _flip, _number, _field, _field, _field, _cut, _splice, _noise)
_TEXT = (_json_value, _json_value, _json_value, _json_swap, _flip, _cut)


# Running


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise Hang(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(folder: Path, numbers: range, progress: Callable[[Tally], None] | None = None) -> Tally:
    """Try the inputs with these numbers, the same ones for the same numbers; ``folder`` is written over and over."""
    known = seeds(folder)
    tally = Tally()
    for number in numbers:
        rng = random.Random(number)
        seed = known[number % len(known)]
        target = rng.choice(seed.targets)
        place = folder / f"seed{number % len(known)}"
        place.mkdir(exist_ok=True)
        for name, data in seed.files.items():
            file = place / name
            if name == target:
                file.unlink(missing_ok=True)  # an open map of the old one must not see its bytes change
                file.write_bytes(mutated(name, data, rng))
            elif not file.exists() or file.stat().st_size != len(data) or file.read_bytes() != data:
                file.unlink(missing_ok=True)
                file.write_bytes(data)
        _try(seed, place, number, target, tally)
        if progress:
            progress(tally)
    return tally


def _try(seed: Seed, place: Path, number: int, target: str, tally: Tally) -> None:
    tally.inputs += 1
    try:
        with _time_limit(SECONDS):
            seed.opens(place)
        tally.opened += 1
    except Ds4Error as error:
        tally.rejected += 1
        message = str(error)
        if "\n" in message or not message.isprintable() or len(message) > 2000:
            tally.crashes.append(
                f"input {number} ({seed.name}, {target}): the message is not one line: {message!r:.300}"
            )
        tally.messages[" ".join(word for word in message.split() if word.isalpha())[:60]] += 1
    except Exception as error:
        tally.crashes.append(f"input {number} ({seed.name}, {target}): {type(error).__name__}: {error!s:.300}")
