"""``attn_prefill``'s kernel against FP64 and ``attn_decode``, and what must not show in a result: where a chunk begins
and ends, the sizes of tensors, stale rows, the order of blocks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from attn_fp64 import in_fp64
from cuemu.backend import CpuBackend, missing
from cuemu.sanitize import sanitized
from torch import Tensor
from unit_data import seeded

from ds4.kernels.attn.cases import ROW, STALE, n_entries
from ds4.kernels.attn.op import attn_decode, attn_prefill
from ds4.kernels.attn.prefill_cases import random_inputs
from ds4.kernels.attn.prefill_op import ATTN_PREFILL
from ds4.kernels.cases import Close, Inputs, bits, difference
from ds4.kernels.registry import run_kernels

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
make = partial(random_inputs, 0, torch.device("cpu"), n_heads=4)
KINDS = [(0, 0), (4, 16), (128, 0)]  # ratio, top_k


def launch(inputs: Inputs, order: str = "warps", seed: int = 1) -> Tensor:
    return run_kernels(ATTN_PREFILL, inputs, CpuBackend(order=order, seed=seed))["o"]


def same(got: Tensor, want: Tensor) -> bool:
    return torch.equal(bits(got), bits(want))


def cut(inputs: Inputs, first: int, count: int, n_rows: int) -> Inputs:
    """The chunk of ``count`` tokens from token ``first`` on, with room for ``n_rows``; what is not in it is stale."""
    part = dict(inputs)
    for name in ("q", "cis", "selected"):
        if inputs[name] is not None:
            tail = torch.full((n_rows - count, *inputs[name].shape[1:]), -1).to(inputs[name].dtype)
            part[name] = torch.cat((inputs[name][first : first + count], tail))
    seen = inputs["rows"][first : first + inputs["window"] + count]
    part["rows"] = torch.cat((seen, torch.full((n_rows - count, ROW.row_bytes), STALE, dtype=torch.uint8)))
    part["count"] = torch.tensor([count], dtype=torch.int32)
    return part | {"pos": inputs["pos"] + first}


def rows_of(inputs: Inputs, token: int) -> Tensor:
    """The rows that a token attends to, f64."""
    window, ratio, p = inputs["window"], inputs["ratio"], int(inputs["pos"]) + token
    rows = [inputs["rows"][position - p + token + window] for position in range(max(0, p - window + 1), p + 1)]
    if ratio:
        n = n_entries(p, ratio)
        listed = range(n) if inputs["selected"] is None else inputs["selected"][token, :n].tolist()
        rows += [inputs["pool"][entry] for entry in listed]
    return ROW.unpack(torch.stack(rows)).double()


@pytest.mark.parametrize("pos", [0, 3, 127, 128, 129, 255, 256, 257, 128 * 600])
def test_error_against_fp64(pos: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Rounding to bf16 is an error of 1.7e-3, of the weights and of the result: 2.4e-3 together; measured 2.5e-3."""
    for ratio, top_k in KINDS if pos < 1000 else KINDS[2:]:
        inputs = make(n_rows=2, pos=pos, ratio=ratio, top_k=top_k)
        want = in_fp64(inputs, rows_of)
        error = ((launch(inputs) - want).square().mean() / want.square().mean()).sqrt().item()
        with capsys.disabled():
            print(f" {pos}, ratio {ratio}: {error:.1e} ")
        assert error < 2.8e-3


@pytest.mark.parametrize(("ratio", "top_k"), KINDS)
@pytest.mark.parametrize("pos", [0, 126, 254, 700])
def test_agrees_with_decoding(pos: int, ratio: int, top_k: int) -> None:
    """The same values from a ring; decoding has queries and weights to 2^-18. Rounding 160 weights moves a sum of rows
    of size 1 by 2^-9 / 12 as a rule and by five times that once in a million; of three rows by 2^-9 of the largest."""
    inputs = make(n_rows=3, pos=pos, ratio=ratio, top_k=top_k)
    ring = torch.full((136, ROW.row_bytes), STALE, dtype=torch.uint8)
    positions = torch.arange(max(0, pos - 128), pos + 3)
    ring[positions % 136] = inputs["rows"][positions - pos + 128]
    shared = {name: inputs[name] for name in ("cis", "sink", "pool", "selected", "pos", "window", "ratio", "eps")}
    want = attn_decode(inputs["q"].float(), ring=ring, **shared)
    compare = Close(1e-3 if pos else 4e-3, 2**-7, "roundings of weights and of the result")
    assert difference(launch(inputs).float(), want, compare) is None


