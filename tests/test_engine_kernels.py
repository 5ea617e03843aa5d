"""The engine as with ``--device cuda``, its kernels run by the CPU's emulation: everything but the GPU itself."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner
from cuemu.backend import CpuBackend, missing

from ds4 import engine
from ds4.cli import main
from ds4.demo import bundled_draft_path
from ds4.engine import LLM, Piece, Statistics
from ds4.errors import Ds4Error
from ds4.sampling import SamplingParams
from ds4.speculation import DraftStatistics

CPU = torch.device("cpu")


class Counting:
    """The emulation, and how many launches went through it."""

    def __init__(self) -> None:
        self.launches = 0
        self._backend = CpuBackend()

    def run(self, calls) -> None:
        self.launches += len(calls)
        self._backend.run(calls)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Counting:
    """``cuda`` resolves to tensors on the CPU and kernels run by the emulation."""
    if missing() is not None:
        pytest.skip(str(missing()))
    backend = Counting()
    monkeypatch.setattr(engine, "resolve_device", lambda device: device)
    monkeypatch.setattr(engine, "current_gpu", lambda: CPU)
    monkeypatch.setattr(engine, "backend_for", lambda device: backend)
    return backend


def answer(llm: LLM, prompt: str, n: int) -> tuple[str, Statistics]:
    *pieces, statistics = llm.generate(prompt, SamplingParams(max_tokens=n))
    assert isinstance(statistics, Statistics)
    return "".join(piece.text for piece in pieces if isinstance(piece, Piece)), statistics


def test_questions_of_the_correctness_gate(emulated: Counting) -> None:
    loaded: list[tuple[int, int]] = []
    llm = LLM(device="cuda", ctx=256, draft="off", on_load=lambda done, total: loaded.append((done, total)))
    assert loaded
    assert (llm.draft, llm.session().drafter) == (0, None)
    for prompt, want in (("What is 2+2? One word.", "Four"), ("What is the capital of France? One word.", "Paris")):
        before = emulated.launches
        text, statistics = answer(llm, prompt, 12)
        assert want in text
        steps = statistics.generated_tokens - 1
        assert steps > 0
        per_pass, per_step = 18, 10  # launches of a layer, at least
        assert emulated.launches - before > 3 * (per_pass + steps * per_step)  # prompt and answer come from kernels


def test_a_conversation_goes_on_after_kernels_wrote_the_cache(emulated: Counting) -> None:
    """Prompt, tokens through kernels, more prompt: the prefill form reads what the kernels published."""
    ids = torch.randint(5, 900, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    rows = []
    for device in ("cpu", "cuda"):
        session = LLM(device=device, ctx=256).session()
        session.prefill(ids[:120])
        for token in ids[120:126]:
            session.decode([token])
        rows.append(session.prefill(ids[126:]))
    assert torch.equal(rows[0].argmax(), rows[1].argmax())
    assert ((rows[1] - rows[0]).norm() / rows[0].norm()).item() < 3e-2  # BF16 activations; tests/model has the median
    assert emulated.launches > 0


@pytest.mark.parametrize("draft", ["auto", "off"])
def test_generate_prints_what_the_kernels_said(emulated: Counting, draft: str) -> None:
    arguments = ["generate", "What is the capital of France? One word.", "--device", "cuda", "-n", "8", "--ctx", "128"]
    result = CliRunner().invoke(main, [*arguments, "--draft", draft])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Paris")
    assert emulated.launches > 0


def as_plain(llm: LLM, prompt: str, n: int, draft: int) -> DraftStatistics:
    """n greedy tokens with drafts are those without; what drafting brought."""
    found = {}
    for length in (0, draft):
        *_, statistics = llm.generate(prompt, SamplingParams(max_tokens=n), draft=length)
        assert isinstance(statistics, Statistics)
        found[length] = statistics
    assert found[0].token_ids == found[draft].token_ids
    drafted = found[draft].draft
    assert drafted is not None
    assert drafted.accepted > 0
    assert drafted.draft_seconds == 0  # in the steps' time
    return drafted


def test_answers_with_drafts(emulated: Counting) -> None:
    """Drafted and verified on the device: greedy ones are the same text, drawn ones repeatable."""
    llm, prompt = LLM(device="cuda", ctx=256), "Tell me a story about a lighthouse."
    drafted = as_plain(llm, prompt, 9, draft=1)
    assert drafted.accepted <= drafted.drafted
    drawn = []
    for _ in range(2):
        *_, statistics = llm.generate(prompt, SamplingParams(max_tokens=6, temperature=1.0, seed=5), draft=1)
        assert isinstance(statistics, Statistics)
        drawn.append(statistics)
    assert drawn[0].token_ids == drawn[1].token_ids
    assert drawn[0].draft is not None
    assert drawn[0].draft.drafted > 0
    assert drawn[0].draft.draft_seconds == 0


def test_answers_with_blocks(emulated: Counting) -> None:
    """Of a DSpark head, in the device's own loop: the same text."""
    llm, prompt = LLM(device="cuda", ctx=256, draft_model=bundled_draft_path()), "Tell me a story about a lighthouse."
    assert llm.draft == "auto"
    drafted = as_plain(llm, prompt, 12, draft=4)
    assert drafted.accepted < drafted.drafted
    with pytest.raises(Ds4Error, match="draft: this draft head drafts at most 5 tokens, 6 were wanted"):
        next(llm.generate(prompt, draft=6))


def test_other_numerics_need_the_cpu(emulated: Counting) -> None:
    with pytest.raises(Ds4Error, match=r"numerics: the GPU kernels compute as 'serve' does; others need --device cpu"):
        LLM(device="cuda", numerics="exact")


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Ds4Error, match=r"device: torch finds no GPU it can use \(ds4 doctor says why\)"):
        LLM(device="cuda")


def test_a_gpu_that_is_too_small_is_one_line(emulated: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(engine, "Transformer", full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(3e9), int(96e9)))
    with pytest.raises(Ds4Error, match=r"no room for the weights, 0\.0 GB; .* \(3\.0 of 96\.0 GB of GPU memory free\)"):
        LLM(device="cuda")
