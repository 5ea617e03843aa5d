"""Prompts through kernels: lists of launches for up to so many tokens, and what runs them chunk by chunk.

A list is made once for a model, a cache and a capacity. Its grids are those of the capacity; how many tokens there are
is read from device memory, and blocks without tokens leave at once. A token's result depends neither on the capacity
nor on the other tokens, so that any cutting of a prompt gives the same bits (design.md, "Two forms").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ds4.kernels.entry import Backend, KernelCall
from ds4.kernels.head.last_rows_op import LAST_ROWS
from ds4.kernels.launch import DECODE_ROWS, PREFILL_ROWS, Launch
from ds4.kernels.mhc import hc_expand
from ds4.kv.cache import KVCache
from ds4.model.block import Residual
from ds4.model.prefill_layers import block_pass
from ds4.model.prefill_state import PassBuilder
from ds4.model.transformer import Observer, Transformer, is_length

CAPACITIES = (8, 64, 512, 4096)
"""Tokens that a list is for; the longest is as many as go through the network at a time."""


@runtime_checkable
class LastTokens(Observer, Protocol):
    """An observer whose state depends on the last ``n_needed`` tokens only: it is not shown what is older."""

    n_needed: int

    def skip(self, position: int) -> None:
        """Tokens up to ``position`` were processed and will not be shown."""


def capacity_for(n_tok: int) -> int:
    """The smallest capacity for ``n_tok`` tokens, at most the largest there is."""
    return next((n for n in CAPACITIES if n >= n_tok), CAPACITIES[-1])


class PrefillPass:
    """The launches of a pass of up to ``n_rows`` tokens on a model and a cache.

    ``parts``  the operations in order
    Raises Ds4Error for a checkpoint whose formats or sizes have no kernels.
    """

    def __init__(self, model: Transformer, cache: KVCache, n_rows: int) -> None:
        self.n_rows = n_rows
        s = PassBuilder(model.config, cache, n_rows)
        self.state, self._model = s.pass_state, model
        r = Residual(model.embed_step(s))
        for i, (block, layer) in enumerate(zip(model.blocks, cache.layers, strict=True)):
            s.layer = i
            r = block_pass(block, r, s, layer)
        s.layer = None
        self.parts = tuple(s.parts)
        self.streams, self._end, self._builder, self._marks = r.streams, r, s, s.marks
        self._heads: dict[int, tuple[list[KernelCall], Tensor]] = {}

    @property
    def workspace_bytes(self) -> int:
        return self._builder.workspace_bytes()

    def segments(self, layers: Sequence[int]) -> list[tuple[list[KernelCall], int | None]]:
        """The launches up to where the output streams of each of ``layers`` are in ``streams``, and the rest.

        The last layer's are there only with :meth:`resolved`.
        """
        last = len(self._model.blocks) - 1
        cuts = [(self._marks[i], i) for i in layers if i != last]
        ends: list[tuple[int, int | None]] = [*cuts, (len(self.parts), last if last in layers else None)]
        begin, found = 0, []
        for end, layer in ends:
            found.append(([call for part in self.parts[begin:end] for call in part.calls], layer))
            begin = end
        return found

    def resolved(self, rows: slice) -> Tensor:
        """Final streams f32 ``[n, m, d]`` of some rows, new."""
        r = self._end
        assert r.y is not None
        assert r.post is not None
        assert r.comb is not None
        return hc_expand(r.y[rows], r.streams[rows], r.post[rows], r.comb[rows])

    def head(self, n: int) -> tuple[list[KernelCall], Tensor]:
        """Launches behind a pass that make the logits f32 ``[n, vocab]`` of its last ``n`` tokens, 1 or 8."""
        if n not in self._heads:
            model, r, s = self._model, self._end, self._builder.beside(n)
            given = {"y": r.y, "streams": r.streams, "prev_post": r.post, "prev_comb": r.comb, "count": s.count, "n": n}
            made = s.add(LAST_ROWS, given)
            last = Residual(made["streams1"], made["y1"], made["post1"], made["comb1"])
            logits = model.head_step(last, s, (model.hc_fn, model.hc_scale, model.hc_base), model.norm)["logits"]
            self._heads[n] = [call for part in s.parts for call in part.calls], logits
        return self._heads[n]


class Prefiller:
    """The prefill form of one session through kernels: ``Transformer.prefill`` on a GPU."""

    def __init__(self, model: Transformer, cache: KVCache, backend: Backend) -> None:
        self.model, self.cache, self.backend = model, cache, backend
        self._passes: dict[int, PrefillPass] = {}
        cache.holders.add(self)

    def forget(self) -> None:
        """Lists are made anew from now on."""
        self._passes.clear()

    def at(self, n_rows: int) -> PrefillPass:
        """The launches for up to ``n_rows`` tokens, one of CAPACITIES."""
        if n_rows not in self._passes:
            self._passes[n_rows] = PrefillPass(self.model, self.cache, n_rows)
        return self._passes[n_rows]

    def prefill(
        self,
        ids: Sequence[int],
        start: int,
        *,
        all_logits: bool = False,
        taken: list[int] | None = None,
        progress: Callable[[int], None] | None = None,
        observer: Observer | None = None,
    ) -> Tensor:
        """As ``Transformer.prefill``; logits are new, on the cache's device."""
        kept, done, outs = [] if taken is None else taken, 0, []
        while done < len(ids):
            part = list(ids[done : done + CAPACITIES[-1]])
            found = self.at(capacity_for(len(part)))
            with self.cache.undone_if(partial(is_length, kept, len(kept))):
                self._run(found, part, start + done, observer)
                if all_logits:
                    outs += self._all_logits(found, start + done, len(part))
                elif done + len(part) == len(ids):
                    calls, logits = found.head(1)
                    self.backend.run(calls)
                    outs.append(logits[0].clone())
                if self.cache.device.type == "cuda":
                    torch.cuda.synchronize(self.cache.device)
                kept += part  # a single step: Ctrl-C comes before or after it
            done += len(part)
            if progress is not None:
                progress(done)
        return torch.cat(outs)

    def _run(self, found: PrefillPass, ids: list[int], start: int, observer: Observer | None) -> None:
        found.state.begin(start, ids)
        layers, first = observer.layers if observer is not None else (), start
        if isinstance(observer, LastTokens):
            first = max(start, (start + len(ids) - observer.n_needed) // PREFILL_ROWS * PREFILL_ROWS)
            observer.skip(first)
        rows, seen = slice(first - start, len(ids)), []
        for calls, layer in found.segments(layers):
            self.backend.run(calls)
            if layer == len(self.model.blocks) - 1:
                seen.append(found.resolved(rows))
            elif layer is not None:
                seen.append(found.streams[rows].clone())
        if observer is not None:
            self._show(observer, ids, start, first, seen)

    def _show(self, observer: Observer, ids: list[int], start: int, first: int, seen: list[Tensor]) -> None:
        """The tokens from position ``first`` on and their streams, tile by tile."""
        at = first
        while at < start + len(ids):
            n = min(PREFILL_ROWS - at % PREFILL_ROWS, start + len(ids) - at)
            launch, row_ids = Launch.prefill_tile(at, n), [0] * PREFILL_ROWS
            row_ids[launch.row_slice] = ids[at - start : at - start + n]
            tiles = []
            for streams in seen:
                tile = streams.new_zeros(PREFILL_ROWS, *streams.shape[1:])
                tile[launch.row_slice] = streams[at - first : at - first + n]
                tiles.append(tile)
            with self.model.on_device():
                observer.observe(launch, torch.tensor(row_ids), tiles)
            at += n

    def _all_logits(self, found: PrefillPass, start: int, n_tok: int) -> list[Tensor]:
        outs = []
        for first in range(0, n_tok, DECODE_ROWS):
            n = min(DECODE_ROWS, n_tok - first)
            calls, logits = found.head(DECODE_ROWS)
            found.state.begin(start, [], first + n)
            self.backend.run(calls)
            outs.append(logits[DECODE_ROWS - n :].clone())
        return outs
