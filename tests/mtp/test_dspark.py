"""The DSpark drafter against the official code (golden/dspark): its stages, drafts, logits and confidence.

Pass lines are those of the golden data. Unrounded: logits of each row within 5e-5 (norm of the difference over norm of
the row), confidence within 1e-4, the same drafts; measured 1.3e-6 and 1.1e-5 with the stored taps, 2.9e-6 and 2.0e-5
with the trunk's own. With rounding simulated, from the stored taps: logits within 5e-3, the same drafts; measured
4.3e-5. The mistakes at the end are off by 0.6 to 1.3.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from feeding import Recorder, drafted, relative, show_prompt, show_step
from safetensors.torch import load_file, save_file
from torch import Tensor

from ds4.config import ModelConfig
from ds4.errors import Ds4Error
from ds4.kernels.attn import attend
from ds4.kernels.common import rms_norm
from ds4.kernels.launch import Launch
from ds4.kernels.numerics import Numerics, resolve
from ds4.model.transformer import Transformer
from ds4.mtp import dspark
from ds4.mtp.drafter import Draft
from ds4.mtp.dspark import DSpark, DSparkDrafter
from ds4.weights import Checkpoint, open_checkpoint
from ds4.weights.draft import attach_draft, open_draft

LENGTHS = (5, 127, 140, 300)
VARIANTS = {
    "f32": (resolve("exact"), 5e-5, 1e-4),
    "sim": (Numerics(kv_fp8=True, index_rotate=True, index_fp4=True), 5e-3, 5e-3),
}
N_ROWS = 7

each_length = pytest.mark.parametrize("n", LENGTHS)
each_variant = pytest.mark.parametrize("variant", VARIANTS)


class Golden:
    """The golden data of one prompt length in one arithmetic variant."""

    def __init__(self, data: dict[str, Tensor], variant: str, n: int) -> None:
        self.n, self.variant = n, variant
        self.prompt: list[int] = data[f"tokens.{n}"].tolist()
        self._data = {
            k.split(".")[1]: v for k, v in data.items() if k.startswith(f"{variant}.") and k.endswith(f".{n}")
        }
        self.y: list[int] = self["y"].tolist()

    def __getitem__(self, key: str) -> Tensor:
        return self._data[key]

    def streams(self, taps: Tensor, n_layers: int = 3) -> list[Tensor]:
        """Streams f32 ``[n, 4, d]`` of each tapped layer that have these means f32 ``[n, taps * d]``."""
        return [t.unsqueeze(1).expand(-1, 4, -1) for t in taps.chunk(n_layers, dim=1)]

    def show_prompt(self, drafter: DSparkDrafter, chunk: int = 128) -> list[int]:
        """Shows the prompt; taps that are not stored are out of every window. Returns the history with y[0]."""
        taps = torch.nn.functional.pad(self["taps_prefill"], (0, 0, self.n - len(self["taps_prefill"]), 0))
        show_prompt(drafter, self.prompt, self.streams(taps), chunk)
        return [*self.prompt, self.y[0]]

    def show_rows(self, drafter: DSparkDrafter, first: int, last: int) -> list[int]:
        """Shows the decoded tokens y[first] .. y[last - 1] in one step; returns the history with y[last]."""
        show_step(drafter, self.y[first:last], self.streams(self["tap"][first + 1 : last + 1]))
        return [*self.prompt, *self.y[: last + 1]]

    def check(self, draft: Draft, logits: Tensor, row: int) -> None:
        _, line, confidence_line = VARIANTS[self.variant]
        worst = relative(logits, self["draft_logits"][row])
        assert worst <= line, f"logits differ by {worst:.2e}"
        off = (torch.tensor(draft.confidence) - self["confidence"][row]).abs().max().item()
        assert off <= confidence_line, f"confidence differs by {off:.2e}"
        assert draft.tokens == self["drafts"][row].tolist()


class World:
    """The checkpoint and what several tests make of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.checkpoint: Checkpoint = open_checkpoint(directory)
        self.config: ModelConfig = self.checkpoint.config
        self.data = load_file(directory / "golden.safetensors")
        self.trunk = lru_cache(None)(lambda variant: Transformer(self.config, self.checkpoint, VARIANTS[variant][0]))
        self.head = lru_cache(None)(lambda variant: DSpark(self.config, self.checkpoint, self.trunk(variant)))

    def golden(self, n: int, variant: str = "f32") -> Golden:
        return Golden(self.data, variant, n)

    def drafter(self, variant: str = "f32") -> DSparkDrafter:
        return DSparkDrafter(self.head(variant))


