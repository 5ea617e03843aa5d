"""Sessions on disk: one safetensors file with a session's tokens, its state and what they belong to.

A restored session continues as if it had never been interrupted, bit for bit (design.md, "Two forms"). The file holds
what the position can need and no more (``saved_bytes``; spec model.md 6.3); its capacity may differ from that of the
session it is loaded into. Tensors, rows in order of position:

    ids                  i32 [tokens]
    layers.N.ring        u8 [n, row_bytes]      the last rows of the window ring
    layers.N.pool, keys  u8 [n, row_bytes]      compressed rows and indexer keys
    layers.N.state, key_state  f32 [n, 2, width]  the compressors' last raw rows
    draft.N.ring, draft.tail.* a draft head's rows and the streams it starts from (ds4/mtp/tail.py)

The header's metadata has ``format``, ``version``, ``record`` (JSON, the fields of :class:`Record`) and its checksum.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ds4.config import ModelConfig
from ds4.errors import Ds4Error
from ds4.kernels.numerics import GROUPS
from ds4.kv.cache import LayerCache
from ds4.kv.ring import ring_read, ring_write
from ds4.kv.spec import RowFormats, layer_spec
from ds4.mtp.dspark import DSparkDrafter
from ds4.mtp.mtp_block import MTPDrafter
from ds4.mtp.tail import Tail
from ds4.replacing import replacing
from ds4.weights.identity import fingerprint

if TYPE_CHECKING:
    from ds4.engine import LLM
    from ds4.session import Session

FORMAT, VERSION = "ds4-session", "2"
_TAIL = "draft.tail."


@dataclass(frozen=True)
class Record:
    """What a file says about its session.

    tokens      how many were processed
    undone      how many more than these had been processed before they were undone
    ctx         the session's capacity, for people; another one may be chosen
    checkpoint  ``fingerprint`` of the trunk
    model       the checkpoint's file name, for messages
    numerics    the switches of ds4/kernels/numerics.py
    draft       ``fingerprint`` of the draft head whose state is here, or None
    crc32       of every tensor's bytes
    notes       what the caller wants to find again, JSON values
    """

    tokens: int
    undone: int
    ctx: int
    checkpoint: str
    model: str
    numerics: dict[str, bool]
    draft: str | None
    crc32: dict[str, int]
    notes: dict[str, Any]


def saved_bytes(config: ModelConfig, formats: RowFormats, tokens: int) -> int:
    """Bytes of a saved session's tensors, without a draft head's (spec model.md 6.3).

    Tokens, 4 each; pools at 584 and 68 bytes an entry; window rings and compressor states as far as they are filled,
    with the rows more (``max_draft``) that make it possible to undo tokens after loading.
    """
    total = 4 * tokens
    for ratio in config.compress_ratios:
        spec = layer_spec(config, ratio)
        total += min(tokens, spec.ring_slots) * formats.row.row_bytes
        if ratio:
            total += tokens // ratio * formats.row.row_bytes + min(tokens, spec.state_slots) * 8 * spec.state_width
        if spec.has_index:
            total += tokens // ratio * formats.key.row_bytes + min(tokens, spec.state_slots) * 8 * spec.key_state_width
    return total


def common_beginning(session: Session, ids: Sequence[int]) -> int:
    """How many of a session's tokens begin a prompt, its last token left out: that one has to be processed."""
    pairs = zip(session.ids, ids[:-1], strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(session.position, max(0, len(ids) - 1)))


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows ``first .. end - 1`` of a storage that has row r in slot ``r % slots``; ``layer``: whose ring it is."""

    storage: Tensor
    first: int
    end: int
    layer: LayerCache | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.end - self.first, *self.storage.shape[1:])

    def read(self) -> Tensor:
        return ring_read(self.storage, self.first, self.end).cpu().contiguous()

    def write(self, rows: Tensor) -> None:
        ring_write(self.storage, self.first, rows.to(self.storage.device))
        if self.layer is not None and self.layer.ring_f32 is not None:
            ring_write(self.layer.ring_f32, self.first, self.layer.formats.row.unpack(rows))


def _layer_rows(layer: LayerCache, position: int) -> dict[str, _Rows]:
    """What a layer keeps of the first ``position`` tokens; parts without a row are left out."""
    n_entries = position // layer.spec.ratio if layer.spec.ratio else 0
    parts = {"ring": _Rows(layer.ring, max(0, position - layer.ring.shape[0]), position, layer)}
    for name, pool in (("pool", layer.pool), ("keys", layer.keys)):
        if pool is not None:
            parts[name] = _Rows(pool, 0, n_entries)
    for name, ring in (("state", layer.state), ("key_state", layer.key_state)):
        if ring is not None:
            parts[name] = _Rows(ring, max(0, position - ring.shape[0]), position)
    return {name: rows for name, rows in parts.items() if rows.end > rows.first}


def _all_rows(layers: Sequence[LayerCache], prefix: str, position: int) -> dict[str, _Rows]:
    return {
        f"{prefix}.{i}.{name}": rows
        for i, layer in enumerate(layers)
        for name, rows in _layer_rows(layer, position).items()
    }


def _draft_head(session: Session) -> MTPDrafter | DSparkDrafter | None:
    """The session's drafter if its state can be stored."""
    drafter = session.drafter
    if isinstance(drafter, MTPDrafter | DSparkDrafter) and drafter.position == session.position:
        return drafter
    return None


