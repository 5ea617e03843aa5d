"""The step's words on the device: Python and the kernels' header have them in the same places."""

from __future__ import annotations

import re

import pytest

from ds4.kernels.compiler import CompileError, compile_source
from ds4.kernels.draft import words
from ds4.kernels.entry import KERNEL_ROOT
from ds4.kernels.launch import DECODE_ROWS

HEADER = KERNEL_ROOT / "draft" / "words.cuh"
PLACES = {name: value for name, value in vars(words).items() if name.isupper() and name != "WORDS"}


def test_the_header_names_the_same_words():
    names = re.findall(r"\bk([A-Z]\w*)\s*=", HEADER.read_text())
    assert sorted(name.upper() for name in names) == sorted(PLACES)


def test_words_do_not_overlap_and_start_on_16_bytes():
    sizes = {place: DECODE_ROWS if name == "TOKENS" else 1 for name, place in PLACES.items()}
    starts = sorted(sizes)
    assert len(starts) == len(PLACES)
    assert all(place % 4 == 0 for place in starts)
    assert all(place + sizes[place] <= end for place, end in zip(starts, [*starts[1:], words.WORDS], strict=True))


@pytest.mark.parametrize("moved", [0, 1])
def test_the_compiler_agrees(tmp_path, moved):
    """Each place as NVRTC sees it; places that were moved by one are noticed."""
    lines = [f'#include "{HEADER}"']
    lines += [f"static_assert(k{name.title()} == {place + moved});" for name, place in PLACES.items()]
    source = tmp_path / "places.cu"
    source.write_text("\n".join([*lines, 'extern "C" __global__ void nothing() {}', ""]))
    if not moved:
        assert compile_source(source, (), "sm_90a").data
        return
    with pytest.raises(CompileError) as found:
        compile_source(source, (), "sm_90a")
    assert found.value.log.count("static assertion failed") == len(PLACES)
