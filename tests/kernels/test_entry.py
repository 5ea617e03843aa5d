"""Entries, argument packs, calls, and C signatures against their Python declarations."""

from __future__ import annotations

import ctypes
import gc
import struct
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds4.errors import Ds4Error
from ds4.kernels.arch import ARCHITECTURES
from ds4.kernels.entry import ArgPack, Entry, KernelCall, constant_set, macro_definitions
from ds4.kernels.signature import (
    C_TYPES,
    check_entry,
    kernel_signatures,
    parse_parameters,
    project_includes,
    without_comments,
)

ALL = Entry(
    "all",
    "all.cu",
    (("x", "f32*"), ("a", "i32"), ("b", "u32"), ("c", "i64"), ("d", "u64"), ("e", "f32"), ("q", "u8*")),
    ("kB", "kA"),
)
LIMITS = {"i32": (-(2**31), 2**31 - 1), "u32": (0, 2**32 - 1), "i64": (-(2**63), 2**63 - 1), "u64": (0, 2**64 - 1)}


def values(**changed):
    """Valid arguments of ALL, some of them replaced."""
    good = {"x": torch.zeros(8), "a": -1, "b": 2, "c": -3, "d": 4, "e": 0.5, "q": torch.zeros(4, dtype=torch.uint8)}
    return {**good, **changed}


def read(pack: ArgPack, sizes: list[int]) -> list[bytes]:
    """The arguments' bytes, found from the pack's address alone, as the driver finds them."""
    pointers = (ctypes.c_void_p * len(sizes)).from_address(pack.address)
    return [ctypes.string_at(pointer, size) for pointer, size in zip(pointers, sizes, strict=True)]


def test_arguments_lie_where_the_driver_looks():
    given_values = values()
    pack = ArgPack(ALL, given_values)
    want = struct.pack("<QiIqQf", given_values["x"].data_ptr(), -1, 2, -3, 4, 0.5)
    got = read(pack, [8, 4, 4, 8, 8, 4, 8])
    # unpadded: Q i I q Q f
    assert b"".join(got[:6]) == want
    assert got[6] == struct.pack("<Q", given_values["q"].data_ptr())
    assert pack.device == torch.device("cpu")


def test_the_pack_keeps_its_tensors_alive():
    x = torch.arange(1024.0)
    pack = ArgPack(Entry("k", "k.cu", (("x", "f32*"),)), {"x": x})
    address, alive = x.data_ptr(), weakref.ref(x)
    del x
    gc.collect()
    assert alive() is not None
    assert struct.unpack("<Q", read(pack, [8])[0])[0] == address
    del pack
    gc.collect()
    assert alive() is None


def test_null_pointers_numpy_scalars_and_no_arguments():
    pack = ArgPack(ALL, values(x=None, a=np.int64(7), e=np.float32(0.25), d=np.uint64(2**63)))
    got = read(pack, [8, 4, 4, 8, 8, 4, 8])
    assert got[0] == bytes(8)
    assert got[1] == struct.pack("<i", 7)
    assert got[4] == struct.pack("<Q", 2**63)
    assert got[5] == struct.pack("<f", 0.25)
    assert ArgPack(Entry("k", "k.cu", ()), {}).address
    assert ArgPack(ALL, values(x=None, q=None)).device is None


@given(st.sampled_from(sorted(LIMITS)), st.integers(-(2**70), 2**70))
def test_integers_fit_exactly_or_are_refused(kind, number):
    entry = Entry("k", "k.cu", (("n", kind),))
    low, high = LIMITS[kind]
    size = 4 if kind.endswith("32") else 8
    if low <= number <= high:
        data = read(ArgPack(entry, {"n": number}), [size])[0]
        assert int.from_bytes(data, "little", signed=kind[0] == "i") == number
    else:
        with pytest.raises(ValueError, match=r"k: argument n: .* out of range"):
            ArgPack(entry, {"n": number})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(8, dtype=torch.float64)}, "argument x: dtype torch.float64 does not fit f32"),
        ({"q": torch.zeros(8, dtype=torch.int8)}, "argument q: dtype torch.int8 does not fit u8"),
        ({"x": torch.zeros(8, 8).T}, "argument x: .*not contiguous"),
        ({"x": torch.zeros(9)[1:]}, "argument x: .*16 bytes"),
        ({"x": 3}, "argument x: a tensor or None is wanted for f32., got int"),
        ({"a": 1.0}, "argument a: an int is wanted for i32, got float"),
        ({"a": True}, "argument a: a number is wanted for i32, got bool"),
        ({"a": None}, "argument a: a number is wanted"),
        ({"a": torch.tensor(1)}, "argument a: a number is wanted for i32, got Tensor"),
        ({"e": 1e39}, "argument e: 1e.39 overflows f32"),
        ({"e": "1"}, "argument e: a number is wanted for f32, got str"),
        ({"x": torch.zeros(8, device="meta")}, "is on cpu, others on meta"),
    ],
)
def test_wrong_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message) as error:
        ArgPack(ALL, values(**changed))
    assert str(error.value).startswith("all: ")