def cancelling(inputs: Inputs) -> None:
    """Equal weights, and values that nearly add up to nothing: 32 positions of +1 and 32 of -1 in turn, small ones in
    between, so that FP32 sums in another order show in the result."""
    inputs["q"][:] = 0
    position = torch.arange(len(inputs["rows"])) + int(inputs["pos"]) - 128
    sign = torch.where(position % 64 < 32, 1.0, -1.0).unsqueeze(1)
    rng = torch.Generator().manual_seed(1)
    large, small = torch.rand(512, generator=rng) + 1, torch.randn(len(position), 512, generator=rng) * 2**-20
    inputs["rows"].copy_(ROW.pack(torch.where(position.unsqueeze(1) % 2 == 0, sign * large, small)))


@pytest.mark.parametrize(("pos", "ratio", "top_k"), [(0, 4, 2), (130, 0, 0), (123, 4, 16), (379, 128, 0)])
def test_chunks_do_not_show(pos: int, ratio: int, top_k: int) -> None:
    """Ten tokens in one chunk, in two and in many, in chunks with room for more: the same bits. With room for 64 a
    block has more heads."""
    inputs = make(n_rows=10, pos=pos, ratio=ratio, top_k=top_k, change=None if ratio else cancelling)
    whole = launch(inputs)
    assert not whole.isnan().any()
    for first, count, n_rows in [(0, 10, 64), (0, 4, 4), (4, 6, 9), (3, 1, 1), (8, 1, 64), (9, 1, 2), (2, 3, 33)]:
        part = launch(cut(inputs, first, count, n_rows))
        assert same(part[:count], whole[first : first + count]), (first, count, n_rows)


def test_sizes_of_tensors_do_not_show() -> None:
    inputs = make(n_rows=2, pos=128 * 40, ratio=128, spare=0)
    o = launch(inputs)
    more = inputs | {"pool": torch.cat((inputs["pool"], torch.full((4000, 584), STALE, dtype=torch.uint8)))}
    assert same(launch(more), o)
    inputs = make(n_rows=2, pos=300, ratio=4, top_k=80)
    o = launch(inputs)
    tail = torch.full((2, 944), -1, dtype=torch.int32)
    assert same(launch(inputs | {"selected": torch.cat((inputs["selected"], tail), dim=1)}), o)
    assert same(launch(inputs | {"selected": None}), o)  # 75 entries, all of them in the list


def test_number_of_heads_does_not_show() -> None:
    """A head alone, among the first of a block and among the last; 70 heads take two blocks of 64 or five of 16."""
    one = make(n_rows=1, pos=140, n_heads=70)
    many = cut(one, 0, 1, 64)
    whole = launch(one)
    assert same(launch(many)[:1], whole)
    for head in (0, 9, 17, 69):
        alone = one | {"q": one["q"][:, head : head + 1].contiguous(), "sink": one["sink"][head : head + 1].clone()}
        assert same(launch(alone), whole[:, head : head + 1])


def test_stale_rows_do_not_show() -> None:
    """Rows outside a token's view hold other bytes, NaN in both parts of a row among them."""
    inputs = make(n_rows=3, pos=60, ratio=4, top_k=12)
    o = launch(inputs)
    for stale in (0x00, 0xFF):
        other = inputs | {"rows": inputs["rows"].clone(), "pool": inputs["pool"].clone()}
        other["rows"][: 128 - 60] = stale  # negative positions
        unused = torch.isin(torch.arange(len(other["pool"])), inputs["selected"].unique(), invert=True)
        assert unused.any()
        other["pool"][unused] = stale
        assert same(launch(other), o)
        other["rows"][130] = stale  # of the last token
        assert same(launch(other)[:2], o[:2])


