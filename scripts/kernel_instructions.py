"""How many thread-instructions a kernel's loops take for each byte of weights that they read, from its machine code.

    pip install nvidia-cuda-nvdisasm                  NVIDIA's disassembler; a CUDA toolkit's is found too
    python scripts/kernel_instructions.py moe_up                          every variant as shipped, for sm_90a
    python scripts/kernel_instructions.py moe_up --only nvfp4 --only N_TOK=1
    python scripts/kernel_instructions.py moe_down --only N_TOK=1 --set W2_FORMAT=Q6KWeights   what is not shipped
    python scripts/kernel_instructions.py proj_in proj_q --arch sm_100a --json > counts.json

Variants are those of the registered operations (ds4/kernels/registry.py), at the dimensions of DeepSeek-V4-Flash. No
GPU is needed. A line is one innermost loop that reads weights or, where the compiler left no loop, what one call in the
kernel's function came to:

    instr     instructions of a warp in one pass, by class: tensor cores, FP32 multiply-adds, loads from shared and from
              global memory. An inner loop without weights counts as often as it runs; where the code does not tell how
              often that is, the end of the line names it instead
    always    those of them that no branch goes around; one under a predicate counts
    bytes     of weights and their scales for a warp in one pass
    a byte    32 instr / bytes;  a weight: 32 instr / weights

Weights are what a load_stream (include/ptx.cuh) brings, or the first load in a struct that is called after a format,
such as Nvfp4Weights, Q8Matrix or Fp8Tile. The format says how many bytes of scales belong to the codes that are loaded,
as lanes may load a scale that they share. The line with most instructions is marked. A GPU has about 7 (H200), 5 (B200)
or 64 (GB10) thread-instructions for each byte that it can stream.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sass import Instruction, Region, classes, parse, regions

from ds4.errors import Ds4Error
from ds4.kernels.arch import ARCHITECTURES
from ds4.kernels.cubin_cache import CubinCache
from ds4.kernels.entry import KERNEL_ROOT, Constants, Entry, macro_definitions
from ds4.kernels.packing import PACKINGS, Packing
from ds4.kernels.registry import get

_INSTALL = "pip install nvidia-cuda-nvdisasm"
_SAMPLE = 4096  # rows and columns of a matrix to take a format's bytes from
_STRUCT = re.compile(r"struct (\w+)")
_ENDING = re.compile(r"(Weights|Matrix|Tile)$")


def disassembler() -> str:
    """Path of nvdisasm. Raises Ds4Error where there is none."""
    from cuda import pathfinder

    tool = pathfinder.find_nvidia_binary_utility("nvdisasm")
    if tool is None:
        raise Ds4Error(f"NVIDIA's disassembler nvdisasm is not found; {_INSTALL}")
    return tool


def disassemble(tool: str, cubin: bytes) -> str:
    """What ``nvdisasm -c -gi`` says of machine code. Raises Ds4Error where it fails."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-c", "-gi", file.name], capture_output=True, text=True)
    if done.returncode:
        raise Ds4Error(f"{tool} fails: {' '.join(done.stderr.split())}; {_INSTALL} -U")
    return done.stdout


def _is_stream(one: Instruction) -> bool:
    """Whether this is load_stream16 (ptx.cuh)."""
    return bool(one.load_bytes) and ".NA." in one.opcode


@cache
def struct_at(place: str) -> str:
    """The struct around a line of a source, or in front of it: "fp4_weights.cuh:43" is in Nvfp4Weights."""
    name, line = place.split(":")
    text = next(KERNEL_ROOT.rglob(name)).read_text(encoding="utf-8").splitlines()[: int(line)]
    return next((match[1] for match in map(_STRUCT.match, reversed(text)) if match), "")


@cache
def packing_of(struct: str) -> Packing | None:
    """The packing that a struct reads: that of nvfp4 for Nvfp4Weights, of q8_0 for Q8Tile."""
    stem = _ENDING.sub("", struct).lower()
    found = (packing for name, packing in PACKINGS.items() if name.replace("_", "").startswith(stem))
    return next(found, None) if stem and stem != struct.lower() else None


