"""The decode step through the kernels for the bundled model converted to other formats (``ds4 convert``), on the CPU's
emulation, against the torch network of the same file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cuemu.backend import CpuBackend, missing
from test_steps import NO_FLIP, Pair, copy_cache, relative

from ds4.demo import bundled_model_path
from ds4.kernels.launch import Launch
from ds4.model.steps import StepBuilder, StepState
from ds4.weights import open_checkpoint
from ds4.weights.convert import convert
from ds4.weights.recipes import Recipe

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
CPU = torch.device("cpu")
N_TOK, N_PROMPT, N_STEPS = 2, 119, 8  # the steps close windows of 4 and of 128
FLIPPED = 1e-2  # of a row's norm, where codes fell differently; 3e-4 measured
ALIKE = 2  # steps without such a code, at least; 4 to 7 of 8 counted
LAYER = 1e-5  # relative RMS of a layer's experts: sums in another order


@dataclass(frozen=True)
class Recipient:
    """A recipe, the file it is written to, and the formats that experts, the shared expert and wq_a get."""

    file: str
    recipe: Recipe
    formats: tuple[str, str, str]

    @property
    def name(self) -> str:
        return f"{self.recipe.experts}-{self.recipe.dense}-{self.file}"


# Every format of experts, and every one of dense matrices, once in each container that has it.
RECIPIENTS = (
    Recipient("model.gguf", Recipe("nvfp4", "f16"), ("nvfp4", "f16", "f16")),
    Recipient("model.gguf", Recipe("mxfp4", "q8_0"), ("mxfp4", "q8_0", "q8_0")),
    Recipient("model.gguf", Recipe("q8_0", "bf16"), ("q8_0", "bf16", "bf16")),
    Recipient("model.gguf", Recipe("bf16", "keep"), ("bf16", "q8_0", "q8_0")),
    Recipient("model", Recipe("mxfp4", "fp8"), ("mxfp4_official", "fp8_block", "fp8_block")),
)


@pytest.fixture(scope="module", params=RECIPIENTS, ids=lambda one: one.name)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The converted model, whose tensors have the formats the recipe asks for."""
    path = tmp_path_factory.mktemp("recipes") / request.param.file
    convert(open_checkpoint(bundled_model_path()), path, request.param.recipe, tokenizer={})
    stored = open_checkpoint(path).stored_as
    names = ("ffn.experts.3.w2", "ffn.shared_experts.w1", "attn.wq_a")
    assert tuple(stored(f"layers.2.{name}.weight")[0] for name in names) == request.param.formats
    return Pair(Path(path))


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def test_steps_of_two_tokens(pair: Pair) -> None:
    """Every step begins with the torch network's cache. Where it writes the codes that the torch network writes, rows
    differ by the order of sums; in the other steps a code between two values fell differently."""
    ids = pair.ids(N_PROMPT + N_STEPS * N_TOK)
    theirs, ours = pair.torch_model.new_cache(512), pair.cache()
    pair.torch_model.prefill(ids[:N_PROMPT], 0, theirs)
    decoder, differences = pair.decoder(ours), []
    for position in range(N_PROMPT, len(ids), N_TOK):
        copy_cache(theirs, ours)
        step = ids[position : position + N_TOK]
        got = decoder.decode(step, position)
        want = pair.torch_model.decode(step, position, theirs)
        end = position + N_TOK
        mine, other = ours.live(end), theirs.live(end)
        flips = sum(int((part != other[name]).sum()) for name, part in mine.items() if part.dtype == torch.uint8)
        differences.append((relative(got, want).max().item(), flips))
    alike = [difference for difference, flips in differences if not flips]
    print(f"{len(alike)} of {N_STEPS} steps write the same codes, rows within {max(alike):.1e}")
    assert len(alike) >= ALIKE
    assert max(alike) < NO_FLIP
    assert max(difference for difference, _ in differences) < FLIPPED


def test_layers_of_experts(pair: Pair) -> None:
    """Router, routed and shared experts of every layer, on activations of spread 1."""
    ids = pair.ids(N_TOK)
    context = pair.torch_model._context(Launch.decode_step(0, N_TOK), ids)
    x = torch.randn(N_TOK, pair.config.hidden_size, generator=torch.Generator().manual_seed(1))
    padded = torch.zeros(context.ids.numel(), x.shape[1])
    padded[:N_TOK] = x
    for layer, (ours, theirs) in enumerate(zip(pair.model.blocks, pair.torch_model.blocks, strict=True)):
        want = theirs.moe(padded, context)[:N_TOK]
        builder = StepBuilder(N_TOK, StepState(CPU))
        builder.tokens.copy_(torch.tensor(ids))
        got = ours.moe.step(x, builder)
        CpuBackend().run([call for part in builder.parts for call in part.calls])
        difference = ((got - want).norm() / want.norm()).item()
        print(f"layer {layer}: relative RMS {difference:.1e}")
        assert difference < LAYER, layer
        assert torch.cosine_similarity(got.double().flatten(), want.double().flatten(), dim=0) >= 0.99999
