"""One answer as it is generated: pieces of text, statistics, and the loop that makes both."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Generator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, field

from ds4.ahead import decoding
from ds4.draft_length import Costs, DraftLength
from ds4.sampling import Sampler, SamplingParams
from ds4.session import Progress, Session
from ds4.speculation import DraftStatistics
from ds4.text.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Piece:
    """Text that has become complete, and the tokens that completed it (text may be empty inside a character)."""

    text: str
    token_ids: list[int]


@dataclass
class Statistics:
    """What a generation cost. Times in seconds, sizes in bytes. ``draft`` is None where nothing was to be drafted."""

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
    draft: DraftStatistics | None = None

    @property
    def prompt_tokens_per_second(self) -> float:
        """Prompt tokens processed (cached ones left out) per second; 0 when there was nothing to do."""
        done = self.prompt_tokens - self.cached_tokens
        return done / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens per second; the first token comes from the prefill and is not counted."""
        steps = self.generated_tokens - 1
        return steps / self.decode_seconds if steps > 0 and self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, object]:
        out = asdict(self)
        out["prompt_tokens_per_second"] = self.prompt_tokens_per_second
        out["tokens_per_second"] = self.tokens_per_second
        out["draft"] = self.draft.to_dict() if self.draft is not None else None
        return out


class Answer:
    """One answer in the making.

    session    holds a proper beginning of ``prompt``
    stop       tokens that end the answer
    length     of drafts; ``costs`` are the model's, measured so far
    tokenizer  None: pieces have no text
    """

    def __init__(
        self,
        session: Session,
        prompt: Sequence[int],
        params: SamplingParams,
        stop: AbstractSet[int],
        tokenizer: Tokenizer | None,
        length: DraftLength,
        costs: Costs,
    ) -> None:
        self.session = session
        self.params = params
        self.statistics = Statistics(prompt_tokens=len(prompt), cached_tokens=session.position)
        self._stop = stop
        self._history = list(prompt)
        self._sampler = Sampler(params)
        self._decoder = StreamDecoder(tokenizer, skip_special=True) if tokenizer else None
        self._n_known = tokenizer.n_vocab if tokenizer else 0  # the model's vocabulary may be padded beyond it
        self._speculation = decoding(session, self._sampler, length, costs)
        if length != 0:
            self.statistics.draft = self._speculation.statistics

    def pieces(self, progress: Progress | None, started: float) -> Generator[Piece, None, None]:
        """Process what is left of the prompt and answer it; ``started`` is when the request came (perf_counter).

        However it ends (a stop token, a limit, Ctrl-C, an error, the reader going away), the session has then processed
        the prompt and all tokens given out but the last, as if they had been decoded one by one.
        """
        stats, session, history = self.statistics, self.session, self._history
        decode_started = time.perf_counter()
        try:
            logits = session.prefill(history[session.position :], progress=progress)
            stats.prefill_seconds = time.perf_counter() - started
            tokens = [self._sampler.sample(logits.cpu(), history)]
            stats.first_token_seconds = time.perf_counter() - started
            decode_started = time.perf_counter()
            yield from self._decoded(tokens)
        except KeyboardInterrupt:
            stats.finish_reason = "interrupted"
        finally:
            if stats.generated_tokens:
                stats.decode_seconds = time.perf_counter() - decode_started
                session.rewind(session.position - len(history) + 1)
        tail = self._decoder.flush() if self._decoder else ""
        if tail:
            yield Piece(tail, [])

    def _decoded(self, tokens: list[int]) -> Generator[Piece, None, None]:
        """Pieces of ``tokens`` and of all that follow them, until something ends the answer."""
        while True:
            for token in tokens:
                self._take(token)
                if token in self._stop:
                    self.statistics.finish_reason = "stop"
                    return
                yield self._piece(token)
                if self._left() < 1:
                    return
            tokens = self._speculation.tokens(self._history, self._left())

    def _take(self, token: int) -> None:
        self.statistics.generated_tokens += 1
        self.statistics.token_ids.append(token)
        self._history.append(token)

    def _piece(self, token: int) -> Piece:
        return Piece(self._decoder.push(token) if self._decoder and token < self._n_known else "", [token])

    def _left(self) -> int:
        """Tokens that may still be chosen: the token behind the context's last one is the last."""
        by_ctx = self.session.ctx - len(self._history) + 1
        return min(self.params.max_tokens - self.statistics.generated_tokens, by_ctx)


def peak_memory_bytes() -> int:
    """Highest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