@torch.inference_mode()
def save(session: Session, path: str | os.PathLike[str], notes: Mapping[str, Any] | None = None) -> int:
    """Write a session to ``path``, whole or not at all; returns the file's size in bytes.

    ``notes`` are JSON values to find again (``Saved.record``). The file is written in a hidden directory beside
    ``path``, flushed to the disk and moved. Raises Ds4Error where that fails; an older file is then as it was.
    """
    target, llm, position = Path(path).expanduser(), session.llm, session.position
    head = _draft_head(session)
    places = _all_rows(session.cache.layers, "layers", position)
    tensors = {"ids": torch.tensor(session.ids, dtype=torch.int32)}
    if head is not None:
        places |= _all_rows(head.caches, "draft", position)
        tensors |= {_TAIL + name: tensor for name, tensor in head.tail.state().items()}
    tensors |= {name: rows.read() for name, rows in places.items()}
    record = Record(
        tokens=position,
        undone=session._highest - position,
        ctx=session.ctx,
        checkpoint=fingerprint(llm.checkpoint),
        model=llm.path.name,
        numerics=asdict(llm.numerics),
        draft=None if head is None else fingerprint(llm.checkpoint, draft=True),
        crc32={name: _crc32(tensor) for name, tensor in tensors.items()},
        notes=dict(notes or {}),
    )
    text = json.dumps(asdict(record))
    metadata = {"format": FORMAT, "version": VERSION, "record": text, "crc32": str(zlib.crc32(text.encode()))}
    try:
        with replacing(target) as part:
            save_file(tensors, part, metadata)
            return part.stat().st_size
    except OSError as error:
        raise Ds4Error(f"{target}: cannot be written: {error.strerror or error}") from None
    except SafetensorError as error:
        raise Ds4Error(f"{target}: cannot be written: {error}") from None


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data)


