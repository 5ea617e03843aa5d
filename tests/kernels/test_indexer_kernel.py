"""The indexer's kernels beyond the generic checks: golden, exact arithmetic, ties, slices, and both in a row."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cuemu.backend import CpuBackend, missing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from unit_data import assert_close, decode_fp8, load_unit

from ds4.kernels.cases import Case, Exact, Inputs
from ds4.kernels.indexer.cases import KEY, score_inputs, topk_inputs
from ds4.kernels.indexer.op import INDEX_SCORE, INDEX_TOPK, SLICE, index_score, index_topk
from ds4.kernels.kv_publish import finish_entry, pool_csa
from ds4.kernels.numerics import Numerics
from ds4.kernels.proj import proj
from ds4.kernels.registry import run_kernels
from ds4.kernels.verify import check_tokens

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

CPU = torch.device("cpu")


def select(scores: Tensor, pos: int, top_k: int, backend: CpuBackend | None = None) -> list[list[int]]:
    """What index_topk's kernel chooses, without the places that are left; those are checked to be -1."""
    inputs = {"scores": scores, "pos": torch.tensor([pos], dtype=torch.int32), "top_k": top_k}
    chosen = run_kernels(INDEX_TOPK, inputs, backend or CpuBackend())["selected"]
    for t, row in enumerate(chosen):
        assert (row[min((pos + t + 1) // 4, top_k) :] == -1).all()
    return [row[row >= 0].tolist() for row in chosen]


def best(row: list[float], n: int, top_k: int) -> list[int]:
    """The definition, on Python's own order of numbers."""
    return sorted(sorted(range(n), key=lambda e: (-row[e], e))[:top_k])


def chosen_by_reference(inputs: Inputs) -> Tensor:
    """Both references in a row; no two scores at the cut are so close that rounding could change the choice."""
    top_k = inputs["top_k"]
    scores = INDEX_SCORE.reference(inputs)["scores"]
    for row in scores[~scores[:, 0].isnan()]:  # the others need no scores
        ordered = row[~row.isnan()].sort(descending=True).values
        assert ordered[top_k - 1] - ordered[top_k] > 2e-5, "choose another seed"
    return INDEX_TOPK.reference({"scores": scores, "pos": inputs["pos"], "top_k": top_k})["selected"]


@pytest.mark.parametrize("offset", range(4))
def test_golden_through_the_kernels(golden: Path, offset: int) -> None:
    """Tokens 8 to 15 from 8 - offset on, so that they stand at every place of a launch; keys packed as in the cache."""
    g = load_unit(golden, "indexer")
    n_heads, first = 8, 8 - offset
    numerics = Numerics(act_fp8=True, index_rotate=True, index_fp4=True)
    kv = F.pad(g["x"] @ g["c_wkv"].T, (0, 0, 4, 0))
    gate = F.pad(g["x"] @ g["c_wgate"].T + g["c_ape"].repeat(4, 1), (0, 0, 4, 0))
    c_cis = torch.complex(g["c_cos"], g["c_sin"])
    keys = KEY.pack(finish_entry(pool_csa(kv, gate, 0), g["c_norm"], c_cis, 1e-6, numerics, indexer=True))
    q = proj(g["qr"], decode_fp8(g["wq_b"], g["wq_b_s"]), numerics).unflatten(1, (n_heads, 128))
    part = slice(first, first + 8)
    inputs = {"q": q[part].contiguous(), "keys": keys, "pos": torch.tensor([first], dtype=torch.int32), "top_k": 0}
    inputs |= {"cis": torch.stack((g["q_cos"], g["q_sin"]), dim=-1)[part].contiguous()}
    inputs |= {"weights": (g["x"] @ g["weights_proj"].T)[part].contiguous(), "weight_scale": (128 * n_heads) ** -0.5}
    scores = run_kernels(INDEX_SCORE, inputs, CpuBackend(seed=offset))["scores"]
    want = g["index_score"][part]
    visible = want > -1e29
    assert torch.equal(visible.sum(1), (torch.arange(first, first + 8) + 1) // 4)
    assert_close(scores[visible], want[visible])
    chosen = select(scores, first, 2)
    assert chosen == [best(row.tolist(), int(n), 2) for row, n in zip(want, visible.sum(1), strict=True)]


def test_every_code_and_scale_of_a_key_is_exact() -> None:
    """A query of equal values meets sums of key columns that FP32 holds exactly, so that no order can show."""
    rng = torch.Generator().manual_seed(0)
    keys = torch.randint(0, 256, (96, KEY.row_bytes), generator=rng, dtype=torch.uint8)
    keys[:, 64:] = 125 + keys[:, 64:] % 4
    keys[:16, :64] = torch.arange(16, dtype=torch.uint8).mul(17)[:, None]  # each code alone
    keys[16:80, :64] = 0
    keys[torch.arange(16, 80), torch.arange(64)] = 0x72  # each byte alone: 1 in the even column, 6 in the odd one
    q = torch.zeros(1, 2, 128)
    q[:, :, 0] = torch.tensor([2.0, -2.0]) * 128**0.5  # 2 in all columns after the rotation
    inputs: Inputs = {"q": q, "cis": torch.zeros(1, 32, 2), "weights": torch.tensor([[3.0, -5.0]]), "keys": keys}
    inputs |= {"pos": torch.tensor([4 * 96], dtype=torch.int32), "weight_scale": 0.5, "top_k": 8}
    dot = 2 * KEY.unpack(keys).sum(1)
    want = dot.relu() * 1.5 - (-dot).relu() * 2.5
    for order in ("lifo", "warps"):
        assert torch.equal(run_kernels(INDEX_SCORE, inputs, CpuBackend(order=order))["scores"][0], want)


@pytest.mark.parametrize("shift", [-60, 60])
def test_scores_scale_with_their_keys(shift: int) -> None:
    """A power of two in a key's block scales is the same power in its score, bit for bit."""
    inputs = score_inputs(0, CPU, n_tok=2, n_heads=4, pos=4 * 50, n_entries=51, top_k=16)
    want = run_kernels(INDEX_SCORE, inputs, CpuBackend())["scores"]
    moved = inputs["keys"].clone()
    moved[:50, 64:] += shift % 256
    scores = run_kernels(INDEX_SCORE, inputs | {"keys": moved}, CpuBackend())["scores"]
    assert torch.equal(scores, want * 2.0**shift)


def test_scores_do_not_depend_on_the_grid_and_stay_in_their_places() -> None:
    """Several tiles a warp, in one block, against one tile a warp; what is not seen stays as it was."""
    inputs = score_inputs(1, CPU, n_tok=5, n_heads=4, pos=4 * 600 - 3, n_entries=640, top_k=599)
    found = []
    for n_blocks in (1, 2, 7, 20):
        outputs = {"scores": torch.full((5, 640), 7.5)}
        (call,) = INDEX_SCORE.calls(inputs, outputs)
        CpuBackend(order="random", seed=n_blocks).run([replace(call, grid=(n_blocks, *call.grid[1:]))])
        found.append(outputs["scores"])
    for scores in found:
        assert torch.equal(scores, found[0])
    untouched = found[0] == 7.5
    assert untouched[:2].all()  # tokens that see 599, all of which are chosen
    assert torch.equal((~untouched[2:]).sum(1), torch.tensor([600, 600, 600]))
    assert untouched[2:, 600:].all()


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.data())
def test_topk_is_its_definition(data: st.DataObject) -> None:
    n_entries = data.draw(st.integers(1, 1200))
    n_tok = data.draw(st.integers(1, 3))
    pos = data.draw(st.integers(0, 4 * n_entries - n_tok))
    top_k = data.draw(st.integers(1, 40) | st.sampled_from([128, 512, 1024]))
    spread = data.draw(st.sampled_from([1, 2, 10, 10000]))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    scores = torch.randint(-spread, spread + 1, (n_tok, n_entries), generator=rng).float()
    order = data.draw(st.sampled_from(["forward", "lifo", "warps"]))
    chosen = select(scores, pos, top_k, CpuBackend(order=order))
    assert chosen == [best(row, (pos + t + 1) // 4, top_k) for t, row in enumerate(scores.tolist())]


@pytest.mark.parametrize(("n_slices", "top_k"), [(2, 1024), (3, 512), (4, 16)])
def test_slices_select_as_one(n_slices: int, top_k: int) -> None:
    """Ties across slices; the last one has less than top_k entries, or all its places but one."""
    for n in ((n_slices - 1) * SLICE + 5, n_slices * SLICE - 1):
        rng = torch.Generator().manual_seed(n)
        scores = torch.randint(0, 64, (1, n + 9), generator=rng).float()
        scores[0, n:] = torch.inf
        want = best(scores[0].tolist(), n, top_k)
        assert select(scores, 4 * n + 1, top_k, CpuBackend(order="random", seed=1)) == [want]


def test_capacity_does_not_show_and_counters_are_zero_again() -> None:
    scores = topk_inputs(0, CPU, n_tok=2, pos=4 * 2000, n_entries=2001, top_k=64)["scores"]
    want = select(scores, 4 * 2000, 64)
    assert select(F.pad(scores, (0, 3 * SLICE), value=torch.nan), 4 * 2000, 64) == want
    inputs = topk_inputs(0, CPU, n_tok=3, pos=4 * (SLICE + 1) - 2, n_entries=2 * SLICE, top_k=64)
    outputs = INDEX_TOPK.outputs(inputs)
    CpuBackend().run(INDEX_TOPK.calls(inputs, outputs))
    assert outputs["counter"].tolist() == [0] * 3


@pytest.mark.parametrize("pos", range(2044, 2048))
def test_scores_then_choice_beyond_2048_tokens(pos: int) -> None:
    """From where the first tokens see all 511 or 512 entries to where the last ones leave one or two out."""
    n_tok, top_k = 8, 512
    inputs = score_inputs(pos, CPU, n_tok=n_tok, n_heads=4, pos=pos, n_entries=520, top_k=top_k)
    want = chosen_by_reference(inputs)
    outputs = INDEX_SCORE.outputs(inputs)
    choice = {"scores": outputs["scores"], "pos": inputs["pos"], "top_k": top_k}
    chosen = INDEX_TOPK.outputs(choice)
    CpuBackend(order="warps").run(INDEX_SCORE.calls(inputs, outputs) + INDEX_TOPK.calls(choice, chosen))
    assert torch.equal(chosen["selected"], want)
    assert want.max() == (pos + n_tok) // 4 - 1


@pytest.mark.skipif(missing("tsan") is not None, reason=str(missing("tsan")))
def test_launches_in_a_row_wait_for_each_other() -> None:
    """Two layers on the same tensors, several tiles a warp: each launch reads or overwrites what the last one had."""
    inputs = score_inputs(0, CPU, n_tok=2, n_heads=4, pos=4 * 280 - 3, n_entries=290, top_k=64)
    want = chosen_by_reference(inputs)
    outputs = INDEX_SCORE.outputs(inputs)
    choice = {"scores": outputs["scores"], "pos": inputs["pos"], "top_k": 64}
    chosen = INDEX_TOPK.outputs(choice)
    (score,), (topk,) = INDEX_SCORE.calls(inputs, outputs), INDEX_TOPK.calls(choice, chosen)
    score = replace(score, grid=(1, *score.grid[1:]))
    CpuBackend("tsan", order="lifo").run([score, topk, score, topk])  # raises where it finds a race
    assert torch.equal(chosen["selected"], want)


@pytest.mark.parametrize("pos", range(4 * 20, 4 * 20 + 4))
def test_tokens_alone_agree_wherever_a_launch_crosses_a_window(pos: int) -> None:
    shape: Inputs = {"n_tok": 8, "pos": pos, "n_entries": 24, "top_k": 20}
    score = Case("score", "edges", partial(score_inputs, n_heads=4, **shape), {"scores": Exact()}, bytes_moved=0)
    topk = Case("topk", "edges", partial(topk_inputs, **shape), {"selected": Exact()}, bytes_moved=0)
    assert check_tokens(INDEX_SCORE, score, CpuBackend(), CPU) == []
    assert check_tokens(INDEX_TOPK, topk, CpuBackend(), CPU) == []


def test_cpu_tensors_go_through_the_references() -> None:
    inputs = score_inputs(0, CPU, n_tok=2, n_heads=4, pos=4 * 20 - 2, n_entries=24, top_k=19)
    scores = index_score(**inputs)
    assert scores[0].isnan().all()  # sees 19, which are all chosen
    assert torch.equal(scores[1].isnan(), torch.arange(24) >= 20)
    left_out = int(scores[1, :20].argmin())
    chosen = index_topk(scores, inputs["pos"], top_k=19)
    assert chosen.tolist() == [list(range(19)), [e for e in range(20) if e != left_out]]


def test_arguments_that_do_not_fit() -> None:
    inputs = score_inputs(0, CPU, n_tok=2, n_heads=4, pos=80, n_entries=24, top_k=16)
    for name, value in (("cis", torch.zeros(1, 32, 2)), ("keys", torch.zeros(24, 132, dtype=torch.uint8))):
        with pytest.raises(ValueError, match=f"index_score: {name} has shape"):
            run_kernels(INDEX_SCORE, inputs | {name: value}, CpuBackend())
    many = {"q": torch.zeros(2, 65, 128), "weights": torch.zeros(2, 65)}
    with pytest.raises(ValueError, match="65 heads"):
        run_kernels(INDEX_SCORE, inputs | many, CpuBackend())
    inputs = topk_inputs(0, CPU, n_tok=1, pos=80, n_entries=16 * SLICE + 1, top_k=1024)
    with pytest.raises(ValueError, match="top_k 1024 of scores"):
        run_kernels(INDEX_TOPK, inputs, CpuBackend())