def test_missing_and_unknown_arguments_are_named():
    wrong = values(z=1)
    del wrong["a"]
    with pytest.raises(ValueError, match=r"missing: \['a'\], not parameters: \['z'\]"):
        ArgPack(ALL, wrong)


def test_infinity_passes_as_f32():
    pack = ArgPack(Entry("k", "k.cu", (("e", "f32"),)), {"e": float("-inf")})
    assert read(pack, [4])[0] == struct.pack("<f", float("-inf"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"params": (("x", "f64"),)},
        {"params": (("x", "i32"), ("x", "i64"))},
        {"constants": ("kA", "kA")},
        {"architectures": ("sm_90",)},
        {"architectures": ()},
    ],
)
def test_an_entry_is_checked(wrong):
    fields = {"name": "k", "file": "k.cu", "params": (), **wrong}
    with pytest.raises(ValueError, match="k: "):
        Entry(**fields)


def test_constants():
    constants = constant_set(kRows=4, kScale=0.1, kType="__nv_bfloat16", kMinus=-3)
    assert [name for name, _ in constants] == ["kMinus", "kRows", "kScale", "kType"]
    assert macro_definitions(constants) == ["kMinus=-3", "kRows=4", "kScale=0.1f", "kType=__nv_bfloat16"]


@pytest.mark.parametrize(
    ("name", "value"), [("k", True), ("k", float("nan")), ("k", "a b"), ("k-", 1), ("k", ""), ("k", None)]
)
def test_wrong_constants_are_refused(name, value):
    with pytest.raises(ValueError, match="constant"):
        macro_definitions(((name, value),))


def call(**changed):
    """A call of ALL, with some fields replaced."""
    fields = {
        "entry": ALL,
        "constants": constant_set(kA=1, kB=2),
        "grid": (4, 2, 1),
        "block": (256, 1, 1),
        "shared_bytes": 0,
        "args": ArgPack(ALL, values()),
    }
    return KernelCall(**{**fields, **changed})


def test_a_call_says_what_it_is():
    text = call(cluster=(2, 1, 1)).describe()
    for part in ("all", "grid (4, 2, 1)", "block (256, 1, 1)", "kA=1 kB=2", "cluster (2, 1, 1)"):
        assert part in text


@pytest.mark.parametrize(
    "changed",
    [
        {"grid": (0, 1, 1)},
        {"grid": (1, 70000, 1)},
        {"grid": (1, 1)},
        {"block": (1025, 1, 1)},
        {"block": (64, 32, 1)},
        {"block": (1, 1, 65)},
        {"shared_bytes": -1},
        {"constants": constant_set(kA=1)},
        {"constants": (("kB", 2), ("kA", 1))},
        {"cluster": (3, 1, 1)},
        {"cluster": (2, 1)},
        {"args": ArgPack(Entry("other", "all.cu", ()), {})},
    ],
)
def test_impossible_calls_are_refused(changed):
    with pytest.raises(ValueError, match="all: "):
        call(**changed)


# Signatures

SOURCE = """
#include "a.cuh"  // extern "C" __global__ void commented_out(int x)
/* extern "C" __global__ void also_commented_out(int x); */
extern "C" __global__ void plain(const float* __restrict__ x, // [n, m], input
                                 float *y, int n) {}
extern "C" __global__ void __launch_bounds__(kWarps * (32), 2) bounded(unsigned char const* q, unsigned n,
    long long m, unsigned long long k, float eps, __nv_bfloat16* __restrict__ b) {}
extern "C" __global__ __launch_bounds__(256) void early(void) {}
"""


