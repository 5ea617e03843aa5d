"""Sentencepiece: for checkpoints that carry a tokenizer.model, or a GGUF with tokenizer.ggml.model "llama".

No public V4 checkpoint does; the loader exists for converted ones. Sentencepiece does not look for control pieces in
text, so the text is cut at them here, as the byte-level tokenizer does with its added tokens.

Source: chat.md 1.4, last paragraph; field numbers from sentencepiece_model.proto.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds4.errors import Ds4Error
from ds4.text.bpe import required, tokens_and_types

if TYPE_CHECKING:
    import sentencepiece

_SPACE = "\u2581"  # sentencepiece writes a space so
_ORDINARY, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # token_type and SentencePiece.Type alike
_BPE = 2  # TrainerSpec.model_type


class SpmBackend:
    """A sentencepiece processor with the few operations that Tokenizer needs."""

    def __init__(self, sp: sentencepiece.SentencePieceProcessor) -> None:
        self._sp = sp
        self.n_vocab: int = sp.get_piece_size()
        self._control = {sp.id_to_piece(i): i for i in range(self.n_vocab) if sp.is_control(i)}
        by_length = sorted(self._control, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, by_length)) + ")") if by_length else None
        # Ordinary pieces are never looked up here, so <think> as a user-defined piece stands for itself as well.
        self.added: dict[int, str] = {i: piece for piece, i in self._control.items()}
        # The model may put a space before every text; only a trial tells, the processor does not.
        self.strips_first_space = bool(sp.encode("a", out_type=str)[0].startswith(_SPACE))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._cut.split(text) if self._cut else [text]:
            if part in self._control:
                ids.append(self._control[part])
            elif part:
                ids.extend(self._sp.encode(part))
        return ids

    def token_to_id(self, token: str) -> int | None:
        token_id = self._sp.piece_to_id(token)
        return token_id if self._sp.id_to_piece(token_id) == token else None

    def id_to_bytes(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.n_vocab:
            raise ValueError(f"token id {token_id} is not in the vocabulary of {self.n_vocab} tokens")
        piece = self._sp.id_to_piece(token_id)
        if self._sp.is_byte(token_id):
            return bytes([int(piece[1:-1], 16)])  # "<0xE2>"
        return piece.encode() if token_id in self.added else piece.replace(_SPACE, " ").encode()

    def special_ids(self) -> tuple[int, int, int]:
        """BOS, EOS and pad as the model declares them; -1 for none."""
        return self._sp.bos_id(), self._sp.eos_id(), self._sp.pad_id()


def spm_from_file(path: Path) -> SpmBackend:
    """Read a tokenizer.model; Ds4Error if it is missing or damaged."""
    try:
        data = path.read_bytes()
    except OSError as err:
        raise Ds4Error(f"{path}: cannot read the tokenizer ({err.strerror})") from err
    return _from_proto(data, str(path))


def spm_from_gguf(metadata: Mapping[str, Any], source: str) -> SpmBackend:
    """Rebuild from ``tokenizer.ggml.*`` of a GGUF with model ``llama``; errors as of :func:`proto_from_gguf`."""
    return _from_proto(proto_from_gguf(metadata, source), source)


def proto_from_gguf(metadata: Mapping[str, Any], source: str) -> bytes:
    """The contents of a tokenizer.model from ``tokenizer.ggml.*`` of a GGUF with model ``llama``.

    tokens      list[str]    pieces; position = id
    token_type  list[int]    1 ordinary, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte
    scores      list[float]  priority of ordinary pieces
    Error:   Ds4Error naming ``source`` and the key.
    """
    tokens, types = tokens_and_types(metadata, source)
    scores = required(metadata, "scores", source)
    if len(scores) != len(tokens):
        raise Ds4Error(
            f"{source}: tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens; "
            "convert the model again"
        )
    unknown = [i for i, kind in enumerate(types) if kind == _UNKNOWN]
    if len(unknown) != 1:
        raise Ds4Error(f"{source}: tokenizer.ggml.token_type marks {len(unknown)} unknown tokens instead of one")
    pieces = b"".join(
        _field(1, _field(1, token.encode()) + _tag(2, 5) + struct.pack("<f", score) + _number(3, kind))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )
    trainer = _number(3, _BPE)  # the only type that GGUF calls "llama"
    trainer += _number(35, int(_BYTE in types))  # byte_fallback
    trainer += _number(40, unknown[0])
    for number, name in ((41, "bos"), (42, "eos"), (43, "padding")):
        declared = metadata.get(f"tokenizer.ggml.{name}_token_id")
        # The processor refuses special ids of the wrong type, and one piece in two offices.
        is_control = declared is not None and 0 <= declared < len(types) and types[declared] == _CONTROL
        trainer += _number(number, int(declared) if is_control and declared is not None else -1)
    normalizer = _field(1, b"identity")
    normalizer += _number(3, int(metadata.get("tokenizer.ggml.add_space_prefix", True)))
    normalizer += _number(4, int(metadata.get("tokenizer.ggml.remove_extra_whitespaces", False)))
    normalizer += _number(5, 1)  # escape_whitespaces
    return pieces + _field(2, trainer) + _field(3, normalizer)


def gguf_keys_from_proto(data: bytes, source: str) -> dict[str, Any]:
    """``tokenizer.ggml.*`` of a tokenizer.model: the way back of :func:`proto_from_gguf`.

    Error:   Ds4Error naming ``source`` for a damaged model, and for what GGUF has no keys for: a model that is no BPE,
             or that rewrites characters before it looks at them.
    """
    backend = _from_proto(data, source)
    pieces: list[dict[int, Any]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(dict(_fields(value)))
        elif number in (2, 3):
            (trainer if number == 2 else normalizer).update(_fields(value))
    if trainer.get(3) != _BPE:
        raise Ds4Error(f"{source}: is no BPE model, so a GGUF cannot hold it; put a tokenizer.json beside it")
    if normalizer.get(2):
        raise Ds4Error(f"{source}: normalises characters, which a GGUF cannot say; put a tokenizer.json beside it")
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece[1].decode() for piece in pieces],
        "tokenizer.ggml.scores": [struct.unpack("<f", piece.get(2, bytes(4)))[0] for piece in pieces],
        "tokenizer.ggml.token_type": [piece.get(3, _ORDINARY) for piece in pieces],
        "tokenizer.ggml.add_space_prefix": bool(normalizer.get(3, True)),
        "tokenizer.ggml.remove_extra_whitespaces": bool(normalizer.get(4, True)),
    }
    pad = backend.special_ids()[2]
    if pad >= 0:
        keys["tokenizer.ggml.padding_token_id"] = pad
    return keys


def _from_proto(data: bytes, source: str) -> SpmBackend:
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor()
    try:
        loaded = bool(data) and sp.load_from_serialized_proto(data)
    except (RuntimeError, OSError) as err:
        reason = " ".join(str(err).split())[:200]
        raise Ds4Error(f"{source}: damaged sentencepiece model ({reason}); fetch the file again") from err
    if not loaded or not sp.get_piece_size():
        raise Ds4Error(f"{source}: damaged sentencepiece model; fetch the file again")
    return SpmBackend(sp)


# Protocol-buffer wire format, as much as a ModelProto needs


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers are sent as 64-bit two's complement
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _tag(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _number(number: int, value: int) -> bytes:
    return _tag(number, 0) + _varint(value)


def _field(number: int, payload: bytes) -> bytes:
    return _tag(number, 2) + _varint(len(payload)) + payload


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of every field of a message that is known to be well formed: integers, or bytes of any other."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(data):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(kind) or varint()
        yield tag >> 3, data[position : position + size]
        position += size
