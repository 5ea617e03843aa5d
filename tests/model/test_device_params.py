"""A checkpoint's weights in the kernels' planes: the same values as in the file, and everything on one device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pretend_device import DEVICE, OnDevice, PretendDevice

from ds4.demo import bundled_model_path
from ds4.errors import Ds4Error
from ds4.kernels.numerics import resolve
from ds4.kernels.packing import PlaneMatrix
from ds4.model import transformer
from ds4.model.device_params import DeviceParams
from ds4.model.params import small
from ds4.model.transformer import Transformer
from ds4.weights import Checkpoint, open_checkpoint
from ds4.weights.tensor import PackedTensor

N_PROMPT = 150  # crosses a tile of 128 rows


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(bundled_model_path())


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def prompt(n: int) -> list[int]:
    return torch.randint(5, 900, (n,), generator=torch.Generator().manual_seed(0)).tolist()


def test_every_weight_keeps_its_values(checkpoint: Checkpoint) -> None:
    params, kinds = DeviceParams(checkpoint, "cpu"), set()
    for name in checkpoint.names():
        want = checkpoint.tensor(name)
        got = params.expect(name, want.shape)
        assert torch.equal(got.dequantize(), want.dequantize()), name
        kinds.add(type(got))
        if isinstance(got, PlaneMatrix):
            rows = torch.tensor([want.shape[0] - 1, 0, 0])
            assert torch.equal(got.take_rows(rows), want.take_rows(rows)), name
            ((where, part),) = got.tiles(1, 3)
            assert where == slice(1, 3)
            assert torch.equal(part, want.dequantize()[1:3]), name
    assert kinds == {PlaneMatrix, PackedTensor}


def test_fp8_rows_that_share_scales(golden: Path) -> None:
    native = open_checkpoint(golden / "tiny_native")
    params = DeviceParams(native, "cpu")
    names = [name for name in native.names() if native.stored_as(name)[0] == "fp8_block"]
    assert names
    for name in names[:6]:
        want = native.tensor(name)
        got = params.expect(name, want.shape)
        rows = torch.tensor([5, want.shape[0] - 1])
        assert isinstance(got, PlaneMatrix)
        assert torch.equal(got.take_rows(rows), want.take_rows(rows))
        parts = [part for _, part in got.tiles(3, want.shape[0])]
        assert torch.equal(torch.cat(parts), want.dequantize()[3:])


def test_the_experts_of_a_layer_share_an_arena(checkpoint: Checkpoint) -> None:
    shape = checkpoint.tensor("layers.1.ffn.experts.0.w1.weight").shape
    params = DeviceParams(checkpoint, "cpu")
    experts = [params.expect(f"layers.1.ffn.experts.{e}.w1.weight", shape) for e in range(16)]
    other = params.expect("layers.2.ffn.experts.0.w1.weight", shape)
    arena = experts[0].arena
    assert all(one.arena is arena and one.index == e for e, one in enumerate(experts))
    assert other.arena is not arena
    assert torch.equal(arena.decode(), torch.cat([one.dequantize() for one in experts]))


def test_experts_in_two_formats_are_refused(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    params = DeviceParams(checkpoint, "cpu")
    first = checkpoint.tensor("layers.1.ffn.experts.0.w1.weight")
    params.expect(first.name, first.shape)
    plain = PackedTensor(
        "layers.1.ffn.experts.1.w1.weight", "f32", first.shape, torch.zeros(first.shape).view(torch.uint8)
    )
    monkeypatch.setattr(checkpoint, "expect", lambda name, shape: plain)
    with pytest.raises(Ds4Error, match=r"experts\.1\.w1\.weight is stored as f32, others of its layer as nvfp4"):
        params.expect(plain.name, plain.shape)


def test_progress_counts_the_weights_it_took(checkpoint: Checkpoint) -> None:
    seen: list[tuple[int, int]] = []
    model = Transformer(
        checkpoint.config,
        DeviceParams(checkpoint, "cpu", lambda done, total: seen.append((done, total))),
        resolve("serve"),
    )
    assert model.embed.shape[0] == checkpoint.config.vocab_size
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen} == {checkpoint.total_bytes}
    assert 0.7 * checkpoint.total_bytes < seen[-1][0] <= checkpoint.total_bytes  # the draft head is not among them


def test_prefill_on_a_device_is_prefill_on_the_cpu(checkpoint: Checkpoint) -> None:
    """Every tensor of it on the device, the logits and the cache bit for bit those of the CPU."""
    ids = prompt(N_PROMPT)
    reference = Transformer(checkpoint.config, checkpoint, resolve("serve"))
    cache = reference.new_cache(256)
    want = reference.prefill(ids, 0, cache)
    with PretendDevice():
        model = Transformer(checkpoint.config, DeviceParams(checkpoint, DEVICE), resolve("serve"), DEVICE)
        there = model.new_cache(256, decoded=False)
        model.prefill(ids[:70], 0, there)
        got = model.prefill(ids[70:], 70, there)
        live = there.live(N_PROMPT)
    assert isinstance(got, OnDevice)
    assert torch.equal(got.inner, want)
    for name, part in cache.live(N_PROMPT).items():
        assert torch.equal(live[name].inner, part), name


def test_a_tensor_left_on_the_cpu_is_noticed(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    made = transformer.make_context

    def careless(*args: object) -> object:
        context = made(*args)
        return replace(context, window_mask=context.window_mask.cpu())

    monkeypatch.setattr(transformer, "make_context", careless)
    with PretendDevice():
        model = Transformer(checkpoint.config, DeviceParams(checkpoint, DEVICE), resolve("serve"), DEVICE)
        with pytest.raises(RuntimeError, match="tensors of the device and of the CPU"):
            model.prefill(prompt(4), 0, model.new_cache(128, decoded=False))


def test_small_tensors_go_along(checkpoint: Checkpoint) -> None:
    with PretendDevice():
        params = DeviceParams(checkpoint, DEVICE)
        norm = small(params, "norm.weight", (checkpoint.config.hidden_size,))
        assert norm.device == DEVICE