class Saved:
    """A session file that was opened; ``record`` is what it says of itself.

    Error:  Ds4Error, one line, for a file that cannot be read, is none of ours, of another version, or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        try:
            self._file = safe_open(self.path, framework="pt")
        except OSError as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or error
            raise Ds4Error(f"{self.path}: cannot be read: {reason}") from None
        except SafetensorError as error:
            raise Ds4Error(f"{self.path}: is no session file, or a damaged one: {error}") from None
        self.record = self._read_record(self._file.metadata() or {})

    def _read_record(self, metadata: Mapping[str, str]) -> Record:
        if metadata.get("format") != FORMAT:
            raise Ds4Error(f"{self.path}: is a safetensors file, but no session; ds4 generate --session makes one")
        version = metadata.get("version", "")
        if version != VERSION:
            raise Ds4Error(
                f"{self.path}: has version {version:.20} of the format, this ds4 reads {VERSION}; "
                "use the ds4 that wrote it, or start anew under another name"
            )
        text = metadata.get("record", "")
        if metadata.get("crc32") != str(zlib.crc32(text.encode())):
            raise self._damaged("its record")
        try:
            record = Record(**json.loads(text))
        except (TypeError, ValueError):
            raise self._damaged("its record") from None
        kinds = ((record.tokens, int), (record.undone, int), (record.crc32, dict), (record.notes, dict))
        if not all(isinstance(value, kind) for value, kind in kinds) or record.tokens < 0:
            raise self._damaged("its record")
        return record

    def _damaged(self, what: str) -> Ds4Error:
        return Ds4Error(f"{self.path}: {what} is damaged; delete the file, or restore it from a copy")

    @torch.inference_mode()
    def session(self, llm: LLM, ctx: int | None = None) -> Session:
        """The session as it was, on ``llm``, with room for ``ctx`` tokens (the model's own if None).

        Draft state comes back where ``llm`` drafts with the same head. Where it does not, the restored session has no
        drafter: such a head would have had to see the whole text.
        Error:  Ds4Error for another checkpoint, other numerics, a context that is too small, or damage.
        """
        record = self.record
        self._check(llm, llm.ctx if ctx is None else ctx)
        session = llm.session(ctx)
        ids = self._tensor("ids", torch.int32, (record.tokens,)).tolist()
        if not all(0 <= i < llm.config.vocab_size for i in ids) or not 0 <= record.undone <= session.cache.max_draft:
            raise self._damaged("its record")
        session.cache.reserve(record.tokens)
        places = _all_rows(session.cache.layers, "layers", record.tokens)
        head = _draft_head(session)
        if head is not None and record.draft == fingerprint(llm.checkpoint, draft=True):
            places |= _all_rows(head.caches, "draft", record.tokens)
            self._restore_tail(head.tail)
        else:
            session.drafter = None
        for name, rows in places.items():
            rows.write(self._tensor(name, rows.storage.dtype, rows.shape))
        session.ids, session._highest = ids, record.tokens + record.undone
        return session

    def _check(self, llm: LLM, ctx: int) -> None:
        record = self.record
        if record.checkpoint != fingerprint(llm.checkpoint):
            raise Ds4Error(
                f"{self.path}: belongs to another checkpoint ({record.model}), not to {llm.path.name}; "
                "load that one, or name another session file"
            )
        if record.numerics != asdict(llm.numerics):
            name = next((n for n, group in GROUPS.items() if asdict(group) == record.numerics), "as they were then")
            raise Ds4Error(f"{self.path}: was computed with other numerics than this model's; choose --numerics {name}")
        if record.tokens > ctx:
            raise Ds4Error(
                f"ctx: {self.path} holds {record.tokens} tokens, the context is {ctx}; raise --ctx above "
                f"{record.tokens}"
            )

    def _tensor(self, name: str, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> Tensor:
        """One tensor, checked; ``shape`` None: any."""
        try:
            tensor = self._file.get_tensor(name)
        except SafetensorError:
            raise self._damaged(f"tensor {name} is missing: the file") from None
        if tensor.dtype != dtype or (shape is not None and tensor.shape != shape):
            raise self._damaged(f"the layout of tensor {name}")
        if self.record.crc32.get(name) != _crc32(tensor):
            raise self._damaged(f"tensor {name}")
        return tensor

    def _restore_tail(self, tail: Tail) -> None:
        state = {name: self._tensor(_TAIL + name, like.dtype) for name, like in tail.state().items()}
        try:
            tail.restore(state)
        except ValueError:
            raise self._damaged("the draft head's state") from None
        if tail.position != self.record.tokens:
            raise self._damaged("the draft head's state")
