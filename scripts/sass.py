"""NVIDIA's machine code (SASS) as nvdisasm prints it: instructions, loops, and what a pass through a loop costs.

nvdisasm -c -gi kernel.cubin        code sections, with the source line and the calls that it was inlined through
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import eq, ge, gt, le, lt, ne

_KERNEL = re.compile(r"\.text\.(\w+):")
_LABEL = re.compile(r"(\.L_x_\d+):")
_LINE = re.compile(r'//## File "(?P<file>[^"]*)", line (?P<line>\d+)')
_INSTRUCTION = re.compile(
    r"/\*(?P<at>[0-9a-f]+)\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<opcode>[A-Z]\S*)\s*(?P<rest>.*?)\s*;"
)
_TARGET = re.compile(r"\.L_x_\d+")
_LOADS = ("LDG", "LDGSTS", "LD")  # from global memory: to registers, to shared memory, by a generic address
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_COMPARE = {"NE": ne, "EQ": eq, "LT": lt, "LE": le, "GT": gt, "GE": ge}
_MOST_TRIPS = 64
_CLASSES = ("MMA", "FFMA", "LDS", "LDG")


@dataclass(frozen=True)
class Instruction:
    """``guard``: the predicate that it runs under, "P0" or "!P0", or nothing. ``targets``: where a branch may go.
    ``source``: "file:line", the innermost inlined function's first, the kernel's own last."""

    address: int
    guard: str
    opcode: str
    operands: tuple[str, ...]
    targets: tuple[int, ...]
    source: tuple[str, ...]

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def load_bytes(self) -> int:
        """Bytes that a warp loads from global memory, a width for each lane; 0 for what is no such load."""
        if self.name not in _LOADS:
            return 0
        return 32 * next((_BYTES[part] for part in self.opcode.split(".") if part in _BYTES), 4)

    @property
    def leaves(self) -> bool:
        """Whether the next instruction is never the one after it."""
        plain = not self.guard and all(_TARGET.search(operand) for operand in self.operands)  # BRA !P0, BRA.DIV UR4
        return self.name in ("EXIT", "RET", "BRX", "JMX") or (self.name in ("BRA", "JMP") and plain)


@dataclass(eq=False)
class Region:
    """A loop, or the code outside loops that one line of the kernel's function came to.

    ``at``: address of its first instruction. ``own``: its instructions that are in no inner loop. ``always``: the
    addresses of those that no branch goes around. ``trips``: passes of an inner loop for each time that it is come to,
    None where the code does not say it.
    """

    at: int
    is_loop: bool
    own: list[Instruction]
    always: set[int]
    inner: list[Region] = field(default_factory=list)
    trips: int | None = None

    def counts(self, *, always: bool = False) -> Counter[str]:
        """Opcode -> instructions of a pass, all or those of ``always``; inner loops of unknown length are left out."""
        found = Counter(one.opcode for one in self.own if not always or one.address in self.always)
        for loop in self.inner:
            if not always or loop.at in self.always:
                for opcode, n in loop.counts(always=always).items():
                    found[opcode] += n * (loop.trips or 0)
        return found

    def unknown(self) -> list[Region]:
        """The inner loops that counts() leaves out."""
        return [one for loop in self.inner for one in ([loop] if loop.trips is None else loop.unknown())]


def classes(counts: Counter[str]) -> dict[str, int]:
    """Instructions by class: tensor cores, FP32 multiply-adds, loads from shared and from global memory, all others."""
    found = dict.fromkeys((*_CLASSES, "other"), 0)
    for opcode, n in counts.items():
        name = opcode.split(".")[0]
        is_mma = re.fullmatch(r"(UTC)?[A-Z]*MMA", name) and name != "HFMA2"
        kinds = [kind for kind in ("FFMA", "LDS", "LDG") if name.startswith(kind) and name != "LDGDEPBAR"]
        found["MMA" if is_mma else kinds[0] if kinds else "other"] += n
    return found


def parse(text: str) -> dict[str, list[Instruction]]:
    """Kernel -> its instructions, from the output of ``nvdisasm -c -gi``."""
    raw: dict[str, list[tuple[re.Match[str], tuple[str, ...]]]] = {}
    labels: dict[str, int] = {}  # label -> address; labels are unique in a file
    kernel, waiting, source, extends = "", [], [], False
    for line in text.splitlines():
        if match := _KERNEL.match(line.strip()):
            kernel = match[1]
            raw[kernel] = []
        elif match := _LABEL.match(line.strip()):
            waiting.append(match[1])
        elif match := _LINE.search(line):
            place = f"{match['file'].rsplit('/', 1)[-1]}:{match['line']}"
            source = [*source, place] if extends else [place]
            extends = True
        elif kernel and (match := _INSTRUCTION.search(line)):
            raw[kernel].append((match, tuple(source)))
            labels.update(dict.fromkeys(waiting, int(match["at"], 16)))
            waiting, extends = [], False
    return {name: [_instruction(*one, labels) for one in found] for name, found in raw.items()}


def _instruction(match: re.Match[str], source: tuple[str, ...], labels: dict[str, int]) -> Instruction:
    name = match["opcode"].split(".")[0]
    jumps = name in ("BRA", "BRX", "JMP", "JMX")
    targets = tuple(labels[label] for label in _TARGET.findall(match["rest"]) if label in labels) if jumps else ()
    operands = tuple(part.strip().removesuffix(".reuse") for part in match["rest"].split(",")) if match["rest"] else ()
    return Instruction(int(match["at"], 16), match["guard"] or "", match["opcode"], operands, targets, source)


def regions(code: Sequence[Instruction]) -> list[Region]:
    """The loops of a kernel, outer before inner, and its code outside loops, by the line of the kernel's function.

    A loop is what lies on a way from its first instruction back to it; several ways back are one loop.
    """
    place = {one.address: i for i, one in enumerate(code)}
    follow = [_followers(i, code, place) for i in range(len(code))]
    bodies = _loops(follow)
    order = sorted(bodies, key=lambda header: len(bodies[header]))
    found: dict[int, Region] = {}
    for header in reversed(order):
        inside: set[int] = set().union(*(bodies[other] for other in order if bodies[other] < bodies[header]))
        own = [code[i] for i in sorted(bodies[header] - inside)]
        always = {code[i].address for i in _always(follow, header, bodies[header])}
        trips = _trips(code, header, bodies[header])
        found[header] = Region(code[header].address, True, own, always, [], trips)
        outer = next((other for other in order if bodies[header] < bodies[other]), None)
        if outer is not None:
            found[outer].inner.append(found[header])
    in_loops: set[int] = set().union(*bodies.values())
    straight: dict[str, Region] = {}
    line = ""
    for i, one in enumerate(code):
        # A line of another file at the end: the compiler has lost the calls in between.
        if one.source and one.source[-1].split(":")[0].endswith(".cu"):
            line = one.source[-1]
        outermost = i in found and not any(i in bodies[other] for other in order if other != i)
        if outermost or i not in in_loops:
            region = straight.setdefault(line, Region(one.address, False, [], set()))
            region.always.add(one.address)
            if outermost:
                region.inner.append(found[i])
            else:
                region.own.append(one)
    return [*found.values(), *straight.values()]


def _followers(i: int, code: Sequence[Instruction], place: dict[int, int]) -> list[int]:
    one = code[i]
    found = [place[target] for target in one.targets]
    if (not one.leaves or one.guard) and i + 1 < len(code):
        found.append(i + 1)
    return found


def _loops(follow: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    """First instruction of each loop -> its instructions, from the edges of a depth-first search that lead back."""
    state = [0] * len(follow)  # 1: on the way from the start to here, 2: done
    back: dict[int, list[int]] = {}
    before: list[list[int]] = [[] for _ in follow]
    way: list[tuple[int, Iterator[int]]] = []
    if follow:
        state[0] = 1
        way.append((0, iter(follow[0])))
    while way:
        i, rest = way[-1]
        for j in rest:
            before[j].append(i)
            if state[j] == 1:
                back.setdefault(j, []).append(i)
            elif not state[j]:
                state[j] = 1
                way.append((j, iter(follow[j])))
                break
        else:
            state[i] = 2
            way.pop()
    bodies = {}
    for header, ends in back.items():
        body, todo = {header}, list(ends)
        while todo:
            i = todo.pop()
            if i not in body:
                body.add(i)
                todo += before[i]
        bodies[header] = body
    return bodies


def _always(follow: Sequence[Sequence[int]], header: int, body: set[int]) -> set[int]:
    """The instructions of a loop on every way from its first one back to it."""
    before: dict[int, list[int]] = {i: [] for i in body}
    for i in body:
        for j in body.intersection(follow[i]):
            before[j].append(i)

    def start(i: int) -> int:  # of the instructions that run just as often
        while i != header and len(before[i]) == 1 and len(follow[before[i][0]]) == 1:
            i = before[i][0]
        return i

    starts = {i: start(i) for i in body}
    needed = {i for i in {*starts.values()} if not _returns(follow, header, body - {i})}
    return {i for i in body if starts[i] in needed}


def _returns(follow: Sequence[Sequence[int]], header: int, allowed: set[int]) -> bool:
    """Whether a way through ``allowed`` leads from the first instruction back to it."""
    seen, todo = set(), [header]
    while todo:
        i = todo.pop()
        if i in allowed and i not in seen:
            seen.add(i)
            if header in follow[i]:
                return True
            todo += follow[i]
    return False


def _trips(code: Sequence[Instruction], header: int, body: set[int]) -> int | None:
    """Passes of a loop without branches, from the constants that its counter has: as if run."""
    order = sorted(body)
    last = code[order[-1]]
    if any(one.targets for one in (code[i] for i in order[:-1])) or last.targets != (code[header].address,):
        return None
    first = header  # of the instructions in front of the loop that lead nowhere else
    while first and not code[first - 1].targets:
        first -= 1
    known: dict[str, int] = {}
    for one in code[first:header]:
        _run(one, known)
    for passes in range(1, _MOST_TRIPS + 1):
        for i in order[:-1]:
            _run(code[i], known)
        holds = known.get(last.guard.lstrip("!"))
        if holds is None:
            return None
        if bool(holds) == last.guard.startswith("!"):
            return passes
    return None


def _run(one: Instruction, known: dict[str, int]) -> None:
    """Follow integers and predicates that are constants through an instruction; forget what else it writes."""
    if not one.operands:
        return
    target, *sources = one.operands
    values = [_integer(source, known) for source in sources]
    whole = [value for value in values if value is not None]
    result = None
    if one.opcode in ("MOV", "VIADD", "IMAD.MOV.U32") or (one.opcode == "IADD3" and len(sources) == 3):
        result = sum(whole) if len(whole) == len(values) else None
    elif one.name == "HFMA2" and re.fullmatch(r"-RZ RZ( -?[0-9.]+(e[-+]?\d+)?){2}", " ".join(sources)):
        upper, lower = (struct.unpack("<H", struct.pack("<e", float(x)))[0] for x in sources[2:])
        result = upper << 16 | lower  # a constant as two f16
    elif one.name == "ISETP" and sources[0] == sources[3] == "PT" and None not in values[1:3]:
        result = int(_COMPARE[one.opcode.split(".")[1]](values[1], values[2]))
    for name in _written(one):
        known.pop(name, None)
    if result is not None and not one.guard:
        known[target] = result


def _written(one: Instruction) -> list[str]:
    """The registers and predicates that an instruction may write: the first operand, and predicates behind it."""
    found = [operand for operand in one.operands[:3] if re.fullmatch(r"U?P\d", operand)]
    if match := re.fullmatch(r"R(\d+)", next((operand for operand in one.operands if operand not in found), "")):
        parts = one.opcode.split(".")
        wide = 4 if "128" in parts or parts[0].endswith("MMA") else 2 if {"64", "WIDE", "CS2R"} & {*parts} else 1
        found += [f"R{int(match[1]) + i}" for i in range(wide)]
    return found


def _integer(operand: str, known: dict[str, int]) -> int | None:
    if operand == "RZ":
        return 0
    return int(operand, 16) if re.fullmatch(r"-?0x[0-9a-f]+", operand) else known.get(operand)
