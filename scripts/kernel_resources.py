"""Write ds4/kernels/resources.json anew: registers, shared memory, stack and spills of every shipped kernel.

Needs NVRTC and no GPU. Run it after a change of a kernel, of a constant set or of NVRTC, and commit the table with the
change. Prints the rows that changed, and fails where a kernel of the decode step spills registers.

    python scripts/kernel_resources.py            write the table
    python scripts/kernel_resources.py --check    only compare; exit code 1 where the table is out of date
"""

from __future__ import annotations

import sys
from typing import Any

import click
from rich.progress import track

from ds4.errors import Ds4Error
from ds4.kernels.cubin_cache import CubinCache
from ds4.kernels.registry import all_operations
from ds4.kernels.resources import TABLE, build_table, dump_table, identity, load_table, shipped, spills

_FIGURES = ("registers", "static_shared_bytes", "stack_bytes", "spill_store_bytes", "spill_load_bytes")


def describe(row: dict[str, Any] | None) -> str:
    """The figures of a row, in the order of the table."""
    return "none" if row is None else " ".join(str(row[figure]) for figure in _FIGURES)


def changes(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[str]:
    """One line for each row that is new, gone or different."""
    before, after = ({identity(row): row for row in rows} for rows in (old, new))
    return [
        f"{' '.join(key)}: {describe(before.get(key))} -> {describe(after.get(key))}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit code 1 where the table is out of date.")
def main(check: bool) -> None:
    """Write ds4/kernels/resources.json anew."""
    operations = all_operations()
    rows = build_table(operations, CubinCache())
    new = list(track(rows, "compiling", total=len(shipped(operations)), disable=not sys.stderr.isatty()))
    text = dump_table(new)
    try:
        old = load_table()[2]
    except Ds4Error:
        old = []
    click.echo(f"{len(new)} rows: {' '.join(_FIGURES)}")
    for line in changes(old, new):
        click.echo(line)
    stale = not TABLE.exists() or TABLE.read_text(encoding="utf-8") != text
    if stale and not check:
        TABLE.write_text(text, encoding="utf-8")
    click.echo("out of date" if stale and check else "written" if stale else "up to date")
    spilling = spills(new, operations)
    for line in spilling:
        click.echo(f"spills: {line}", err=True)
    sys.exit(1 if spilling or (stale and check) else 0)


if __name__ == "__main__":
    try:
        main()
    except Ds4Error as error:
        sys.exit(f"kernel_resources: {error}")