@pytest.fixture(scope="module")
def world(golden: Path) -> World:
    return World(golden / "dspark")


@each_variant
@each_length
def test_drafts(world: World, n: int, variant: str) -> None:
    """From the stored taps and tokens, one decoded token at a time."""
    golden, drafter = world.golden(n, variant), world.drafter(variant)
    history = golden.show_prompt(drafter)
    for row in range(N_ROWS):
        if row:
            history = golden.show_rows(drafter, row - 1, row)
        golden.check(*drafted(drafter, history, 5), row)


@each_length
def test_whole_model(world: World, n: int) -> None:
    """Trunk and drafter together: prompt in one go, then single steps, the drafter watching."""
    golden, trunk, drafter = world.golden(n), world.trunk("f32"), world.drafter()
    cache = trunk.new_cache(n + N_ROWS)
    logits = trunk.prefill(golden.prompt, 0, cache, observer=drafter)
    history = list(golden.prompt)
    for row in range(N_ROWS):
        assert relative(logits[None], golden["logits"][row][None]) <= 5e-5
        assert int(logits.argmax()) == golden.y[row]
        history.append(golden.y[row])
        golden.check(*drafted(drafter, history, 5), row)
        logits = trunk.decode([golden.y[row]], len(history) - 1, cache, drafter)[0]


@pytest.mark.parametrize("n", [5, 140])
def test_streams_of_the_stages(world: World, n: int) -> None:
    golden, head, drafter = world.golden(n), world.head("f32"), world.drafter()
    for row in range(N_ROWS):
        history = golden.show_rows(drafter, row - 1, row) if row else golden.show_prompt(drafter)
        drafter.draft(history, 1, Recorder())
        stages = head.block(history[-1], drafter.position, drafter.caches)
        assert relative(torch.stack(stages).flatten(0, 1), golden["streams"][row].flatten(0, 1)) <= 5e-5
        hidden = head.collapse(stages[-1])
        assert relative(hidden, golden["collapsed"][row]) <= 5e-5
        assert relative(head.logits(hidden), golden["draft_logits_base"][row]) <= 5e-5


def test_rings(world: World) -> None:
    """Every stage's context rows after the last token; the official ring has position p in slot p mod 128."""
    golden, drafter = world.golden(140), world.drafter()
    golden.show_prompt(drafter)
    drafter.draft(golden.show_rows(drafter, 0, 6), 1, Recorder())
    first, last = drafter.position - 128, drafter.position
    slots = torch.arange(first, last) % 128
    for cache, expected in zip(drafter.caches, golden["ctx_final"], strict=True):
        assert relative(cache.window(first, last), expected[slots]) <= 5e-5


@pytest.mark.parametrize("chunk", [1, 37, 128])
def test_prompt_rows_do_not_depend_on_the_chunks(world: World, chunk: int) -> None:
    golden, whole, cut = world.golden(140), world.drafter("sim"), world.drafter("sim")
    golden.show_prompt(whole)
    golden.show_prompt(cut, chunk)
    for a, b in zip(whole.caches, cut.caches, strict=True):
        assert torch.equal(a.ring, b.ring)


