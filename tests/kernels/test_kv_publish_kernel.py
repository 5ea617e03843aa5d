"""The cache writers' kernels over launches: every split of the tokens, rejected drafts, whole texts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cuemu.backend import CpuBackend, missing
from torch import Tensor
from unit_data import seeded

from ds4.kernels.cases import Inputs, Outputs
from ds4.kernels.kv_publish import pool_csa, pool_hca
from ds4.kernels.kv_publish.cases import angles, random_inputs
from ds4.kernels.kv_publish.op import KV_PUBLISH_CSA, KV_PUBLISH_HCA, KV_PUBLISH_SWA
from ds4.kernels.kv_publish.ref import KEY, ROW, finish_entry, ring_row
from ds4.kernels.numerics import GROUPS
from ds4.kernels.registry import run, run_kernels
from ds4.kernels.verify import copy_to, take_tokens

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

CPU = torch.device("cpu")
OPERATIONS = {"swa": KV_PUBLISH_SWA, "hca": KV_PUBLISH_HCA, "csa": KV_PUBLISH_CSA}
STARTS = (0, 2, 3, *range(124, 132), 255, 1000, 4095)


def publish(kind: str, inputs: Inputs, first: int, n: int, order: str = "forward") -> Tensor:
    """Launch tokens ``first .. first + n - 1`` of ``inputs`` at their positions; returns qr. Caches are updated."""
    part = take_tokens(OPERATIONS[kind], inputs, first, first + n)
    part["pos"] = inputs["pos"] + first
    return run_kernels(OPERATIONS[kind], part, CpuBackend(order=order, seed=first))["qr"]


def caches(kind: str, inputs: Inputs) -> Outputs:
    return {name: inputs[name] for name in OPERATIONS[kind].mutates}


def assert_same(got: Outputs, want: Outputs) -> None:
    assert {name: torch.equal(got[name], want[name]) for name in want} == dict.fromkeys(want, True)


# ---------------------------------------------------------------- launches


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", OPERATIONS)
def test_split_of_tokens_does_not_show(kind: str, start: int) -> None:
    """8 tokens in one launch, one by one, and as 3 + 3 + 2: the same bits of every cache and of qr."""
    fresh = random_inputs(5, CPU, kind=kind, n_tok=8, pos=start, n_entries=(start + 8) // 4)
    want = copy_to(fresh, CPU)
    qr = publish(kind, want, 0, 8)
    for split in ([1] * 8, [3, 3, 2]):
        got, parts = copy_to(fresh, CPU), []
        for n in split:
            parts.append(publish(kind, got, sum(len(part) for part in parts), n, order="warps"))
        assert torch.equal(torch.cat(parts), qr)
        assert_same(caches(kind, got), caches(kind, want))
    ratio = {"swa": 4, "csa": 4, "hca": 128}[kind]
    for name in ("pool", "keys"):
        if name in fresh:  # exactly the entries of windows that end here are written
            written = (want[name] != fresh[name]).any(1).nonzero().flatten().tolist()
            assert written == list(range(start // ratio, (start + 8) // ratio))


@pytest.mark.parametrize("kind", OPERATIONS)
@pytest.mark.parametrize("start", [1, 120, 125, 251, 1001])
def test_rejected_drafts_leave_no_trace(kind: str, start: int) -> None:
    """Of 8 tokens the last 5 are taken back and others published in their place: as if they had never been there."""
    drafted = random_inputs(1, CPU, kind=kind, n_tok=8, pos=start, n_entries=(start + 11) // 4)
    others = random_inputs(2, CPU, kind=kind, n_tok=8, pos=start + 3)
    others |= {name: drafted[name] for name in drafted if name not in (*OPERATIONS[kind].token_inputs, "pos")}
    plain = copy_to(drafted, CPU)
    publish(kind, plain, 0, 3)
    publish(kind, drafted, 0, 8)
    assert any(not torch.equal(drafted[name], plain[name]) for name in OPERATIONS[kind].mutates)
    for done, n in ((0, 2), (2, 1), (3, 5)):
        for state in (plain, drafted):
            publish(kind, others | caches(kind, state), done, n)
    assert_same(caches(kind, drafted), caches(kind, plain))


def lost_rows(slots: int, start: int) -> list[int]:
    """Positions of the window of the first of 8 tokens at ``start .. start + 7`` whose rows the launch overwrites."""
    inputs = random_inputs(3, CPU, kind="swa", n_tok=8, pos=start)
    inputs["ring"] = torch.randint(0, 256, (slots, 584), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    before = inputs["ring"].clone()
    publish("swa", inputs, 0, 8)
    window = range(start - 127, start)
    return [p - start for p in window if not torch.equal(inputs["ring"][p % slots], before[p % slots])]


def test_a_ring_of_the_window_is_too_short_for_8_tokens() -> None:
    assert lost_rows(128, 1000) == list(range(-127, -120))
    assert lost_rows(134, 1000) == [-127]
    assert lost_rows(135, 1000) == []
    assert lost_rows(136, 1000) == []


@pytest.mark.parametrize(("kind", "pos"), [("csa", 7), ("hca", 255)])
def test_nothing_is_written_beyond_the_room(kind: str, pos: int) -> None:
    """Entry 1 is closed; there is a row for entry 0 alone, and other data behind it."""
    inputs = random_inputs(0, CPU, kind=kind, n_tok=1, pos=pos, n_entries=1)
    behind = {}
    for name in ("pool", "keys"):
        if name in inputs:
            behind[name] = torch.cat((inputs[name], torch.full((3, inputs[name].shape[1]), 0xA5, dtype=torch.uint8)))
            inputs[name] = behind[name][:1]
    before = copy_to(behind, CPU)
    publish(kind, inputs, 0, 1)
    assert_same(behind, before)
    with_room = inputs | behind
    publish(kind, with_room, 0, 1)
    assert all((with_room[name][1] != before[name][1]).any() for name in behind)


# ---------------------------------------------------------------- a whole text


def text_inputs(kind: str, n: int, ratio: int) -> Inputs:
    """Inputs whose token tensors have ``n`` tokens from position 0, the caches as they are before any text: NaN."""
    inputs = random_inputs(0, CPU, kind=kind, n_tok=1, pos=0, ratio=ratio, n_entries=n // ratio)
    for i, name in enumerate(OPERATIONS[kind].token_inputs):
        if not name.endswith("cis"):
            inputs[name] = seeded(n, inputs[name].shape[1], seed=i)
    positions = torch.arange(n)
    inputs["cis"], inputs["entry_cis"] = angles(positions), angles((positions + 1 - ratio).clamp_min(0))
    for name in OPERATIONS[kind].mutates:
        inputs[name].view(-1).view(torch.uint8).fill_(0xFF)
    return inputs


def whole_text(inputs: Inputs, prefix: str, ratio: int) -> Tensor:
    """Entries f32 of all windows at once, from raw rows that never were in a ring."""
    names = (
        ("comp_kv", "comp_gate", "ape", "comp_norm")
        if prefix == "comp"
        else ("idx_kv", "idx_gate", "idx_ape", "idx_norm")
    )
    kv, gate, ape, norm = (inputs[name] for name in names)
    score = gate + ape.repeat(len(gate) // ratio, 1)
    pooled = pool_hca(kv, score, ratio)
    if ratio == 4:
        pooled = pool_csa(F.pad(kv, (0, 0, 4, 0)), F.pad(score, (0, 0, 4, 0)), 0)
    cis = torch.view_as_complex(inputs["entry_cis"])[ratio - 1 :: ratio]
    return finish_entry(pooled, norm, cis, inputs["eps"], GROUPS["serve"], indexer=prefix == "idx")


def assert_stored(got: Tensor, want: Tensor) -> None:
    """Packed rows u8: at most 1 in 1000 bytes is another, where a value lay on a rounding boundary."""
    assert (got != want).float().mean() < 1e-3


@pytest.mark.parametrize(("kind", "ratio", "n"), [("csa", 4, 160), ("hca", 128, 384), ("hca", 16, 160)])
def test_text_in_launches_is_the_text_at_once(kind: str, ratio: int, n: int) -> None:
    """Launches of 1 to 8 tokens from the start of a text; no byte of what was in the caches before is used."""
    inputs = text_inputs(kind, n, ratio)
    done, sizes = 0, [8, 1, 3, 8, 2, 5, 8, 7, 4, 6]
    while done < n:
        size = min(sizes[done % len(sizes)], n - done)
        publish(kind, inputs, done, size)
        done += size
    assert_stored(inputs["pool"], ROW.pack(whole_text(inputs, "comp", ratio)))
    if kind == "csa":
        assert_stored(inputs["keys"], KEY.pack(whole_text(inputs, "idx", ratio)))
    rows = ring_row(inputs["kv"], inputs["kv_norm"], torch.view_as_complex(inputs["cis"]), inputs["eps"])
    last = torch.arange(n - 136, n)
    assert_stored(inputs["ring"][last % 136], ROW.pack(rows[last]))


# ---------------------------------------------------------------- the operations


@pytest.mark.parametrize("kind", OPERATIONS)
def test_cpu_tensors_go_through_the_reference(kind: str) -> None:
    """And the caches are updated in place there as well."""
    inputs = random_inputs(0, CPU, kind=kind, n_tok=8, pos=124)
    want = OPERATIONS[kind].reference(copy_to(inputs, CPU))
    held = caches(kind, inputs)
    results = run(OPERATIONS[kind], inputs)
    assert_same(results, want)
    assert all(results[name] is held[name] for name in held)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("swa", {"kv": torch.zeros(1, 448)}, r"kv is \[1, 448\], not \[1, 512\]"),
        ("swa", {"ring": torch.zeros(136, 580, dtype=torch.uint8)}, r"ring is \[136, 580\], not \[None, 584\]"),
        ("swa", {"q_a": torch.zeros(1, 130), "q_norm": torch.zeros(130)}, "q_lora 130"),
        ("swa", {"ring": torch.zeros(0, 584, dtype=torch.uint8)}, "ring has 0 slots; 1 are needed"),
        ("csa", {"state": torch.zeros(7, 2, 1024)}, "state has 7 slots; 8 are needed"),
        ("csa", {"key_state": torch.zeros(7, 2, 256)}, "key_state has 7 slots; 8 are needed"),
        ("csa", {"keys": torch.zeros(3, 68, dtype=torch.uint8)}, "different numbers of entries"),
        ("csa", {"ape": torch.zeros(8, 1024)}, r"ape is \[8, 1024\], not \[4, 1024\]"),
        ("hca", {"state": torch.zeros(127, 2, 512)}, "state has 127 slots; 128 are needed"),
        ("hca", {"ape": torch.zeros(6, 512)}, "ratio 6"),
        ("hca", {"entry_cis": torch.zeros(1, 32)}, r"entry_cis is \[1, 32\], not \[1, 32, 2\]"),
    ],
)
def test_what_does_not_fit_is_refused(kind: str, change: Inputs, message: str) -> None:
    inputs = random_inputs(0, CPU, kind=kind, n_tok=1, pos=0)
    with pytest.raises(ValueError, match=message):
        run_kernels(OPERATIONS[kind], inputs | change, CpuBackend())


def test_more_than_8_tokens_are_refused() -> None:
    inputs = random_inputs(0, CPU, kind="swa", n_tok=9, pos=0)
    with pytest.raises(ValueError, match="9 tokens"):
        run_kernels(KV_PUBLISH_SWA, inputs, CpuBackend())
