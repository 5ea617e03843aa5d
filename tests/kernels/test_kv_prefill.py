"""The prefill form of the cache writers: the bytes of the decode form, however a text is cut into chunks and steps."""

from __future__ import annotations

import pytest
import torch
from cuemu.backend import CpuBackend, missing
from torch import Tensor
from unit_data import seeded

from ds4.kernels.cases import Inputs, Outputs
from ds4.kernels.kv_publish.cases import Kind, angles
from ds4.kernels.kv_publish.op import KV_PREFILL, KV_PUBLISH_CSA, KV_PUBLISH_HCA, KV_PUBLISH_SWA
from ds4.kernels.kv_publish.prefill_cases import random_inputs
from ds4.kernels.registry import run_kernels
from ds4.kernels.verify import copy_to, poison, take_tokens

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

CPU = torch.device("cpu")
PUBLISH = {"swa": KV_PUBLISH_SWA, "hca": KV_PUBLISH_HCA, "csa": KV_PUBLISH_CSA}
WINDOW, RING_SLOTS = 24, 32


def text_inputs(kind: Kind, n: int, ratio: int) -> Inputs:
    """Inputs whose token tensors have ``n`` tokens from position 0, the caches as they are before any text: NaN."""
    options = {"ratio": ratio, "n_entries": n // ratio, "window": WINDOW, "ring_slots": RING_SLOTS}
    inputs = random_inputs(0, CPU, kind=kind, n_rows=1, pos=0, **options)
    for i, name in enumerate(KV_PREFILL[kind].token_inputs):
        if not name.endswith("cis"):
            inputs[name] = seeded(n, inputs[name].shape[1], seed=i)
    positions = torch.arange(n)
    inputs["cis"], inputs["entry_cis"] = angles(positions), angles((positions + 1 - ratio).clamp_min(0))
    poison(inputs[name] for name in KV_PREFILL[kind].mutates)
    return inputs


def step(kind: Kind, text: Inputs, first: int, n: int) -> None:
    """Tokens ``first .. first + n - 1`` through the decode form."""
    run_kernels(PUBLISH[kind], take_tokens(PUBLISH[kind], text, first, first + n), CpuBackend())


def chunk(
    kind: Kind, text: Inputs, first: int, n: int, *, capacity: int | None = None, order: str = "warps"
) -> Outputs:
    """The same tokens through the prefill form, as the first of ``capacity`` rows, NaN behind them."""
    inputs = take_tokens(KV_PREFILL[kind], text, first, first + n)
    if capacity is not None:
        inputs["count"] = torch.tensor([n], dtype=torch.int32)
        for name in KV_PREFILL[kind].token_inputs:
            row = inputs[name]
            inputs[name] = torch.cat((row, row.new_full((capacity - n, *row.shape[1:]), torch.nan)))
    results = run_kernels(KV_PREFILL[kind], inputs, CpuBackend(order=order, seed=first))
    return {"qr": results["qr"][:n], "rows": results["rows"][: WINDOW + n]}


def caches(kind: Kind, text: Inputs) -> Outputs:
    return {name: text[name] for name in KV_PREFILL[kind].mutates}


def assert_same(got: Outputs, want: Outputs) -> None:
    assert {name: torch.equal(got[name], want[name]) for name in want} == dict.fromkeys(want, True)


def stored_rows(kind: Kind, text: Inputs, n: int) -> Tensor:
    """u8 [n, 584]: every token's row as the decode form stores it; the caches are those behind the text."""
    rows = []
    for first in range(0, n, 8):
        last = min(first + 8, n)
        step(kind, text, first, last - first)
        rows.append(text["ring"][torch.arange(first, last) % RING_SLOTS])
    return torch.cat(rows)


@pytest.mark.parametrize(("kind", "ratio", "n"), [("swa", 4, 75), ("csa", 4, 75), ("hca", 16, 75), ("hca", 128, 260)])
def test_bytes_are_those_of_the_decode_form(kind: Kind, ratio: int, n: int) -> None:
    """In chunks longer and shorter than rings and states, with steps between them; the rows of a chunk's window too."""
    text = text_inputs(kind, n, ratio)
    want = copy_to(text, CPU)
    rows = stored_rows(kind, want, n)
    qr = chunk(kind, copy_to(text, CPU), 0, n, order="lifo")["qr"]
    assert not qr.isnan().any()
    for sizes, capacity in (([n], None), ([n], n + 5), ([3, 9, 1, 26, 5], 30), ([1, 2, 14], None)):
        got, done, turn = copy_to(text, CPU), 0, 0
        while done < n:
            size = min(sizes[turn % len(sizes)], n - done)
            if turn % 2 and size <= 8:
                step(kind, got, done, size)
            else:
                made = chunk(kind, got, done, size, capacity=capacity)
                assert torch.equal(made["qr"], qr[done : done + size])
                before = min(WINDOW, done)
                assert torch.equal(made["rows"][WINDOW - before :], rows[done - before : done + size])
            done, turn = done + size, turn + 1
        assert_same(caches(kind, got), caches(kind, want))


@pytest.mark.parametrize("kind", PUBLISH)
def test_no_token_leaves_no_trace(kind: Kind) -> None:
    """A chunk of a capacity that none of the tokens fills: only the window's rows are there."""
    inputs = random_inputs(0, CPU, kind=kind, n_rows=9, pos=123, count=0)
    before = copy_to(inputs, CPU)
    rows = run_kernels(KV_PREFILL[kind], inputs, CpuBackend())["rows"]
    assert_same(caches(kind, inputs), caches(kind, before))
    assert torch.equal(rows[:8], before["ring"][torch.arange(115, 123) % 16])


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("swa", {"kv": torch.zeros(1, 448)}, r"kv is \[1, 448\], not \[1, 512\]"),
        ("swa", {"window": 17}, "ring has 16 slots; 17 are needed"),
        ("swa", {"window": -1}, "window -1 is below 0"),
        ("swa", {"count": torch.ones(2, dtype=torch.int32)}, "count is not one number"),
        ("csa", {"state": torch.zeros(7, 2, 1024)}, "state has 7 slots; 8 are needed"),
        ("csa", {"keys": torch.zeros(3, 68, dtype=torch.uint8)}, "different numbers of entries"),
        ("hca", {"state": torch.zeros(127, 2, 512)}, "state has 127 slots; 128 are needed"),
        ("hca", {"ape": torch.zeros(6, 512)}, "ratio 6"),
    ],
)
def test_what_does_not_fit_is_refused(kind: Kind, change: Inputs, message: str) -> None:
    inputs = random_inputs(0, CPU, kind=kind, n_rows=1, pos=0)
    with pytest.raises(ValueError, match=message):
        run_kernels(KV_PREFILL[kind], inputs | change, CpuBackend())


def test_more_than_8192_rows_are_refused() -> None:
    inputs = text_inputs("swa", 8193, 4)
    with pytest.raises(ValueError, match="8193 tokens"):
        run_kernels(KV_PREFILL["swa"], inputs, CpuBackend())
