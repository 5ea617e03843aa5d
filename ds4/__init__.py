"""ds4: DeepSeek-V4-Flash on one GPU, from Python.

from ds4 import LLM, SamplingParams
for piece in LLM().generate("What is the capital of France?", SamplingParams(max_tokens=20)): ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ds4.errors import Ds4Error

if TYPE_CHECKING:
    from ds4.engine import LLM, Piece, Session, Statistics
    from ds4.sampling import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "Ds4Error", "Piece", "SamplingParams", "Session", "Statistics", "load_model"]

_HOMES = {
    "LLM": "ds4.engine",
    "Piece": "ds4.engine",
    "SamplingParams": "ds4.sampling",
    "Session": "ds4.engine",
    "Statistics": "ds4.engine",
}


def __getattr__(name: str) -> object:
    """Load the engine, and torch with it, only when it is asked for."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ds4' has no attribute {name!r}")


def load_model(path: str | None = None, **options: Any) -> LLM:
    """Shorthand for ``LLM(path, **options)``."""
    from ds4.engine import LLM

    return LLM(path, **options)
