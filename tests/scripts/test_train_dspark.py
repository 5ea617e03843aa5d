"""scripts/train_dspark.py: the network it trains is the one that drafts, and its targets are the trunk's own choices.

In exact arithmetic both compute the same in FP32 in another order: hidden states of a block agree to 1e-5 (norm of the
difference over norm; measured 7e-7), and so do logits and confidence.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from dspark_blocks import Text, Trunk, cut, dense, texts
from dspark_net import BlockNet
from train_demo import make_tokenizer
from train_dspark import NAME, Trainer, initial, score

from ds4.demo import bundled_draft_path, bundled_model_path
from ds4.kernels.numerics import resolve
from ds4.model.transformer import Transformer
from ds4.mtp.dspark import DSpark, DSparkDrafter
from ds4.sampling import Sampler, SamplingParams
from ds4.weights import Checkpoint, open_checkpoint
from ds4.weights.draft import attach_draft, open_draft

B = 5


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(bundled_model_path())


@pytest.fixture(scope="module")
def trunk(checkpoint: Checkpoint) -> Trunk:
    return Trunk(checkpoint, make_tokenizer())


@pytest.fixture(scope="module")
def text(trunk: Trunk) -> Text:
    return next(texts(trunk, make_tokenizer(), 256, 3, "heldout"))


def near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= 1e-5 * b.norm())


def test_the_trained_network_is_the_one_that_drafts(checkpoint: Checkpoint, text: Text) -> None:
    """Blocks at the beginning of a text, where the window is full and where it has moved on."""
    attached = attach_draft(checkpoint, open_draft(bundled_draft_path()), replace=True)
    model = Transformer(attached.config, attached, resolve("exact"))
    head, sampler = DSpark(attached.config, attached, model), Sampler(SamplingParams())
    starts = torch.tensor([[1, 2, 60, 128, 129, 200, 250]])
    with torch.inference_mode():
        net = BlockNet(attached.config, dense(attached))
        hidden = net.hidden(text.taps[None], text.row[starts], starts)[0]
        for i, start in enumerate(starts[0].tolist()):
            drafter, ids = DSparkDrafter(head), text.row[: start + 1].tolist()
            model.prefill(ids[:-1], 0, model.new_cache(256), observer=drafter)
            draft = drafter.draft(ids, B, sampler)
            expected = head.collapse(head.block(ids[-1], start, drafter.caches)[-1])
            assert near(hidden[i], expected), start
            logits, confidence = net.outputs(hidden[i], torch.tensor([ids[-1], *draft.tokens[:-1]]))
            assert logits.argmax(1).tolist() == draft.tokens
            assert near(confidence, torch.tensor(draft.confidence))


def test_answers_are_what_the_model_writes(trunk: Trunk) -> None:
    user, end, think = 1010, trunk.eos, 1012
    row = torch.tensor([0, user, 50, trunk.assistant, think, 60, 61, end, user, 51, trunk.assistant, think, 62])
    assert trunk.answers(row).nonzero()[:, 0].tolist() == [5, 6, 12]


def test_places_count_while_the_text_is_the_trunks_own() -> None:
    """Positions 2 to 6 are an answer; the trunk's choices are the text, but for the one at position 5."""
    row, choice = torch.tensor([9, 9, 1, 2, 3, 4, 5, 9]), torch.tensor([0, 0, 2, 3, 7, 5, 6, 0])
    written = torch.tensor([False, False, True, True, True, True, True, False])
    logits = torch.nn.functional.one_hot(choice, 10).float()
    blocks = cut([Text(row, written, logits, torch.zeros(8, 4))], 5, 4, 4, torch.Generator().manual_seed(0))
    seen = {s: i for i, s in enumerate(blocks.starts[0].tolist())}
    assert sorted(seen) == [2, 3, 4, 5, 6]
    expected = {
        2: ([1, 2, 3, 4], [2, 3, 7, 5], [1, 1, 1, 0]),  # the choice at position 4 is a target, what follows it is not
        3: ([2, 3, 4, 5], [3, 7, 5, 6], [1, 1, 0, 0]),
        4: ([3, 4, 5, 9], [7, 5, 6, 0], [1, 0, 0, 0]),
        5: ([4, 5, 9, 0], [5, 6, 0, 0], [1, 1, 0, 0]),  # the answer ends behind position 6
        6: ([5, 9, 0, 0], [6, 0, 0, 0], [1, 0, 0, 0]),
    }
    for start, (before, wanted, counts) in expected.items():
        i = seen[start]
        assert blocks.tokens[0, i] == row[start]
        assert blocks.before[0, i].tolist() == before
        assert blocks.wanted[0, i].tolist() == wanted
        assert blocks.counts[0, i].tolist() == [bool(c) for c in counts]
        for place, token in enumerate(wanted):
            assert not counts[place] or blocks.logits[0, i, place].argmax() == token


@pytest.fixture
def args() -> argparse.Namespace:
    return argparse.Namespace(stages=1, block=3, rank=32, experts=6, lr=2e-3, qat_from=0.5, bias_speed=1e-3)


@pytest.fixture
def _one_thread() -> Iterator[None]:
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.mark.usefixtures("_one_thread")
def test_training_and_the_file_it_writes(
    checkpoint: Checkpoint, text: Text, args: argparse.Namespace, tmp_path: Path
) -> None:
    """A few updates, the last of them on rounded weights, lower the loss; a checkpoint and the file hold the same."""
    trainer, g = Trainer(args, checkpoint), torch.Generator().manual_seed(1)
    blocks = cut([text], 12, args.block, 128, g)
    losses = [trainer.step(i / 8, i == 4, blocks).loss.item() for i in range(8)]
    assert losses[-1] < 0.8 * losses[0]
    trainer.save(tmp_path / "a.pt", 8, 1.5)
    again = Trainer(args, checkpoint)
    assert again.restore(tmp_path / "a.pt") == (8, 1.5)
    with torch.no_grad():
        expected = score(trainer.net(quantised=True), blocks).loss
        assert score(again.net(quantised=True), blocks).loss == expected
        again.export(tmp_path / "head.gguf")
        attached = attach_draft(checkpoint, open_draft(tmp_path / "head.gguf"), replace=True)
        assert attached.warnings == ()
        assert attached.config == trainer.config
        assert near(score(BlockNet(attached.config, dense(attached)), blocks).loss, expected)


def test_stages_begin_as_the_mtp_block(checkpoint: Checkpoint, args: argparse.Namespace) -> None:
    tensors = initial(Trainer(args, checkpoint).config, checkpoint, args.experts)
    block = dense(checkpoint, "mtp.0.")
    assert torch.equal(tensors["mtp.0.attn.wq_b.weight"], block["mtp.0.attn.wq_b.weight"])
    assert torch.equal(tensors["mtp.0.ffn.gate.weight"], block["mtp.0.ffn.gate.weight"][:6])
    assert "preview" in NAME  # the release of the trunk; without it the pair is warned about