def struct_of(one: Instruction) -> str:
    """The line of a struct with a packing that an instruction comes from, the outermost such call; or nothing."""
    return next((place for place in reversed(one.source) if packing_of(struct_at(place))), "")


def code_loads(code: Sequence[Instruction]) -> dict[Instruction, Packing | None]:
    """Loads of codes, the first plane of a format -> its packing, where it is known.

    In a struct with a packing it is the first line that loads, by load_stream if any does; elsewhere every load_stream.
    Other loads of a struct are those of scales.
    """
    groups: dict[str, list[Instruction]] = {}
    found: dict[Instruction, Packing | None] = {}
    for one in code:
        if place := struct_of(one) if one.load_bytes else "":
            groups.setdefault(struct_at(place), []).append(one)
        elif is_stream(one):
            found[one] = None
    for struct, loads in groups.items():
        codes = {one: int(struct_of(one).split(":")[1]) for one in [*filter(is_stream, loads)] or loads}
        found |= {one: packing_of(struct) for one, line in codes.items() if line == min(codes.values())}
    return found


def is_stream(one: Instruction) -> bool:
    """Whether this is load_stream16 or a narrower load of its kind (include/ptx.cuh)."""
    return bool(one.load_bytes) and ".NA." in one.opcode


def weights_of(loads: Sequence[Instruction], packing: Packing | None) -> tuple[float, float | None]:
    """Bytes of the weights whose codes are loaded, in all planes, and their number.

    Without a packing the bytes are those of the loads, which is all where there is one plane.
    """
    codes = sum(one.load_bytes for one in loads)
    if packing is None:
        return codes, None
    n_weights = codes / packing.planes[0].row_bytes(_SAMPLE) * _SAMPLE
    return n_weights * packing.nbytes(_SAMPLE, _SAMPLE) / _SAMPLE**2, n_weights


def row(region: Region, loads: Sequence[Instruction], packing: Packing | None) -> dict[str, Any]:
    """What a pass through a region costs that has these loads of codes."""
    n_bytes, n_weights = weights_of(loads, packing)
    counts = region.counts()
    return {
        "at": region.at,
        "loop": region.is_loop,
        "format": packing.format if packing else "",
        "instructions": counts.total(),
        "always": region.counts(always=True).total(),
        "left_out": [{"at": loop.at, "instructions": loop.counts().total()} for loop in region.unknown()],
        "bytes": n_bytes,
        "a_byte": 32 * counts.total() / n_bytes,
        "a_weight": 32 * counts.total() / n_weights if n_weights else None,
        "classes": classes(counts),
        "opcodes": dict((+counts).most_common()),
        "source": " < ".join(loads[0].source),
    }


def rows(code: Sequence[Instruction]) -> list[dict[str, Any]]:
    """A row for each innermost region of a kernel that reads weights; ``most`` marks the one with most instructions.

    Loads outside loops do not count where they are the first ones of a loop, which the same line came to.
    """
    codes = code_loads(code)
    reading = {region: loads for region in regions(code) if (loads := [one for one in region.own if one in codes])}
    lines = {region: {one.source[-1:] for one in loads} for region, loads in reading.items()}
    looped = set().union(*(lines[region] for region in reading if region.is_loop))
    found = [
        row(region, loads, codes[loads[0]])
        for region, loads in reading.items()
        if not (any(below in reading for below in _inner(region)) if region.is_loop else lines[region] & looped)
    ]
    found.sort(key=lambda one: one["at"])
    most = max(found, key=lambda one: one["instructions"], default=None)
    return [{**one, "most": one is most} for one in found]


def _inner(region: Region) -> Iterator[Region]:
    for loop in region.inner:
        yield loop
        yield from _inner(loop)