@each_length
def test_several_tokens_at_once(world: World, n: int) -> None:
    """After a step of k accepted tokens the draft is row k, from the same bytes as after k single steps."""
    golden, single = world.golden(n), world.drafter()
    golden.show_prompt(single)
    for row in range(1, N_ROWS):
        history = golden.show_rows(single, row - 1, row)
        single.draft(history, 1, Recorder())
        at_once = world.drafter()
        golden.show_prompt(at_once)
        assert golden.show_rows(at_once, 0, row) == history
        golden.check(*drafted(at_once, history, 5), row)
        for a, b in zip(single.caches, at_once.caches, strict=True):
            assert torch.equal(a.window(max(0, n + row - 128), n + row), b.window(max(0, n + row - 128), n + row))


@each_length
def test_rejected_tokens_leave_no_trace(world: World, n: int) -> None:
    """Each step shows the accepted token and up to seven wrong ones, which are undone."""
    golden, drafter, plain = world.golden(n), world.drafter(), world.drafter()
    for d in (drafter, plain):
        golden.show_prompt(d)
    for row in range(1, N_ROWS):
        n_wrong = min(row + 1, 7)
        taps = torch.cat((golden["tap"][row : row + 1], 50 * torch.ones(n_wrong, golden["tap"].shape[1])))
        show_step(drafter, [golden.y[row - 1]] + [3] * n_wrong, golden.streams(taps))
        drafter.rewind(drafter.position - n_wrong)
        history = golden.show_rows(plain, row - 1, row)
        got = drafted(drafter, history, 5)
        golden.check(*got, row)
        expected = drafted(plain, history, 5)
        assert torch.equal(got[1], expected[1])
        assert got[0].confidence == expected[0].confidence


def test_short_drafts_are_the_beginning_of_long_ones(world: World) -> None:
    """The block is always as long as it was trained; ``k`` is how much of it is used."""
    golden, drafter = world.golden(5), world.drafter()
    history = golden.show_prompt(drafter)
    whole = drafter.draft(history, 9, Recorder())
    assert len(whole.tokens) == 5
    for k in range(5):
        draft = drafter.draft(history, k, Recorder())
        assert draft.tokens == whole.tokens[:k]
        assert draft.confidence == whole.confidence[:k]
        assert draft.probs == []


def test_position_has_to_fit(world: World) -> None:
    golden, drafter = world.golden(5), world.drafter()
    history = golden.show_prompt(drafter)
    with pytest.raises(ValueError, match="needs a history of 6, got 5"):
        drafter.draft(history[:-1], 5, Recorder())
    with pytest.raises(ValueError, match="cannot go from position 5 to 6"):
        drafter.rewind(6)
    drafter.rewind(4)
    launch = Launch.decode_step(5, 1)
    with pytest.raises(ValueError, match="position 5 do not continue at 4"):
        drafter.observe(launch, torch.zeros(8), golden.streams(torch.zeros(8, 768)))


def test_first_token_of_a_text(world: World) -> None:
    """One row of context: not in the official code, but the formulas reach that far."""
    golden, drafter = world.golden(5), world.drafter()
    show_prompt(drafter, golden.prompt[:1], golden.streams(golden["taps_prefill"][:1]))
    draft, logits = drafted(drafter, golden.prompt[:2], 5)
    assert len(draft.tokens) == 5
    assert logits.isfinite().all()


