"""LLM and Session: loading, prefill, the decode loop, streaming, statistics."""

from __future__ import annotations

import operator
import os
import resource
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from torch import Tensor

from ds4 import hub
from ds4.demo import bundled_model_path
from ds4.errors import Ds4Error
from ds4.kernels.launch import DECODE_ROWS
from ds4.kernels.numerics import Numerics, resolve
from ds4.kv.spec import cache_bytes
from ds4.model.transformer import Transformer
from ds4.sampling import Sampler, SamplingParams
from ds4.text.chat import chat_generation, encode_messages
from ds4.text.templates import Generation
from ds4.text.tokenizer import StreamDecoder, Tokenizer
from ds4.weights import open_checkpoint

Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all) while a prompt is processed."""


@dataclass(frozen=True)
class Piece:
    """Text that has become complete, and the tokens that completed it (text may be empty inside a character)."""

    text: str
    token_ids: list[int]


@dataclass
class Statistics:
    """What a generation cost. Times in seconds, sizes in bytes."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    first_token_seconds: float = 0.0
    finish_reason: str = "length"
    peak_memory_bytes: int = 0
    weights_bytes: int = 0
    token_ids: list[int] = field(default_factory=list)

    @property
    def prompt_tokens_per_second(self) -> float:
        """Prompt tokens processed (cached ones left out) per second; 0 when there was nothing to do."""
        done = self.prompt_tokens - self.cached_tokens
        return done / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decode steps per second; the first token comes from the prefill and is not counted."""
        steps = self.generated_tokens - 1
        return steps / self.decode_seconds if steps > 0 and self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, object]:
        out = asdict(self)
        out["prompt_tokens_per_second"] = self.prompt_tokens_per_second
        out["tokens_per_second"] = self.tokens_per_second
        return out


class Session:
    """One text in progress: its tokens, its state, and where it stands.

    At temperature 0 the results do not depend on how the prompt was chunked, on how many tokens a decode step took, or
    on tokens that were undone: bit for bit (design.md, "Two forms").
    """

    def __init__(self, llm: LLM, ctx: int) -> None:
        self.llm = llm
        self.ctx = ctx
        self.ids: list[int] = []
        self.cache = llm.model.new_cache(ctx)
        self._highest = 0

    @property
    def position(self) -> int:
        """Number of tokens processed."""
        return len(self.ids)

    def _check(self, ids: Sequence[int]) -> list[int]:
        ids = [int(i) for i in ids]
        if not ids:
            raise ValueError("no tokens given")
        vocab = self.llm.config.vocab_size
        bad = next((i for i in ids if not 0 <= i < vocab), None)
        if bad is not None:
            raise Ds4Error(f"token id {bad} is outside the vocabulary of {vocab}")
        if self.position + len(ids) > self.ctx:
            raise Ds4Error(
                f"ctx: {self.position + len(ids)} tokens do not fit the context of {self.ctx}; "
                "shorten the prompt or raise --ctx"
            )
        return ids

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int], chunk: int | None = None, progress: Progress | None = None) -> Tensor:
        """Process prompt tokens in the prefill form; logits f32 ``[vocab]`` of the last one.

        ``chunk`` tokens at a time (None: all at once); the result does not depend on it. Raises Ds4Error when the
        tokens do not fit the context. Broken off (Ctrl-C, an error in ``progress``), it leaves the session empty.
        """
        ids = self._check(ids)
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        step = chunk or len(ids)
        logits = torch.empty(0)
        try:
            for i in range(0, len(ids), step):
                part = ids[i : i + step]
                on_tile = partial(_report, progress, i, len(ids)) if progress else None
                logits = self.llm.model.prefill(part, self.position, self.cache, on_tile=on_tile)
                self.ids += part
        except BaseException:  # rings have lost what the old position needs; position 0 needs nothing of them
            self.ids.clear()
            raise
        finally:
            self._highest = self.position
        if progress is not None:
            progress(len(ids), len(ids))
        return logits

    @torch.inference_mode()
    def decode(self, ids: Sequence[int]) -> Tensor:
        """Process 1 to 8 tokens in the decode form; logits f32 ``[n, vocab]``, a row a token."""
        ids = self._check(ids)
        if len(ids) > DECODE_ROWS:
            raise ValueError(f"a decode step takes at most {DECODE_ROWS} tokens, got {len(ids)}")
        threads = torch.get_num_threads()
        # Matrix-vector products gain nothing from a second thread, and the small operations between them lose.
        torch.set_num_threads(1)
        try:
            logits = self.llm.model.decode(ids, self.position, self.cache)
        finally:
            torch.set_num_threads(threads)
        self.ids += ids
        self._highest = self.position
        return logits

    def rewind(self, n: int) -> None:
        """Undo the last ``n`` tokens. All rewinds since the last processed token together may undo ``max_draft``."""
        limit = self.cache.max_draft - (self._highest - self.position)
        if not 0 <= n <= min(limit, self.position):
            raise ValueError(f"can undo at most {min(limit, self.position)} more tokens here, asked for {n}")
        if n:
            del self.ids[-n:]


def resolve_device(device: str) -> str:
    """Where a model runs, "cpu" or "cuda", from what was asked for. Raises Ds4Error where it cannot run there."""
    if device not in ("auto", "cpu", "cuda"):
        raise Ds4Error(f"device: {device!r} is not one of auto, cpu, cuda")
    if device == "cuda":
        raise Ds4Error("device: the model does not run on CUDA yet; use --device cpu")
    return "cpu"


class LLM:
    """A loaded model. ``path=None`` is the bundled demonstration model.

    ``numerics``: "serve" (default: FP32 arithmetic, KV rows and indexer keys rounded as the official code rounds them,
    which is what lets them be stored packed), "official" (every rounding of the official code) or "exact" (none).
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        device: str = "auto",
        ctx: int = 8192,
        numerics: str | Numerics | None = None,
        draft: int = 0,
    ) -> None:
        self.device = resolve_device(device)
        if draft:
            raise Ds4Error(f"draft: this version has no speculative decoding yet; use 0 instead of {draft}")
        self.path = hub.local_path(path) if path is not None else bundled_model_path()
        self.numerics = resolve(numerics)
        self.checkpoint = open_checkpoint(self.path)
        self.config = self.checkpoint.config
        self.ctx = self._check_ctx(ctx)
        self.model = Transformer(self.config, self.checkpoint, self.numerics)
        self._tokenizer: Tokenizer | None = None
        self._tokenizer_known = False

    def _check_ctx(self, ctx: int) -> int:
        limit = self.config.max_position_embeddings
        if not 1 <= ctx <= limit:
            raise Ds4Error(f"ctx: {ctx} is outside 1 to {limit}, the context this checkpoint is made for")
        return ctx

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer, or None: such a checkpoint works with token ids only."""
        if not self._tokenizer_known:
            self._tokenizer_known = True
            if "tokenizer.ggml.model" in self.checkpoint.metadata:
                self._tokenizer = Tokenizer.from_gguf(self.checkpoint.metadata, source=str(self.path))
            elif self.checkpoint.tokenizer_files is not None:
                self._tokenizer = Tokenizer.from_directory(self.checkpoint.tokenizer_files)
        return self._tokenizer

    @property
    def generation(self) -> Generation:
        """Which effort levels the chat format has: "preview" or "0731" (spec chat.md 2.4)."""
        template = self.checkpoint.metadata.get("tokenizer.chat_template")
        metadata = self.checkpoint.metadata
        name = str(metadata.get("general.name", f"{metadata.get('_name_or_path', '')} {self.path.name}"))
        return chat_generation(name=name, chat_template=template, dspark=self.config.dspark_block_size is not None)

    def session(self, ctx: int | None = None) -> Session:
        """A new empty session for up to ``ctx`` tokens (default: the model's own ``ctx``)."""
        return Session(self, self._check_ctx(self.ctx if ctx is None else ctx))

    def session_bytes(self, ctx: int | None = None) -> int:
        """Bytes of state that a session of this capacity allocates."""
        return cache_bytes(self.config, self.model.formats(), self.ctx if ctx is None else ctx)

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits f32 ``[n, vocab]`` of every token of a text, in the prefill form; row i predicts token i + 1."""
        session = self.session(max(1, len(ids)))
        return self.model.prefill(session._check(ids), 0, session.cache, all_logits=True)

    def encode_prompt(
        self,
        prompt: str | Sequence[dict] | Sequence[int],
        *,
        thinking: bool = False,
        raw: bool = False,
        reasoning_effort: str | None = None,
    ) -> list[int]:
        """Token ids of a prompt: text or chat messages through the chat format, ``raw`` text, or ids as they are."""
        messages: list[dict] = [{"role": "user", "content": prompt}]
        if not isinstance(prompt, str):
            messages = [m for m in prompt if isinstance(m, dict)]
            if not messages:
                return [operator.index(i) for i in prompt if not isinstance(i, dict)]
            if len(messages) < len(prompt):
                raise Ds4Error("prompt: it mixes chat messages with something else; give messages, token ids or text")
        if self.tokenizer is None:
            raise Ds4Error(f"{self.path}: the checkpoint has no tokenizer; give token ids instead of text")
        if isinstance(prompt, str) and raw:
            return self.tokenizer.encode(prompt)
        text = encode_messages(
            messages, thinking=thinking, reasoning_effort=reasoning_effort, generation=self.generation
        )
        return self.tokenizer.encode(text)

    def generate(
        self,
        prompt: str | Sequence[dict] | Sequence[int],
        params: SamplingParams | None = None,
        *,
        thinking: bool = False,
        raw: bool = False,
        reasoning_effort: str | None = None,
        session: Session | None = None,
        progress: Progress | None = None,
    ) -> Generator[Piece | Statistics, None, None]:
        """Yield pieces of text with their token ids as they come, then one :class:`Statistics` (also after Ctrl-C).

        A ``session`` whose tokens begin the prompt is continued: only the rest is processed. Raises Ds4Error for a
        prompt that does not fit; generation that reaches the end of the context stops with reason "length".
        """
        started = time.perf_counter()
        params = params or SamplingParams()
        ids = self.encode_prompt(prompt, thinking=thinking, raw=raw, reasoning_effort=reasoning_effort)
        if not ids:
            raise Ds4Error("prompt: it is empty; give some text")
        session = session if session is not None else self.session()
        stats = Statistics(prompt_tokens=len(ids), weights_bytes=self.checkpoint.total_bytes)
        stats.cached_tokens = session.position
        if session.ids != ids[: session.position] or session.position == len(ids):
            raise ValueError("the session's tokens are not a proper beginning of the prompt")
        stop = set(params.stop_token_ids) | (self.tokenizer.stop_ids if self.tokenizer else {self.config.eos_token_id})
        decoder = StreamDecoder(self.tokenizer, skip_special=True) if self.tokenizer else None
        n_known = self.tokenizer.n_vocab if self.tokenizer else 0  # the model's vocabulary may be padded beyond it
        sampler = Sampler(params)
        history = list(ids)
        decode_started = time.perf_counter()
        try:
            logits = session.prefill(ids[session.position :], progress=progress)
            stats.prefill_seconds = time.perf_counter() - started
            while True:
                token = sampler.sample(logits, history)
                if not stats.generated_tokens:
                    stats.first_token_seconds = time.perf_counter() - started
                    decode_started = time.perf_counter()
                stats.generated_tokens += 1
                stats.token_ids.append(token)
                history.append(token)
                if token in stop:
                    stats.finish_reason = "stop"
                    break
                yield Piece(decoder.push(token) if decoder and token < n_known else "", [token])
                if stats.generated_tokens >= params.max_tokens or session.position >= session.ctx:
                    break
                logits = session.decode([token])[0]
        except KeyboardInterrupt:
            stats.finish_reason = "interrupted"
        finally:
            if stats.generated_tokens:
                stats.decode_seconds = time.perf_counter() - decode_started
        tail = decoder.flush() if decoder else ""
        if tail:
            yield Piece(tail, [])
        stats.peak_memory_bytes = peak_memory_bytes()
        yield stats


def _report(progress: Progress, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def peak_memory_bytes() -> int:
    """Highest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
