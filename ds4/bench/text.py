"""The record of ``ds4 bench`` as tables of at most 60 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds4.profiling.tables import bytes_table, columns, megabytes, table_text, wrapped


def bench_text(record: Mapping[str, Any]) -> str:
    """Machine and settings, tokens a second by frontier, what a token costs, and where it goes."""
    parts = [_head(record), table_text(_rates(record)), table_text(_costs(record))]
    if record["bytes_per_token"] is not None:
        parts.append(table_text(bytes_table(record["bytes_per_token"])))
    if record["breakdown"] is not None:
        parts.append(table_text(_breakdown(record["breakdown"])))
    return "\n\n".join([*parts, *notes(record)])


def _head(record: Mapping[str, Any]) -> str:
    model, settings, copy = (record[name] for name in ("model", "settings", "copy"))
    draft = "off" if not settings["draft"] else str(settings["draft"])
    if settings["accept"] is not None:
        draft += f", {settings['accept']:.0%} of drafted tokens right by force"
    lines = [
        f"{model['path']}, {model['layers']} layers, {model['weights_bytes'] / 1e9:.2f} GB, on {place(record)}",
        f"copy {copy['copy_gb_s']:.1f} GB/s, read {copy['read_gb_s']:.1f} GB/s; draft {draft}",
        f"medians of {settings['repeats']} repeats of {settings['tokens']} tokens, prefill by chunks of "
        f"{settings['chunk']}; +-: half the range",
    ]
    return "\n".join(line for text in lines for line in wrapped(text))


def place(record: Mapping[str, Any]) -> str:
    """What computed."""
    machine = record["machine"]
    n = machine["threads"]
    return machine["gpu"]["name"] if machine["gpu"] else f"{machine['cpu']}, {n} thread{'s' if n > 1 else ''}"


def short(ctx: int) -> str:
    """2K for 2048."""
    return f"{ctx // 1024}K" if ctx % 1024 == 0 else str(ctx)


def _rates(record: Mapping[str, Any]) -> Any:
    table = columns("tokens/s", "ctx", "prefill", "+-%", "decode", "+-%", "draft", "+-%", "gain")
    for row in record["rows"]:
        gain = f"{row['speedup']:.2f}" if row["speedup"] else ""
        ways = [text for way in ("prefill", "plain", "draft") for text in _rate(row[way])]
        table.add_row(row["prompt"], short(row["ctx"]), *ways, gain)
    return table


def _rate(way: Mapping[str, Any] | None) -> tuple[str, str]:
    """A rate and its spread; nothing for what was not measured."""
    if way is None:
        return "", ""
    rate = way["tokens_per_second"]
    spread = 50 * (rate["max"] - rate["min"]) / rate["median"]
    return f"{rate['median']:.0f}" if rate["median"] >= 1000 else f"{rate['median']:.1f}", f"{spread:.0f}"


def _costs(record: Mapping[str, Any]) -> Any:
    table = columns("a token", "ctx", "ms", "MB", "GB/s", "% roof", "drafted", "kept", "J")
    for row in record["rows"]:
        plain, draft, roof = row["plain"], row["draft"], row["roofline"]
        joules = plain["joules_per_token"]
        table.add_row(
            row["prompt"],
            short(row["ctx"]),
            f"{1e3 / plain['tokens_per_second']['median']:.2f}",
            megabytes(roof["bytes"]) if roof else "",
            f"{roof['gb_s']:.1f}" if roof else "",
            f"{roof['percent']:.1f}" if roof else "",
            f"{draft['drafted']}" if draft else "",
            f"{draft['accepted']}" if draft else "",
            f"{joules:.2f}" if joules is not None else "",
        )
    return table


def _breakdown(found: Mapping[str, Any]) -> Any:
    table = columns(f"a step at {short(found['position'])}", "us", "%", "% copy")
    for part in found["parts"]:
        copy = part["percent_of_copy"]
        table.add_row(
            part["name"], f"{part['us']:.1f}", f"{part['percent']:.1f}", "" if copy is None else f"{copy:.1f}"
        )
    table.add_row("step", f"{found['step_us']:.1f}", "", "", style="bold")
    return table


def notes(record: Mapping[str, Any]) -> list[str]:
    """What has to be known to read the figures, one paragraph each."""
    found = []
    if record["bytes_per_token"] is None:
        found.append("No bytes and no roofline: ds4 has no kernels for a format of this checkpoint.")
    elif record["model"]["device"] == "cpu":
        found.append(
            "The roofline is that of packed weights and rows, as kernels read them. On the CPU the references compute "
            "with FP32 copies of the weights: they move more, and gain no speed by packing."
        )
    idle = (record["breakdown"] or {}).get("idle_percent")
    if idle is not None:
        found.append(f"The GPU waits {idle:.1f}% of a plain step.")
    more = record["extrapolation"]
    if more is not None:
        rates = ", ".join(f"{short(one['ctx'])} {one['tokens_per_second']:.1f}" for one in more["rows"])
        found.append(
            f"{more['layers']} of {more['of']} layers were measured. With all, a byte of a layer taking as long as "
            f"here and the head as long as here, plain tokens/s would be: {rates}."
        )
    return ["\n".join(wrapped(text)) for text in found]