class TestSettings:
    """Block size, taps, Markov rank and noise token are those of the configuration."""

    def draft(self, world: World, **changes: object) -> tuple[Draft, Tensor]:
        golden = world.golden(140)
        config = replace(world.config, **changes)  # type: ignore[arg-type]
        drafter = DSparkDrafter(DSpark(config, world.checkpoint, world.trunk("f32")))
        return drafted(drafter, golden.show_prompt(drafter), 99)

    def test_block_size(self, world: World) -> None:
        draft, logits = self.draft(world, dspark_block_size=3)
        assert len(draft.tokens) == 3
        assert relative(logits, world.golden(140)["draft_logits"][0, :3]) > 1e-2  # fewer rows to attend
        assert len(self.draft(world, dspark_block_size=11)[0].tokens) == 7  # a decode step takes eight tokens

    def test_noise_token(self, world: World) -> None:
        assert relative(self.draft(world, dspark_noise_token_id=17)[1], world.golden(140)["draft_logits"][0]) > 1e-2

    def test_markov_rank(self, world: World) -> None:
        with pytest.raises(Ds4Error, match=r"mtp\.2\.markov_head\.markov_w1\.weight.*16"):
            self.draft(world, dspark_markov_rank=16)

    def test_tapped_layers(self, world: World) -> None:
        head = DSpark(replace(world.config, dspark_target_layer_ids=(4, 2, 3)), world.checkpoint, world.trunk("f32"))
        assert head.layers == (2, 3, 4)
        streams = [torch.full((1, 4, 256), float(layer)) for layer in head.layers]
        assert head.taps(streams)[0, ::256].tolist() == [4, 2, 3]
        with pytest.raises(Ds4Error, match=r"mtp\.0\.main_proj\.weight.*512"):
            self.draft(world, dspark_target_layer_ids=(3, 4))

    def test_missing(self, world: World) -> None:
        with pytest.raises(Ds4Error, match="dspark_block_size"):
            self.draft(world, dspark_block_size=None)


def test_side_file(world: World, tmp_path: Path) -> None:
    """Trunk and head in files of their own, put together when they are opened."""
    tensors = load_file(world.directory / "model.safetensors")
    for name, is_head in (("trunk", False), ("head", True)):
        (tmp_path / name).mkdir()
        part = {k: v for k, v in tensors.items() if k.startswith("mtp.") == is_head}
        save_file(part, tmp_path / name / "model.safetensors")
        shutil.copy(world.directory / "config.json", tmp_path / name)
    trunk_only = open_checkpoint(tmp_path / "trunk")
    assert trunk_only.config.n_mtp_layers == 0
    checkpoint = attach_draft(trunk_only, open_draft(tmp_path / "head"))
    trunk = Transformer(checkpoint.config, checkpoint, resolve("exact"))
    golden, drafter = world.golden(5), DSparkDrafter(DSpark(checkpoint.config, checkpoint, trunk))
    golden.check(*drafted(drafter, golden.show_prompt(drafter), 5), 0)


def test_mistakes_are_seen(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by the comparison of test_drafts, in the first row after a decoded token."""
    golden = world.golden(140)

    def check(match: str, *, forget: int | None = None) -> None:
        drafter = world.drafter()
        golden.show_prompt(drafter)
        history = golden.show_rows(drafter, 0, 1)
        if forget is not None:
            drafter.draft(history, 1, Recorder())
            for cache in drafter.caches:
                cache.ring_f32[(drafter.position - forget) % cache.ring.shape[0]] = 0  # type: ignore[index]
        with pytest.raises(AssertionError, match=match):
            golden.check(*drafted(drafter, history, 5), 1)

    def causal(q: Tensor, kv: Tensor, sink: Tensor, mask: None, numerics: Numerics) -> Tensor:
        b, n = q.shape[0], kv.shape[0]
        seen = torch.arange(n) <= torch.arange(n - b, n).unsqueeze(1)
        return attend(q, kv, sink, seen, numerics)

    def context_only(q: Tensor, kv: Tensor, sink: Tensor, mask: None, numerics: Numerics) -> Tensor:
        return attend(q, kv[: -q.shape[0]], sink, None, numerics)

    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check("no mistake, no difference")
    right = DSpark.confident
    check("logits differ", forget=1)
    check("logits differ", forget=128)
    patches = (
        (dspark, "attend", causal, "logits differ"),
        (dspark, "attend", context_only, "logits differ"),
        (DSpark, "bias", lambda self, markov: torch.zeros(self.config.vocab_size), "logits differ"),
        (
            DSpark,
            "confident",
            lambda self, hidden, markov: right(self, rms_norm(hidden, self.norm, 1e-6), markov),
            "confidence differs",
        ),
    )
    for owner, name, wrong, match in patches:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, wrong)
            check(match)
