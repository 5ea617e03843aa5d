"""``ds4 inspect``: what ds4.weights.describe says of a checkpoint, as tables that fit narrow terminals, or as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ds4.cli_common import one_line


def inspect_command(path: str, *, tensors: bool, as_json: bool) -> None:
    """Open the checkpoint (headers only) and print its description; the list of tensors only on request."""
    from ds4 import hub
    from ds4.weights import open_checkpoint
    from ds4.weights.describe import describe

    description = describe(open_checkpoint(hub.local_path(path)))
    if as_json:
        if not tensors:
            description.pop("tensors")
        click.echo(json.dumps(description))
        return
    tables = [summary(description), types_table(description), traffic_table(description)]
    if tensors:
        tables.append(tensors_table(description))
    click.echo("\n\n".join(_render(table) for table in tables))


def _render(table: Table) -> str:
    """The table for this terminal's width (80 columns in a pipe), without the padding at the ends of lines."""
    console = Console(file=sys.stdout, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def size(n_bytes: float) -> str:
    """Bytes in decimal units, as disks and checkpoints are sold: 81.2 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.1f} {unit}"
    return f"{n_bytes:.0f} B"


def count(number: float) -> str:
    """A number of parameters: 284.3 B, 11.2 M."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number:.0f}"


def summary(d: dict[str, Any]) -> Table:
    """What it is, one line a fact; long values wrap under themselves."""
    layers, experts, parameters, draft = d["layers"], d["experts"], d["parameters"], d["draft"]
    kinds = ", ".join(f"{layers[kind]} {kind}" for kind in ("swa", "csa", "hca") if layers[kind])
    stored = sum(row["count"] for row in d["types"])
    rows = {
        "name": d["name"],
        "path": d["path"],
        "container": f"{d['container']}, architecture {d['architecture']}",
        "generation": d["generation"],
        "recipe": ", ".join(f"{group} {'+'.join(formats)}" for group, formats in d["recipe"].items() if formats),
        "layers": f"{layers['total']}: {kinds}; {layers['hash_routed']} hash-routed",
        "experts": f"{' or '.join(map(str, experts['routed']))} routed, {experts['per_token']} per token, "
        f"{experts['shared']} shared",
        "context": f"{d['context_length']:,} tokens",
        "parameters": f"{count(parameters['total'])}, {count(parameters['active'])} active per token",
        "draft head": f"{draft['kind']}, stages: {draft['stages']}, {count(draft['parameters'])} parameters, "
        f"{size(draft['bytes'])}"
        if draft
        else "none",
        "size": f"{size(d['total_bytes'])} in {stored} tensors",
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(Text(name, style="bold"), Text(one_line(value)))
    return table


def _columns(*headers: str) -> Table:
    """A borderless table: the first column is text and may wrap, the others are numbers and may not."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(headers[0], overflow="fold")
    for header in headers[1:]:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def types_table(d: dict[str, Any]) -> Table:
    """Stored tensors by type, most bytes first."""
    table = _columns("type", "tensors", "values", "size", "share")
    for row in d["types"]:
        share = row["bytes"] / max(1, d["total_bytes"])
        table.add_row(row["format"], str(row["count"]), count(row["parameters"]), size(row["bytes"]), f"{share:.1%}")
    return table


def traffic_table(d: dict[str, Any]) -> Table:
    """Weight bytes read for one token, without drafts and cache."""
    table = _columns("weights read per token", "size", "share")
    traffic = dict(d["bytes_per_token"])
    total = traffic.pop("total")
    for component, n_bytes in traffic.items():
        if n_bytes:
            table.add_row(component, size(n_bytes), f"{n_bytes / max(1, total):.1%}")
    table.add_row("total", size(total), "", style="bold")
    return table


def tensors_table(d: dict[str, Any]) -> Table:
    """Every stored tensor in file order, under the file's own names."""
    table = _columns("tensor", "shape", "type", "size")
    for tensor in d["tensors"]:
        shape = "x".join(map(str, tensor["shape"])) or "scalar"
        table.add_row(Text(one_line(tensor["name"])), shape, tensor["format"], size(tensor["bytes"]))
    return table
