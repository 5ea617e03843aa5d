"""The decode step through the kernels, on the CPU's emulation: against the network in torch, and against itself.

Codes of the cache that lie between two values may fall differently when sums are taken in another order; such a choice
moves later rows by up to 0.1 on the random weights of golden/tiny. So these are compared in the median, and tightly
where no code differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from cuemu.backend import missing
from pair import CTX, Pair
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ds4.demo import bundled_model_path
from ds4.errors import Ds4Error
from ds4.kernels.entry import KernelCall
from ds4.kernels.packing import PlaneMatrix
from ds4.kv.cache import KVCache
from ds4.model.steps import Decoder, planes_of

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
NO_FLIP = 3e-5  # of a row's norm: sums in another order; 1.2e-5 measured
MEDIAN = 6e-3  # with codes that fell differently in earlier tokens; 2.7e-3 measured
ROWS = 0.05  # cached rows behind such choices, in the median; up to 0.022 measured
PICKED = ("tokens", "ids", "weights")  # what a step's experts are given besides activations
EDGES_LAYER = 16  # launches of a layer (spec kernels.md a.4)


@pytest.fixture(scope="module")
def demo() -> Pair:
    return Pair(bundled_model_path())


@pytest.fixture(scope="module")
def tiny(golden: Path) -> Pair:
    return Pair(golden / "tiny")


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def run(decoder: Decoder, ids: Sequence[int], start: int, sizes: Sequence[int]) -> Tensor:
    """Logits of all tokens, in steps of the given sizes in turn."""
    rows, done, turn = [], 0, 0
    while done < len(ids):
        part = ids[done : done + sizes[turn % len(sizes)]]
        rows.append(decoder.decode(part, start + done))
        done, turn = done + len(part), turn + 1
    return torch.cat(rows)


def relative(got: Tensor, want: Tensor) -> Tensor:
    return (got - want).norm(dim=1) / want.norm(dim=1)


def torch_decode(pair: Pair, ids: Sequence[int], start: int, cache: KVCache) -> Tensor:
    return torch.cat([pair.torch_model.decode([token], start + i, cache) for i, token in enumerate(ids)])


def test_300_tokens_of_a_tiny_checkpoint(tiny: Pair) -> None:
    """From an empty cache, in steps of 8 and 1, across the 4-, 128- and ring boundaries and beyond top_k entries."""
    ids = tiny.ids(300)
    theirs, ours = tiny.torch_model.new_cache(CTX), tiny.cache()
    want = torch_decode(tiny, ids, 0, theirs)
    got = run(tiny.decoder(ours), ids, 0, (8, 8, 8, 1))
    difference = relative(got, want)
    print(f"median {difference.median():.1e}, 90% {difference.quantile(0.9):.1e}, worst {difference.max():.1e}")
    assert difference[:8].max() < NO_FLIP
    assert difference.median() < MEDIAN
    assert (got.argmax(1) == want.argmax(1)).float().mean() >= 0.97
    mine, other, formats = ours.live(300), theirs.live(300), tiny.model.formats()
    for name, part in mine.items():
        if part.dtype == torch.uint8:
            unpack = formats.key.unpack if name.endswith("keys") else formats.row.unpack
            apart = relative(unpack(part), unpack(other[name])).median()
            print(f"{name} {apart:.1e}", end=" ")
            assert apart < ROWS, name


def test_each_step_alone(tiny: Pair) -> None:
    """Before every step the cache is the torch network's, so that only this step's own choices can differ."""
    ids = tiny.ids(150)
    theirs, ours = tiny.torch_model.new_cache(CTX), tiny.cache()
    tiny.torch_model.prefill(ids[:110], 0, theirs)
    decoder, differences = tiny.decoder(ours), []
    for position in range(110, 150):
        copy_cache(theirs, ours)
        got = decoder.decode([ids[position]], position)
        want = tiny.torch_model.decode([ids[position]], position, theirs)
        differences.append(relative(got, want).item())
    alike = sum(one < NO_FLIP for one in differences)
    print(f"{alike} of {len(differences)} steps within {NO_FLIP}, worst {max(differences):.1e}")
    assert alike >= 0.8 * len(differences)


def copy_cache(source: KVCache, target: KVCache) -> None:
    for one, other in zip(source.layers, target.layers, strict=True):
        for name in ("ring", "pool", "state", "keys", "key_state"):
            if getattr(one, name) is not None:
                getattr(other, name).copy_(getattr(one, name))


def test_number_of_tokens_changes_no_bit(demo: Pair) -> None:
    """Logits and every live byte of the cache, steps of 1, 2 and 8 tokens and a mixture, straddling 4 and 128."""
    ids, n_prompt, n = demo.ids(142), 118, 24
    found = []
    for sizes in ((1,), (2,), (8,), (8, 1, 2, 8)):
        cache = demo.cache()
        demo.model.prefill(ids[:n_prompt], 0, cache)
        logits = run(demo.decoder(cache), ids[n_prompt:], n_prompt, sizes)
        assert logits.shape[0] == n
        found.append((logits, cache.live(n_prompt + n)))
    for logits, live in found[1:]:
        assert torch.equal(logits, found[0][0])
        assert all(torch.equal(live[name], part) for name, part in found[0][1].items())


def test_rejected_drafts_leave_no_trace(demo: Pair) -> None:
    """A step whose later tokens were wrong, then the position set back, equals steps that never had them."""
    ids, n_prompt = demo.ids(140), 120
    plain, drafting = demo.cache(), demo.cache()
    for cache in (plain, drafting):
        demo.model.prefill(ids[:n_prompt], 0, cache)
    want = run(demo.decoder(plain), ids[n_prompt:], n_prompt, (1,))
    decoder, rows, position = demo.decoder(drafting), [], n_prompt
    for accepted in (1, 3, 2, 8, 1, 5):
        right = ids[position : position + accepted]
        step = right + [7] * (8 - accepted)
        rows.append(decoder.decode(step, position)[:accepted])
        position += accepted
    assert position == 140
    assert torch.equal(torch.cat(rows), want)
    live = drafting.live(140)
    assert all(torch.equal(live[name], part) for name, part in plain.live(140).items())


def test_after_a_prompt_the_kernels_choose_the_same_tokens(demo: Pair) -> None:
    """Greedy decoding after a prompt through the prefill form, which left its cache to the kernels."""
    ids = demo.ids(130)
    theirs, ours = demo.torch_model.new_cache(CTX), demo.cache()
    rows = [demo.torch_model.prefill(ids, 0, theirs), demo.model.prefill(ids, 0, ours)]
    assert torch.equal(*rows)
    decoder, tokens = demo.decoder(ours), []
    for position in range(130, 150):
        choice = [int(row.argmax()) for row in rows]
        assert choice[0] == choice[1], position
        tokens.append(choice[0])
        rows = [demo.torch_model.decode([choice[0]], position, theirs)[0], decoder.decode([choice[0]], position)[0]]
        assert int(decoder.step(1).token[0]) == int(rows[1].argmax())
        assert relative(rows[1][None], rows[0][None]).item() < 1e-2


def test_a_step_is_made_once_and_runs_without_the_host(demo: Pair) -> None:
    """The same launches at every position: nothing on the host depends on what the device holds."""
    decoder = demo.decoder(demo.cache())
    launched: list[list[KernelCall]] = []

    class Recorder:
        def run(self, calls: Sequence[KernelCall]) -> None:
            launched.append(list(calls))

    decoder.backend = Recorder()
    for position in (0, 3, 127, 128, 200):
        decoder.decode([5], position)
    assert all(calls == launched[0] for calls in launched)
    assert [part.layer for part in decoder.step(1).parts][:1] == [None]
    for layer, ratio in enumerate(demo.config.compress_ratios):
        n = sum(len(part.calls) for part in decoder.step(1).parts if part.layer == layer)
        assert n <= EDGES_LAYER, f"layer {layer} of ratio {ratio} takes {n} launches"


def test_a_run_allocates_nothing(demo: Pair) -> None:
    """Between a step's launches and the host's numbers lies one copy: no new tensor, nothing that would wait."""
    decoder, ops = demo.decoder(demo.cache()), []
    step = decoder.step(2)

    class Silent:
        def run(self, calls: Sequence[KernelCall]) -> None:
            ops.append("launches")

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ops.append(f"{func.overloadpacket} {args[2:]}")
            return func(*args, **(kwargs or {}))

    with Watch():
        for start in (0, 5):
            step.run([7, 9], start, Silent())
    assert ops == ["aten.copy_ (True,)", "launches"] * 2  # True: the host does not wait for it
    assert (step.parts[0].inputs["tokens"].tolist(), step.parts[0].inputs["pos"].tolist()) == ([7, 9], [5])
    with pytest.raises(ValueError, match="a step of 2 tokens is given 1"):
        step.run([7], 7, Silent())


def test_steps_of_all_lengths_share_the_model(demo: Pair) -> None:
    """Tables that the kernels need in a form of their own, such as i32 tid2eid, are on the device once."""
    decoder, found = demo.decoder(demo.cache()), []
    for n_tok in (1, 2):
        parts = [part for part in decoder.step(n_tok).parts if part.operation.name in ("route", "moe_up", "moe_down")]
        weights = [{k: v for k, v in part.inputs.items() if k not in ("x", "mid", *PICKED)} for part in parts]
        found.append([{k: v.data_ptr() for k, v in one.items() if isinstance(v, Tensor)} for one in weights])
    assert found[0] == found[1]
    names = {name for one in found[0] for name in one}
    assert names >= {"tid2eid", "bias", "gate", "w1_codes", "w2_codes"}


def test_formats_without_a_kernel_are_refused(demo: Pair) -> None:
    matrix = demo.model.blocks[0].moe.experts[0].w1
    assert isinstance(matrix, PlaneMatrix)
    with pytest.raises(Ds4Error, match=r"layers\.0\.ffn\.experts\.0\.w1\.weight is stored as nvfp4: .* reads q8_0"):
        planes_of(matrix, ("q8_0",), "proj_in")
