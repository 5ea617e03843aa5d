"""``attn_decode``'s kernels against the unit golden and FP64, and what must not show in a result: the number of tokens,
the sizes of caches, stale rows, the order of blocks."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from attn_fp64 import in_fp64
from cuemu.backend import CpuBackend, missing
from cuemu.sanitize import sanitized
from torch import Tensor
from unit_data import SUM_ORDER, load_unit, seeded

from ds4.kernels.attn.cases import ROW, STALE, n_entries, random_inputs
from ds4.kernels.attn.op import ATTN_DECODE, attn_decode
from ds4.kernels.cases import Inputs, Outputs
from ds4.kernels.registry import run_kernels
from ds4.kernels.verify import take_tokens
from ds4.kv.ring import ring_read

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
make = partial(random_inputs, 0, torch.device("cpu"), n_heads=4)


def launch(inputs: Inputs, order: str = "warps", seed: int = 1) -> Tensor:
    return run_kernels(ATTN_DECODE, inputs, CpuBackend(order=order, seed=seed))["o"]


def rows_of(inputs: Inputs, token: int) -> Tensor:
    """The rows that a token attends to, f64."""
    end = int(inputs["pos"]) + token + 1
    rows = [ROW.unpack(ring_read(inputs["ring"], max(0, end - inputs["window"]), end))]
    if inputs["ratio"]:
        n = n_entries(end - 1, inputs["ratio"])
        entries = torch.arange(n) if inputs["selected"] is None else inputs["selected"][token, :n]
        rows.append(ROW.unpack(inputs["pool"][entries]))
    return torch.cat(rows).double()


class Golden:
    """unit_sparse_attn, which has heads of 128 and rows in bf16 that are neither packed nor rotated.

    Half of its columns become the rotated ones, under a rotation by nothing; the others are split into two e4m3, which
    hold all of a bf16, in two blocks of columns with the query in both. Rows are doubled, as 512^-0.5 is half of
    128^-0.5; columns that are zero in all rows bring each query to a mean square of 1.
    """

    def __init__(self, golden: Path) -> None:
        g = load_unit(golden, "sparse_attn")
        self.kv, self.sink, self.expected = g["kv"][0], g["attn_sink"].clone(), g["o_ref"][0]
        self.lists = [row[row >= 0].long() for row in g["topk_idxs"][0]]
        first, last = g["q"][0].split(64, dim=-1)
        self.q = torch.cat((first, first, torch.zeros(*first.shape[:2], 320), last), dim=-1)
        self.q[..., 128:448] = ((512 - self.q.square().sum(-1, keepdim=True)) / 320).sqrt()
        rows = torch.zeros(len(self.kv), 512)
        rows[:, :64] = 2 * self.kv[:, :64]
        rows[:, 448:] = 2 * self.kv[:, 64:]
        high = ROW.unpack(ROW.pack(rows))
        rows[:, 64:128] = rows[:, :64] - high[:, :64]
        self.rows = ROW.pack(rows)
        parts = ROW.unpack(self.rows)
        assert torch.equal(parts[:, :64] + parts[:, 64:128], 2 * self.kv[:, :64])
        assert torch.equal(parts[:, 448:], 2 * self.kv[:, 64:])

    def inputs(self, query: int, n_window: int) -> Inputs:
        """A query with the first ``n_window`` rows of its list in the window, the others in the pool."""
        rows = self.rows[self.lists[query]]
        n_pool = len(rows) - n_window
        pos = 4 * n_pool if n_pool else n_window - 1
        ring = torch.full((136, 584), STALE, dtype=torch.uint8)
        ring[(pos - n_window + 1 + torch.arange(n_window)) % 136] = rows[:n_window]
        inputs: Inputs = {"q": self.q[query : query + 1].clone(), "sink": self.sink, "ring": ring}
        inputs |= {"cis": torch.tensor([1.0, 0.0]).expand(1, 32, 2).contiguous(), "eps": 1e-20}
        inputs |= {"pos": torch.tensor([pos], dtype=torch.int32), "window": n_window, "ratio": 4 if n_pool else 0}
        selected = torch.arange(n_pool, dtype=torch.int32).unsqueeze(0) if n_pool else None
        return inputs | {"pool": rows[n_window:].clone() if n_pool else None, "selected": selected}

    def check(self, o: Tensor, query: int) -> None:
        got = torch.cat((o[0, :, :64] + o[0, :, 64:128], o[0, :, 448:]), dim=-1) / 2
        want = self.expected[query]
        assert ((got - want).abs() <= 2**-8 * want.abs() + SUM_ORDER).all()  # the golden is rounded to bf16


@pytest.mark.parametrize("order", ["forward", "lifo", "warps"])
def test_golden(golden: Path, order: str) -> None:
    g = Golden(golden)
    for query, rows in enumerate(g.lists):
        for n_window in (len(rows), 3):
            inputs = g.inputs(query, n_window)
            g.check(launch(inputs, order), query)
    with pytest.raises(AssertionError):
        g.check(launch(inputs | {"sink": torch.full_like(g.sink, -torch.inf)}), query)


@pytest.mark.parametrize("n", [1, 2, 128, 129, 2047, 2048, 2049, 2050, 2051, 2052, 8320])
def test_error_against_fp64(n: int, capsys: pytest.CaptureFixture[str]) -> None:
    """For rows of size 1. Measured 3.7e-6 for one row, 4.5e-6 for two, 1.8e-6 for 129 and 1e-6 for thousands."""
    inputs = make(n_tok=1, pos=n - 1) if n <= 128 else make(n_tok=1, pos=128 * (n - 127) - 2, ratio=128)
    assert len(rows_of(inputs, 0)) == n
    error = (launch(inputs) - in_fp64(inputs, rows_of)).abs().max().item()
    with capsys.disabled():
        print(f" {n} rows: {error:.1e} ")
    assert error < 1e-5


def test_positions_of_the_cases_in_fp64() -> None:
    inputs = make(n_tok=8, pos=500, ratio=4, top_k=16)
    assert (launch(inputs) - in_fp64(inputs, rows_of)).abs().max() < 1e-5


@pytest.mark.parametrize(("pos", "ratio", "top_k"), [(130, 0, 0), (1020, 4, 32), (124, 128, 0), (8 * 136 - 4, 128, 0)])
def test_a_token_among_others_and_alone(pos: int, ratio: int, top_k: int) -> None:
    """Where the ring wraps around and where entries are completed."""
    inputs = make(n_tok=8, pos=pos, ratio=ratio, top_k=top_k)
    whole = launch(inputs)
    for first, last in [(i, i + 1) for i in range(8)] + [(0, 2), (3, 6)]:
        part = launch(take_tokens(ATTN_DECODE, inputs, first, last))
        assert torch.equal(part, whole[first:last]), (first, last)


def test_sizes_of_caches_do_not_show() -> None:
    """More entries, more slots, a longer list: other grids and workspaces, the same spans."""
    inputs = make(n_tok=2, pos=128 * 905, ratio=128, spare=0)
    o = launch(inputs)
    more = inputs | {"pool": torch.cat((inputs["pool"], torch.full((4000, 584), STALE, dtype=torch.uint8)))}
    assert torch.equal(launch(more), o)
    inputs = make(n_tok=2, pos=300, ratio=4, top_k=80)
    o = launch(inputs)
    tail = torch.full((2, 944), -1, dtype=torch.int32)
    assert torch.equal(launch(inputs | {"selected": torch.cat((inputs["selected"], tail), dim=1)}), o)
    assert torch.equal(launch(inputs | {"selected": None}), o)  # 75 entries, all of them in the list
    ring = torch.full((200, 584), STALE, dtype=torch.uint8)
    positions = torch.arange(300 - 127, 302)
    ring[positions % 200] = inputs["ring"][positions % 136]
    assert torch.equal(launch(inputs | {"ring": ring}), o)


def test_stale_rows_do_not_show() -> None:
    """Slots and entries outside a token's view hold other bytes, NaN in both parts of a row among them."""
    inputs = make(n_tok=2, pos=60, ratio=4, top_k=16)
    o = launch(inputs)
    seen = torch.arange(62) % 136
    for stale in (0x00, 0xFF):
        other = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        other["ring"][torch.isin(torch.arange(136), seen, invert=True)] = stale
        other["pool"][n_entries(61, 4) :] = stale
        assert torch.equal(launch(other), o)


