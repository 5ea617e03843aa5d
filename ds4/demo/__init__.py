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
