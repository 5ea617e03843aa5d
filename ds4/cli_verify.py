"""``ds4 verify``: the report of ds4.one_answer as a table that fits narrow terminals, or as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text

from ds4.cli_common import ProgressBar, one_line, render

if TYPE_CHECKING:
    from ds4.one_answer import Cell, Mismatch, Report

_SHOWN = 5
_SESSIONS = 3  # at a time: the plain one, a run's, and that one restored


def verify_command(model: str | None, device: str, draft_model: str | None, tokens: int, as_json: bool) -> int:
    """Run the comparison and print its report; the exit code, 0 if it found no problem, else 1."""
    import torch

    from ds4.engine import LLM
    from ds4.one_answer import verify_one_answer

    torch.set_num_threads(1)
    bar = ProgressBar("loading the weights", bytes_done=True)
    try:
        llm = LLM(model, device=device, draft_model=draft_model, on_load=bar.update, sessions=_SESSIONS)
    finally:
        bar.close()
    bar = ProgressBar("comparing")
    try:
        report = verify_one_answer(llm, tokens, bar.update)
    finally:
        bar.close()
    if as_json:
        click.echo(json.dumps(report.to_dict()))
    else:
        click.echo("\n\n".join(render(part) for part in (cells_table(report), summary(report))))
    return 1 if report.problems else 0


def cells_table(report: Report) -> Table:
    """One row for each way to draft and to resume; chunk sizes, which --json has one by one, are taken together."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("draft", "resumed"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens", "accepted", "rejected", "differ"):
        table.add_column(name, justify="right", no_wrap=True)
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in report.cells:
        groups.setdefault((cell.draft, cell.resume), []).append(cell)
    before = ""
    for (draft, resume), cells in groups.items():
        sums = [sum(getattr(c, part) for c in cells) for part in ("tokens", "accepted", "rejected", "mismatches")]
        drafted = [f"{n:,}" if sums[1] + sums[2] else "-" for n in sums[1:3]]
        table.add_row(draft if draft != before else "", resume, f"{sums[0]:,}", *drafted, str(sums[3]))
        before = draft
    return table


def summary(report: Report) -> Text:
    """The verdict, the first mismatch with its rows, and what else is wrong."""
    chunks = ", ".join(str(c or "whole") for c in sorted({c.chunk for c in report.cells}, key=lambda c: c or 0))
    lines = [
        f"{report.tokens:,} tokens compared in {len(report.cells)} cells, {report.prompts} prompts, chunks {chunks}; "
        f"{report.mismatches} runs differ; {report.seconds:.0f} s"
    ]
    if report.first_mismatch is not None:
        lines += mismatch_lines(report.first_mismatch)
    lines += report.problems[:_SHOWN]
    if len(report.problems) > _SHOWN:
        lines.append(f"and {len(report.problems) - _SHOWN} more problems (--json lists them)")
    lines.append("FAILED" if report.problems else "One answer: every way to decode gave the plain tokens and logits.")
    return Text("\n".join(map(one_line, lines)), style="red" if report.problems else "")


def mismatch_lines(m: Mismatch) -> list[str]:
    """Where it is, and the largest logits of both rows; --json has the rows whole."""
    where = (
        f"first difference: draft {m.draft}, chunk {m.chunk or 'whole'}, {m.resume}, {m.kind} prompt of "
        f"{m.prompt_tokens} tokens, position {m.position}: token {m.token}, plain {m.expected_token}"
    )
    if not m.logits:
        return [where]
    differ = [abs(a - b) for a, b in zip(m.logits, m.expected_logits, strict=True)]
    return [
        where,
        f"{sum(d != 0 for d in differ):,} of {len(differ):,} logits differ, by up to {max(differ):.3g}",
        f"logits: {_largest(m.logits)}",
        f"plain:  {_largest(m.expected_logits)}",
    ]


def _largest(row: list[float]) -> str:
    best = sorted(range(len(row)), key=lambda i: -row[i])[:_SHOWN]
    return ", ".join(f"{i}: {row[i]:.6g}" for i in best)