def test_visible_rows_do_show() -> None:
    """Every row counts: the first and the last of the window, of the pool and of the list."""
    inputs = make(n_tok=1, pos=400, ratio=4, top_k=16)
    o = launch(inputs)
    for name, row in [("ring", (400 - 127) % 136), ("ring", 400 % 136)] + [
        ("pool", int(inputs["selected"][0, i])) for i in (0, 15)
    ]:
        other = inputs | {name: inputs[name].clone()}
        other[name][row] = ROW.pack(torch.ones(1, 512))[0]
        assert not torch.equal(launch(other), o), (name, row)


@pytest.mark.parametrize("pos", [60, 128 * 1000])
def test_order_of_blocks_does_not_show(pos: int) -> None:
    inputs = make(n_tok=2, pos=pos, ratio=128)
    first, *others = (launch(inputs, order, 7) for order in ("forward", "lifo", "random", "warps"))
    assert all(torch.equal(o, first) for o in others)


@pytest.mark.parametrize("mode", ["asan", "tsan"])
def test_sanitizers_find_nothing_where_tiles_follow_each_other(mode: str) -> None:
    """The smoke cases, which all operations run under them, have a tile a block."""
    if missing(mode):
        pytest.skip(str(missing(mode)))
    case = next(case for case in ATTN_DECODE.cases() if case.name == "several tiles a span")
    assert sanitized(ATTN_DECODE, case, mode) == []


