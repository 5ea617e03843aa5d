"""Byte-level BPE: the tokenizer of DeepSeek-V4, from its tokenizer.json or rebuilt from GGUF metadata.

Text is cut by three regular expressions, its bytes are written in the GPT-2 byte alphabet (one printable character a
byte), and merges join the characters. Added tokens are found in the raw text before all that and stand for themselves.

Source: chat.md 1.1, 1.2, 1.4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds4.errors import Ds4Error

if TYPE_CHECKING:
    import tokenizers

# chat.md 1.2, each applied to the pieces of the one before: digits by threes, CJK and kana runs, everything else.
PRE_TOKENIZER_REGEXES = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
PRE_TOKENIZERS = ("joyai-llm", "deepseek-v3")  # two names for the regexes above

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the other 68 for U+0100 onwards in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


class BpeBackend:
    """A ``tokenizers`` BPE with the few operations that Tokenizer needs."""

    strips_first_space = False

    def __init__(self, tok: tokenizers.Tokenizer) -> None:
        tok.no_truncation()
        tok.no_padding()
        self._tok = tok
        self._alphabet = byte_alphabet()
        self.n_vocab: int = tok.get_vocab_size(with_added_tokens=True)
        self.added: dict[int, str] = {i: token.content for i, token in tok.get_added_tokens_decoder().items()}

    def to_json(self) -> str:
        """The text of a tokenizer.json that makes the same tokenizer."""
        return self._tok.to_str(pretty=True)

    def encode(self, text: str) -> list[int]:
        return self._tok.encode(text, add_special_tokens=False).ids

    def token_to_id(self, token: str) -> int | None:
        return self._tok.token_to_id(token)

    def id_to_bytes(self, token_id: int) -> bytes:
        piece = self.added.get(token_id)
        if piece is not None:
            return piece.encode()
        piece = self._tok.id_to_token(token_id)
        if piece is None:
            raise ValueError(f"token id {token_id} is not in the vocabulary of {self.n_vocab} tokens")
        try:
            return bytes(self._alphabet[char] for char in piece)
        except KeyError:
            return piece.encode()  # padding entries of a vocabulary need not be in the byte alphabet


def bpe_from_file(path: Path) -> BpeBackend:
    """Read a tokenizer.json; Ds4Error if it is missing, damaged or no byte-level BPE."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise Ds4Error(f"{path}: cannot read the tokenizer ({_line(err)})") from err
    return bpe_from_json(text, str(path))


def bpe_from_json(text: str, source: str) -> BpeBackend:
    """Build from the text of a tokenizer.json; ``source`` names it in errors."""
    import tokenizers

    try:
        tok = tokenizers.Tokenizer.from_str(text)
    except Exception as err:  # the library raises bare Exception
        raise Ds4Error(f"{source}: damaged tokenizer.json ({_line(err)}); fetch the file again") from err
    if not isinstance(tok.model, tokenizers.models.BPE) or b"ByteLevel" not in _state(tok.decoder):
        kind = type(tok.model).__name__
        raise Ds4Error(f"{source}: a {kind} tokenizer without byte-level decoder; ds4 reads byte-level BPE only")
    return BpeBackend(tok)


def bpe_from_gguf(metadata: Mapping[str, Any], source: str) -> BpeBackend:
    """Rebuild from ``tokenizer.ggml.*`` of a GGUF with model ``gpt2``.

    tokens      list[str]  byte-alphabet text of ordinary tokens, literal text of added ones; position = id
    token_type  list[int]  1 ordinary, 3 control, 4 user-defined, 5 unused (others: as ordinary)
    merges      list[str]  "left right", by falling priority
    pre         str        one of PRE_TOKENIZERS
    Error:   Ds4Error naming ``source`` and the key. Ids and texts equal the official tokenizer's on golden/tokenizer.
    Source:  chat.md 1.4.
    """
    import tokenizers
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        known = " and ".join(PRE_TOKENIZERS)
        raise Ds4Error(f"{source}: tokenizer.ggml.pre is {pre!r}; ds4 knows {known}, the pre-tokenizers of DeepSeek")
    tokens, types = tokens_and_types(metadata, source)
    merges = []
    for number, merge in enumerate(required(metadata, "merges", source)):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise Ds4Error(
                f'{source}: tokenizer.ggml.merges[{number}] is {merge!r}, not "left right"; convert the model again'
            )
        merges.append((left, right))
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise Ds4Error(f"{source}: tokenizer.ggml.tokens holds {twice!r} twice; convert the model again")
    try:
        tok = tokenizers.Tokenizer(models.BPE(vocab, merges, fuse_unk=False, byte_fallback=False, ignore_merges=False))
    except Exception as err:  # the library raises bare Exception
        raise Ds4Error(f"{source}: tokenizer.ggml.merges does not fit the tokens ({_line(err)})") from err

    splits: list[Any] = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in PRE_TOKENIZER_REGEXES]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tok.decoder = decoders.ByteLevel()
    pairs = list(zip(tokens, types, strict=True))
    # Their texts are in the vocabulary already, so the ids stay where they are.
    tok.add_special_tokens([AddedToken(s, special=True, normalized=False) for s, kind in pairs if kind == _CONTROL])
    tok.add_tokens([AddedToken(s, special=False, normalized=False) for s, kind in pairs if kind == _USER_DEFINED])
    backend = BpeBackend(tok)
    assert backend.n_vocab == len(tokens)
    assert all(tokens[i] == text for i, text in backend.added.items())
    return backend


def required(metadata: Mapping[str, Any], name: str, source: str) -> Any:
    """The value of ``tokenizer.ggml.<name>``; Ds4Error where it is missing."""
    key = f"tokenizer.ggml.{name}"
    if metadata.get(key) is None:
        raise Ds4Error(f"{source}: metadata key {key} is missing; convert the model again or give a tokenizer.json")
    return metadata[key]


def tokens_and_types(metadata: Mapping[str, Any], source: str) -> tuple[Sequence[str], list[int]]:
    """``tokens`` and ``token_type``, of equal length."""
    tokens = required(metadata, "tokens", source)
    types = [int(kind) for kind in required(metadata, "token_type", source)]
    if len(tokens) != len(types):
        raise Ds4Error(
            f"{source}: tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens; "
            "convert the model again"
        )
    return tokens, types


def _state(part: Any) -> bytes:
    """The library's own description of a part: it has no other way to look inside a sequence of parts."""
    return b"" if part is None else part.__getstate__()


def _line(err: BaseException) -> str:
    return " ".join(str(err).split())[:200]
