"""``ds4 pull``: download a checkpoint from the Hugging Face hub."""

from __future__ import annotations

import json
import sys

import click

from ds4 import hub


def pull_command(name: str, *, as_json: bool) -> None:
    """Download what is missing and print where the checkpoint lies; progress goes to standard error."""
    hub_name = hub.parse(name)
    if hub_name is None:
        raise click.UsageError(f"{name!r} is not a name on the hub; give REPO or REPO:FILE, as in org/model:x.gguf")
    import huggingface_hub.utils

    if as_json or not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    path = hub.pull(hub_name)
    if as_json:
        click.echo(json.dumps({"name": str(hub_name), "path": str(path)}))
        return
    click.echo(path)
    click.echo(f"run it with: ds4 generate -m {hub_name} PROMPT", err=True)