def test_visible_rows_do_show() -> None:
    """Every row counts: the first and the last of the window, of the pool and of the list."""
    inputs = make(n_rows=2, pos=400, ratio=4, top_k=16)
    o = launch(inputs)
    entry = [int(inputs["selected"][0, i]) for i in (0, 15)]
    for name, row in [("rows", 1), ("rows", 128), ("pool", entry[0]), ("pool", entry[1])]:
        other = inputs | {name: inputs[name].clone()}
        other[name][row] = ROW.pack(torch.ones(1, 512))[0]
        assert not same(launch(other)[:1], o[:1]), (name, row)


def test_rows_from_count_on_are_left_alone() -> None:
    inputs = make(n_rows=5, pos=100, count=2)
    outputs = ATTN_PREFILL.outputs(inputs)
    for count in (2, 0, 9):
        inputs["count"][:] = count
        outputs["o"].fill_(7)
        CpuBackend().run(ATTN_PREFILL.calls(inputs, outputs))
        assert [bool((o != 7).all()) for o in outputs["o"]] == [t < count for t in range(5)]


def test_order_of_blocks_does_not_show() -> None:
    inputs = make(n_rows=3, pos=128 * 70, ratio=128, n_heads=20)
    first, *others = (launch(inputs, order, 7) for order in ("forward", "lifo", "random", "warps"))
    assert all(same(o, first) for o in others)


@pytest.mark.parametrize("mode", ["asan", "tsan"])
def test_sanitizers_find_nothing_in_a_block_of_64_heads(mode: str) -> None:
    """The smoke cases, which all operations run under them, have a pair of warps that multiply."""
    if missing(mode):
        pytest.skip(str(missing(mode)))
    case = next(case for case in ATTN_PREFILL.cases() if "68 heads" in case.name)
    assert sanitized(ATTN_PREFILL, case, mode) == []


def test_not_a_number_stays_in_its_head() -> None:
    inputs = make(n_rows=2, pos=200, ratio=128)
    o = launch(inputs)
    inputs["q"][1, 2, 5] = torch.nan
    damaged = launch(inputs)
    assert damaged[1, 2].isnan().all()
    damaged[1, 2] = o[1, 2]
    assert same(damaged, o)


def test_values_too_large_are_not_a_number() -> None:
    """A scale above 2^7 is beyond what the kernel decodes: it may not make a finite result."""
    inputs = make(n_rows=1, pos=40)
    for scale in (135, 136, 254):
        inputs["rows"][128, 450] = scale
        assert not launch(inputs)[:, :, 128:192].isfinite().any()


def test_cpu_tensors_go_through_the_reference() -> None:
    inputs = make(n_rows=3, pos=125, ratio=4, top_k=16)
    want = ATTN_PREFILL.reference(inputs)["o"]
    assert same(attn_prefill(**inputs), want)
    assert difference(want.double(), in_fp64(inputs, rows_of), Close(1e-3, 2**-7, "as for decoding")) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": seeded(1, 4, 256).bfloat16()}, "q has shape"),
        ({"cis": seeded(2, 32, 2)}, "cis has shape"),
        ({"sink": seeded(5)}, "sink has shape"),
        ({"rows": torch.zeros(128, 584, dtype=torch.uint8)}, "rows has shape"),
        ({"rows": torch.zeros(129, 583, dtype=torch.uint8)}, "rows has shape"),
        ({"count": torch.zeros(2, dtype=torch.int32)}, "count has shape"),
        ({"window": 0, "rows": torch.zeros(1, 584, dtype=torch.uint8)}, "window 0"),
        ({"q": seeded(1, 4, 512)}, "dtype"),
        ({"ratio": 4}, "a pool goes with a ratio"),
        ({"selected": torch.zeros(1, 16, dtype=torch.int32)}, "a selection with a pool"),
        ({"pool": torch.zeros(4, 584, dtype=torch.uint8)}, "a pool goes with a ratio"),
    ],
)
def test_inputs_that_do_not_fit(change: Inputs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch(make(n_rows=1, pos=3) | change)
