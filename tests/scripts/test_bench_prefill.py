"""scripts/bench_prefill.py on a small random model: what it prints, and what it says of peers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from ds4.weights import open_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import bench_prefill
from bench_prefill import LARGE, Speed, fabricate

SMALL = LARGE | {
    **{"hidden_size": 128, "num_hidden_layers": 3, "compress_ratios": (0, 4, 128), "num_attention_heads": 2},
    **{"q_lora_rank": 64, "o_groups": 2, "o_lora_rank": 64, "index_n_heads": 2, "moe_intermediate_size": 64},
    **{"n_routed_experts": 8},
}


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    monkeypatch.setattr(bench_prefill, "LARGE", SMALL)
    command = ["bench_prefill.py", "--only", "large", "--tokens", "260", "--repeats", "1", *options]
    monkeypatch.setattr(sys, "argv", command)
    bench_prefill.main()
    return capsys.readouterr().out


def test_the_random_model_is_the_one_described(tmp_path: Path) -> None:
    """Its experts are BF16, its parameters counted, and the seed makes the same file again."""
    n = fabricate(tmp_path / "small.gguf", SMALL)
    checkpoint = open_checkpoint(tmp_path / "small.gguf")
    tensors = list(checkpoint.tensors())
    assert n == sum(t.data.numel() // {"bf16": 2, "f32": 4, "i32": 4}[t.format] for t in tensors)
    assert checkpoint.tensor("layers.1.ffn.experts.3.w2.weight").format == "bf16"
    again = tmp_path / "again.gguf"
    assert fabricate(again, SMALL) == n
    assert again.read_bytes() == (tmp_path / "small.gguf").read_bytes()


def test_record_and_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(run(monkeypatch, capsys, "--json", "--profile", "--no-peers"))
    model = record["models"]["large"]
    assert (model["prompt_tokens"], model["repeats"]) == (260, 1)
    assert model["tokens_per_second"] > 0
    assert sum(row["share"] for row in model["profile"]) == pytest.approx(1)
    calls = {row["part"]: row["calls"] for row in model["profile"]}
    assert calls["experts"] == 3
    assert calls["attention"] == calls["router"] == 3 * 3
    assert calls["mHC boundaries"] == 2 * calls["router"]
    assert calls["compressors"] == 3  # CSA's two, HCA's one
    out = run(monkeypatch, capsys, "--profile", "--no-peers")
    assert "large, on one thread" in out
    assert "experts" in out


def test_peers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object) -> Speed:
        raise ValueError("no such architecture\nand more")

    peers = {
        "absent": ("no_such_module", broken),
        "broken": ("json", broken),
        "slow": ("json", lambda path, ids, repeats: Speed(1e-3, 2e-3)),
    }
    monkeypatch.setattr(bench_prefill, "PEERS", peers)
    model = json.loads(run(monkeypatch, capsys, "--json"))["models"]["large"]
    assert model["peers"]["absent"] == {"status": "not installed"}
    assert model["peers"]["broken"] == {"status": "failed: no such architecture"}
    slow = model["peers"]["slow"]
    assert slow["ratio"] == pytest.approx(model["tokens_per_second"] / 1e-3)
    assert slow["ratio_cpu"] == pytest.approx(model["tokens_per_cpu_second"] / 2e-3)
    out = run(monkeypatch, capsys)
    assert "absent: not installed" in out
    assert "broken: failed: no such architecture" in out


def test_bad_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, capsys, "--tokens", "100")
    assert error.value.code == 2
    assert "--tokens must be above 200" in capsys.readouterr().err
