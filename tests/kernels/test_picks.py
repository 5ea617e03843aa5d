"""Picks: the rule, the card's file, and what is wrong with a file."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds4.errors import Ds4Error
from ds4.kernels import picks
from ds4.kernels.picks import (
    TOKENS,
    Pick,
    Picks,
    Shape,
    candidates,
    default_pick,
    pick,
    picks_file,
    picks_of,
    read_picks,
    shared_bytes,
    using,
)

CPU = torch.device("cpu")
CARD = "NVIDIA H200 (PCIe)"
SHAPE = Shape("gemm", 4096, 256, ("bf16",))
ROW = {"kernel": "gemm", "n_cols": 4096, "n_rows": 256, "formats": ["bf16"], "n_tok": 512, "tokens": 64, "stages": 3}


def picked(n_tok: int, device: torch.device = CPU, **changes: Any) -> Pick:
    values = {"n_cols": 4096, "n_rows": 256, "formats": ["bf16"]} | changes
    return pick("gemm", n_tok=n_tok, device=device, **values)


def test_the_rule() -> None:
    tiles = {n: default_pick(n).tokens for n in (1, 8, 9, 16, 17, 33, 64, 65, 128, 129, 4096)}
    assert tiles == {1: 8, 8: 8, 9: 16, 16: 16, 17: 32, 33: 64, 64: 64, 65: 128, 128: 128, 129: 128, 4096: 128}
    assert all(default_pick(n) in candidates(("iq2_xxs", "q2_k")) for n in TOKENS if n < 128)
    # 1024 rows of 128 a block: 512 tokens are 32 blocks of 128 tokens, 64 of 64, 128 of 32.
    assert default_pick(512, 132, lambda tokens: 8 * 512 // tokens).tokens == 32
    assert default_pick(512, 128, lambda tokens: 8 * 512 // tokens).tokens == 32
    assert default_pick(512, 64, lambda tokens: 8 * 512 // tokens).tokens == 64
    assert default_pick(512, 10**6, lambda tokens: 8 * 512 // tokens).tokens == 16
    assert default_pick(8, 10**6, lambda tokens: 1).tokens == 8
    assert default_pick(512, 10**6, lambda tokens: 7).tokens == 128  # smaller tiles would not help


def test_candidates_fit() -> None:
    """Into the 99 KB of a block, 2 KB of them for what kernels declare themselves."""
    assert set(candidates(("q8_0",))) == {Pick(t, s) for t in TOKENS for s in (2, 3, 4)} - {Pick(128, 4)}
    for formats in (("q8_0",), ("q2_k", "q4_k"), ("iq2_xxs", "iq2_xxs")):
        assert max(shared_bytes(one, formats) for one in candidates(formats)) <= 97 * 1024
    assert Pick(128, 2) in candidates(("iq2_xxs", "iq2_xxs"))
    assert Pick(128, 3) not in candidates(("q4_k",))


def test_the_nearest_measured_number_of_tokens() -> None:
    table = Picks([(SHAPE, 64, Pick(16, 4)), (SHAPE, 512, Pick(64, 3))])
    found = {n: table.find(SHAPE, n) for n in (8, 9, 64, 65, 512, 513)}
    assert found == {8: None, 9: Pick(16, 4), 64: Pick(16, 4), 65: Pick(64, 3), 512: Pick(64, 3), 513: None}
    assert table.find(Shape("moe_up", 4096, 256, ("bf16",)), 64) is None
    with using(table):
        assert picked(512) == Pick(64, 3)
        assert picked(512, n_rows=512) == default_pick(512)
        with using(Picks()):
            assert picked(512) == default_pick(512)
    assert picked(512) == default_pick(512)


def test_a_card_s_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Written, read, printed, and followed on that card; elsewhere the rule decides."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(picks, "device_facts", lambda index: SimpleNamespace(name=f"{CARD} {index}", n_sms=132))
    file = picks_file(f"{CARD} 0")
    assert file == tmp_path / "ds4" / "kernels" / "picks-NVIDIA-H200-PCIe-0.json"
    table = Picks([(SHAPE, 512, Pick(64, 3)), (Shape("moe_up", 4096, 4096, ("q4_k", "q4_k")), 96, Pick(32, 2))])
    file.parent.mkdir(parents=True)
    file.write_text(table.to_json(f"{CARD} 0"))
    assert read_picks(file, f"{CARD} 0").rows() == table.rows() != []
    assert str(table).splitlines() == [
        "gemm 256 x 4096 bf16, 512 tokens: tiles of 64, 3 stages",
        "moe_up 4096 x 4096 q4_k,q4_k, 96 tokens: tiles of 32, 2 stages",
    ]
    assert picked(512, torch.device("cuda", 0)) == Pick(64, 3)
    assert picked(512, torch.device("cuda", 1)) == picked(512) == Pick(128, 2)
    file.unlink()
    assert picked(512, torch.device("cuda", 0)) == Pick(64, 3)  # read once
    picks_of.cache_clear()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", r"not readable as JSON \("),
        ("[]", "no picks of format 1"),
        ({"format": 2}, "no picks of format 1"),
        ({"picks": {}}, "no picks of format 1"),
        ({"card": "other"}, "picks of 'other', not of 'NVIDIA H200"),
        ({"picks": [ROW, 7]}, "pick 1: not an object with kernel, formats, n_cols"),
        ({"picks": [ROW | {"more": 1}]}, "pick 0: not an object with kernel, formats"),
        ({"picks": [ROW | {"tokens": "64"}]}, "pick 0: tokens is '64', not a positive number"),
        ({"picks": [ROW | {"n_tok": True}]}, "pick 0: n_tok is True, not a positive number"),
        ({"picks": [ROW | {"n_rows": 0}]}, "pick 0: n_rows is 0, not a positive number"),
        ({"picks": [ROW | {"formats": "bf16"}]}, "pick 0: kernel is a name and formats a list of names"),
        ({"picks": [ROW | {"tokens": 48}]}, "pick 0: tiles of 48 with 3 stages: there is no such launch"),
        ({"picks": [ROW | {"tokens": 128, "formats": ["q4_k"]}]}, "pick 0: tiles of 128 with 3 stages"),
    ],
)
def test_a_broken_file(tmp_path: Path, text: Any, what: str) -> None:
    file = tmp_path / "picks.json"
    good = {"format": 1, "card": CARD, "picks": [ROW]}
    file.write_text(text if isinstance(text, str) else json.dumps(good | text))
    with pytest.raises(Ds4Error, match=what) as error:
        read_picks(file, CARD)
    assert str(error.value).startswith(f"{file}: ")
    assert str(error.value).endswith("; delete it, or make it anew with scripts/tune_prefill.py")
    assert "\n" not in str(error.value)
    file.write_text(json.dumps(good))
    assert len(read_picks(file, CARD).rows()) == 1
