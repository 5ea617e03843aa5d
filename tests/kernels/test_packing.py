"""Planes: reversible bit for bit, laid out as their files say, and decoded like the format itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds4.errors import Ds4Error
from ds4.kernels.packing import PACKINGS, Packing, Planes, fp8_block, pack_rows, packing_of, planes
from ds4.weights.formats import FORMATS, iq2_xxs
from ds4.weights.formats.block_scale import E2M1_VALUES
from ds4.weights.tensor import PackedTensor

PROPERTY = settings(derandomize=True, deadline=None, max_examples=25)
ALL = {**PACKINGS, "fp8_block, f32 scales": fp8_block.F32_SCALES}
EVERY = pytest.mark.parametrize("packing", ALL.values(), ids=ALL)

# The last byte of each float in a block, whose exponent must not be all ones for the values to be finite.
LAST_BYTES = {
    "f32": (3,),
    "f16": (1,),
    "bf16": (1,),
    "q8_0": (1,),
    "q2_k": (81, 83),
    "q4_k": (1, 3),
    "q6_k": (209,),
    "iq2_xxs": (1,),
}


def random_tensor(packing: Packing, n_rows: int, n_cols: int, seed: int = 0, *, finite: bool = False) -> PackedTensor:
    """Random bytes; ``finite``: with every scale a finite number."""
    fmt = FORMATS[packing.format]
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Tensor:
        return torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))

    data, parts = draw(n_rows, fmt.row_bytes(n_cols)), {}
    if fmt.name == "fp8_block":
        parts["scale"] = draw(-(-n_rows // 128), -(-n_cols // 128))
    elif fmt.parts:
        parts["scale"] = draw(n_rows, n_cols // fmt.block)
    if finite:
        blocks = data.view(-1, fmt.block_bytes)
        for byte in LAST_BYTES.get(fmt.name, ()):
            blocks[:, byte] &= 0xBF
        if fmt.name == "mxfp4":
            blocks[:, 0].clamp_(max=252)
        if fmt.name == "fp8_block":
            data[data & 0x7F == 0x7F] = 0
        if fmt.name == "nvfp4_sleepy":
            blocks[:, 128:] &= 0xF7
        for scale in parts.values():
            scale.copy_(scale & 0xF7 if fmt.name == "nvfp4_modelopt" else scale.clamp(max=240))
    if packing is fp8_block.F32_SCALES:
        bits = rng.integers(0, 1 << 32, parts["scale"].shape, dtype=np.uint32)
        parts["scale"] = torch.from_numpy(bits & 0xBFFFFFFF if finite else bits).view(torch.float32)
    return PackedTensor("w", fmt.name, (n_rows, n_cols), data, parts=parts)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


def packed(tensor: PackedTensor) -> Planes:
    made = Planes.allocate(packing_of(tensor), tensor.data.shape[0], tensor.shape[-1])
    pack_rows(tensor, made)
    return made


def columns(packing: Packing) -> st.SearchStrategy[int]:
    """Row lengths that the format allows, odd numbers of blocks among them."""
    block = FORMATS[packing.format].block
    return st.integers(1, max(3, 600 // block)).map(lambda n: n * block)


@EVERY
@PROPERTY
@given(data=st.data())
def test_unpack_of_pack_is_the_identity(packing: Packing, data: st.DataObject) -> None:
    """For any bytes, not-a-number scales included, and any number of rows and blocks; padding is zeros."""
    n_rows, n_cols = data.draw(st.integers(1, 5) | st.integers(126, 131)), data.draw(columns(packing))
    tensor = random_tensor(packing, n_rows, n_cols, seed=data.draw(st.integers(0, 1 << 30)))
    made = packed(tensor)
    assert made.packing is packing
    original = (tensor.data, *tensor.parts.values())
    assert len(made.read()) == len(original)
    assert all(same_bits(ours, theirs) for ours, theirs in zip(made.read(), original, strict=True))
    for plane in packing.planes:
        rows = made.tensors[plane.name]
        assert rows.dtype == plane.dtype
        assert rows.shape[0] == plane.n_rows(n_rows)
        assert rows.stride(0) * rows.element_size() == plane.row_bytes(n_cols)
        assert plane.row_bytes(n_cols) % 16 == 0
        assert 0 <= plane.row_bytes(n_cols) - plane.width(n_cols) * plane.dtype.itemsize < 16
        assert rows.data_ptr() % 16 == 0
        assert not rows[:, plane.width(n_cols) :].contiguous().view(torch.uint8).any()
    assert sum(t.numel() * t.element_size() for t in made.tensors.values()) == packing.nbytes(n_rows, n_cols)


@EVERY
def test_decode_equals_the_format(packing: Packing) -> None:
    n_rows, block = 131, FORMATS[packing.format].block
    n_cols = 3 * block if block > 1 else 129
    tensor = random_tensor(packing, n_rows, n_cols, seed=1, finite=True)
    expected = tensor.dequantize()
    assert expected.isfinite().all()
    assert same_bits(packed(tensor).decode(), expected)


@EVERY
@PROPERTY
@given(data=st.data())
def test_rows_in_any_portions(packing: Packing, data: st.DataObject) -> None:
    """Rows packed in pieces, out of order, by tiles of a few rows, into the middle of larger planes: the same planes as
    at once, and no row beside them is touched."""
    step = FORMATS[packing.format].row_block
    n_rows, n_cols = 3 * step + 2, 2 * FORMATS[packing.format].block
    n_cols = n_cols if n_cols > 2 else 20
    tensor = random_tensor(packing, n_rows, n_cols, seed=2, finite=True)
    cuts = sorted({0, n_rows, *(step * n for n in data.draw(st.sets(st.integers(1, 3))))})
    pieces = data.draw(st.permutations(list(itertools.pairwise(cuts))))
    whole, larger = packed(tensor), Planes.allocate(packing, n_rows + 3 * step, n_cols)
    for plane in larger.tensors.values():
        plane.view(torch.uint8).fill_(0xAB)
    tile = planes._TILE
    planes._TILE = data.draw(st.sampled_from([1, 2 * n_cols, tile]))
    try:
        for first, last in pieces:
            pack_rows(tensor, larger, first, last, at=first + step)
        decoded = larger.rows(step, step + n_rows).decode()
    finally:
        planes._TILE = tile
    assert same_bits(decoded, whole.decode())
    for plane in packing.planes:
        here, there = larger.tensors[plane.name], whole.tensors[plane.name]
        start, width = plane.n_rows(step), plane.width(n_cols)
        end = start + there.shape[0]
        assert same_bits(here[start:end, :width], there[:, :width])
        beside = torch.cat((here[:start], here[end:]))
        assert beside.numel()
        assert (beside.view(torch.uint8) == 0xAB).all()


def naive_q8_0(codes: Tensor, d: Tensor) -> list[float]:
    return [float(d[0, k // 32]) * int(codes[0, k]) for k in range(256)]


def place(k: int) -> tuple[int, int, int, int]:
    """Chunk of 128, lane, block of 32 and number among its eight of weight k."""
    return k // 128, k % 32 // 8, k % 128 // 32, k % 8


def word(plane: Tensor, index: int) -> int:
    """32 bits of a plane's only row."""
    return int(plane.contiguous().view(torch.int32)[0, index]) & 0xFFFFFFFF


