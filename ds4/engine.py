"""LLM and Session: loading, prefill, the decode loop, streaming, statistics."""

from __future__ import annotations

import operator
import os
import resource
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from ds4 import hub
from ds4.demo import bundled_model_path
from ds4.errors import Ds4Error
from ds4.kernels.cuda_backend import backend_for
from ds4.kernels.entry import Backend
from ds4.kernels.numerics import DEFAULT_GROUP, GROUPS, Numerics, resolve
from ds4.kv.spec import cache_bytes
from ds4.model.device_params import DeviceParams
from ds4.model.transformer import Transformer
from ds4.sampling import Sampler, SamplingParams
from ds4.session import Progress, Session, explained_memory
from ds4.text.chat import chat_generation, encode_messages
from ds4.text.templates import Generation
from ds4.text.tokenizer import StreamDecoder, Tokenizer
from ds4.weights import open_checkpoint


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


def resolve_device(device: str) -> str:
    """Where a model runs, "cpu" or "cuda", from what was asked for. Raises Ds4Error where it cannot run there.

    "auto" is the CPU: no GPU has run the CUDA path yet, so it is used where it is asked for.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise Ds4Error(f"device: {device!r} is not one of auto, cpu, cuda")
    if device != "cuda":
        return "cpu"
    if not torch.cuda.is_available():
        raise Ds4Error("device: torch finds no GPU it can use (ds4 doctor says why); use --device cpu")
    return "cuda"


def current_gpu() -> torch.device:
    """torch's current GPU."""
    return torch.device("cuda", torch.cuda.current_device())


class LLM:
    """A loaded model. ``path=None`` is the bundled demonstration model.

    ``numerics``: "serve" (default: FP32 arithmetic, KV rows and indexer keys rounded as the official code rounds them,
    which is what lets them be stored packed), "official" (every rounding of the official code) or "exact" (none).
    ``device``: "cuda" loads the weights onto the GPU, calling ``on_load(bytes done, bytes in all)``, and decodes with
    ds4's kernels; "cpu" leaves them in the file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        device: str = "auto",
        ctx: int = 8192,
        numerics: str | Numerics | None = None,
        draft: int = 0,
        on_load: Progress | None = None,
    ) -> None:
        self.device = resolve_device(device)
        if draft:
            raise Ds4Error(f"draft: this version has no speculative decoding yet; use 0 instead of {draft}")
        self.path = hub.local_path(path) if path is not None else bundled_model_path()
        self.numerics = resolve(numerics)
        self.checkpoint = open_checkpoint(self.path)
        self.config = self.checkpoint.config
        self.ctx = self._check_ctx(ctx)
        self.backend: Backend | None = None
        self.model = self._load_on_gpu(on_load) if self.device == "cuda" else self._load()
        self._tokenizer: Tokenizer | None = None
        self._tokenizer_known = False

    def _load(self) -> Transformer:
        return Transformer(self.config, self.checkpoint, self.numerics)

    def _load_on_gpu(self, on_load: Progress | None) -> Transformer:
        if self.numerics != GROUPS[DEFAULT_GROUP]:
            raise Ds4Error(f"numerics: the GPU kernels compute as {DEFAULT_GROUP!r} does; others need --device cpu")
        device = current_gpu()
        self.backend = backend_for(device)
        params = DeviceParams(self.checkpoint, device, on_load)
        with explained_memory(f"the weights, {self.checkpoint.total_bytes / 1e9:.1f} GB; choose a smaller checkpoint"):
            return Transformer(self.config, params, self.numerics, device)

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

        A ``session`` whose tokens begin the prompt is continued: only the rest is processed. On a GPU the environment
        variable DS4_PROFILE (ds4.profiling.environment) adds a table of times on standard error. Raises Ds4Error for a
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
                token = sampler.sample(logits.cpu(), history)
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
        session.print_profile()
        yield stats


def peak_memory_bytes() -> int:
    """Highest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
