"""``ds4 inspect``: what ds4.weights.describe says of a checkpoint, as tables that fit narrow terminals, or as JSON."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from ds4.cli_common import one_line, render

if TYPE_CHECKING:
    from ds4.weights import Checkpoint


@dataclass(frozen=True)
class Wanted:
    """What ``ds4 inspect`` is asked for besides the description."""

    tensors: bool = False
    draft: str | None = None
    memory: int | None = None
    ctx: int | None = None
    verify: bool = False
    read_speed: bool = False
    as_json: bool = False


def inspect_command(path: str, wanted: Wanted) -> int:
    """Open the checkpoint (headers only), print its description and what else is wanted; the exit code.

    1 if the model does not fit the memory, or ``--verify`` finds a defect; both are answers, not errors.
    """
    from ds4 import hub
    from ds4.weights import open_checkpoint
    from ds4.weights.describe import describe

    ckpt = open_checkpoint(hub.local_path(path), hub.local_path(wanted.draft) if wanted.draft else None)
    record = describe(ckpt, tensors=wanted.tensors)
    if wanted.memory is not None or wanted.ctx is not None:
        record["fit"] = _fit(ckpt, record, wanted)
    if wanted.verify:
        record["verify"] = _verify(ckpt)
    if wanted.read_speed:
        from ds4.weights.stream import read_speed

        record["read_speed"] = {"device": "cpu", **read_speed(ckpt, "cpu")}
    if wanted.as_json:
        click.echo(json.dumps(record))
    else:
        parts = [summary(record), types_table(record), traffic_table(record)]
        parts += [table(record) for key, table in _EXTRA.items() if key in record]
        click.echo("\n\n".join(render(part) for part in parts))
    return int(bool(record.get("verify", {}).get("defects")) or not record.get("fit", {}).get("fits", True))


def _fit(ckpt: Checkpoint, record: dict[str, Any], wanted: Wanted) -> dict[str, Any]:
    """The memory bill on a GPU, with all of the machine's memory where none is given."""
    from ds4.fit import Planner

    ctx = wanted.ctx or record["context_length"]
    if ctx > record["context_length"]:
        raise click.UsageError(f"--ctx {ctx}: the model's context ends at {record['context_length']} tokens")
    memory = wanted.memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Planner(ckpt, n_toks=range(1, 9) if record["draft"] else (1,)).fit(ctx, memory).to_dict()


def _verify(ckpt: Checkpoint) -> dict[str, Any]:
    """Check the weights under a progress bar, which only a terminal sees."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from ds4.weights.check import verify

    console = Console(stderr=True)
    columns = (TextColumn("checking"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("checking", total=ckpt.total_bytes)
        report = verify(ckpt, lambda done, _total: bar.update(task, completed=done))
    return {**asdict(report), "defects": list(report.defects)}


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
        "evidence": "; ".join(d["evidence"]) or "none",
        "recipe": ", ".join(f"{group} {'+'.join(formats)}" for group, formats in d["recipe"].items() if formats),
        "layers": f"{layers['total']}: {kinds}; {layers['hash_routed']} hash-routed",
        "experts": f"{' or '.join(map(str, experts['routed']))} routed, {experts['per_token']} per token, "
        f"{experts['shared']} shared" + (f"; {experts['pruned']}" if experts["pruned"] else ""),
        "context": f"{d['context_length']:,} tokens",
        "parameters": f"{count(parameters['total'])}, {count(parameters['active'])} active per token",
        "draft head": f"{draft['kind']}, stages: {draft['stages']}, {count(draft['parameters'])} parameters, "
        f"{size(draft['bytes'])}" + (f", from {draft['path']}" if draft["path"] else "")
        if draft
        else "none",
        "size": f"{size(d['total_bytes'])} in {stored} tensors",
    }
    if d["warnings"]:
        rows["warning"] = "; ".join(d["warnings"])
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
    """Weight bytes read for one token, without drafts and cache; a large model's in MB, to be compared with others."""
    table = _columns("weights read per token", "size", "share")
    traffic = dict(d["bytes_per_token"])
    total = traffic.pop("total")
    show = size if total < 1e8 else (lambda n_bytes: f"{n_bytes / 1e6:,.1f} MB")
    for component, n_bytes in traffic.items():
        if n_bytes:
            table.add_row(component, show(n_bytes), f"{n_bytes / max(1, total):.1%}")
    table.add_row("total", show(total), "", style="bold")
    return table


def fit_table(d: dict[str, Any]) -> Table:
    """What the model needs in memory at a context length, against what there is."""
    from ds4.fit import binary_size

    fit = d["fit"]
    table = _columns(f"memory at {fit['ctx']:,} tokens", "size")
    shown = {"weights": "weights", "cache": "cache and state", "steps": "workspaces of decode steps"}
    shown |= {"prompts": "workspaces of prompts", "graphs": "CUDA graphs", "copies": "FP32 copies"}
    shown |= {"reserve": "reserve"}
    for name, text in shown.items():
        table.add_row(text, binary_size(fit[f"{name}_bytes"]))
    table.add_row("total", binary_size(fit["total_bytes"]), style="bold")
    table.add_row("memory", binary_size(fit["memory_bytes"]))
    longest = f"longest context {fit['max_ctx']:,} tokens" if fit["max_ctx"] else "no context does"
    table.add_row(f"{'fits' if fit['fits'] else 'does NOT fit'}; {longest}")
    return table


def verify_table(d: dict[str, Any]) -> Table:
    """What ``--verify`` looked at and found."""
    report = d["verify"]
    table = _columns("verified", "count")
    table.add_row("tensors inside the file, none overlapping", f"{report['n_tensors']:,}")
    table.add_row("scales and unquantised values read", f"{report['n_scales']:,}")
    table.add_row("hash-routing tables", f"{report['n_tables']:,}")
    table.add_row("defects", str(len(report["defects"])), style="bold")
    for defect in report["defects"][:20]:
        table.add_row(Text(one_line(defect)))
    return table


def read_speed_table(d: dict[str, Any]) -> Table:
    """Streaming to the device against a plain read of the same bytes."""
    speed = d["read_speed"]
    table = _columns(f"reading {size(speed['bytes'])}", "speed")
    table.add_row("plain read()", f"{speed['read_gb_s']:.2f} GB/s")
    table.add_row(f"streaming to {speed['device']}", f"{speed['load_gb_s']:.2f} GB/s")
    table.add_row("ratio", f"{speed['ratio']:.2f}", style="bold")
    return table


def tensors_table(d: dict[str, Any]) -> Table:
    """Every stored tensor in file order, under the file's own names."""
    table = _columns("tensor", "shape", "type", "size")
    for tensor in d["tensors"]:
        shape = "x".join(map(str, tensor["shape"])) or "scalar"
        table.add_row(Text(one_line(tensor["name"])), shape, tensor["format"], size(tensor["bytes"]))
    return table


_EXTRA = {"tensors": tensors_table, "fit": fit_table, "verify": verify_table, "read_speed": read_speed_table}
