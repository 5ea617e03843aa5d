"""scripts/compare_peers.py: peers as processes (a made-up llama_cpp stands for one), figures, exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import compare_peers
from compare_peers import Peer, record, table

SMALL = ["compare_peers", "--prompt", "12", "--tokens", "3", "--repeats", "2"]
FAKE = """
class Llama:
    def __init__(self, path, **options):
        assert options["n_ctx"] == 12 + 3 + 8 and options["n_threads"] == 1, options
        self.seen = []
    def reset(self): self.seen = []
    def eval(self, ids): self.seen += ids
    def sample(self, temp):
        print("libraries print")
        return len(self.seen)
"""


@pytest.fixture
def without_bench(monkeypatch):
    """No llama-bench, whatever the machine has; ds4 once."""
    monkeypatch.setattr(compare_peers.shutil, "which", lambda name: None)
    monkeypatch.setattr(compare_peers, "installed", lambda python, module: False)


def test_side_by_side(monkeypatch, tmp_path, capsys, without_bench):
    (tmp_path / "llama_cpp.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [*SMALL, "--json"])
    assert compare_peers.main() == 0
    found = {row["peer"]: row for row in json.loads(capsys.readouterr().out)["peers"]}
    assert found["ds4"]["why"] is None
    assert found["ds4"]["same_tokens"] == 4
    assert found["llama.cpp"]["why"] is None
    assert found["llama.cpp"]["decode"]["median"] > found["ds4"]["decode"]["median"]
    ratio = found["ds4"]["decode"]["median"] / found["llama.cpp"]["decode"]["median"]
    assert found["llama.cpp"]["ds4_decode_ratio"] == pytest.approx(ratio)
    assert found["llama.cpp"]["same_tokens"] == 0  # it says how many tokens it has seen
    assert "not installed" in found["llama-bench"]["why"]


def test_without_a_peer(monkeypatch, capsys, without_bench):
    for name in ("llama.cpp", "transformers", "ds4 drafting"):
        monkeypatch.setitem(compare_peers.PEERS, name, None)
    started = []

    def start(self, python, options):
        started.append((self.name, python))
        self.why = "" if self.name.startswith("ds4") else "not installed (No module named x)"

    monkeypatch.setattr(Peer, "start", start)
    monkeypatch.setattr(Peer, "round", lambda self, prompt, tokens, *, counts: _count(self, prompt, counts))
    monkeypatch.setattr(sys, "argv", [*SMALL, "--python", "/some/python"])
    assert compare_peers.main() == 1
    out = capsys.readouterr().out
    assert "llama.cpp      not installed (No module named x)" in out
    assert dict(started) == {
        **{"ds4": sys.executable, "ds4 drafting": sys.executable},
        **{"llama.cpp": "/some/python", "transformers": "/some/python"},
    }


def _count(peer: Peer, prompt: list[int], counts: bool) -> None:
    assert len(prompt) == 12
    if counts and not peer.why:
        peer.prompt.append(100.0)
        peer.decode.append(10.0)
        peer.ids = [1, 2, 3, 4]


def test_bad_input(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [*SMALL, "-m", "nowhere.gguf"])
    assert compare_peers.main() == 2
    assert "nowhere.gguf" in capsys.readouterr().err


def test_figures():
    peers = [
        Peer("ds4", prompt=[90.0, 100.0, 120.0], decode=[10.0], ids=[1, 2, 3]),
        Peer("other", prompt=[50.0], decode=[40.0], ids=[1, 2, 4]),
        Peer("llama-bench", prompt=[25.0], decode=[5.0]),
        Peer("none", why="not installed (x)"),
        Peer("half", prompt=[1.0], decode=[1.0], why="failed: it stopped"),
    ]
    rows = record(peers)
    assert rows[0]["prompt"] == {"median": 100.0, "min": 90.0, "max": 120.0}
    assert [row.get("ds4_prompt_ratio") for row in rows] == [1.0, 2.0, 4.0, None, None]
    assert [row.get("ds4_decode_ratio") for row in rows] == [1.0, 0.25, 2.0, None, None]
    assert [row.get("same_tokens") for row in rows] == [3, 2, None, None, None]
    lines = table(rows).splitlines()
    assert max(map(len, lines)) <= 72
    assert lines[1].split() == ["ds4", "100.0", "15", "10.0", "0", "3"]
    assert lines[2].split() == ["other", "50.0", "0", "2.00x", "40.0", "0", "0.25x", "2"]
    assert lines[-1] == "half           failed: it stopped"


def test_a_peer_that_breaks(tmp_path, monkeypatch):
    (tmp_path / "llama_cpp.py").write_text(
        "class Llama:\n    def __init__(self, path, **k): raise ValueError('no such arch')"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    peer = Peer("llama.cpp")
    options = {"path": "x", "ctx": 8, "threads": 1, "device": "cpu", "draft": "off"}
    peer.start(sys.executable, options)
    assert (peer.why, peer.process) == ("failed: ValueError: no such arch", None)
    peer.round([1], 1, counts=True)
    assert not peer.measured
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('No module named llama')")
    peer = Peer("llama.cpp")
    peer.start(sys.executable, options)
    assert peer.why == "not installed (No module named llama)"
    peer = Peer("llama.cpp")
    peer.start(str(tmp_path / "nothing"), options)
    assert peer.why.startswith("cannot be started")
