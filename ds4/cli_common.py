"""What the commands share: options of ``ds4 generate`` and ``ds4 chat``, the model they load, output on a terminal."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from ds4.engine import LLM
    from ds4.fit import Fit
    from ds4.sampling import SamplingParams


_NOTICED_BYTES = 2 << 30


def one_line(message: str) -> str:
    """A message without newlines and control characters, whatever file or text it quotes."""
    return " ".join("".join(c if c.isprintable() else " " for c in message).split())


def render(what: Table | Text) -> str:
    """Text for this terminal's width (80 columns in a pipe), without the padding at the ends of lines."""
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False)
    with console.capture() as capture:
        console.print(what)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


class ProgressBar:
    """A bar on standard error for work that takes its time; nothing where nobody would see it."""

    PATIENCE_SECONDS = 0.5

    def __init__(self, what: str, *, bytes_done: bool = False, tokens: bool = False) -> None:
        """``bytes_done`` or ``tokens``: what is counted, and shown with its speed; else only the share is shown."""
        self._what, self._bytes, self._tokens = what, bytes_done, tokens
        self._started = time.monotonic()
        self._bar: Any = None

    def update(self, done: int, total: int) -> None:
        """How much is done, and how much there is; the bar appears late and goes when all is done."""
        if self._bar is None:
            if done >= total or not sys.stderr.isatty() or time.monotonic() - self._started < self.PATIENCE_SECONDS:
                return
            self._open(total)
        rate = done / (time.monotonic() - self._started)
        self._bar.update(self._task, completed=done, counted=f"{done:,}/{total:,} tokens, {rate:,.0f}/s")
        if done >= total:
            self.close()

    def _open(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            ProgressColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns: tuple[str | ProgressColumn, ...] = Progress.get_default_columns()
        if self._bytes:
            columns += (DownloadColumn(), TransferSpeedColumn())
        elif self._tokens:  # short enough for 80 columns
            counted = TextColumn("{task.fields[counted]}")
            columns = (TextColumn("{task.description}"), BarColumn(20), counted, TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._bar.start()
        self._task = self._bar.add_task(self._what, total=total, counted="")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


# Options


class FiniteRange(click.FloatRange):
    """A float range that takes neither NaN nor infinity."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class WholeRange(click.IntRange):
    """An integer range under a name that reads well in "'x' is not a valid ..."."""

    name = "whole number"


class Quantity(click.ParamType):
    """A whole number with an optional unit, such as 128GiB or 32k, in ``units``; larger than 0."""

    def __init__(self, name: str, units: dict[str, int]) -> None:
        self.name, self.units = name, units

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", value.strip())
        scale = self.units.get(match[2].lower()) if match else None
        number = float(match[1]) * scale if match and scale else 0.0
        if number < 1 or number != int(number):
            self.fail(f"{value!r} is not a {self.name}, such as {self.example}", param, ctx)
        return int(number)

    @property
    def example(self) -> str:
        return "96GB or 128GiB" if "gib" in self.units else "32k or 1M"


class Draft(click.ParamType):
    """How many tokens to draft: what ds4.draft_length takes."""

    name = "draft length"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in ("auto", "off") and not re.fullmatch("[0-7]", value):
            self.fail(f"{value!r} is not auto, off or a number from 0 to 7", param, ctx)
        return value


MEMORY = Quantity("size of memory", {"": 1, "mb": 10**6, "gb": 10**9, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40})
TOKENS = Quantity("number of tokens", {"": 1, "k": 1 << 10, "m": 1 << 20})


def _with_options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """One decorator that adds several options, listed by --help in this order."""

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


model_options = _with_options(
    click.option("-m", "--model", metavar="PATH", help="Checkpoint or hub name; the bundled small model if left out."),
    click.option("--ctx", type=TOKENS, default=8192, metavar="N", help="Context in tokens, such as 32k (8192)."),
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to run (auto)."),
    click.option(
        "--numerics", type=click.Choice(["official", "serve", "exact"]), help="Which roundings to imitate (serve)."
    ),
)

draft_options = _with_options(
    click.option(
        "--draft",
        type=Draft(),
        default="auto",
        metavar="K|auto|off",
        help="Tokens to draft ahead, 1 to 7; auto (default): as many as pay, if there is a draft head.",
    ),
    click.option("--draft-model", metavar="PATH", help="Draft head in a file of its own, or its hub name."),
)

# The ranges are those of SamplingParams.
sampling_options = _with_options(
    click.option("-n", "--max-tokens", type=WholeRange(1), default=512, metavar="N", help="At most N tokens (512)."),
    click.option("--temp", type=FiniteRange(0), default=0.0, metavar="X", help="Temperature; 0 (default) is greedy."),
    click.option("--top-k", type=WholeRange(0), default=0, metavar="N", help="Only the N likeliest; 0 is off."),
    click.option(
        "--top-p",
        type=FiniteRange(0, 1, min_open=True),
        default=1.0,
        metavar="X",
        help="Only the likeliest that sum to X; 1 is off.",
    ),
    click.option(
        "--min-p",
        type=FiniteRange(0, 1),
        default=0.0,
        metavar="X",
        help="Only those at least X times as likely as the likeliest; 0 is off.",
    ),
    click.option(
        "--repeat-penalty",
        type=FiniteRange(0, min_open=True),
        default=1.0,
        metavar="X",
        help="Above 1: repeat less; 1 is off.",
    ),
    click.option("--seed", type=WholeRange(0), metavar="N", help="Makes the draws repeatable."),
    click.option("--think/--no-think", default=False, help="Reason before the answer, or not (default)."),
    click.option("--effort", type=click.Choice(["low", "high", "max"]), help="How much to reason; needs --think."),
    click.option("--system", metavar="TEXT", help="System message."),
)


@dataclass
class Options:
    """The values of model_options and sampling_options, checked against each other."""

    model: str | None
    ctx: int
    device: str
    numerics: str | None
    max_tokens: int
    temp: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    seed: int | None
    think: bool
    effort: str | None
    system: str | None
    draft: str = "auto"
    draft_model: str | None = None

    def __post_init__(self) -> None:
        if self.draft_model is not None and self.draft in ("off", "0"):
            raise click.UsageError("--draft-model needs a draft: leave out --draft off")
        if self.effort is not None and not self.think:
            raise click.UsageError("--effort needs --think")
        if self.system is not None and any("\ud800" <= char <= "\udfff" for char in self.system):
            raise click.UsageError("--system is not UTF-8 text")

    def sampling_params(self) -> SamplingParams:
        """The options that choose tokens."""
        from ds4.sampling import SamplingParams

        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temp,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repeat_penalty,
            seed=self.seed,
        )

    def first_messages(self) -> list[dict[str, Any]]:
        """How a conversation starts: with the system message, or empty."""
        return [] if self.system is None else [{"role": "system", "content": self.system}]


def print_plan(plan: Fit) -> None:
    """What will be allocated, on standard error: where that is a GPU's memory, or enough to be noticed elsewhere."""
    if not plan.mapped or plan.total_bytes > _NOTICED_BYTES:
        click.secho(plan.line(), err=True, dim=True)


def load_llm(options: Options) -> LLM:
    """Open the model of ``options``; weights that go to a GPU show a progress bar."""
    from ds4.engine import LLM

    bar = ProgressBar("loading the weights", bytes_done=True)
    try:
        return LLM(
            options.model,
            device=options.device,
            ctx=options.ctx,
            numerics=options.numerics,
            draft=options.draft,
            draft_model=options.draft_model,
            on_load=bar.update,
            on_plan=print_plan,
        )
    finally:
        bar.close()
