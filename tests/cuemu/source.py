"""Rewrites CUDA C++ files so that they compile as C++: shared memory, kernel entries, includes.

Nothing else of a file changes, and every line keeps its number. The rewritten files get numbered folders; ``#line``
directives make errors name the originals.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ds4.kernels.entry import INCLUDE_DIR
from ds4.kernels.signature import kernel_signatures

from .errors import SourceError

CUDA_HEADERS = ("cuda_fp16.h", "cuda_bf16.h", "cuda_fp8.h", "cuda_fp4.h", "math_constants.h")
PTX_HEADER = "ptx.cuh"  # the only file that may hold PTX

_COMMENT_OR_TEXT = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])+'", re.DOTALL)
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?:"([^"\n]+)"|<([^>\n]+)>)', re.MULTILINE)
_ALIGN = re.compile(r"(?:__align__|alignas)\s*\(([^()]*(?:\([^()]*\)[^()]*)*)\)")
_SHARED = re.compile(
    r"(?P<qualifiers>(?:\b(?:extern|static)\s+|" + _ALIGN.pattern + r"\s*)*)\b__shared__\b(?P<body>[^;{]*)(?P<end>[;{])"
)
_DECLARATORS = re.compile(r"(.+?[\s*>])(\w+\s*(?:\[[^\]]*\]\s*)*(?:,\s*\w+\s*(?:\[[^\]]*\]\s*)*)*)", re.DOTALL)


@dataclass(frozen=True)
class Rewritten:
    """C++ files by relative path, the main one first; what they were made of, and the kernels of the main one."""

    files: dict[str, str]
    sources: tuple[Path, ...]
    kernels: tuple[str, ...]


def rewrite(path: Path) -> Rewritten:
    """The .cu file ``path`` and the project headers it includes, ready for a C++ compiler.

    Raises SourceError with file and line for shared memory declared in a way that cannot be rewritten, PTX outside
    ptx.cuh, a header that NVRTC's include path does not have, or a file without an ``extern "C" __global__`` kernel.
    """
    path = path.resolve()
    pending, names, files = [path], {path: f"0/{path.name}"}, {}
    while pending:
        current = pending.pop()
        text = _read(current)
        code = _without_comments(text)
        _refuse_ptx(code, current)
        edits = _shared_edits(code, current)
        for start, end, header in _includes(code, current, path):
            if header not in names:
                names[header] = f"{len(names)}/{header.name}"
                pending.append(header)
            edits.append((start, end, f'#include "../{names[header]}"'))
        files[names[current]] = f'#line 1 "{current}"\n{_apply(text, edits)}\n'
    try:
        kernels = tuple(kernel_signatures(_read(path)))
    except ValueError as error:
        raise SourceError(f"{path}: {error}") from None
    if not kernels:
        raise SourceError(f'{path}: no kernel found; declare it as: extern "C" __global__ void name(')
    files[names[path]] += "".join(f"CUEMU_EXPORT({kernel})\n" for kernel in kernels)
    return Rewritten(files, tuple(names), kernels)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from None


def _without_comments(text: str) -> str:
    """``text`` with comments blanked, so that positions and lines stay."""

    def blank(match: re.Match[str]) -> str:
        found = match[0]
        return re.sub(r"[^\n]", " ", found) if found[0] == "/" else found

    return _COMMENT_OR_TEXT.sub(blank, text)


def _where(code: str, position: int, path: Path) -> str:
    return f"{path}:{code.count(chr(10), 0, position) + 1}"


def _refuse_ptx(code: str, path: Path) -> None:
    found = re.search(r"\basm\b", code)
    if found and path.name != PTX_HEADER:
        raise SourceError(f"{_where(code, found.start(), path)}: PTX belongs into {PTX_HEADER}, with its host twin")


def _includes(code: str, path: Path, main: Path) -> list[tuple[int, int, Path]]:
    """(start, end, file) of every include of a project header, looked up as NVRTC does."""
    found = []
    for match in _INCLUDE.finditer(code):
        name = match[1] or match[2]
        folders = [path.parent] if match[1] else []
        candidates = [folder / name for folder in (*folders, main.parent, INCLUDE_DIR)]
        header = next((c.resolve() for c in candidates if c.is_file()), None)
        if header:
            found.append((match.start(), match.end(), header))
        elif name not in CUDA_HEADERS:
            where = _where(code, match.start(), path)
            raise SourceError(f"{where}: {name} is no header of the project, nor one of {', '.join(CUDA_HEADERS)}")
    return found


def _shared_edits(code: str, path: Path) -> list[tuple[int, int, str]]:
    """Replacements for the declarations of shared memory."""
    edits = []
    for match in _SHARED.finditer(code):
        where = _where(code, match.start(), path)
        qualifiers, body = match["qualifiers"], match["body"]
        if match["end"] == "{":
            raise SourceError(f"{where}: name the type of a shared variable before the variable")
        alignments = _ALIGN.findall(qualifiers + body)
        body = _ALIGN.sub(" ", body)
        alignment = alignments[0] if alignments else "1"
        declarators = _DECLARATORS.fullmatch(body.strip())
        if not declarators or len(alignments) > 1:
            raise SourceError(f"{where}: cannot read this declaration: __shared__{body.rstrip()};")
        if code.count("{", 0, match.start()) <= code.count("}", 0, match.start()):
            raise SourceError(f"{where}: declare shared memory inside the function that uses it")
        kind, names = declarators[1].strip(), _split(declarators[2])
        if "extern" in qualifiers:
            text = _dynamic(kind, names, alignment, where)
        else:
            text = " ".join(_static(kind, name, dims, alignment) for name, dims in names)
        edits.append((match.start(), match.end(), text + "\n" * match[0].count("\n")))
    return edits


def _split(declarators: str) -> list[tuple[str, str]]:
    """Names and dimensions: a[4][2], b -> ("a", "[4][2]"), ("b", "")."""
    return [(name, dims.strip()) for name, dims in re.findall(r"(\w+)\s*((?:\[[^\]]*\]\s*)*)(?:,|$)", declarators)]


def _static(kind: str, name: str, dims: str, alignment: str) -> str:
    return (
        f"typedef {kind} cuemu_type_of_{name}{dims}; "
        f"auto& {name} = cuemu::shared<cuemu_type_of_{name}, {alignment}>([] {{}});"
    )


def _dynamic(kind: str, names: list[tuple[str, str]], alignment: str, where: str) -> str:
    if len(names) != 1 or re.sub(r"\s", "", names[0][1]) != "[]":
        raise SourceError(f"{where}: dynamic shared memory is declared as: extern __shared__ type name[];")
    return f"{kind}* const {names[0][0]} = cuemu::dynamic_shared<{kind}, {alignment}>();"


def _apply(text: str, edits: list[tuple[int, int, str]]) -> str:
    for start, end, replacement in sorted(edits, reverse=True):
        text = text[:start] + replacement + text[end:]
    return text
