"""The bundled demonstration model: one GGUF of the real architecture, trained by ``scripts/train_demo.py``."""

from pathlib import Path


def bundled_model_path() -> Path:
    """The GGUF that ships with the package."""
    return Path(__file__).parent / "demo.gguf"