def nibble(plane: Tensor, k: int) -> int:
    c, t, b, i = place(k)
    return word(plane, 16 * c + 4 * t + b) >> 16 * (i % 2) + 4 * (i // 2) & 15


def naive_q2_k(codes: Tensor, scales: Tensor, d: Tensor) -> list[float]:
    values = []
    for k in range(256):
        c, t, b, i = place(k)
        field = ((0, 1, 2, 6), (3, 4, 5, 7))[b % 2][i // 2]
        code = word(codes, 8 * c + 2 * t + b // 2) >> 16 * (i % 2) + 2 * field & 3
        half = k % 32 // 16
        scale = word(scales, 2 * c) >> 8 * half + 4 * (b // 2) + 16 * (b % 2) & 15
        minimum = word(scales, 2 * c + 1) >> 4 * b + 16 * half & 15
        values.append(float(d[0, 0]) * scale * code - float(d[0, 1]) * minimum)
    return values


def naive_q4_k(codes: Tensor, scales: Tensor, d: Tensor) -> list[float]:
    s = scales.flatten().tolist()
    assert max(s) < 64
    values = []
    for k in range(256):
        c, _, b, _ = place(k)
        scale, minimum = s[8 * c + b], s[8 * c + 4 + b]
        values.append(float(d[0, 0]) * scale * nibble(codes, k) - float(d[0, 1]) * minimum)
    return values


def naive_q6_k(low: Tensor, high: Tensor, scales: Tensor, d: Tensor) -> list[float]:
    values = []
    for k in range(256):
        c, t, b, i = place(k)
        top = word(high, 8 * c + 2 * t + b // 2) >> 16 * (i % 2) + 2 * (i // 2) + 8 * (b % 2) & 3
        values.append(float(d[0, 0]) * int(scales[0, k // 16]) * ((top << 4 | nibble(low, k)) - 32))
    return values


def naive_iq2_xxs(codes: Tensor, d: Tensor) -> list[float]:
    magnitudes = iq2_xxs.patterns(torch.device("cpu")).view(torch.int8).view(256, 8).tolist()
    values = []
    for k in range(256):
        c, t, b, i = place(k)
        number, circle = word(codes, 8 * c + 2 * t) >> 8 * b & 255, word(codes, 8 * c + 2 * t + 1)
        signs = circle ^ (circle >> 4 | circle << 28)
        sign = -1 if signs >> b + 4 * (i // 2 + i % 2 * 4) & 1 else 1
        scale = float(d[0, 0]) * (0.5 + (word(codes, 8 * c + 2 * b + 1) >> 28)) / 4
        values.append(scale * magnitudes[number][i] * sign)
    return values


E2M1_PLACES = ((0, 1, 2, 9), (4, 5, 6, 13), (10, 11, 12, 19), (14, 7, 8, 15))  # of the even code of a pair


def naive_fp4(scale_of: Callable[[int], float], block: int) -> Callable[..., list[float]]:
    def naive(codes: Tensor, scales: Tensor) -> list[float]:
        s, values = scales.flatten().tolist(), []
        for k in range(256):
            c, t, b, i = place(k)
            bits = word(codes, 16 * c + 4 * t + b)
            code = sum((bits >> (p + 16 * (i % 2)) % 32 & 1) << n for n, p in enumerate(E2M1_PLACES[i // 2]))
            values.append(E2M1_VALUES[code] * scale_of(s[k // block]))
        return values

    return naive


def e4m3(byte: int) -> float:
    return float(torch.tensor(byte, dtype=torch.uint8).view(torch.float8_e4m3fn))


NAIVE: dict[str, Callable[..., list[float]]] = {
    "q8_0": naive_q8_0,
    "q2_k": naive_q2_k,
    "q4_k": naive_q4_k,
    "q6_k": naive_q6_k,
    "iq2_xxs": naive_iq2_xxs,
    "mxfp4": naive_fp4(lambda e: 2.0 ** (e - 127), 32),
    "mxfp4_official": naive_fp4(lambda e: 2.0 ** (e - 127), 32),
    "nvfp4": naive_fp4(lambda byte: e4m3(byte & 0x7F) if byte & 0x7F != 0x7F else 0.0, 16),
    "nvfp4_modelopt": naive_fp4(e4m3, 16),
    "nvfp4_sleepy": naive_fp4(e4m3, 16),
}


@pytest.mark.parametrize("name", NAIVE)
def test_planes_are_laid_out_as_documented(name: str) -> None:
    """Weight by weight, from the bytes at the documented places; every format's own decoder agrees."""
    for seed in range(4):
        tensor = random_tensor(PACKINGS[name], 1, 256, seed=seed, finite=True)
        made = packed(tensor)
        used = [made.tensors[plane.name][:, : plane.width(256)] for plane in made.packing.planes]
        expected = torch.tensor(NAIVE[name](*used), dtype=torch.float64).float()  # K-quants round their difference once
        assert torch.equal(expected, tensor.dequantize()[0])


def test_one_nibble_order_for_every_source() -> None:
    """The same weights out of all five layouts give the same code plane, and MXFP4 and NVFP4 each the same scales."""
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(3))
    x = torch.where(x == 0, 1.0, x).clamp(-6, 6)
    for names in (("mxfp4", "mxfp4_official"), ("nvfp4", "nvfp4_modelopt", "nvfp4_sleepy")):
        made = []
        for name in names:
            data, *parts = FORMATS[name].encode(x)
            made.append(
                packed(PackedTensor("w", name, (3, 512), data, parts=dict(zip(("scale",), parts, strict=False))))
            )
        # A negative value that rounds to zero is code 8 in the layouts that know -0: signs are left out.
        signs = sum(1 << (places[3] + 16 * odd) % 32 for places in E2M1_PLACES for odd in range(2))
        codes = [one.tensors["codes"].view(torch.int32) & ~(signs - (1 << 32)) for one in made]
        for i, other in enumerate(made[1:], 1):
            assert torch.equal(codes[i], codes[0])
            assert torch.equal(other.tensors["scales"], made[0].tensors["scales"])


def test_k_quant_rows_of_a_real_width_need_no_padding() -> None:
    """Rows of 4096 and of 2048 weights, the widths of V4-Flash: planes take no more room than the file, but for Q4_K's
    unpacked scales and FP8's f32 ones."""
    for name, packing in PACKINGS.items():
        for n_cols in (2048, 4096):
            stored = FORMATS[name].row_bytes(n_cols)
            if FORMATS[name].parts and name != "fp8_block":
                stored += n_cols // FORMATS[name].block
            extra = {"q4_k": 4 * n_cols // 256, "fp8_block": 4 * n_cols // 128 / 128}.get(name, 0)
            assert packing.nbytes(128, n_cols) == 128 * (stored + extra), name


def test_interleaved_rows_of_two_matrices() -> None:
    """Gate and up rows alternate in one arena: planes may be any rows that are dense in themselves."""
    gate, up = (random_tensor(PACKINGS["mxfp4"], 6, 160, seed=seed, finite=True) for seed in (4, 5))
    arena = Planes.allocate(PACKINGS["mxfp4"], 12, 160)
    for offset, tensor in enumerate((gate, up)):
        half = replace(arena, n_rows=6, tensors={name: t[offset::2] for name, t in arena.tensors.items()})
        pack_rows(tensor, half)
        assert same_bits(half.read()[0], tensor.data)
    decoded = arena.decode()
    assert torch.equal(decoded[0::2], gate.dequantize())
    assert torch.equal(decoded[1::2], up.dequantize())


def test_strided_and_unaligned_sources() -> None:
    """A column slice of a wider tensor, and data at an odd address of a file."""
    wide = random_tensor(PACKINGS["q8_0"], 4, 256, finite=True)
    width = wide.data.shape[1] // 2
    half = PackedTensor("h", "q8_0", (4, 128), wide.data[:, width:])
    assert torch.equal(packed(half).decode(), wide.dequantize()[:, 128:])
    for packing in PACKINGS.values():
        tensor = random_tensor(packing, 2, 2 * FORMATS[packing.format].block, finite=True)
        shifted = torch.cat((torch.zeros(1, dtype=torch.uint8), tensor.data.flatten()))[1:].view_as(tensor.data)
        assert same_bits(packed(replace(tensor, data=shifted)).read()[0], tensor.data)


def test_what_does_not_fit() -> None:
    tensor = random_tensor(PACKINGS["q8_0"], 4, 64)
    with pytest.raises(ValueError, match="does not fit planes of q8_0 with rows of 32"):
        pack_rows(tensor, Planes.allocate(PACKINGS["q8_0"], 4, 32))
    with pytest.raises(ValueError, match="does not fit planes of mxfp4"):
        pack_rows(tensor, Planes.allocate(PACKINGS["mxfp4"], 4, 64))
    with pytest.raises(ValueError, match="rows 0 to 4 of 4 to 1 of 4"):
        pack_rows(tensor, Planes.allocate(PACKINGS["q8_0"], 4, 64), at=1)
    with pytest.raises(ValueError, match="rows 2 to 5 of 4"):
        pack_rows(tensor, Planes.allocate(PACKINGS["q8_0"], 8, 64), 2, 5)
    fp8 = random_tensor(PACKINGS["fp8_block"], 200, 64)
    target = Planes.allocate(PACKINGS["fp8_block"], 400, 64)
    for first, last, at in ((64, 200, 0), (0, 64, 0), (0, 128, 64)):
        with pytest.raises(ValueError, match="128 rows share their scales"):
            pack_rows(fp8, target, first, last, at)
    with pytest.raises(ValueError, match="row 64 does not begin a row of plane scales"):
        target.rows(64, 128)
    with pytest.raises(ValueError, match="rows 128 to 500 of 400"):
        target.rows(128, 500)
    with pytest.raises(Ds4Error, match=r"tensor w is stored as i32, which ds4 has no GPU kernels for"):
        packing_of(PackedTensor("w", "i32", (1, 4), torch.zeros(1, 16, dtype=torch.uint8)))
