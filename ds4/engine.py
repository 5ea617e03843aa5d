"""LLM: a loaded model, its sessions and its answers."""

from __future__ import annotations

import operator
import os
import time
from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor

from ds4 import hub
from ds4.demo import bundled_model_path
from ds4.draft_length import AUTO, Costs, DraftLength, draft_length
from ds4.errors import Ds4Error
from ds4.fit import Fit, Planner, free_bytes
from ds4.generation import Answer, Piece, Statistics, peak_memory_bytes
from ds4.kernels.cuda_backend import backend_for
from ds4.kernels.entry import Backend
from ds4.kernels.launch import DECODE_ROWS
from ds4.kernels.numerics import DEFAULT_GROUP, GROUPS, Numerics, resolve
from ds4.kv.spec import RowFormats, cache_bytes
from ds4.model.device_params import DeviceParams
from ds4.model.params import Params
from ds4.model.steps import Decoder
from ds4.model.transformer import Transformer
from ds4.mtp.drafter import Drafter
from ds4.mtp.heads import MakeDrafter, draft_head
from ds4.sampling import SamplingParams
from ds4.session import Progress, Session, explained_memory
from ds4.text.chat import chat_generation, encode_messages
from ds4.text.templates import Generation
from ds4.text.tokenizer import Tokenizer
from ds4.weights import Checkpoint, open_checkpoint

