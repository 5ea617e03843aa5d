"""Pictures of a record of ``ds4 bench``, as PNG and SVG: speed over the context, the step's parts, the roofline."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds4.bench.text import place, short
from ds4.errors import Ds4Error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = ("png", "svg")
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # apart from each other for colour-blind eyes too


def check() -> None:
    """Raise Ds4Error where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise Ds4Error("--plots: matplotlib is not installed; pip install 'ds4[plots]'")


def draw(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what the record has figures for into ``folder``, which is made; the files. Raises Ds4Error."""
    check()
    from matplotlib.figure import Figure

    makers: dict[str, Callable[[Figure, Mapping[str, Any]], None]] = {"context": _context}
    if record["breakdown"] is not None:
        makers["step"] = _step
    if any(row["roofline"] for row in record["rows"]):
        makers["roofline"] = _roofline
    made = []
    try:
        folder.mkdir(exist_ok=True)
        for name, maker in makers.items():
            figure = Figure(figsize=(8, 4.5), layout="constrained")
            maker(figure, record)
            for suffix in SUFFIXES:
                made.append(folder / f"{name}.{suffix}")
                figure.savefig(made[-1], dpi=130)
    except OSError as error:
        raise Ds4Error(f"--plots {folder}: {error.strerror or error}") from None
    return made


def _title(record: Mapping[str, Any]) -> str:
    model = record["model"]
    return f"{Path(model['path']).name}, {model['layers']} layers, on {place(record)}"


def _context(figure: Figure, record: Mapping[str, Any]) -> None:
    """Tokens a second over the context: prompt on the left, decoding on the right, bars from least to most."""
    figure.suptitle(_title(record), fontsize=10)
    axes = figure.subplots(1, 2)
    for ax, ways, title in ((axes[0], ("prefill",), "prompt"), (axes[1], ("plain", "draft"), "decoding")):
        for kind, color in zip(record["settings"]["prompts"], COLORS, strict=False):
            for way, style in zip(ways, ("-", "--"), strict=False):
                rows = [row for row in record["rows"] if row["prompt"] == kind and row[way]]
                if not rows:
                    continue
                rates = [row[way]["tokens_per_second"] for row in rows]
                errors = [
                    [rate["median"] - rate["min"] for rate in rates],
                    [rate["max"] - rate["median"] for rate in rates],
                ]
                label = f"{kind}, drafts" if way == "draft" else kind
                places, middles = [row["ctx"] for row in rows], [rate["median"] for rate in rates]
                ax.errorbar(places, middles, errors, color=color, ls=style, marker="o", ms=4, capsize=3, label=label)
        _over_context(ax, record)
        ax.set_title(title, fontsize=10)
        ax.set_ylabel("tokens a second")
        ax.set_ylim(bottom=0)
        ax.legend(fontsize=8)


def _over_context(ax: Axes, record: Mapping[str, Any]) -> None:
    frontiers = record["settings"]["frontiers"]
    ax.set_xscale("log", base=2)
    ax.set_xticks(frontiers, [short(ctx) for ctx in frontiers])
    ax.minorticks_off()
    ax.set_xlabel("context in tokens")
    ax.grid(alpha=0.3)


def _step(figure: Figure, record: Mapping[str, Any]) -> None:
    """The parts of a plain step, longest first, with their share and, where it is known, their bandwidth."""
    found = record["breakdown"]
    parts = sorted(found["parts"], key=lambda part: part["us"])
    ax = figure.subplots()
    ax.barh([part["name"] for part in parts], [part["us"] for part in parts], color=COLORS[0])
    for i, part in enumerate(parts):
        copy = part["percent_of_copy"]
        text = f" {part['percent']:.1f}%" + ("" if copy is None else f", {copy:.0f}% of copy")
        ax.text(part["us"], i, text, va="center", fontsize=8)
    ax.set_xlim(right=1.25 * max(part["us"] for part in parts))
    ax.set_xlabel(f"us of a step of {found['step_us']:.0f} us at {short(found['position'])} tokens ({found['how']})")
    ax.set_title(_title(record), fontsize=10)


def _roofline(figure: Figure, record: Mapping[str, Any]) -> None:
    """Tokens a second over the bytes of a token, under what the copy bandwidth allows."""
    rows = [row for row in record["rows"] if row["roofline"]]
    copy = record["copy"]["copy_gb_s"]
    n_bytes = [row["roofline"]["bytes"] for row in rows]
    ax = figure.subplots()
    least, most = 0.8 * min(n_bytes), 1.2 * max(n_bytes)
    places = [least + (most - least) * i / 50 for i in range(51)]
    limits = [copy * 1e9 / place for place in places]
    ax.plot([place / 1e6 for place in places], limits, color="black", label=f"copy bandwidth, {copy:.1f} GB/s")
    markers = dict(zip(record["settings"]["frontiers"], "osD^vP*X", strict=False))
    for kind, color in zip(record["settings"]["prompts"], COLORS, strict=False):
        for row in (row for row in rows if row["prompt"] == kind):
            rate, roof = row["plain"]["tokens_per_second"]["median"], row["roofline"]
            marker = markers.get(row["ctx"], "o")
            label = f"{kind}, {short(row['ctx'])}: {roof['percent']:.1f}%"
            ax.plot(roof["bytes"] / 1e6, rate, marker, color=color, ls="none", label=label)
    ax.set_yscale("log")
    ax.set_xlabel("MB that a token has to move: weights, cache, activations")
    ax.set_ylabel("plain tokens a second")
    ax.set_title(_title(record), fontsize=10)
    ax.grid(alpha=0.3, which="both")
    ax.legend(fontsize=8)
