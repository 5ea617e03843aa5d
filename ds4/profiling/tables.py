"""The records of this package as tables of at most 60 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH = 60


def plan_text(record: Mapping[str, Any]) -> str:
    """Operations, layer kinds and the step of ``plan_record``."""
    operations = bytes_table(record)
    kinds = columns("layers", "n", "operations", "launches", "MB each")
    for row in record["layers"]:
        if row["layers"]:
            each = [str(row[key]) for key in ("layers", "operations_each", "launches_each")]
            kinds.add_row(row["kind"], *each, megabytes(row["bytes"] / row["layers"]))
    step, n_tok = record["step"], record["n_tok"]
    experts = ", ".join(f"{count:g} of {total}" for total, count in record["distinct_experts"].items())
    lines = [
        f"One step of {_tokens(n_tok)} at position {record['position']}, in MB.",
        "n: launches; stored: the same weights in the checkpoint;",
        "a launch: weights of one launch.",
        "",
        table_text(operations),
        "",
        table_text(kinds),
        "",
        f"launches: {step['launches']} a step, {step['launches'] / n_tok:g} a token",
        f"bytes: {step['bytes'] / 1e9:.3f} GB a step",
        f"weights: {_ratio(step['weight_bytes'], step['floor_bytes'])} of the bytes stored",
        f"routed experts counted: {experts}",
    ]
    return "\n".join(lines)


def bytes_table(record: Mapping[str, Any]) -> Table:
    """Operations and the step of ``plan_record``, in MB."""
    table = columns("operation", "n", "weights", "stored", "cache", "act", "a launch")
    for row in record["operations"]:
        table.add_row(row["operation"], *_amounts(row))
    table.add_row("step", *_amounts(record["step"]), style="bold")
    return table


def dispatch_text(record: Mapping[str, Any]) -> str:
    """Launches of ``dispatch_record``, operation by operation, and what follows for each n_tok."""
    n_toks = list(record["steps"])
    steps = ", ".join(f"{times} of {_tokens(int(n))}" for n, times in record["steps"].items())
    table = columns("kernel", *(f"n_tok {n}" for n in n_toks))
    for name in (one["operation"] for one in record["operations"]):
        rows = [row for row in record["rows"] if row["operation"] == name]
        table.add_row(name, style="bold")
        for row, label in zip(rows, _labels(rows), strict=True):
            table.add_row(f"  {label}", *(str(row["launches"].get(n, "never")) for n in n_toks))
    lines = [f"Launches in these steps: {steps}.", "", table_text(table), ""]
    for n in n_toks:
        own = [one["operation"] for one in record["operations"] if one["kernels"].get(n) == "own"]
        shared = [one["operation"] for one in record["operations"] if one["kernels"].get(n) == "shared"]
        lines += wrapped(f"n_tok = {n}: always kernels that no other n_tok hits: {', '.join(own) or 'none'}")
        lines += wrapped(f"n_tok = {n}: also kernels that another n_tok hits: {', '.join(shared) or 'none'}")
    return "\n".join(lines)


def profile_text(record: Mapping[str, Any]) -> str:
    """Times of ``profile_record``."""
    table = columns("operation", "n", "us", "%", "MB", "GB/s", "% copy")
    for row in record["operations"]:
        table.add_row(row["operation"], str(row["launches"]), f"{row['us']:.1f}", f"{row['percent']:.1f}", *_rates(row))
    step = record["step"]
    n = sum(row["launches"] for row in record["operations"])
    total = f"{step['parts_us']:.1f}"
    table.add_row("sum", str(n), total, "100.0", megabytes(step["bytes"]), "", "", style="bold")
    lines = [*_about(record), "", table_text(table), ""]
    for name, what in (("eager_us", "launched from the host"), ("graph_us", "as one CUDA graph")):
        if step[name] is not None:
            lines.append(f"uninterrupted, {what}: {step[name]:.1f} us")
    lines.append(f"the fastest of these: {step['gb_s']:.0f} GB/s, {step['percent_of_copy']:.1f}% of copy")
    return "\n".join(lines)


def moe_text(record: Mapping[str, Any]) -> str:
    """Times of ``moe_record``."""
    table = columns("layer", "up us", "down us", "MB", "GB/s", "% copy", "experts")
    for row in [*record["layers"], {"layer": "all", "kind": "", **record["all"]}]:
        times = (f"{row['gate_up_us']:.1f}", f"{row['down_us']:.1f}")
        table.add_row(f"{row['layer']} {row['kind']}", *times, *_rates(row), f"{row['distinct_experts']:g}")
    return "\n".join([*_about(record), "", table_text(table)])


def _about(record: Mapping[str, Any]) -> list[str]:
    return [
        f"Steps of {_tokens(record['n_tok'])} about position {record['position']}:",
        f"medians of {record['steps']} steps; copy {record['copy_gb_s']:.0f} GB/s.",
    ]


def _tokens(n: int) -> str:
    return "1 token" if n == 1 else f"{n} tokens"


def _labels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The kernels' names with the constants that say which form it is: tokens, formats, and what else tells two forms
    for as many tokens and the same formats apart."""
    form = {name for row in rows for name, _ in _constants(row) if name == "N_TOK" or "FORMAT" in name}
    short = [_chosen(row, form) for row in rows]
    labels = []
    for row, label in zip(rows, short, strict=True):
        twins = [_constants(one) for one, other in zip(rows, short, strict=True) if other == label]
        differing = {name for twin in twins for name, _ in twin ^ _constants(row)}
        labels.append(_chosen(row, differing | {"N_TOK"}) if differing else label)
    return labels


def _constants(row: Mapping[str, Any]) -> set[tuple[str, str]]:
    return {(name, value) for name, _, value in (text.partition("=") for text in row["constants"].split())}


def _chosen(row: Mapping[str, Any], names: Set[str]) -> str:
    return " ".join([row["entry"], *(one for one in row["constants"].split() if one.partition("=")[0] in names)])


def _amounts(row: Mapping[str, Any]) -> list[str]:
    kinds = ("weight_bytes", "floor_bytes", "cache_bytes", "activation_bytes")
    return [
        str(row["launches"]),
        *(megabytes(row[key]) for key in kinds),
        megabytes(row["weight_bytes"] / row["launches"]),
    ]


def _rates(row: Mapping[str, Any]) -> list[str]:
    return [megabytes(row["bytes"]), f"{row['gb_s']:.0f}", f"{row['percent_of_copy']:.1f}"]


def _ratio(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2f}%" if whole else "-"


def megabytes(n_bytes: float) -> str:
    """Megabytes with about four digits; nothing for nothing."""
    value = n_bytes / 1e6
    digits = 0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 10 else 3
    return f"{value:.{digits}f}" if n_bytes else ""


def columns(*headers: str) -> Table:
    """A borderless table: the first column is text and may wrap, the others are numbers and may not."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column(headers[0], overflow="fold")
    for header in headers[1:]:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def table_text(table: Table) -> str:
    """The table, without the blanks at the ends of lines."""
    console = Console(width=WIDTH, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def wrapped(text: str) -> Sequence[str]:
    """Lines of the tables' width."""
    from textwrap import wrap

    return wrap(text, WIDTH, subsequent_indent="  ")
