"""The C signatures of kernels, read out of their sources and compared with what Python declares.

cuLaunchKernel cannot know the types behind ``kernelParams``: a parameter declared ``i32`` in Python and ``long long``
in C reads four bytes too many, silently. So the declaration is compared with the source before anything is launched.
"""

from __future__ import annotations

import re
from pathlib import Path

from ds4.errors import Ds4Error
from ds4.kernels.entry import INCLUDE_DIR, Entry

# C types, without const and __restrict__, by the Python name of the parameter type.
C_TYPES: dict[str, tuple[str, ...]] = {
    "i32": ("int", "int32_t"),
    "u32": ("unsigned", "unsigned int", "uint32_t"),
    "i64": ("long long", "int64_t"),
    "u64": ("unsigned long long", "uint64_t"),
    "f32": ("float",),
    "f32*": ("float*",),
    "bf16*": ("__nv_bfloat16*",),
    "f16*": ("__half*", "half*"),
    "u8*": ("unsigned char*", "uint8_t*"),
    "i8*": ("signed char*", "int8_t*"),
    "i32*": ("int*", "int32_t*"),
    "u32*": ("unsigned*", "unsigned int*", "uint32_t*"),
    "i64*": ("long long*", "int64_t*"),
    "u64*": ("unsigned long long*", "uint64_t*"),
}
_PYTHON_TYPES = {c: python for python, spellings in C_TYPES.items() for c in spellings}
_COMMENT = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
_KERNEL = re.compile(r'extern\s+"C"\s+__global__\b')
_WORD = re.compile(r"\s*(\w+)\s*(\(?)")
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?:"([^"\n]+)"|<([^>\n]+)>|[^\n]*)', re.MULTILINE)


def read_source(path: Path) -> str:
    """The text of a kernel file. Raises Ds4Error where it cannot be read: the installation is broken then."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Ds4Error(f"{path}: cannot read the kernel source ({error}); install ds4 again") from None


def without_comments(source: str) -> str:
    """``source`` with each comment turned into a blank, line breaks kept; string literals stay."""

    def blank(match: re.Match[str]) -> str:
        text = match.group()
        return text if text.startswith('"') else " " + "\n" * text.count("\n")

    return _COMMENT.sub(blank, source)


def project_includes(path: Path) -> list[Path]:
    """The project's headers that ``path`` includes, directly or not, sorted; each looked up as the compilers do.

    That is beside the including file (for "..."), beside ``path``, then in ds4/kernels/include. A header found nowhere
    there is the toolkit's and not listed. Includes under a false #if count too.
    Raises ValueError for an #include of a macro, whose file cannot be told.
    """
    found: set[Path] = set()
    to_read = [path]
    while to_read:
        file = to_read.pop()
        text = without_comments(read_source(file))
        for line in _INCLUDE.finditer(text):
            quoted, angled = line.groups()
            if not quoted and not angled:
                raise ValueError(f"{file}: {' '.join(line.group().split())}: name the file")
            for folder in ([file.parent] if quoted else []) + [path.parent, INCLUDE_DIR]:
                header = (folder / (quoted or angled)).resolve()
                if header.is_file():
                    if header not in found and header != path.resolve():
                        found.add(header)
                        to_read.append(header)
                    break
    return sorted(found)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at ``start``; -1 if none does."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    return -1


def _declarator(text: str, at: int) -> tuple[str, str] | None:
    """Name and parameter list of the function declared from ``at`` on, past its return type and attributes."""
    while match := _WORD.match(text, at):
        word, bracket = match.groups()
        at = match.end()
        if bracket:
            close = _closing(text, at - 1)
            if close < 0:
                return None
            if not word.startswith("__"):
                return word, text[at:close]
            at = close + 1
    return None


def kernel_signatures(source: str) -> dict[str, str]:
    """Name -> text of the parameter list of every ``extern "C" __global__`` function, in file order.

    Attributes with parentheses (``__launch_bounds__(256)``) may stand before or after ``void``.
    Raises ValueError where the text after ``__global__`` is not of that form.
    """
    text = without_comments(source)
    found: dict[str, str] = {}
    for start in _KERNEL.finditer(text):
        declared = _declarator(text, start.end())
        if declared is None:
            line = text.count("\n", 0, start.start()) + 1
            raise ValueError(f'line {line}: extern "C" __global__ is not followed by void name(...)')
        found[declared[0]] = declared[1]
    return found


def parse_parameters(text: str) -> tuple[tuple[str, str], ...]:
    """(name, type) of a C parameter list, types as in C_TYPES. Raises ValueError for any other C type."""
    if not text.strip() or text.strip() == "void":
        return ()
    params = []
    for part in text.split(","):
        plain = re.sub(r"\b(const|__restrict__|__restrict|volatile)\b", " ", part)
        match = re.fullmatch(r"\s*(.*?[\s*])\s*(\w+)\s*", plain, re.DOTALL)
        c_type = re.sub(r"\s*\*\s*", "*", " ".join(match.group(1).split())) if match else ""
        if match is None or c_type not in _PYTHON_TYPES:
            raise ValueError(f"parameter '{' '.join(part.split())}' has a type that launches do not know")
        params.append((match.group(2), _PYTHON_TYPES[c_type]))
    return tuple(params)


def check_entry(entry: Entry) -> None:
    """Raise ValueError where ``entry`` and its source disagree: the name, a parameter's name, type or place, or a
    constant that neither the file nor a header it includes mentions. Ds4Error where the file cannot be read."""
    source = read_source(entry.path)
    signatures = kernel_signatures(source)
    if entry.name not in signatures:
        raise ValueError(f"{entry.file}: no kernel {entry.name}; there are: {', '.join(signatures) or 'none'}")
    try:
        in_source = parse_parameters(signatures[entry.name])
    except ValueError as error:
        raise ValueError(f"{entry.file}: {entry.name}: {error}") from None
    if in_source != entry.params:
        c = ", ".join(f"{kind} {name}" for name, kind in in_source)
        python = ", ".join(f"{kind} {name}" for name, kind in entry.params)
        raise ValueError(f"{entry.file}: {entry.name} takes ({c}) in C but ({python}) in Python")
    texts = [source, *(read_source(header) for header in project_includes(entry.path))]
    words = set(re.findall(r"\w+", " ".join(without_comments(text) for text in texts)))
    unused = [name for name in entry.constants if name not in words]
    if unused:
        raise ValueError(f"{entry.file}: {entry.name}: constants {', '.join(unused)} do not occur in the source")
