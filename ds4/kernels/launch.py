"""Launch: which rows of a fixed-shape call carry tokens.

A token at position p sits in row ``p % n_rows``, in the decode form (8 rows) as in the prefill form (128 rows). Two
calls that compute the same token therefore run the same instructions on the same row, whatever else they compute:
bit-identity holds by construction and does not rest on how a BLAS library treats its rows. One place does rest on it:
in the prefill form an expert takes its tokens in blocks of fixed size, and a token's row there depends on which other
tokens chose the expert (``ds4/kernels/moe``; tested for the library at hand in ``tests/kernels/test_moe.py``).

Several tiles of a prompt go through a layer together (``Transformer.prefill``). Each is still a call of its own for
every operation but the experts, which take the tokens of all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DECODE_ROWS = 8
PREFILL_ROWS = 128


@dataclass(frozen=True, eq=False)
class Launch:
    """``n_tok`` tokens at positions ``start ..`` in the rows of one call.

    ``rows[i]`` is the row of token i; ``pos`` i64 ``[n_rows]`` the absolute position of every row (rows without a token
    have one too: their results are finite and are dropped).
    """

    decode: bool
    start: int
    n_tok: int
    n_rows: int
    rows: tuple[int, ...]
    pos: Tensor

    @property
    def end(self) -> int:
        return self.start + self.n_tok

    @property
    def tile_start(self) -> int:
        """Position of row 0 in the prefill form."""
        return self.start - self.rows[0]

    @property
    def tile_end(self) -> int:
        """Position behind the last row in the prefill form."""
        return self.tile_start + self.n_rows

    @property
    def row_slice(self) -> slice:
        """The rows with tokens, in the prefill form, where they are contiguous."""
        return slice(self.rows[0], self.rows[0] + self.n_tok)

    def take(self, x: Tensor) -> Tensor:
        """The rows of ``x`` ``[n_rows, ...]`` that carry tokens, in order: ``[n_tok, ...]``."""
        first = self.rows[0]
        if self.rows[-1] - first == self.n_tok - 1:  # a view where they do not wrap around, which is most of the time
            return x[first : first + self.n_tok]
        return x[list(self.rows)]

    @staticmethod
    def decode_step(start: int, n_tok: int) -> Launch:
        """1..8 tokens in the decode form."""
        if not 1 <= n_tok <= DECODE_ROWS:
            raise ValueError(f"a decode step takes 1 to {DECODE_ROWS} tokens, got {n_tok}")
        rows = tuple((start + i) % DECODE_ROWS for i in range(n_tok))
        pos = [0] * DECODE_ROWS
        for i, row in enumerate(rows):
            pos[row] = start + i
        return Launch(True, start, n_tok, DECODE_ROWS, rows, torch.tensor(pos))

    @staticmethod
    def prefill_tile(start: int, n_tok: int, n_rows: int = PREFILL_ROWS) -> Launch:
        """Tokens of one aligned tile of ``n_rows`` positions; they must not cross into the next tile."""
        first = start % n_rows
        if not 1 <= n_tok <= n_rows - first:
            raise ValueError(f"{n_tok} tokens from position {start} do not fit one tile of {n_rows}")
        pos = torch.arange(start - first, start - first + n_rows)
        return Launch(False, start, n_tok, n_rows, tuple(range(first, first + n_tok)), pos)
