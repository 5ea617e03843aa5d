"""The CPU's counterparts of ds4.kernels.bandwidth and ds4.profiling.measure: how fast its memory is, and which part of
a decode step takes how long."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ds4.model.transformer import Transformer

COPY_BYTES = 256 << 20  # far more than a cache holds
REPEATS = 5


def copy_speed(n_bytes: int = COPY_BYTES, repeats: int = REPEATS) -> dict[str, Any]:
    """Memory bandwidth with torch's threads, in the form of ``ds4.kernels.bandwidth.measure``.

    Copies count bytes read plus bytes written.
    """
    x = torch.arange(n_bytes // 4, dtype=torch.float32)
    y = torch.zeros_like(x)  # its pages exist before they are timed
    works: dict[str, tuple[int, Callable[[], object]]] = {
        "read": (n_bytes, x.sum),
        "copy": (2 * n_bytes, lambda: y.copy_(x)),
    }
    rates: dict[str, list[float]] = {kind: [] for kind in works}
    for _ in range(repeats):
        for kind, (moved, work) in works.items():
            began = time.perf_counter()
            work()
            rates[kind].append(moved / (time.perf_counter() - began) / 1e9)
    rows = [
        {"kind": kind, "bytes": n_bytes, "gb_s": statistics.median(values), "min": min(values), "max": max(values)}
        for kind, values in rates.items()
    ]
    best = {f"{row['kind']}_gb_s": row["gb_s"] for row in rows}
    return {"rows": rows, **best, "repeats": repeats}


class _Timed:
    """Calls ``inner`` and adds the time to ``spent[name]``; everything else is the inner object's."""

    def __init__(self, inner: Any, name: str, spent: dict[str, float], methods: tuple[str, ...] = ()) -> None:
        self._inner, self._name, self._spent, self._methods = inner, name, spent, methods

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._timed(self._inner, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in self._methods:
            return found
        return lambda *args, **kwargs: self._timed(found, *args, **kwargs)

    def _timed(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            self._spent[self._name] = self._spent.get(self._name, 0.0) + time.perf_counter() - began


@contextmanager
def part_times(model: Transformer) -> Iterator[dict[str, float]]:
    """Within it the decode steps of ``model`` add up the seconds of their parts: attention by the kind of layer,
    experts, hyper-connections, head."""
    spent: dict[str, float] = {}
    blocks = model.blocks
    before = [dict(vars(block)) for block in blocks]
    logits = model.logits
    for layer, block in enumerate(blocks):
        kind = f"attention {model.config.layer_kind(layer)}"
        block.attn = _Timed(block.attn, kind, spent, ("decode",))  # type: ignore[assignment]
        block.moe = _Timed(block.moe, "experts", spent)  # type: ignore[assignment]
        block.attn_site = _Timed(block.attn_site, "hyper-connections", spent)  # type: ignore[assignment]
        block.ffn_site = _Timed(block.ffn_site, "hyper-connections", spent)  # type: ignore[assignment]
    model.logits = _Timed(logits, "head", spent)  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        for block, names in zip(blocks, before, strict=True):
            vars(block).update(names)
        del model.logits