def test_scores_far_apart() -> None:
    """A maximum that grows from tile to tile rescales earlier sums, one that comes first wipes out later rows."""
    for rising in (True, False):
        inputs = make(n_tok=1, pos=127)
        inputs["q"][:] = 0
        inputs["q"][..., 0] = 1.0
        inputs["cis"][:] = torch.tensor([1.0, 0.0])
        rows = torch.zeros(128, 512)
        rows[:, 0] = torch.arange(128.0) if rising else torch.arange(127.0, -1, -1)
        rows[:, 1] = torch.arange(128.0)
        inputs["ring"][:128] = ROW.pack(rows)
        o, want = launch(inputs), in_fp64(inputs, rows_of)
        assert (o - want).abs().max() < 1e-5 * 127
        assert (want[0, :, 1] - (127 if rising else 0)).abs().max() < 4


def test_not_a_number_stays_in_its_head() -> None:
    inputs = make(n_tok=2, pos=200, ratio=128)
    o = launch(inputs)
    inputs["q"][1, 2, 5] = torch.nan
    damaged = launch(inputs)
    assert damaged[1, 2].isnan().all()
    damaged[1, 2] = o[1, 2]
    assert torch.equal(damaged, o)


def test_cpu_tensors_go_through_the_reference() -> None:
    inputs = make(n_tok=3, pos=125, ratio=4, top_k=16)
    want: Outputs = ATTN_DECODE.reference(inputs)
    assert torch.equal(attn_decode(**inputs), want["o"])
    assert (want["o"] - in_fp64(inputs, rows_of)).abs().max() < 2e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": seeded(1, 4, 256)}, "q has shape"),
        ({"cis": seeded(2, 32, 2)}, "cis has shape"),
        ({"sink": seeded(5)}, "sink has shape"),
        ({"ring": torch.zeros(136, 583, dtype=torch.uint8)}, "ring has shape"),
        ({"ring": torch.zeros(127, 584, dtype=torch.uint8)}, "127 slots"),
        ({"window": 0}, "window 0"),
        ({"q": seeded(9, 4, 512), "cis": seeded(9, 32, 2)}, "9 tokens"),
        ({"ratio": 4}, "a pool goes with a ratio"),
        ({"selected": torch.zeros(1, 16, dtype=torch.int32)}, "a selection with a pool"),
        ({"pool": torch.zeros(4, 584, dtype=torch.uint8)}, "a pool goes with a ratio"),
    ],
)
def test_inputs_that_do_not_fit(change: Inputs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch(make(n_tok=1, pos=3) | change)
