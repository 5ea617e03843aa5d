"""``ds4 convert``: another container, other formats; what became of the weights, as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from ds4.cli_common import one_line, render
from ds4.cli_inspect import size

if TYPE_CHECKING:
    from ds4.weights import Checkpoint
    from ds4.weights.convert_report import Line, Report

_SHOWN = 5  # names listed before "and 20 more"


@dataclass(frozen=True)
class Wanted:
    """The options of ``ds4 convert``."""

    experts: str
    dense: str
    force: bool
    shard_size: int | None
    as_json: bool


def convert_command(source: str, out: str, wanted: Wanted) -> None:
    """Convert, under a progress bar that only a terminal sees, and print what came of it."""
    from ds4 import hub
    from ds4.weights import open_checkpoint
    from ds4.weights.convert import SHARD_BYTES, container_of, convert
    from ds4.weights.recipes import Recipe

    target = Path(out).expanduser()
    if wanted.shard_size is not None and target.suffix.lower() in (".gguf", ".safetensors"):
        raise click.UsageError("--shard-size is for a directory of safetensors; OUT is a single file")
    recipe = Recipe(wanted.experts, wanted.dense)
    recipe.check(container_of(target))
    ckpt = open_checkpoint(hub.local_path(source))
    tokenizer = _tokenizer(ckpt, container_of(target))
    with _progress_bar() as progress:
        report = convert(
            ckpt,
            target,
            recipe,
            tokenizer=tokenizer,
            force=wanted.force,
            shard_bytes=wanted.shard_size or SHARD_BYTES,
            progress=progress,
        )
    has_tokenizer = bool(tokenizer) or "tokenizer.ggml.model" in ckpt.metadata
    if wanted.as_json:
        click.echo(json.dumps({**report.to_dict(), "tokenizer": has_tokenizer}))
    else:
        click.echo(_summary(report, has_tokenizer))


def _tokenizer(ckpt: Checkpoint, container: str) -> dict[str, Any]:
    """The tokenizer in the form of the target: keys of a GGUF (none where the source is one too), or files."""
    from ds4.text import tokenizer_files

    directory = ckpt.tokenizer_files
    if container == "gguf":
        return tokenizer_files.gguf_keys(directory, ckpt.config.vocab_size) if directory else {}
    if directory is not None:
        return dict(tokenizer_files.copied_files(directory))
    return dict(tokenizer_files.files_from_gguf(ckpt.metadata, str(ckpt.path)))


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, as a function of (bytes written, bytes in all)."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("converting"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("converting", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _summary(report: Report, has_tokenizer: bool) -> str:
    """What was written, and a line for each group of tensors, for this terminal's width (80 columns in a pipe)."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    rows = [("written", str(report.path)), ("size", f"{size(report.source_bytes)} -> {size(report.file_bytes)}")]
    if not has_tokenizer:
        rows.append(("tokenizer", "none in the source, so the result works with token ids only"))
    rows += [(line.group, describe_line(line)) for line in report.lines]
    if report.left_out:
        rows.append(("left out", f"{_some(report.left_out)}: ds4 does not know {_them(len(report.left_out))}"))
    rows += [("note", note) for note in report.notes]
    before = ""
    for name, value in rows:
        table.add_row(Text(name if name != before else "", style="bold"), Text(one_line(value)))
        before = name
    return render(table)


def describe_line(line: Line) -> str:
    """``mxfp4 -> nvfp4: lossless (all 1,234 tensors), 6.3 GB -> 6.7 GB``."""
    change = line.source if line.source == line.target else f"{line.source} -> {line.target}"
    sizes = size(line.target_bytes)
    if line.source_bytes != line.target_bytes:
        sizes = f"{size(line.source_bytes)} -> {sizes}"
    everything = f"all {line.tensors:,} tensors" if line.tensors > 1 else "1 tensor"
    if line.source == line.target:
        result = f"unchanged ({everything})"
    elif not line.inexact:
        result = f"lossless ({everything})"
    else:
        n = len(line.inexact)
        which = everything if n == line.tensors else f"{n:,} of {line.tensors:,} tensors: {_some(tuple(line.inexact))}"
        result = f"rounded, relative error up to {line.max_relative_error:.2%} ({which})"
    return f"{change}: {result}, {sizes}"


def _some(names: tuple[str, ...]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def _them(n: int) -> str:
    return "it" if n == 1 else "them"
