"""Text to token ids and back, whatever file the tokenizer comes from.

The chat encoder owns BOS and EOS: encoding never adds any. Added tokens that stand in the text (``<｜User｜>``,
``<think>``) become their ids, as the reference does; text from outside that must not may be checked with
``Tokenizer.token_to_id`` first.

Source: chat.md 1 and 2.6.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ds4.errors import Ds4Error
from ds4.text import templates as t


class Backend(Protocol):
    """What Tokenizer asks of a library: see bpe.py and spm.py."""

    n_vocab: int
    added: dict[int, str]  # ids found in raw text and shown literally
    strips_first_space: bool  # a space is put before every stretch of text and must go again

    def encode(self, text: str) -> list[int]: ...
    def token_to_id(self, token: str) -> int | None: ...
    def id_to_bytes(self, token_id: int) -> bytes: ...


# Control tokens by their look, the rule of the GGUF converter, since GGUF does not keep the "special" flag.
# The last alternative is the model's own misspelling of one marker, "<｜/table>｜".
_CONTROL_LOOK = re.compile(r"<[｜|].*(?:[｜|]>|>｜)", re.DOTALL)
_BOS_NAMES = (t.BOS, "<s>")
_EOS_NAMES = (t.EOS, "</s>")


class Tokenizer:
    """A loaded tokenizer; build it with one of the ``from_`` methods.

    n_vocab     number of ids, added tokens included
    bos_id      begin of sentence
    eos_id      end of sentence
    stop_ids    ids that end a generation: EOS, and BOS, pad, ``<｜User｜>`` in defence
    hidden_ids  ids never shown to a user: BOS, EOS, pad, role and task tokens, placeholders; not ``<think>``, not DSML
    """

    def __init__(self, backend: Backend, *, bos_id: int, eos_id: int, pad_id: int | None = None) -> None:
        self._backend = backend
        self._bytes: dict[int, bytes] = {}
        self.n_vocab = backend.n_vocab
        self.bos_id = bos_id
        self.eos_id = eos_id
        defence = (pad_id, backend.token_to_id(t.PAD), backend.token_to_id(t.USER))
        self.stop_ids = frozenset([eos_id, bos_id, *(i for i in defence if i is not None)])
        looks = (i for i, text in backend.added.items() if _CONTROL_LOOK.fullmatch(text))
        self.hidden_ids = self.stop_ids.union(looks)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """From a tokenizer.json; a tokenizer_config.json beside it may name BOS and EOS.

        Error: Ds4Error if the file is missing, damaged or no byte-level BPE, or names no BOS or EOS.
        """
        from ds4.text.bpe import bpe_from_file

        path = Path(path)
        backend = bpe_from_file(path)
        named = _config_names(path.with_name("tokenizer_config.json"))
        return _with_specials(backend, str(path), {}, named)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, source: str = "GGUF") -> Tokenizer:
        """From the decoded key/values of a GGUF; ``source`` (its path) is named in errors.

        ``tokenizer.huggingface.json`` is preferred where it is present; otherwise ``tokenizer.ggml.model`` decides:
        "gpt2" is byte-level BPE, "llama" is sentencepiece, all others are refused. Keys: chat.md 1.4.
        Error: Ds4Error naming the key that is missing or wrong.
        """
        from ds4.text.bpe import bpe_from_gguf, bpe_from_json, required
        from ds4.text.spm import spm_from_gguf

        backend: Backend
        if embedded := metadata.get("tokenizer.huggingface.json"):
            backend = bpe_from_json(embedded, f"{source}: tokenizer.huggingface.json")
        else:
            model = required(metadata, "model", source)
            if model not in ("gpt2", "llama"):
                raise Ds4Error(
                    f"{source}: tokenizer.ggml.model is {model!r}; ds4 reads gpt2 (byte-level BPE) and llama "
                    "(sentencepiece); give a tokenizer.json"
                )
            backend = (bpe_from_gguf if model == "gpt2" else spm_from_gguf)(metadata, source)
        declared = {}
        for name, key in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("pad", "padding_token_id")):
            token_id = metadata.get(f"tokenizer.ggml.{key}")
            if token_id is not None:
                if not 0 <= token_id < backend.n_vocab:
                    raise Ds4Error(
                        f"{source}: tokenizer.ggml.{key} is {token_id}, outside the {backend.n_vocab} tokens; "
                        "convert the model again"
                    )
                declared[name] = int(token_id)
        return _with_specials(backend, source, declared, {})

    @classmethod
    def from_sentencepiece(cls, path: str | Path) -> Tokenizer:
        """From a sentencepiece tokenizer.model; Ds4Error if it is missing or damaged or has no BOS or EOS."""
        from ds4.text.spm import spm_from_file

        backend = spm_from_file(Path(path))
        ids = zip(("bos", "eos", "pad"), backend.special_ids(), strict=True)
        return _with_specials(backend, str(path), {name: i for name, i in ids if i >= 0}, {})

    @classmethod
    def from_directory(cls, directory: str | Path) -> Tokenizer | None:
        """From the tokenizer.json of a checkpoint directory, else its tokenizer.model; None if it has neither."""
        directory = Path(directory)
        if (directory / "tokenizer.json").is_file():
            return cls.from_file(directory / "tokenizer.json")
        if (directory / "tokenizer.model").is_file():
            return cls.from_sentencepiece(directory / "tokenizer.model")
        return None

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; no BOS, no EOS; added tokens in the text become their ids. Ds4Error on lone surrogates."""
        try:
            text.encode()
        except UnicodeEncodeError as err:
            raise Ds4Error(f"text is not valid Unicode: half a surrogate pair at character {err.start}") from err
        return self._backend.encode(text)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of ``ids``; broken UTF-8 becomes U+FFFD. With ``skip_special``, hidden_ids are left out."""
        stream = StreamDecoder(self, skip_special=skip_special)
        return "".join([stream.push(token_id) for token_id in ids]) + stream.flush()

    def token_to_id(self, token: str) -> int | None:
        """Id of a token by its vocabulary text (byte alphabet, or literal if added); None if there is none."""
        return self._backend.token_to_id(token)

    def id_to_bytes(self, token_id: int) -> bytes:
        """Bytes that a token stands for; added tokens literally. ValueError for an id outside the vocabulary."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._backend.id_to_bytes(token_id)
        return known

    def _is_added(self, token_id: int) -> bool:
        return token_id in self._backend.added

    @property
    def _strips_first_space(self) -> bool:
        return self._backend.strips_first_space