__all__ = ["LLM", "Piece", "Progress", "Session", "Statistics"]


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
    ``draft``: tokens to draft ahead of each step, 1 to 7; "auto" (default) drafts as many as pay, if the checkpoint has
    a draft head; "off" or 0 never does. ``draft_model``: a draft head in a file of its own.
    ``memory`` is what ``sessions`` of ``ctx`` tokens at a time will take: ``on_plan`` is told before anything is
    loaded, and where that is more than there is, Ds4Error says how much and which context would fit.
    """

    weights_in_file = True
    """On the CPU: weights are read where they are."""

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        device: str = "auto",
        ctx: int = 8192,
        numerics: str | Numerics | None = None,
        draft: int | str = AUTO,
        draft_model: str | os.PathLike[str] | None = None,
        on_load: Progress | None = None,
        on_plan: Callable[[Fit], None] | None = None,
        sessions: int = 1,
    ) -> None:
        self.device = resolve_device(device)
        self.draft = self._check_draft(draft, draft_model is not None)
        self.numerics = resolve(numerics)
        self.checkpoint = self._open(path, draft_model)
        self.path = self.checkpoint.path
        self.config = self.checkpoint.config
        self.ctx = self._check_ctx(ctx)
        self.memory = self._plan_memory(sessions)
        if on_plan is not None:
            on_plan(self.memory)
        self.memory.check()
        self.backend: Backend | None = None
        self.model, self._make_drafter = self._load(on_load)
        if self.draft:
            self.draft = self._resolve_length(self.draft)
        self._costs = Costs()
        self._tokenizer: Tokenizer | None = None
        self._tokenizer_known = False

    def _open(self, path: str | os.PathLike[str] | None, draft_model: str | os.PathLike[str] | None) -> Checkpoint:
        """The checkpoint and its draft head."""
        head_path = hub.local_path(draft_model) if draft_model is not None else None
        return open_checkpoint(
            hub.local_path(path) if path is not None else bundled_model_path(), head_path, replace_draft=True
        )

    def _plan_memory(self, sessions: int) -> Fit:
        """What will be allocated, against what is free now."""
        n = self.numerics
        formats = RowFormats.of(self.config, kv_fp8=n.kv_fp8, kv_rope_bf16=n.kv_rope_bf16, index_fp4=n.index_fp4)
        longest = DECODE_ROWS if self.draft == AUTO else int(self.draft) + 1
        if not self.config.n_mtp_layers:
            longest = 1
        device = current_gpu() if self.device == "cuda" else torch.device("cpu")
        planner = Planner(
            self.checkpoint,
            "cuda" if self.device == "cuda" else "cpu",
            formats=formats,
            n_toks=range(1, longest + 1),
            sessions=sessions,
            in_file=self.weights_in_file,
        )
        return planner.fit(self.ctx, free_bytes(device))

    def _check_draft(self, draft: int | str, from_file: bool) -> DraftLength:
        """What was asked for."""
        length = draft_length(draft)
        if from_file and length == 0:
            raise Ds4Error("draft: it is off, so the draft model would not be used; leave out one of them")
        return length

    def _resolve_length(self, length: DraftLength) -> DraftLength:
        """``length``, or 0 where AUTO finds no head. Raises Ds4Error for a number that cannot be drafted."""
        drafter = self.new_drafter()
        if length == AUTO:
            return AUTO if drafter is not None else 0
        if drafter is None and length:
            if self.config.n_mtp_layers:
                raise Ds4Error("draft: the model was loaded without its draft head; load it with draft='auto'")
            raise Ds4Error(f"draft: {self.path} has no draft head; give one with --draft-model, or use --draft off")
        if drafter is not None and length > drafter.max_tokens:
            raise Ds4Error(f"draft: this draft head drafts at most {drafter.max_tokens} tokens, {length} were wanted")
        return length

    def new_drafter(self, decoder: Decoder | None = None) -> Drafter | None:
        """The draft head at work on a new text; None where nothing is drafted.

        ``decoder``: the session's whose steps go through kernels, so that drafts do too.
        """
        return self._make_drafter(decoder) if self._make_drafter is not None else None

    def _load(self, on_load: Progress | None) -> tuple[Transformer, MakeDrafter | None]:
        """The network on its device, and its draft head if one is wanted."""
        device = torch.device("cpu")
        if self.device == "cuda":
            if self.numerics != GROUPS[DEFAULT_GROUP]:
                raise Ds4Error(f"numerics: the GPU kernels compute as {DEFAULT_GROUP!r} does; others need --device cpu")
            device = current_gpu()
            self.backend = backend_for(device)
        params = self._params(device, on_load)
        with explained_memory(f"the weights, {self.checkpoint.total_bytes / 1e9:.1f} GB; choose a smaller checkpoint"):
            model = Transformer(self.config, params, self.numerics, device)
            return model, draft_head(model, params) if self.draft else None

    def _params(self, device: torch.device, on_load: Progress | None) -> Params:
        """Where the network takes its weights from."""
        return DeviceParams(self.checkpoint, device, on_load) if self.device == "cuda" else self.checkpoint

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

    def load_session(self, path: str | os.PathLike[str], ctx: int | None = None) -> Session:
        """A session that ``Session.save`` wrote, as it was, for up to ``ctx`` tokens (default: the model's own).

        It goes on bit for bit as if it had never been interrupted, with as many tokens to undo. Raises Ds4Error for a
        file of another checkpoint, other numerics or another version, a damaged one, and a context that is too small.
        """
        from ds4 import store  # and safetensors with it: only where a session is loaded

        return store.Saved(path).session(self, ctx)

    def session_bytes(self, ctx: int | None = None) -> int:
        """Bytes of state of a session of this capacity when its text is as long."""
        return cache_bytes(self.config, self.model.formats(), self.ctx if ctx is None else ctx)

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits f32 ``[n, vocab]`` of every token of a text, in the prefill form; row i predicts token i + 1."""
        return self.session(max(1, len(ids))).rows(ids)

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
        draft: int | str | None = None,
    ) -> Generator[Piece | Statistics, None, None]:
        """Yield pieces of text with their token ids as they come, then one :class:`Statistics` (also after Ctrl-C).

        A ``session`` whose tokens begin the prompt is continued: only the rest is processed. ``draft`` takes the place
        of the model's own setting for this answer. On a GPU the environment
        variable DS4_PROFILE (ds4.profiling.environment) adds a table of times on standard error. Raises Ds4Error for a
        prompt that does not fit; generation that reaches the end of the context stops with reason "length".
        """
        started = time.perf_counter()
        params = params or SamplingParams()
        length = self.draft if draft is None else self._resolve_length(self._check_draft(draft, False))
        ids = self.encode_prompt(prompt, thinking=thinking, raw=raw, reasoning_effort=reasoning_effort)
        if not ids:
            raise Ds4Error("prompt: it is empty; give some text")
        if session is None:
            session = self.session()
            if length == 0:  # nobody will draft in it later
                session.drafter = None
        if session.ids != ids[: session.position] or session.position == len(ids):
            raise ValueError("the session's tokens are not a proper beginning of the prompt")
        stop = set(params.stop_token_ids) | (self.tokenizer.stop_ids if self.tokenizer else {self.config.eos_token_id})
        answer = Answer(session, ids, params, stop, self.tokenizer, length, self._costs)
        yield from answer.pieces(progress, started)
        answer.statistics.weights_bytes = self.checkpoint.total_bytes
        answer.statistics.peak_memory_bytes = peak_memory_bytes()
        session.print_profile()
        yield answer.statistics
