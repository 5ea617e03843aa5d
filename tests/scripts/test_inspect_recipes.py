"""Full-size headers of the public recipes: ``ds4 inspect`` prints what the documents say, in little memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import fabricate
import inspect_recipes

# Size of the public file and how far ours may be off: the published figure's rounding, and headers.
PUBLISHED = {"q2": (80.76, 0.02), "q4": (153.3, 0.1), "k128": (75.0, 0.1), "k180": (98.63, 0.02)}


@pytest.mark.parametrize("recipe", list(inspect_recipes.EXPECTED))
def test_inspect_matches_the_document(recipe, tmp_path):
    path = inspect_recipes.fabricated(recipe, tmp_path)
    run = inspect_recipes.inspected(path)
    assert inspect_recipes.mismatches(recipe, run.record["bytes_per_token"]) == []
    # Half of it is torch's import. A safetensors release has a hundred times the tensors of a GGUF, each with a name.
    assert run.peak_bytes < (300e6 if path.is_file() else 400e6)
    assert run.record["layers"] == {"total": 43, "swa": 2, "csa": 21, "hca": 20, "hash_routed": 3}
    print(f"{recipe}: {run.record['total_bytes'] / 1e9:.1f} GB, {run.seconds:.2f} s, {run.peak_bytes / 1e6:.0f} MB")


@pytest.mark.parametrize("recipe", list(PUBLISHED))
def test_files_have_the_published_size(recipe, tmp_path):
    size, tolerance = PUBLISHED[recipe]
    path = fabricate.write_gguf(tmp_path / "x.gguf", fabricate.GGUF_RECIPES[recipe])
    assert path.stat().st_size / 2**30 == pytest.approx(size, abs=tolerance)
    assert path.stat().st_blocks * 512 < 20e6


def test_safetensors_have_the_published_size(tmp_path):
    """Tensor bytes of the official releases (spec weights.md 1.1 and 2.1), without the headers."""
    published = {"official-0731": 166_878_536_440, "modelopt-nvfp4-0731": 175_535_844_088}
    for recipe, size in published.items():
        path = inspect_recipes.fabricated(recipe, tmp_path)
        assert inspect_recipes.inspected(path).record["total_bytes"] == size


def test_a_wrong_table_is_noticed():
    figures, _ = inspect_recipes.EXPECTED["q2"]
    traffic = {n: round(f * 1e6) for n, f in zip(inspect_recipes.COMPONENTS, figures, strict=True)}
    assert inspect_recipes.mismatches("q2", traffic) == []
    assert inspect_recipes.mismatches("q2", traffic | {"router": 91_000_000})
