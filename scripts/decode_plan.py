"""The plan of a decode step of a public checkpoint of V4-Flash that is not there: real headers, no weights, no GPU.

    python scripts/decode_plan.py q2 [--n-tok N] [--ctx N] [--json]

The checkpoint is one of scripts/fabricate.py; the output is that of ``ds4 bench --plan``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import click
from fabricate import GGUF_RECIPES, SAFETENSORS_RECIPES
from inspect_recipes import fabricated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds4.cli_bench import plan
from ds4.cli_common import TOKENS, WholeRange
from ds4.profiling.tables import plan_text
from ds4.weights import open_checkpoint


@click.command()
@click.argument("recipe", type=click.Choice([*GGUF_RECIPES, *SAFETENSORS_RECIPES]))
@click.option("--n-tok", type=WholeRange(1, 8), default=1, metavar="N", help="Tokens of a step (1).")
@click.option("--ctx", type=TOKENS, metavar="N", help="Tokens before the step (4096).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(recipe: str, n_tok: int, ctx: int | None, as_json: bool) -> None:
    """Launches and bytes of a decode step of a public checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        record = plan(open_checkpoint(fabricated(recipe, Path(folder))), n_tok, ctx)
    click.echo(json.dumps(record) if as_json else plan_text(record))


if __name__ == "__main__":
    main()
