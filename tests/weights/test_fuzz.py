"""A small budget of damaged checkpoints (the script has the full one), and proof that a crash is noticed."""

from __future__ import annotations

import random

import pytest
from weights import fuzzing

from ds4.weights import gguf

INPUTS = 1200


def test_damaged_headers_are_refused_or_opened(tmp_path):
    tally = fuzzing.run(tmp_path, range(1_000_000, 1_000_000 + INPUTS))
    print(f"{tally.inputs} inputs: {tally.opened} opened, {tally.rejected} refused, {len(tally.crashes)} crashes")
    assert tally.crashes == []
    assert tally.inputs == INPUTS == tally.opened + tally.rejected
    assert tally.opened > INPUTS // 50  # some damage is harmless: a name, a number nobody reads
    assert tally.rejected > INPUTS // 2
    assert len(tally.messages) > 40


def test_seeds_are_valid(tmp_path):
    """Undamaged, every seed opens; otherwise all its inputs would be refused for one reason."""
    for seed in fuzzing.seeds(tmp_path):
        place = tmp_path / seed.name
        place.mkdir()
        for name, data in seed.files.items():
            (place / name).write_bytes(data)
        seed.opens(place)


@pytest.mark.parametrize("error", [KeyError("x"), MemoryError(), IndexError("y"), fuzzing.Ds4Error("two\nlines")])
def test_crashes_are_noticed(tmp_path, monkeypatch, error):
    def broken(*_args):
        raise error

    monkeypatch.setattr(gguf, "read_gguf", broken)
    tally = fuzzing.run(tmp_path, range(0, 18))
    assert len(tally.crashes) >= 6
    assert type(error).__name__ in tally.crashes[0] or "not one line" in tally.crashes[0]


def test_hangs_are_noticed(tmp_path, monkeypatch):
    def endless(*_args):
        while True:
            pass

    monkeypatch.setattr(fuzzing, "SECONDS", 1)
    monkeypatch.setattr(gguf, "read_gguf", endless)
    assert "Hang" in fuzzing.run(tmp_path, range(0, 1)).crashes[0]


def test_inputs_are_the_same_every_time():
    data = bytes(range(256)) * 20
    assert [fuzzing.mutated("m.gguf", data, random.Random(n)) for n in range(50)] == [
        fuzzing.mutated("m.gguf", data, random.Random(n)) for n in range(50)
    ]
