"""Tail: what a draft head was shown last, and how far it has written its own caches from that.

A head's context rows need the trunk's streams, which exist only while the trunk runs. In the decode form these are
kept for a few positions, and rows are written when a draft is wanted: by then it is known which tokens were accepted,
and rejected ones cost nothing. Prompt tiles are written at once, in the prefill form, so that rows do not depend on how
a prompt was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ds4.kernels.launch import DECODE_ROWS, Launch
from ds4.kv.ring import ring_read, ring_write
from ds4.kv.spec import MAX_DRAFT

SLOTS = DECODE_ROWS + MAX_DRAFT + 1
"""Positions kept: those not written yet, a decode step on top, and the one that the oldest of them leans on."""

Write = Callable[[Launch, Tensor, Tensor], None]
"""Writes the context rows of a launch, given f32 ``[n_rows, ...]`` and tokens i64 ``[n_rows]`` in its layout."""

Publish = Callable[[int, int], None]
"""Writes the context rows of positions ``first .. end - 1``, 1 to 8 of them, from the tail itself: by kernels."""


class Tail:
    """Streams and tokens of the last positions.

    position  number of tokens observed
    written   context rows of positions 0 .. written - 1 are as if nothing had ever been undone
    ahead     1 where a row also needs the token of the next position (MTP), 0 where it does not (DSpark)
    streams   f32 [SLOTS, *shape], ids i64 [SLOTS]: position p in slot p % SLOTS. Kernels may write them (``begin``)
    publish   takes the place of ``write`` in the decode form
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        ahead: int,
        write: Write,
        device: torch.device | str = "cpu",
        publish: Publish | None = None,
    ) -> None:
        self.position = 0
        self.written = 0
        self._ahead = ahead
        self._write = write
        self._publish = publish
        self.streams = torch.zeros(SLOTS, *shape, device=device)
        self.ids = torch.zeros(SLOTS, dtype=torch.int64, device=device)
        self._claimed = -1  # the token that row position - 1 was written with before the token itself was observed

    def at(self, position: int) -> Tensor:
        """Streams f32 ``shape`` of one of the last positions."""
        return self.streams[position % SLOTS]

    def claim(self, token: int) -> None:
        """The head itself has written row ``position - 1``, taking ``token`` for the next one."""
        self.written, self._claimed = self.position, token

    def observe(self, launch: Launch, ids: Tensor, streams: Tensor) -> None:
        """A launch of the trunk: tokens i64 ``[n_rows]``, streams f32 ``[n_rows, *shape]`` in its layout."""
        start = launch.start
        self.begin(start, int(ids[launch.rows[0]]))
        if not launch.decode:
            self.fill()
            self._write_tile(launch, ids, streams)
        ring_write(self.streams, start, launch.take(streams))
        ring_write(self.ids, start, launch.take(ids))
        self.position = launch.end

    def skip(self, position: int) -> None:
        """Tokens up to ``position`` were processed unseen: nothing that comes depends on them."""
        self.position = self.written = position

    def begin(self, start: int, token: int) -> None:
        """The trunk is going to process up to 8 tokens from position ``start`` on, the first of them ``token``.

        Kernels may then put them and their streams where they belong; ``position`` is moved when they have.
        Raises ValueError where ``start`` is not ``position``.
        """
        if start != self.position:
            raise ValueError(f"tokens from position {start} do not continue at {self.position}")
        if self._ahead and self.written == start and start and token != self._claimed:
            self.written = start - 1
        if start - self._ahead - self.written > MAX_DRAFT - 1:
            self.fill()

    def fill(self) -> None:
        """Write all rows that can be written, in the decode form."""
        end = self.position - self._ahead
        while self.written < end:
            launch = Launch.decode_step(self.written, min(DECODE_ROWS, end - self.written))
            if self._publish is not None:
                self._publish(launch.start, launch.end)
            else:
                ids = ring_read(self.ids, launch.start + self._ahead, launch.end + self._ahead)
                self._write(*self._laid_out(launch, ids))
            self.written = launch.end

    def _laid_out(self, launch: Launch, ids: Tensor) -> tuple[Launch, Tensor, Tensor]:
        """A launch over the last positions with their streams f32 ``[n_rows, *shape]`` and ``ids`` in its layout."""
        streams = self.streams.new_zeros(launch.n_rows, *self.streams.shape[1:])
        ids_of_rows = self.ids.new_zeros(launch.n_rows)
        # As in a ring of n_rows slots: a position's row is its remainder.
        ring_write(streams, launch.start, ring_read(self.streams, launch.start, launch.end))
        ring_write(ids_of_rows, launch.start, ids)
        return launch, streams, ids_of_rows

    def unwritten(self, token: int) -> tuple[Launch, Tensor, Tensor]:
        """What ``write`` takes, for all rows up to the last position, whose next token is ``token``; at least one.

        For a head that writes these rows while it drafts (``ahead`` 1), and then calls :meth:`claim`.
        """
        n = self.n_unwritten()
        start = self.position - n
        ids = torch.cat((ring_read(self.ids, start + 1, self.position), torch.tensor([token])))
        return self._laid_out(Launch.decode_step(start, n), ids)

    def n_unwritten(self) -> int:
        """How many rows :meth:`unwritten` is about, 1 to 8; earlier ones are written first."""
        if self.position - self.written > DECODE_ROWS:
            self.fill()
        return max(1, self.position - self.written)

    def _write_tile(self, launch: Launch, ids: Tensor, streams: Tensor) -> None:
        """Rows of a prompt tile, and the one in front of it where it had to wait for the tile's first token."""
        first, last = launch.start, launch.end - self._ahead
        next_ids = ids.roll(-self._ahead)
        if self.written < first:
            before = Launch.prefill_tile(first - 1, 1, launch.n_rows)
            row = before.rows[0]
            if launch.rows[0]:
                streams = streams.clone()
                streams[row] = self.at(first - 1)
                first -= 1
            else:
                alone = torch.zeros_like(streams)
                alone[row] = self.at(first - 1)
                self._write(before, alone, next_ids)  # rolled: the last row has the tile's first token
        if last > first:
            self._write(Launch.prefill_tile(first, last - first, launch.n_rows), streams, next_ids)
        self.written = last

    def rewind(self, position: int) -> None:
        """Only the first ``position`` tokens count. Raises ValueError for more than there are."""
        if not 0 <= position <= self.position:
            raise ValueError(f"cannot go from position {self.position} to {position}")
        self.position = position
        self.written = min(self.written, max(0, position - self._ahead))

    def state(self) -> dict[str, Tensor]:
        """What has to be kept to go on later.

        counts i64 [3] (position, written, the token that ``claim`` was given), and of the last n <= SLOTS positions
        streams f32 [n, *shape] and ids i64 [n], all on the CPU
        """
        first = max(0, self.position - SLOTS)
        return {
            "counts": torch.tensor([self.position, self.written, self._claimed], device="cpu"),
            "streams": ring_read(self.streams, first, self.position).cpu().contiguous(),
            "ids": ring_read(self.ids, first, self.position).cpu().contiguous(),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on where ``state`` was taken. Raises ValueError for one that belongs to another head."""
        position, written, claimed = (int(n) for n in state["counts"])
        streams, ids = state["streams"], state["ids"]
        n = min(position, SLOTS)
        if streams.shape != (n, *self.streams.shape[1:]) or ids.shape != (n,) or not 0 <= written <= position:
            raise ValueError(f"{tuple(streams.shape)} streams and {tuple(ids.shape)} ids at position {position}")
        self.position, self.written, self._claimed = position, written, claimed
        if n:
            ring_write(self.streams, position - n, streams.to(self.streams.device))
            ring_write(self.ids, position - n, ids.to(self.ids.device))
