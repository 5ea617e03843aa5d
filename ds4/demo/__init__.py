"""The bundled demonstration model, a GGUF of the real architecture (``scripts/train_demo.py``), and its DSpark head in
a file of its own (``scripts/train_dspark.py``).
"""

from pathlib import Path


def bundled_model_path() -> Path:
    """The GGUF that ships with the package."""
    return Path(__file__).parent / "demo.gguf"


def bundled_draft_path() -> Path:
    """The DSpark head that ships beside it; the model drafts with its own MTP block unless this is asked for."""
    return Path(__file__).parent / "dspark.gguf"


def preferred_draft(model: str | None, draft: str, draft_model: str | None) -> str | None:
    """The file of the draft head that the commands use: ``draft_model``, where nothing is said the head with which the
    bundled model is fastest (docs/experiments.md), and None for the checkpoint's own."""
    if draft_model is None and model is None and draft == "auto":
        return str(bundled_draft_path())
    return draft_model
