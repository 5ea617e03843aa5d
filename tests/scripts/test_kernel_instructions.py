"""scripts/kernel_instructions.py and scripts/sass.py on recorded machine code; the figures were counted by hand.

sass/toy.sass is the code section of ``nvdisasm -c -gi`` (13.5) for toy.cu, compiled by ds4.kernels.compiler for sm_90a.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import kernel_instructions
import sass

from ds4.errors import Ds4Error
from ds4.kernels.compiler import compile_source
from ds4.kernels.entry import Entry, constant_set

TOY = Path(__file__).parent / "sass"
RECORDED = (TOY / "toy.sass").read_text(encoding="utf-8")
LOOP, WORDS, STORES = 0xA0, 0x130, 0x230  # the loop over chunks and those within it: four words; n of stores


@pytest.fixture(autouse=True)
def _sources(monkeypatch) -> None:
    """Lines of toy.cuh are looked up there."""
    monkeypatch.setattr(kernel_instructions, "KERNEL_ROOT", TOY)


@pytest.fixture
def code() -> list[sass.Instruction]:
    return sass.parse(RECORDED)["toy"]


def at(code: list[sass.Instruction], address: int) -> sass.Instruction:
    return next(one for one in code if one.address == address)


def test_instructions(code):
    load = at(code, 0xF0)
    assert (load.opcode, load.load_bytes) == ("LDG.E.NA.128.CONSTANT", 512)
    assert load.source == ("toy.cuh:4", "toy.cuh:10", "toy.cu:7")
    assert (at(code, 0x110).load_bytes, at(code, 0x390).load_bytes) == (64, 0)
    branch = at(code, 0x1B0)
    assert (branch.guard, branch.targets, branch.leaves) == ("P0", (WORDS,), False)
    assert at(code, 0x230).operands == ("R4", "R9", "0x4", "R6")  # without its .reuse
    assert at(code, 0x3A0).leaves
    assert at(code, 0x3B0).leaves
    assert code[-1].opcode == "NOP"


def test_loops(code):
    loops = {region.at: region for region in sass.regions(code) if region.is_loop}
    assert set(loops) == {LOOP, WORDS, STORES}  # and not the branch to itself at the end
    outer, words, stores = (loops[address] for address in (LOOP, WORDS, STORES))
    assert outer.inner == [words, stores]
    assert [len(region.own) for region in (outer, words, stores)] == [21, 9, 5]
    assert [region.trips for region in (outer, words, stores)] == [None, 4, None]
    assert outer.counts().total() == 21 + 4 * 9
    assert outer.counts(always=True).total() == 19 + 4 * 9  # but for the two in front of the stores
    assert outer.unknown() == [stores]
    straight = [region for region in sass.regions(code) if not region.is_loop]
    assert sum(len(region.own) for region in straight) == len(code) - 21 - 9 - 5


@pytest.mark.parametrize(
    ("old", "new", "trips"),
    [
        ("R0, -RZ, RZ, 0, 0 ", "R0, -RZ, RZ, 0, 1.1920928955078125e-07 ", 2),  # from 2, as two f16
        ("HFMA2.MMA R0, -RZ, RZ, 0, 0 ", "MOV R0, 0x3 ", 1),
        ("ISETP.NE.AND P0, PT, R0, 0x4, PT", "ISETP.GE.U32.AND P0, PT, R0, 0x4, PT", 1),
        ("ISETP.NE.AND P0, PT, R0, 0x4, PT", "ISETP.NE.AND P0, PT, R0, R2, PT", None),
        ("ISETP.NE.AND P0, PT, R0, 0x4, PT", "ISETP.NE.AND P0, PT, R0, 0x4, P1", None),
        ("VIADD R0, R0, 0x1 ", "VIADD R0, R0, R1 ", None),
        ("MOV R4, R2 ", "LDS.128 R0, [R2] ", None),  # overwrites the counter
        ("MOV R4, R2 ", "MOV R0, 0x3 ", 2),  # a compiler's trick: of two passes the second has a constant
        ("MOV R4, R2 ", "@P1 BRA `(.L_x_4) ", None),
    ],
)
def test_how_often_a_loop_runs(old, new, trips):
    start = RECORDED.index("/*0110*/")
    assert old in RECORDED[start:]
    changed = RECORDED[:start] + RECORDED[start:].replace(old, new, 1)
    [found] = [region.trips for region in sass.regions(sass.parse(changed)["toy"]) if region.at == WORDS]
    assert found == trips


def test_rows(code):
    first, second = kernel_instructions.rows(code)
    assert (first["at"], first["loop"], first["most"], first["format"]) == (LOOP, True, True, "nvfp4")
    assert (first["instructions"], first["always"]) == (57, 55)
    assert first["left_out"] == [{"at": STORES, "instructions": 5}]
    # 1024 codes of four bits, and 64 scales of a byte for them
    assert (first["bytes"], first["a_byte"], first["a_weight"]) == (576, 32 * 57 / 576, 32 * 57 / 1024)
    assert first["classes"] == {"MMA": 0, "FFMA": 4, "LDS": 0, "LDG": 2, "other": 51}
    assert sum(first["opcodes"].values()) == 57
    # What is read behind the loop has a row of its own: another line of the kernel calls for it.
    assert (second["at"], second["loop"], second["most"], second["instructions"]) == (0x2E0, False, False, 12)
    assert (second["bytes"], second["source"].split(" < ")[-1]) == (144, "toy.cu:19")


def test_loads_in_front_of_a_loop_belong_to_it():
    same_line = RECORDED.replace("line 19", "line 7")
    assert [one["at"] for one in kernel_instructions.rows(sass.parse(same_line)["toy"])] == [LOOP]


@pytest.mark.parametrize(
    ("old", "new"), [("LDG.E.U16 ", "LDG.E.NA.U16.CONSTANT "), ('toy.cuh", line 13', 'toy.cuh", line 10')]
)
def test_scales_are_no_codes(old, new):
    """Whether they are streamed too, or loaded on the same line."""
    [first, _] = kernel_instructions.rows(sass.parse(RECORDED.replace(old, new))["toy"])
    assert first["bytes"] == 576


def test_a_format_that_is_not_known(monkeypatch):
    monkeypatch.setattr(kernel_instructions, "struct_at", lambda place: "Toy")
    [first, _] = kernel_instructions.rows(sass.parse(RECORDED)["toy"])
    assert (first["format"], first["bytes"], first["a_weight"]) == ("", 512, None)


@pytest.mark.parametrize(
    ("struct", "name"),
    [
        ("Nvfp4Tile", "nvfp4"),
        ("Q8Matrix", "q8_0"),
        ("Iq2Weights", "iq2_xxs"),
        ("Q2KTile", "q2_k"),
        ("Fp8Tile", "fp8_block"),
    ],
)
def test_formats_by_struct(struct, name):
    packing = kernel_instructions.packing_of(struct)
    assert packing is not None
    assert packing.format == name


@pytest.mark.parametrize("struct", ["", "Tile", "RowChunks", "Q8", "PlainMatrix"])
def test_structs_without_a_format(struct):
    assert kernel_instructions.packing_of(struct) is None


def test_classes():
    names = ("HMMA.16816.F32", "UTCHMMA", "QMMA", "HFMA2.MMA", "FFMA.FTZ", "LDSM.16", "LDG.E", "LDGSTS.E", "LDGDEPBAR")
    found = sass.classes(sass.Counter(names))
    assert found == {"MMA": 3, "FFMA": 1, "LDS": 1, "LDG": 2, "other": 2}


def run(*arguments: str) -> Any:
    return CliRunner().invoke(kernel_instructions.main, list(arguments))


@pytest.fixture
def recorded(monkeypatch) -> list[tuple[str, Any, str]]:
    """The script on the recorded code; returns what was to be compiled."""
    asked: list[tuple[str, Any, str]] = []
    entry = Entry("toy", "toy.cu", (), ("N_TOK", "W_FORMAT"))
    variants = [(entry, constant_set(N_TOK=n, W_FORMAT=fmt)) for n in (1, 8) for fmt in ("Nvfp4Tile", "Q8Tile")]

    class Cubins:
        def get(self, entry: Entry, constants: Any, architecture: str) -> Any:
            asked.append((entry.name, dict(constants), architecture))
            return type("Cubin", (), {"data": b"machine code"})

    def get(name: str) -> Any:
        if name != "toy":
            raise ValueError(f"no operation {name}; there are: toy")
        return type("Operation", (), {"variants": variants})

    monkeypatch.setattr(kernel_instructions, "CubinCache", Cubins)
    monkeypatch.setattr(kernel_instructions, "get", get)
    monkeypatch.setattr(kernel_instructions, "disassembler", lambda: "nvdisasm")
    monkeypatch.setattr(kernel_instructions, "disassemble", lambda tool, cubin: RECORDED)
    return asked


def test_command(recorded):
    result = run("toy", "--only", "nvfp4", "--only", "N_TOK=8", "--arch", "sm_120a")
    assert result.exit_code == 0, result.output
    assert recorded == [("toy", {"N_TOK": 8, "W_FORMAT": "Nvfp4Tile"}, "sm_120a")]
    head, columns, first, second = result.output.splitlines()
    assert head == "toy N_TOK=8 W_FORMAT=Nvfp4Tile sm_120a"
    assert " ".join(columns.split()) == "at instr always bytes a byte a weight MMA FFMA LDS LDG other"
    assert first.split()[:7] == ["*", "0xa0", "57", "55", "576", "3.17", "1.78"]
    assert first.endswith("nvfp4 toy.cu:7, + loop 0x230 of 5")
    assert second.endswith("nvfp4 toy.cu:19, no loop")


def test_command_with_other_constants(recorded):
    result = run("toy", "--only", "N_TOK=1", "--set", "W_FORMAT=Q6KTile", "--json")
    assert result.exit_code == 0, result.output
    assert recorded == [("toy", {"N_TOK": 1, "W_FORMAT": "Q6KTile"}, "sm_90a")]  # two variants, now the same
    [kernel] = json.loads(result.stdout)["kernels"]
    assert (kernel["kernel"], kernel["constants"]) == ("toy", "N_TOK=1 W_FORMAT=Q6KTile")
    assert [one["instructions"] for one in kernel["rows"]] == [57, 12]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "no operation nothing; there are: toy"),
        (["toy", "--only", "N_TOK=2"], "toy: none of its 4 variants has N_TOK=2"),
        (["toy", "--set", "N_TOCK=2"], "--set N_TOCK=2: a NAME=VALUE with one of N_TOK, W_FORMAT is needed"),
    ],
)
def test_errors_are_one_line(recorded, arguments, words):
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (2, f"kernel_instructions: {words}\n")


def test_without_a_disassembler(monkeypatch):
    from cuda import pathfinder

    monkeypatch.setattr(pathfinder, "find_nvidia_binary_utility", lambda name: None)
    result = run("moe_up")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "nvdisasm is not found; pip install nvidia-cuda-nvdisasm" in result.stderr


def test_with_a_disassembler():
    """The tools as installed: a loop, four words a chunk and the format are found whatever else they make of it."""
    try:
        tool = kernel_instructions.disassembler()
    except Ds4Error as error:
        pytest.skip(str(error))
    with pytest.raises(Ds4Error, match=r"nvdisasm fails: .*pip install nvidia-cuda-nvdisasm -U"):
        kernel_instructions.disassemble(tool, b"no machine code")
    cubin = compile_source(TOY / "toy.cu", (), "sm_90a")
    code = sass.parse(kernel_instructions.disassemble(tool, cubin.data))["toy"]
    row = next(one for one in kernel_instructions.rows(code) if one["loop"])
    assert (row["format"], row["bytes"], row["classes"]["FFMA"]) == ("nvfp4", 576, 4)
