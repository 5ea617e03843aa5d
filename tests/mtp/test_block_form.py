"""Products of a draft block's rows against FP64 and against the decode form, and that drafts are always the same.

A row of an FP32 product of 256 to 2,304 terms is within 1e-6 of the FP64 one (norm of the difference over norm of the
row; measured 6e-7 and less). The expert layer is two such products and a few FP32 operations: 2e-6 (measured 6e-7).
"""

from __future__ import annotations

import pytest
import torch
from feeding import relative
from torch import Tensor

from ds4 import LLM
from ds4.demo import bundled_draft_path
from ds4.kernels.launch import Launch
from ds4.kernels.numerics import resolve
from ds4.model.context import Context, make_context
from ds4.model.moe import MoE
from ds4.mtp import block_form
from ds4.mtp.block_form import BlockProduct
from ds4.mtp.drafter import Draft
from ds4.mtp.dspark import DSpark, DSparkDrafter
from ds4.sampling import Sampler, SamplingParams
from ds4.session import Session
from ds4.weights.tensor import PackedTensor

GREEDY = Sampler(SamplingParams())


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(draft_model=bundled_draft_path(), ctx=256)


def head_of(session: Session) -> DSpark:
    assert isinstance(session.drafter, DSparkDrafter)
    return session.drafter.dspark


@pytest.fixture(scope="module")
def head(llm: LLM) -> DSpark:
    return head_of(llm.session())


@pytest.fixture(params=["ordered", "blas", "tiled"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a product is computed: by oneDNN where torch has it, by BLAS where not, and of large matrices."""
    if request.param == "ordered" and not block_form.ORDERS:
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(block_form, "ORDERS", request.param == "ordered")
    if request.param == "tiled":
        monkeypatch.setattr(block_form, "TILED_BYTES", 0)
    return request.param


def f64(*weights: object) -> Tensor:
    """The stack of weights."""
    assert all(isinstance(w, PackedTensor) for w in weights)
    return torch.cat([w.dequantize() for w in weights]).double()  # type: ignore[attr-defined]


def rows(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 5])
def test_stacked(head: DSpark, way: str, n: int) -> None:
    attn = head.stages[0].attn
    product, w = BlockProduct(attn.wq_a, attn.wkv), f64(attn.wq_a, attn.wkv)
    assert product.is_small is (way != "tiled")
    for seed in range(2):  # the first call puts the matrix in order
        x = rows(n, 256, seed)
        assert relative(product(x), (x.double() @ w.t()).float()) <= 1e-6


def test_part_of_the_rows(head: DSpark, way: str) -> None:
    attn, x = head.stages[1].attn, rows(5, 1024)
    for part in ((0, 128), (128, 256)):
        expected = (x.double() @ f64(attn.wo_a)[slice(*part)].t()).float()
        assert relative(BlockProduct(attn.wo_a, rows=part)(x), expected) <= 1e-6


def test_side_by_side(head: DSpark, way: str) -> None:
    downs = [e.w2 for e in head.stages[0].moe.experts]
    product, x = BlockProduct(*downs, dim=1), rows(5, 8 * 256)
    if way == "tiled":
        with pytest.raises(ValueError, match="side by side"):
            product(x)
        return
    w = torch.cat([f64(down) for down in downs], dim=1)
    assert relative(product(x), (x.double() @ w.t()).float()) <= 1e-6


def test_roundings(head: DSpark) -> None:
    attn, x = head.stages[0].attn, rows(5, 256)
    product, official = BlockProduct(attn.wq_a), resolve("official")
    made = product.proj(x, official)
    assert torch.equal(made, made.bfloat16().float())
    assert 1e-2 < relative(made, product(x)) < 0.1
    assert torch.equal(product.proj(x, resolve("exact")), product(x))


def contexts(head: DSpark, numerics: str) -> tuple[Context, Context]:
    """Of a block of five rows: as it is drafted, and in the decode form."""
    made = []
    for decode in (False, True):
        launch = Launch(decode, 64, 5, 5, tuple(range(5)), torch.arange(64, 69))
        made.append(make_context(head.config, head.trunk.rope, resolve(numerics), launch, torch.zeros(5).long()))
    return made[0], made[1]


def test_experts(head: DSpark) -> None:
    block, decode = contexts(head, "serve")
    for i, stage in enumerate(head.stages):
        x = 3 * rows(5, 256, i)
        assert relative(stage.moe(x, block), MoE.__call__(stage.moe, x, decode)) <= 2e-6


@pytest.mark.parametrize("why", ["large", "rounded"])
def test_experts_one_by_one(head: DSpark, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """Where they are not small together, and where each slot's result is rounded."""
    block, _ = contexts(head, "official" if why == "rounded" else "serve")
    moe, x = head.stages[0].moe, rows(5, 256)
    if why == "large":
        monkeypatch.setattr(block_form, "TILED_BYTES", 8 * 512 * 256 * 4)
    monkeypatch.setattr(BlockProduct, "__call__", None)
    assert torch.equal(moe(x, block), MoE.__call__(moe, x, block))


def test_a_draft_is_always_the_same(llm: LLM) -> None:
    """Whatever was drafted before, with one thread or two."""
    prompt = llm.encode_prompt("Tell me a short story about a robot learning to paint.")
    first = int(llm.session().prefill(prompt).argmax())

    def draft(*before: int) -> Draft:
        session = llm.session()
        session.prefill(prompt)
        for token in before:
            session.draft([*prompt, token], 5, GREEDY)
        return session.draft([*prompt, first], 5, GREEDY)

    threads, made = torch.get_num_threads(), draft()
    assert len(made.tokens) == 5
    try:
        torch.set_num_threads(2)
        others = [draft(), draft(7, 400)]
    finally:
        torch.set_num_threads(threads)
    for other in [*others, draft(first, 9)]:
        assert (other.tokens, other.confidence) == (made.tokens, made.confidence)