def chosen(entry: Entry, constants: Constants, only: Sequence[str]) -> bool:
    """Whether a variant has all of these: NAME=VALUE among its constants, or a word in its kernel's name or a value."""
    lines = macro_definitions(constants)
    words = [entry.name, *(line.split("=", 1)[1] for line in lines)]
    return all(one in lines if "=" in one else any(one.lower() in word.lower() for word in words) for one in only)


def changed(constants: Constants, changes: Sequence[str]) -> Constants:
    """The constants with other values for some. Raises Ds4Error for a name that is not among them."""
    values = dict(constants)
    for change in changes:
        name, _, value = change.partition("=")
        if name not in values or not value:
            raise Ds4Error(f"--set {change}: a NAME=VALUE with one of {', '.join(values)} is needed")
        values[name] = value
    return tuple(sorted(values.items()))


def variants(operation: str, only: Sequence[str], changes: Sequence[str]) -> list[tuple[Entry, Constants]]:
    """The operation's variants that ``only`` leaves, changed, each once. Raises Ds4Error where there are none."""
    try:
        all_of = get(operation).variants
    except ValueError as error:
        raise Ds4Error(str(error)) from None
    found = [(entry, changed(constants, changes)) for entry, constants in all_of if chosen(entry, constants, only)]
    if not found:
        raise Ds4Error(f"{operation}: none of its {len(all_of)} variants has {' and '.join(only)}")
    return list(dict.fromkeys(found))


def table(record: dict[str, Any]) -> str:
    """The rows of a kernel as text."""
    lines = [f"{record['kernel']} {record['constants']} {record['architecture']}"]
    if not record["rows"]:
        return f"{lines[0]}\n  reads no weights"
    kinds = "".join(f"{kind:>6}" for kind in record["rows"][0]["classes"])
    lines.append(f"  {'at':>6} {'instr':>6} {'always':>6} {'bytes':>6} {'a byte':>7} {'a weight':>8}{kinds}")
    for one in record["rows"]:
        a_weight = "" if one["a_weight"] is None else f"{one['a_weight']:.2f}"
        figures = (
            f"{one['at']:#6x} {one['instructions']:>6} {one['always']:>6} {one['bytes']:>6.0f} {one['a_byte']:>7.2f}"
        )
        figures += f" {a_weight:>8}" + "".join(f"{n:>6}" for n in one["classes"].values())
        about = [f"{one['format']} {one['source'].split(' < ')[-1]}".strip()]
        about += [] if one["loop"] else ["no loop"]
        about += [f"+ loop {loop['at']:#x} of {loop['instructions']}" for loop in one["left_out"]]
        lines.append(f"{'*' if one['most'] else ' '} {figures}  {', '.join(about)}")
    return "\n".join(lines)


@click.command()
@click.argument("operations", nargs=-1, required=True)
@click.option("--only", multiple=True, metavar="TEXT", help="Only variants with NAME=VALUE, or with a value like this.")
@click.option("--set", "changes", multiple=True, metavar="NAME=VALUE", help="Another value for a constant.")
@click.option("--arch", type=click.Choice(ARCHITECTURES), default="sm_90a", help="Architecture (sm_90a).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    operations: tuple[str, ...], only: tuple[str, ...], changes: tuple[str, ...], arch: str, as_json: bool
) -> None:
    """Count the instructions a byte of weights in the loops of these OPERATIONS."""
    cubins, records = CubinCache(), []
    try:
        tool = disassembler()
        for entry, constants in dict.fromkeys(one for name in operations for one in variants(name, only, changes)):
            code = parse(disassemble(tool, cubins.get(entry, constants, arch).data))[entry.name]
            about = {"kernel": entry.name, "constants": " ".join(macro_definitions(constants)), "architecture": arch}
            records.append({**about, "rows": rows(code)})
            if not as_json:
                click.echo(table(records[-1]))
    except Ds4Error as error:
        click.echo(f"kernel_instructions: {error}", err=True)
        sys.exit(2)
    if as_json:
        click.echo(json.dumps({"schema": 1, "kernels": records}))


if __name__ == "__main__":
    main()
