"""A stand-in for ds4.engine: the same names and calls, an answer from a script, no model.

The command line's tests put it in sys.modules["ds4.engine"], so that they need neither weights nor seconds.
"""

from __future__ import annotations

import copy
import json
import types
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ds4.errors import Ds4Error

BOS, EOS = 0, 1


@dataclass
class Piece:
    text: str
    token_ids: list[int]


@dataclass
class Statistics:
    prompt_tokens: int = 14
    cached_tokens: int = 0
    prefill_seconds: float = 0.5
    generated_tokens: int = 3
    decode_seconds: float = 0.1
    first_token_seconds: float = 0.6
    finish_reason: str = "stop"
    token_ids: list[int] = field(default_factory=list)
    peak_memory_bytes: int = 300 * 2**20
    weights_bytes: int = 18_000_000
    draft: Any = None

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.generated_tokens / self.decode_seconds

    def to_dict(self) -> dict[str, Any]:
        rates = {
            "prompt_tokens_per_second": self.prompt_tokens_per_second,
            "tokens_per_second": self.tokens_per_second,
        }
        return asdict(self) | rates


class Session:
    """What the command line looks at: the tokens, and how many they are."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    @property
    def position(self) -> int:
        return len(self.ids)


class LLM:
    """Answers with ``script``: pieces of text, exceptions to raise, or a finish reason such as "<length>"."""

    script: list[Any] = ["Par", "is"]  # noqa: RUF012
    load_error: BaseException | None = None
    tokenizer: Any = object()
    made: list[LLM] = []  # noqa: RUF012

    def __init__(
        self,
        path=None,
        *,
        device="auto",
        ctx=8192,
        numerics=None,
        draft="auto",
        draft_model=None,
        on_load=None,
        on_plan=None,
    ) -> None:
        if self.load_error:
            raise self.load_error
        self.options = {"path": path, "device": device, "ctx": ctx, "numerics": numerics, "draft": draft}
        self.options["draft_model"] = draft_model
        self.path, self.device = Path(path or "bundled.gguf"), "cpu"
        self.ids: dict[str, int] = {}
        self.config = types.SimpleNamespace(bos_token_id=BOS, eos_token_id=EOS)
        self.calls: list[dict[str, Any]] = []
        self.sessions: list[Session] = []
        self.made.append(self)

    def session(self, ctx=None) -> Session:
        self.sessions.append(Session())
        return self.sessions[-1]

    def encode_prompt(self, prompt, *, thinking=False, raw=False, reasoning_effort=None) -> list[int]:
        """BOS and a token id for every message; ``decoded`` finds the messages again."""
        return [BOS, *(self.ids.setdefault(json.dumps(message), len(self.ids) + 2) for message in prompt)]

    def decoded(self, ids: list[int]) -> list[Any]:
        """Messages where the prompt was encoded as a whole; tokens of an answer and EOS stay numbers."""
        messages = {token: json.loads(message) for message, token in self.ids.items()}
        assert ids[0] == BOS
        return [messages.get(token, token) for token in ids[1:]]

    def generate(
        self, prompt, params=None, *, thinking=False, raw=False, reasoning_effort=None, session=None, progress=None
    ):
        self.calls.append({"prompt": copy.deepcopy(prompt), "params": params, "thinking": thinking, "raw": raw})
        self.calls[-1] |= {"effort": reasoning_effort, "session": session}
        if session is not None:
            assert session.ids == prompt[: session.position]
            assert session.position < len(prompt)
            session.ids = list(prompt)  # the fake processes no token that it generates
        if progress:
            progress(14, 14)
        ids, finish = [], "stop"
        for step in self.script:
            if isinstance(step, BaseException):
                raise step
            if step == "<eos>":
                ids.append(EOS)
                continue
            if step.startswith("<") and step.endswith(">") and "think" not in step:
                finish = step[1:-1]
                continue
            ids.append(100 + len(ids))
            try:
                yield Piece(step, [ids[-1]])
            except KeyboardInterrupt:
                finish = "interrupted"
                break
        yield Statistics(generated_tokens=len(ids), finish_reason=finish, token_ids=ids)


def module(script: list[Any] | None = None, load_error: BaseException | None = None) -> types.ModuleType:
    """A fresh ``ds4.engine`` with its own LLM class."""
    made = types.ModuleType("ds4.engine")
    llm = type("LLM", (LLM,), {"script": script or LLM.script, "load_error": load_error, "made": []})
    vars(made).update(LLM=llm, Piece=Piece, Statistics=Statistics, Ds4Error=Ds4Error)
    return made
