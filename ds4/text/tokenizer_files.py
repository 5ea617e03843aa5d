"""A tokenizer on its way between the files of a checkpoint directory and the ``tokenizer.*`` keys of a GGUF.

Both forms load as the same tokenizer: same ids, same texts.  What a GGUF cannot say gets lost on the way to it and
back: which control tokens Hugging Face calls special (they all are, then), and everything in tokenizer_config.json but
BOS, EOS, padding and the chat template.

Source: chat.md 1.1 to 1.4.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds4.errors import Ds4Error
from ds4.text import templates as t
from ds4.text.bpe import PRE_TOKENIZER_REGEXES, PRE_TOKENIZERS, bpe_from_gguf, bpe_from_json
from ds4.text.spm import gguf_keys_from_proto, proto_from_gguf

# Files of a checkpoint directory that belong to its text side; a conversion between directories takes them as they are.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type
_CONTROL_LOOK = re.compile(r"<\|.*\|>|<｜.*｜>", re.DOTALL)  # llama.cpp's rule for what is not special
_MAX_VOCAB = 1 << 24


def copied_files(directory: Path) -> dict[str, bytes]:
    """The text files of a directory, name -> bytes; Ds4Error for one that cannot be read."""
    return {name: _read(directory / name) for name in FILES if (directory / name).is_file()}


def files_from_gguf(metadata: Mapping[str, Any], source: str) -> dict[str, bytes]:
    """tokenizer.json (or tokenizer.model) and tokenizer_config.json of a GGUF's key/values; empty without a tokenizer.

    Error:   Ds4Error naming ``source`` for a tokenizer that ds4 cannot read.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model is None:
        return {}
    embedded = metadata.get("tokenizer.huggingface.json")
    if embedded is None and model not in ("gpt2", "llama"):
        raise Ds4Error(f"{source}: tokenizer.ggml.model is {model!r:.60}; ds4 converts gpt2 and llama")
    files = {}
    if embedded is not None:
        bpe_from_json(embedded, f"{source}: tokenizer.huggingface.json")
        files["tokenizer.json"] = embedded.encode()
    elif model == "gpt2":
        files["tokenizer.json"] = bpe_from_gguf(metadata, source).to_json().encode()
    else:
        files["tokenizer.model"] = proto_from_gguf(metadata, source)
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
    }
    for office, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(token_id) is int and 0 <= token_id < len(tokens):
            config[f"{office}_token"] = tokens[token_id]
    if isinstance(metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = metadata["tokenizer.chat_template"]
    files["tokenizer_config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def gguf_keys(directory: Path, vocab_size: int) -> dict[str, Any]:
    """The ``tokenizer.*`` keys of a directory's tokenizer, without BOS and EOS, which the model's configuration has.

    vocab_size  rows of the embedding; llama.cpp needs as many tokens, so that missing ones are filled in as unused
    returns     empty for a directory without a tokenizer
    Error:      Ds4Error naming the file for one that is damaged or that ds4 cannot express.
    """
    config = _config(directory / "tokenizer_config.json")
    if (directory / "tokenizer.json").is_file():
        keys = _bpe_keys(directory / "tokenizer.json", config, vocab_size)
    elif (directory / "tokenizer.model").is_file():
        path = directory / "tokenizer.model"
        keys = gguf_keys_from_proto(_read(path), str(path))
    else:
        return {}
    keys["tokenizer.ggml.add_bos_token"] = keys["tokenizer.ggml.add_eos_token"] = False
    template = config.get("chat_template")
    if (directory / "chat_template.jinja").is_file():
        template = _read(directory / "chat_template.jinja").decode(errors="replace")
    if isinstance(template, str) and template:
        keys["tokenizer.chat_template"] = template
    return keys


def _bpe_keys(path: Path, config: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Keys of a byte-level BPE; with the whole tokenizer.json among them where the others cannot say all of it."""
    text = _read(path).decode(errors="replace")
    backend = bpe_from_json(text, str(path))
    whole = json.loads(text)
    vocab, added = whole["model"]["vocab"], whole.get("added_tokens") or []
    size = max(vocab_size, backend.n_vocab, *(i + 1 for i in vocab.values()), *(token["id"] + 1 for token in added))
    if size > _MAX_VOCAB:
        raise Ds4Error(f"{path}: has a token with the number {size - 1}, which cannot be right; fetch the file again")
    tokens, types = [f"[PAD{i}]" for i in range(size)], [_UNUSED] * size
    for piece, i in vocab.items():
        tokens[i], types[i] = piece, _NORMAL
    for token in added:
        control = token.get("special") or _CONTROL_LOOK.fullmatch(token["content"])
        tokens[token["id"]], types[token["id"]] = token["content"], _CONTROL if control else _USER_DEFINED
    pairs = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in whole["model"]["merges"]]
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in pairs],
    }
    if _is_v4(whole) and all(len(pair) == 2 and " " not in "".join(pair) for pair in pairs):
        keys["tokenizer.ggml.pre"] = PRE_TOKENIZERS[0]
    else:
        keys["tokenizer.huggingface.json"] = text
    for name in (t.PAD, _text(config.get("pad_token"))):
        pad = backend.token_to_id(name) if name else None
        if pad is not None:
            keys["tokenizer.ggml.padding_token_id"] = pad
            break
    return keys


def _is_v4(whole: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json splits and joins text as V4 does: vocabulary, merges and added tokens then say all."""
    splits = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in PRE_TOKENIZER_REGEXES
    ]
    pre = whole.get("pre_tokenizer") or {}
    stages = [dict(stage) for stage in pre.get("pretokenizers") or []]
    for stage in stages:
        stage.pop("trim_offsets", None)
        if isinstance(regex := (stage.get("pattern") or {}).get("Regex"), str):  # V4's has the characters themselves
            stage["pattern"] = {"Regex": regex.replace("\r", r"\r").replace("\n", r"\n")}
    normalizer = whole.get("normalizer")
    model = whole["model"]
    odd = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback")
    return (
        stages == [*splits, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]
        and normalizer in (None, {"type": "Sequence", "normalizers": []})
        and not any(model.get(key) for key in (*odd, "ignore_merges"))
        and not any(token.get(key) for token in whole["added_tokens"] for key in ("lstrip", "rstrip", "single_word"))
    )


def _config(path: Path) -> dict[str, Any]:
    """tokenizer_config.json as an object; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(_read(path))
    except ValueError as err:
        raise Ds4Error(f"{path}: cannot read it as JSON ({err}); fetch the file again or remove it") from err
    return config if isinstance(config, dict) else {}


def _text(token: Any) -> str | None:
    """A token of tokenizer_config.json: a text, or an object that holds it."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise Ds4Error(f"{path}: cannot be read: {err.strerror or err}") from err
