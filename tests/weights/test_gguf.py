"""Reading GGUF files: the dialects, and every way in which a file can be damaged."""

from __future__ import annotations

import itertools
import random
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from weights.builders import gguf_bytes, gguf_with, shapes, small_config, small_keys, write

from ds4.errors import Ds4Error
from ds4.kernels.numerics import resolve
from ds4.model.transformer import Transformer
from ds4.weights import open_checkpoint
from ds4.weights.formats import BY_GGML_TYPE, FORMATS, INTEGER_FORMATS, ggml_other
from ds4.weights.formats.ggml_other import UNDECODABLE
from ds4.weights.gguf_write import write_gguf
from ds4.weights.names import to_gguf
from ds4.weights.tensor import PackedTensor

F32, Q8_0, I32, F64, NVFP4 = 0, 8, 26, 28, 40


def refused(path: Path) -> str:
    """The one-line message with which a file is refused."""
    with pytest.raises(Ds4Error) as error:
        open_checkpoint(path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < 500 + len(str(path))
    return message


def one_tensor(
    name: str = "output_norm.weight", dims: tuple[int, ...] = (64,), kind: int = F32, offset: int = 0
) -> Any:
    return (name, dims, kind, offset)


def test_minimal_file_and_metadata(tmp_path: Path) -> None:
    keys = small_keys() | {"a.bools": [True, False], "a.strings": ["x", "", "é"], "a.empty": [], "a.f": 0.5}
    ckpt = open_checkpoint(write(tmp_path / "a.gguf", gguf_bytes(keys, [one_tensor()], 256)))
    assert ckpt.container == "gguf"
    assert ckpt.names() == ["norm.weight"]
    assert ckpt.metadata["a.bools"] == [True, False]
    assert ckpt.metadata["a.strings"] == ["x", "", "é"]
    assert ckpt.metadata["a.empty"] == []
    assert ckpt.metadata["a.f"] == 0.5
    assert ckpt.config.n_mtp_layers == 0
    assert ckpt.tokenizer_files is None
    assert ckpt.total_bytes == 256
    assert torch.equal(
        ckpt.tensor("norm.weight").dequantize(), torch.arange(256, dtype=torch.uint8).fmod(251).view(torch.float32)
    )


def test_directory_with_one_gguf(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", gguf_bytes(small_keys(), [one_tensor()], 256))
    assert open_checkpoint(tmp_path).names() == ["norm.weight"]
    write(tmp_path / "b.gguf", b"")
    assert "name one of them" in refused(tmp_path)


def test_missing_tensor_and_wrong_shape(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", gguf_bytes(small_keys(), [one_tensor()], 256))
    ckpt = open_checkpoint(path)
    assert ckpt.expect("norm.weight", (64,)).shape == (64,)
    assert "norm.weight" in ckpt
    assert "embed.weight" not in ckpt
    for call in (ckpt.tensor, ckpt.stored_as):
        with pytest.raises(Ds4Error, match=r"a\.gguf: tensor embed\.weight is missing"):
            call("embed.weight")
    with pytest.raises(Ds4Error, match=r"norm\.weight has shape \[64\], expected \[32\]"):
        ckpt.expect("norm.weight", (32,))
    with pytest.raises(Ds4Error, match=r"layers\.0\.ffn\.gate\.weight is missing"):
        ckpt.n_experts("layers.0")


BAD_TENSORS = [
    ("not a multiple of the q5_k block 256", [("x", (128,), 13, 0)]),
    ("not a multiple of the q4_k block 256", [("x", (128,), 12, 0)]),
    ("needs bytes", [("x", (256, 4), 12, 0)]),
    ("'x' has type number 999", [("x", (256,), 999, 0)]),
    ("not a multiple of the alignment", [("x", (4,), F32, 4)]),
    ("overlap", [("x", (16,), F32, 0), ("y", (16,), F32, 32)]),
    ("occurs twice", [("x", (8,), F32, 0), ("x", (8,), F32, 32)]),
    ("needs bytes", [("x", (65,), F32, 0)]),
    ("needs bytes", [("x", (1 << 62, 1 << 62, 1 << 62, 1 << 62), F32, 0)]),
    ("needs bytes", [("x", (8,), F32, (1 << 64) - 32)]),
    ("empty dimension", [("x", (8, 0), F32, 0)]),
    ("has 5 dimensions", [("x", (1, 1, 1, 1, 8), F32, 0)]),
    ("not a multiple of the q8_0 block 32", [("x", (48,), Q8_0, 0)]),
    ("a tensor name of 0 characters", [("", (8,), F32, 0)]),
    ("a tensor name of 5000 characters", [("x" * 5000, (8,), F32, 0)]),
    ("must have 3 dimensions", [("blk.0.ffn_gate_exps.weight", (32, 2), F32, 0)]),
    ("cannot be split", [("blk.2.nextn.eh_proj.weight", (32, 2), Q8_0, 0)]),
    ("draft blocks [1] are not the last", [("blk.1.nextn.eh_proj.weight", (64,), F32, 0)]),
    ("draft blocks [7] are not the last", [("blk.7.nextn.eh_proj.weight", (64,), F32, 0)]),
    (
        "'mtp.0.enorm.weight' and 'blk.2.nextn.enorm.weight' both hold mtp.0.enorm.weight",
        [
            ("blk.2.nextn.eh_proj.weight", (4, 2), F32, 0),
            ("blk.2.nextn.enorm.weight", (4,), F32, 32),
            ("mtp.0.enorm.weight", (4,), F32, 64),
        ],
    ),
    (
        "3 experts but 2 scales",
        [
            ("blk.0.ffn_up_exps.weight", (64, 1, 3), NVFP4, 0),
            ("blk.0.ffn_up_exps.scale", (2,), F32, 128),
        ],
    ),
    ("must be f32, not f16", [("output.weight", (64,), NVFP4, 0), ("output.scale", (1,), 1, 64)]),
    ("2 scales, expected 1", [("blk.0.attn_kv.weight", (64,), NVFP4, 0), ("blk.0.attn_kv.scale", (2,), F32, 64)]),
    # A type that its name rules out.
    ("'blk.0.ffn_gate_tid2eid.weight' is f32, but has to be i32", [("blk.0.ffn_gate_tid2eid.weight", (2, 8), F32, 0)]),
    ("'blk.0.attn_norm.weight' is q8_0, but has to be f32", [("blk.0.attn_norm.weight", (64,), Q8_0, 0)]),
    ("'blk.0.attn_sinks.weight' is i32, but has to be f32", [("blk.0.attn_sinks.weight", (4,), I32, 0)]),
    ("'blk.1.exp_probs_b.bias' is f64, but has to be f32", [("blk.1.exp_probs_b.bias", (3,), F64, 0)]),
    ("'blk.0.attn_kv.weight' is i32, but has to be a float", [("blk.0.attn_kv.weight", (8, 2), I32, 0)]),
    ("'token_embd.weight' is i64, but has to be a float", [("token_embd.weight", (8, 2), 27, 0)]),
    # Tensors of a layer that were made for different numbers of experts.
    (
        "'blk.1.ffn_gate_inp.weight' and 'blk.1.ffn_up_exps.weight' disagree: they are for 3 and 2 experts",
        [("blk.1.ffn_up_exps.weight", (4, 2, 2), F32, 0), ("blk.1.ffn_gate_inp.weight", (8, 3), F32, 64)],
    ),
    (
        "'blk.1.ffn_gate_inp.weight' and 'blk.1.exp_probs_b.bias' disagree: they are for 3 and 2 experts",
        [("blk.1.exp_probs_b.bias", (2,), F32, 0), ("blk.1.ffn_gate_inp.weight", (8, 3), F32, 64)],
    ),
    (
        "'blk.1.ffn_gate_exps.weight' and 'blk.1.ffn_down_exps.weight' disagree: they are for 3 and 1 experts",
        [("blk.1.ffn_gate_exps.weight", (4, 2, 3), F32, 0), ("blk.1.ffn_down_exps.weight", (2, 4, 1), F32, 96)],
    ),
    ("is for 4 experts, but the model has 3", [("blk.1.ffn_gate_inp.weight", (8, 4), F32, 0)]),
    ("is for 1 experts, but each token takes 2", [("blk.1.ffn_gate_inp.weight", (8, 1), F32, 0)]),
    (
        "is for 1 experts, but each token takes 2",
        [("mtp.0.ffn_gate_inp.weight", (8, 1), F32, 0), ("mtp.0.attn_norm.weight", (8,), F32, 32)],
    ),
]


@pytest.mark.parametrize(("problem", "tensors"), BAD_TENSORS, ids=[f"{n}" for n in range(len(BAD_TENSORS))])
def test_bad_tensor_lists(tmp_path: Path, problem: str, tensors: list) -> None:
    message = refused(write(tmp_path / "bad.gguf", gguf_bytes(small_keys(), tensors, 256)))
    assert problem in message


BAD_HEADERS = [
    ("does not start with 'GGUF'", {"magic": b"GGML"}),
    ("GGUF version 2", {"version": 2}),
    ("big-endian", {"version": 3 << 24}),
    ("general.alignment must be a power of two", {"general.alignment": 48}),
    ("general.alignment must be a power of two", {"general.alignment": 0}),
    ("general.alignment must be a power of two", {"general.alignment": "32"}),
    ("must be 'deepseek4', not 'llama'", {"general.architecture": "llama"}),
    ("not UTF-8", {"general.name": b"\xff\xfe"}),
    ("is an array of unknown type 9", {"general.name": [[1]]}),
]


@pytest.mark.parametrize(("problem", "changes"), BAD_HEADERS, ids=[p for p, _ in BAD_HEADERS])
def test_bad_headers(tmp_path: Path, problem: str, changes: dict) -> None:
    options = {k: changes[k] for k in ("magic", "version") if k in changes}
    keys = small_keys() | {k: v for k, v in changes.items() if k not in options}
    assert problem in refused(write(tmp_path / "bad.gguf", gguf_bytes(keys, [one_tensor()], 256, **options)))


def test_counts_and_lengths_past_the_end(tmp_path: Path) -> None:
    good = gguf_bytes({"k": "value"} | small_keys(), [one_tensor()], 256)
    huge = struct.pack("<Q", 1 << 60)
    for at, problem in (
        (8, "tensors runs past"),
        (16, "keys runs past"),
        (24, "a key runs past"),
        (37, "'k' runs past"),
    ):
        assert problem in refused(write(tmp_path / "bad.gguf", good[:at] + huge + good[at + 8 :]))
    array = gguf_bytes({"k": ["a", "b"]} | small_keys(), [one_tensor()], 256)
    assert "'k' runs past" in refused(write(tmp_path / "bad.gguf", array[:41] + huge + array[49:]))
    assert "'k' runs past" in refused(write(tmp_path / "bad.gguf", array[:49] + huge + array[57:]))
    twice = good.replace(b"deepseek4.rope.dimension_count", b"deepseek4.attention.key_length")
    assert "occurs twice" in refused(write(tmp_path / "bad.gguf", twice)) or len(twice) != len(good)
    unknown = bytearray(good)
    unknown[33] = 77
    assert "'k' has unknown type 77" in refused(write(tmp_path / "bad.gguf", bytes(unknown)))


def test_headers_too_long_to_be_true(tmp_path: Path) -> None:
    """What becomes Python objects is bounded in number, so a large file of zeros cannot fill the memory."""
    path = tmp_path / "long.gguf"
    n = (1 << 22) + 1
    for kind, size, what in ((7, 1, "the value of 'k'"), (8, 8, "the array 'k'")):
        header = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, kind, n)
        with open(path, "wb") as file:
            file.write(header)
            file.truncate(len(header) + n * size)
        assert f"{what} makes the header longer than 4194304 values" in refused(path)
    header = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IQ", 8, n * 4)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + n * 4)
    assert f"the value of 'k' of {n * 4} bytes is not believable" in refused(path)


def test_truncated_anywhere(tmp_path: Path) -> None:
    good = gguf_bytes(small_keys(), [one_tensor(), ("token_embd.weight", (64, 32), Q8_0, 256)], 256 + 32 * 68)
    path = tmp_path / "cut.gguf"
    open_checkpoint(write(path, good))
    for size in [*range(1, 600), *range(600, len(good), 13), len(good) - 1]:
        refused(write(path, good[:size]))
    assert "empty" in refused(write(path, b""))


def test_flipped_bytes_never_crash(tmp_path: Path) -> None:
    good = gguf_bytes(small_keys() | {"t": ["a", "bc"]}, [one_tensor(), ("x", (4, 2), F32, 256)], 288)
    header = len(good) - 288
    rng = random.Random(0)
    path = tmp_path / "flip.gguf"
    outcomes = {"opened": 0, "refused": 0, "several lines": 0}
    for _ in range(1500):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(header)] = rng.choice((0, 1, 255, rng.randrange(256)))
        write(path, bytes(data))
        try:
            ckpt = open_checkpoint(path)
        except Ds4Error as error:
            outcomes["several lines" if "\n" in str(error) else "refused"] += 1
            continue
        outcomes["opened"] += 1
        for name in ckpt.names():
            ckpt.tensor(name).dequantize()
    assert outcomes.pop("several lines") == 0
    assert min(outcomes.values()) > 50


def test_llama_cpp_draft_block_in_the_same_file(tmp_path: Path) -> None:
    keys = small_keys() | {"deepseek4.block_count": 4, "deepseek4.nextn_predict_layers": 1}
    generator = torch.Generator().manual_seed(0)
    eh = torch.randn(64, 128, generator=generator)
    packed = gguf.quantize(eh.numpy(), gguf.GGMLQuantizationType.Q8_0).tobytes()
    norms = torch.randn(5, 64, generator=generator)
    tensors = [("blk.3.nextn.eh_proj.weight", (128, 64), Q8_0, 0)]
    offset = len(packed)
    for suffix in ("nextn.enorm", "nextn.hnorm", "nextn.shared_head_norm", "attn_norm", "attn_q_a_norm"):
        tensors.append((f"blk.3.{suffix}.weight", (64,), F32, offset))
        offset += 256
    data = gguf_bytes(keys, tensors, 0) + packed + norms.numpy().tobytes()
    ckpt = open_checkpoint(write(tmp_path / "a.gguf", data))
    assert ckpt.config == small_config()
    assert ckpt.config.n_mtp_layers == 1
    whole = torch.from_numpy(
        gguf.dequantize(gguf.quantize(eh.numpy(), gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0)
    )
    e_proj, h_proj = ckpt.expect("mtp.0.e_proj.weight", (64, 64)), ckpt.expect("mtp.0.h_proj.weight", (64, 64))
    assert torch.equal(e_proj.dequantize(), whole[:, :64])
    assert torch.equal(h_proj.dequantize(), whole[:, 64:])
    assert torch.equal(h_proj.dequantize(rows=slice(5, 9)), whole[5:9, 64:])
    assert e_proj.nbytes + h_proj.nbytes == len(packed) == ckpt.stored_as("mtp.0.e_proj.weight")[2] * 2
    names = ("enorm", "hnorm", "norm", "attn_norm", "attn.q_norm")
    for name, expected in zip(names, norms, strict=True):
        assert torch.equal(ckpt.tensor(f"mtp.0.{name}.weight").dequantize(), expected)


def test_unused_nextn_key_is_ignored(tmp_path: Path) -> None:
    keys = small_keys() | {"deepseek4.nextn_predict_layers": 1}
    ckpt = open_checkpoint(write(tmp_path / "a.gguf", gguf_bytes(keys, [one_tensor()], 256)))
    assert (ckpt.config.num_hidden_layers, ckpt.config.n_mtp_layers) == (3, 0)


def test_draft_block_counted_but_left_out(tmp_path: Path) -> None:
    keys = small_keys() | {"deepseek4.block_count": 4, "deepseek4.nextn_predict_layers": 1}
    tensors = [("blk.2.attn_norm.weight", (64,), F32, 0)]
    ckpt = open_checkpoint(write(tmp_path / "a.gguf", gguf_bytes(keys, tensors, 256)))
    assert (ckpt.config.num_hidden_layers, ckpt.config.n_mtp_layers) == (3, 0)
    assert ckpt.config.compress_ratios == (0, 4, 8)
    # With tensors in block 3, or without the key, all four are layers.
    for extra, changes in (("blk.3.attn_norm.weight", {}), ("x", {"deepseek4.nextn_predict_layers": 0})):
        more = [*tensors, (extra, (64,), F32, 256)]
        path = write(tmp_path / "b.gguf", gguf_bytes(keys | changes, more, 512))
        assert open_checkpoint(path).config.num_hidden_layers == 4


def test_keys_of_any_width(tmp_path: Path) -> None:
    """Integers of every width, f64 for f32, arrays of either: what the gguf package's own writer makes."""
    kinds = gguf.GGUFValueType
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "deepseek4")
    integers = itertools.cycle((kinds.UINT16, kinds.INT16, kinds.UINT32, kinds.INT32, kinds.UINT64, kinds.INT64))
    for key, value in small_keys().items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            kind = kinds.UINT64 if value > 30_000 else kinds.UINT8 if value < 4 else next(integers)
            writer.add_key_value(key, value, kind)
        elif isinstance(value, float):
            writer.add_float64(key, value)
        elif isinstance(value, list):
            sub_type = kinds.UINT32 if isinstance(value[0], int) else kinds.FLOAT64
            writer.add_key_value(key, value, kinds.ARRAY, sub_type=sub_type)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert open_checkpoint(tmp_path / "a.gguf").config == small_config(num_nextn_predict_layers=0)


def test_output_a_with_groups_as_a_dimension(tmp_path: Path) -> None:
    tensors = [("blk.0.attn_output_a.weight", (256, 32, 2), F32, 0)]
    ckpt = open_checkpoint(write(tmp_path / "a.gguf", gguf_bytes(small_keys(), tensors, 256 * 64 * 4)))
    assert ckpt.expect("layers.0.attn.wo_a.weight", (64, 256)).data.shape == (64, 1024)


def test_expert_scales(tmp_path: Path) -> None:
    tensors = [("blk.0.ffn_up_exps.weight", (64, 2, 3), NVFP4, 0), ("blk.0.ffn_up_exps.scale", (3,), F32, 224)]
    data = gguf_bytes(small_keys(), tensors, 216) + bytes(8) + struct.pack("<3f", 0.5, 2.0, 3.0)
    ckpt = open_checkpoint(write(tmp_path / "a.gguf", data))
    assert [ckpt.tensor(f"layers.0.ffn.experts.{e}.w3.weight").scale for e in range(3)] == [0.5, 2.0, 3.0]
    one = ckpt.tensor("layers.0.ffn.experts.1.w3.weight")
    assert one.shape == (2, 64)
    assert one.data[0, 0] == 72  # the second expert of a ramp of bytes
    assert "layers.0.ffn.experts.3.w3.weight" not in ckpt


def test_stacks_are_not_listed_one_by_one(tmp_path: Path) -> None:
    tensors = [("blk.1.ffn_up_exps.weight", (8, 2, 3), F32, 0), ("output_norm.weight", (64,), F32, 192)]
    ckpt = open_checkpoint(write(tmp_path / "a.gguf", gguf_bytes(small_keys(), tensors, 192 + 256)))
    assert list(ckpt.stored_groups()) == [
        ("layers.1.ffn.experts.*.w3.weight", "f32", (3, 2, 8), 192),
        ("norm.weight", "f32", (64,), 256),
    ]
    experts = [f"layers.1.ffn.experts.{e}.w3.weight" for e in range(3)]
    assert ckpt.names() == [*experts, "norm.weight"]
    assert len(ckpt) == 4
    whole = next(iter(ckpt.tensors())).data.view(torch.float32).view(3, 2, 8)
    for e, name in enumerate(experts):
        assert name in ckpt
        assert ckpt.stored_as(name) == ("f32", (2, 8), 64)
        assert torch.equal(ckpt.tensor(name).dequantize(), whole[e])
    for name in ("*", "03", "3", "1.w3.weight", "9" * 20):
        assert f"layers.1.ffn.experts.{name}.w3.weight" not in ckpt
    assert 3 not in ckpt


def test_every_type_of_ggml_opens(tmp_path: Path) -> None:
    """Types without code of ds4's own: sizes are right; values are those of the gguf package; the rest is refused by
    name, but only when its values are wanted."""
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "a.gguf"
    for kind, (block, n_bytes) in gguf.GGML_QUANT_SIZES.items():
        fmt = BY_GGML_TYPE[kind]
        data = torch.randint(0, 64, (2, 256 // block * n_bytes), generator=generator, dtype=torch.uint8)
        packed = data.numpy().tobytes()
        name = "token_embd.weight" if fmt.name not in INTEGER_FORMATS else "unknown.weight"
        write(path, gguf_with(small_keys(), {name: (kind, (2, 256), packed)}))
        ckpt = open_checkpoint(path)
        (stored,) = ckpt.tensors()
        assert (stored.format, stored.nbytes) == (kind.name.lower(), len(packed))
        if fmt.name in INTEGER_FORMATS:
            continue
        assert ckpt.stored_as("embed.weight") == (kind.name.lower(), (2, 256), len(packed))
        if fmt.name in UNDECODABLE:
            with pytest.raises(Ds4Error, match=f"'token_embd.weight' has type {fmt.name}, which ds4 cannot decode"):
                ckpt.expect("embed.weight", (2, 256))
        elif fmt.name in ggml_other.TYPES:
            values = ckpt.tensor("embed.weight").dequantize(rows=slice(1, 2))
            assert torch.equal(values, torch.from_numpy(gguf.dequantize(data[1:].numpy(), kind)))


def test_model_refuses_a_type_it_cannot_decode(tmp_path: Path) -> None:
    tensors = {"token_embd.weight": (24, (32, 64), bytes(32 * 64))}
    ckpt = open_checkpoint(write(tmp_path / "a.gguf", gguf_with(small_keys(), tensors)))
    with pytest.raises(Ds4Error, match=r"a\.gguf: tensor 'token_embd\.weight' has type i8, which ds4 cannot decode"):
        Transformer(ckpt.config, ckpt, resolve("exact"))


@pytest.mark.parametrize("name", ["q4_0", "q5_k", "iq4_xs", "iq3_xxs"])
def test_block_scales_of_other_types(name: str) -> None:
    number, block, n_bytes = ggml_other.TYPES[name]
    data = torch.zeros(1, n_bytes, dtype=torch.uint8)
    assert FORMATS[name].ggml_type == number
    assert FORMATS[name].dequantize(data, block).isfinite().all()
    data[0, :2] = torch.tensor([0x00, 0x7E], dtype=torch.uint8)
    with pytest.raises(Ds4Error, match=rf"tensor x \({name}\) has a block scale that is not a finite number"):
        PackedTensor("x", name, (1, block), data).dequantize()


def test_every_block_name_maps_back() -> None:
    for name in shapes(small_config()):
        place = to_gguf(name)
        assert place is not None, name
        assert place[0].startswith(("blk.", "mtp.0.", "token_embd", "output"))
    for unknown in ("layers.0.enorm.weight", "layers.x.attn_norm.weight", "nope", "layers.0.ffn.experts.0.w4.weight"):
        assert to_gguf(unknown) is None


def test_a_large_vocabulary_opens_quickly(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    tokens = [f"token{n}" for n in range(130_000)]
    config = small_config(num_nextn_predict_layers=0)
    write_gguf(
        path,
        config,
        [("norm.weight", torch.ones(64), "f32")],
        tokenizer_metadata={"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * len(tokens)},
        name="v",
    )
    start = time.perf_counter()
    ckpt = open_checkpoint(path)
    assert time.perf_counter() - start < 2
    assert ckpt.metadata["tokenizer.ggml.tokens"] == tokens
