"""``ds4 doctor``: the report of ds4.doctor as a table that fits narrow terminals, or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

import click
from rich.table import Table
from rich.text import Text

from ds4.cli_common import one_line, render
from ds4.doctor import Report, diagnose

_STYLES = {"ok": "green", "missing": "bold red", "note": "yellow"}


def doctor_command(*, as_json: bool) -> int:
    """Run the checks and print them; the exit code, 0 if ``--device cuda`` will work, else 1."""
    report = diagnose()
    if as_json:
        click.echo(json.dumps({"ok": report.ok, "checks": [asdict(check) for check in report.checks]}))
    else:
        click.echo(f"{render(table(report))}\n\n{render(Text(verdict(report)))}")
    return 0 if report.ok else 1


def table(report: Report) -> Table:
    """One row a finding; long texts wrap under themselves."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(no_wrap=True)
    rows.add_column(no_wrap=True)
    rows.add_column(overflow="fold")
    for check in report.checks:
        rows.add_row(Text(check.status, style=_STYLES[check.status]), check.name, Text(one_line(check.text)))
    return rows


def verdict(report: Report) -> str:
    """The last line: whether ``--device cuda`` will work."""
    if report.ok:
        return "--device cuda will work."
    missing = ", ".join(check.name for check in report.checks if check.status == "missing") or "no check ran"
    return f"--device cuda will not work: {missing}. --device cpu does."