class StreamDecoder:
    """Decode ids one by one; what comes out never ends inside a character.

    The pieces of push and flush together equal ``Tokenizer.decode`` of all ids. A broken sequence becomes U+FFFD as
    soon as it is certain; an unfinished one is held back until the next id or flush.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.hidden_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = True

    def push(self, token_id: int) -> str:
        """Take the next id; return the text that is complete by now. ValueError for an unknown id."""
        data = self._tokenizer.id_to_bytes(token_id)
        if self._tokenizer._strips_first_space and self._at_start:
            data = data.removeprefix(b" ")
        self._at_start = self._tokenizer._is_added(token_id)
        return "" if token_id in self._hidden else self._utf8.decode(data)

    def flush(self) -> str:
        """The end: an unfinished character comes out as U+FFFD."""
        self._at_start = True
        return self._utf8.decode(b"", final=True)


def _with_specials(backend: Backend, source: str, declared: Mapping[str, int], named: Mapping[str, str]) -> Tokenizer:
    """Settle BOS and EOS: a declared id first, then a name from the configuration, then the usual names."""

    def find(office: str, names: tuple[str, ...]) -> int:
        if office in declared:
            return declared[office]
        candidates = (named[office],) if office in named else names
        found = next((i for i in map(backend.token_to_id, candidates) if i is not None), None)
        if found is None:
            raise Ds4Error(
                f"{source}: no {office.upper()} token ({' or '.join(candidates)} is not in the vocabulary); "
                "this is not a tokenizer of DeepSeek-V4"
            )
        return found

    bos_id, eos_id = find("bos", _BOS_NAMES), find("eos", _EOS_NAMES)
    return Tokenizer(backend, bos_id=bos_id, eos_id=eos_id, pad_id=declared.get("pad"))


def _config_names(path: Path) -> dict[str, str]:
    """BOS and EOS texts from a tokenizer_config.json, if there is one; each is a text or an object with ``content``."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise Ds4Error(f"{path}: cannot read it as JSON ({err}); fetch the file again or remove it") from err
    names = {}
    for office in ("bos", "eos"):
        value = config.get(f"{office}_token") if isinstance(config, dict) else None
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            names[office] = value
    return names