def test_signatures_are_read():
    signatures = kernel_signatures(SOURCE)
    assert list(signatures) == ["plain", "bounded", "early"]
    assert parse_parameters(signatures["plain"]) == (("x", "f32*"), ("y", "f32*"), ("n", "i32"))
    assert [kind for _, kind in parse_parameters(signatures["bounded"])] == ["u8*", "u32", "i64", "u64", "f32", "bf16*"]
    assert parse_parameters(signatures["early"]) == ()


@pytest.mark.parametrize(("kind", "spelling"), [(kind, c) for kind, spellings in C_TYPES.items() for c in spellings])
def test_every_spelling_of_a_type(kind, spelling):
    assert parse_parameters(f"const {spelling} __restrict__ x, {spelling.replace('*', ' *')} y") == (
        ("x", kind),
        ("y", kind),
    )


@pytest.mark.parametrize(
    "text", ["double x", "float x[4]", "float** x", "char* x", "State s", "long x", "float& x", "int"]
)
def test_other_types_are_refused(text):
    with pytest.raises(ValueError, match="launches do not know"):
        parse_parameters(text)


def test_a_malformed_kernel_is_refused():
    with pytest.raises(ValueError, match="line 2"):
        kernel_signatures('\nextern "C" __global__ void broken(int x')


def test_comments_and_strings():
    text = without_comments('a /* b\n */ "// c" // d\ne')
    assert text == 'a  \n "// c"  \ne'


@pytest.fixture
def source_file(tmp_path):
    path = tmp_path / "k.cu"
    path.write_text('extern "C" __global__ void k(const float* x, int n, float eps) { x[kN]; }')
    return path


def test_a_matching_entry_passes(source_file):
    check_entry(Entry("k", str(source_file), (("x", "f32*"), ("n", "i32"), ("eps", "f32")), ("kN",)))


@pytest.mark.parametrize(
    ("params", "constants", "message"),
    [
        ((("x", "f32*"), ("n", "i64"), ("eps", "f32")), ("kN",), "takes .*i32 n.* in C but .*i64 n"),
        ((("x", "bf16*"), ("n", "i32"), ("eps", "f32")), ("kN",), "in C but"),
        ((("n", "i32"), ("x", "f32*"), ("eps", "f32")), ("kN",), "in C but"),
        ((("x", "f32*"), ("n", "i32")), ("kN",), "in C but"),
        ((("x", "f32*"), ("m", "i32"), ("eps", "f32")), ("kN",), "in C but"),
        ((("x", "f32*"), ("n", "i32"), ("eps", "f32")), ("kM", "kN"), "constants kM do not occur"),
    ],
)
def test_a_planted_mismatch_is_found(source_file, params, constants, message):
    with pytest.raises(ValueError, match=message):
        check_entry(Entry("k", str(source_file), params, constants))


def test_a_kernel_that_is_not_there(source_file, tmp_path):
    with pytest.raises(ValueError, match="no kernel other; there are: k"):
        check_entry(Entry("other", str(source_file), ()))
    with pytest.raises(Ds4Error, match=r"gone\.cu: cannot read"):
        check_entry(Entry("k", str(tmp_path / "gone.cu"), ()))


def test_includes_are_followed(tmp_path):
    for name, text in {
        "sub/k.cu": '#include "a.cuh"\n#include <cuda_bf16.h>\n#  include "../shared.cuh"\n// #include "unused.cuh"\n',
        "sub/a.cuh": '#include "b.cuh"\n',
        "sub/b.cuh": '#include "a.cuh"\n',
        "sub/unused.cuh": "",
        "shared.cuh": "",
        "cuda_bf16.h": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = [path.relative_to(tmp_path).as_posix() for path in project_includes(tmp_path / "sub" / "k.cu")]
    assert found == ["shared.cuh", "sub/a.cuh", "sub/b.cuh"]


def test_an_include_of_a_macro_is_refused(source_file):
    source_file.write_text("#include HEADER\n")
    with pytest.raises(ValueError, match="#include HEADER: name the file"):
        project_includes(source_file)


def test_architectures():
    assert len(ARCHITECTURES) == len(set(ARCHITECTURES)) == 8
    assert Entry("k", "k.cu", ()).architectures == ARCHITECTURES
