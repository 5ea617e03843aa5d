"""verify.sh itself: its exit code with a fake ds4, with the bundled model, and with a damaged copy of that."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_verify import PLAIN

ROOT = Path(__file__).resolve().parent.parent


def run_checks(name: str, data: bytes) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "verify_checks.py"), name]
    result = subprocess.run(command, input=data, capture_output=True, env={"LC_ALL": "C"}, check=False)
    return subprocess.CompletedProcess(command, result.returncode, result.stdout.decode(), result.stderr.decode())


def test_checks_script_prints_answer_and_verdict():
    result = run_checks("capital", json.dumps({"text": "Päris: Paris", "token_ids": [3]}, ensure_ascii=False).encode())
    assert result.returncode == 0
    assert result.stdout == "Päris: Paris\nPASS capital: Päris: Paris\n"
    result = run_checks("capital", b'{"text": "Rome", "token_ids": [3]}')
    assert result.returncode == 1
    assert result.stdout == "Rome\nFAIL capital: Paris is not in the answer\n"


@pytest.mark.parametrize("data", [b"", b"no json", b"[]", b"{}", b'{"text": 4}', b'{"text": "\xff"}'])
def test_checks_script_on_broken_output(data):
    result = run_checks("capital", data)
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1].startswith("FAIL capital: ")
    assert not result.stderr


def test_checks_script_usage():
    assert run_checks("poem", b"").returncode == 2


# The script with a fake ds4

GOOD_ANSWERS = {"2+2": "Four.", "robot": PLAIN, "France": "Paris"}


def run_verify(tmp_path: Path, answers: dict[str, str], *arguments: str, model: str | None = None, code: int = 0):
    """verify.sh, from a foreign directory, with a ds4 on PATH that answers by a word of the prompt."""
    fake = tmp_path / "bin" / "ds4"
    fake.parent.mkdir(parents=True, exist_ok=True)
    fake.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"open({str(tmp_path / 'calls')!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
        f"text = next((a for key, a in {answers!r}.items() if key in sys.argv[2]), '')\n"
        "print(json.dumps({'text': text, 'token_ids': [1] if text else [], 'finish_reason': 'stop'}))\n"
        f"sys.exit({code})\n"
    )
    fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{fake.parent}{os.pathsep}{os.environ['PATH']}"}
    env.pop("MODEL", None)
    if model is not None:
        env["MODEL"] = model
    return subprocess.run(
        [str(ROOT / "verify.sh"), *arguments], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )


def calls(tmp_path: Path) -> list[list[str]]:
    return [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


def test_verify_passes(tmp_path):
    result = run_verify(tmp_path, GOOD_ANSWERS)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith(("PASS", "FAIL"))] == [
        "PASS arithmetic",
        "PASS story",
        "PASS capital",
    ]
    assert PLAIN in lines
    assert lines[-1] == "3 passed, 0 failed"
    assert all("--model" not in call and call[2:4] == ["--temp", "0"] for call in calls(tmp_path))


def test_verify_passes_model_and_options_on(tmp_path):
    result = run_verify(tmp_path, GOOD_ANSWERS, "--ctx", "99", "--system", "two words", model="some dir/a model.gguf")
    assert result.returncode == 0
    for call in calls(tmp_path):
        assert call[2:4] == ["--model", "some dir/a model.gguf"]
        assert call[-4:] == ["--ctx", "99", "--system", "two words"]


@pytest.mark.parametrize("broken", ["2+2", "robot", "France"])
@pytest.mark.parametrize("answer", ["Lorem ipsum", ""])
def test_verify_fails_if_one_check_fails(tmp_path, broken, answer):
    result = run_verify(tmp_path, {**GOOD_ANSWERS, broken: answer})
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] == "2 passed, 1 failed"
    assert result.stdout.count("FAIL") == 1


def test_verify_fails_if_the_command_fails(tmp_path):
    result = run_verify(tmp_path, GOOD_ANSWERS, code=2)  # even with the right answers on standard output
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] == "0 passed, 3 failed"
    assert result.stdout.count("ds4 generate ended with exit code 2") == 3


# The script with the real command and the bundled model


def bundled_model() -> Path:
    found = sorted((ROOT / "ds4" / "demo").glob("*.gguf"))
    if not found:
        pytest.skip("the bundled model does not exist yet (ds4/demo/*.gguf)")
    return found[0]


def run_real(model: Path | None, tmp_path: Path, *, installed: bool) -> subprocess.CompletedProcess[str]:
    """verify.sh with this clone's ds4: through a `ds4` on PATH, or without one (then python -m ds4 is used)."""
    env = {key: value for key, value in os.environ.items() if key != "MODEL"}
    path = tmp_path / "bin"
    path.mkdir(exist_ok=True)
    for name in ("python3", "python"):
        (path / name).unlink(missing_ok=True)
        (path / name).write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (path / name).chmod(0o755)
    kept = [part for part in env["PATH"].split(os.pathsep) if not (Path(part) / "ds4").exists()]
    if installed:
        (path / "ds4").write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m ds4 "$@"\n')
        (path / "ds4").chmod(0o755)
    env["PATH"] = os.pathsep.join([str(path), *kept])
    if model is not None:
        env["MODEL"] = str(model)
    return subprocess.run([str(ROOT / "verify.sh")], env=env, cwd=tmp_path, capture_output=True, text=True, check=False)


def damage(source: Path, copy: Path, *, zero: bool) -> None:
    """A copy whose tensor data is damaged with a whole header and directory: every second page zeroed or inverted."""
    import gguf

    shutil.copyfile(source, copy)
    start = int(gguf.GGUFReader(source).data_offset)
    data = bytearray(copy.read_bytes())
    for page in range(start, len(data), 8192):
        piece = data[page : page + 4096]
        data[page : page + 4096] = bytes(len(piece)) if zero else bytes(b ^ 0x5A for b in piece)
    copy.write_bytes(data)


@pytest.mark.parametrize("installed", [True, False], ids=["ds4", "python-m"])
def test_verify_passes_with_the_bundled_model(tmp_path, installed):
    bundled_model()
    result = run_real(None, tmp_path, installed=installed)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "3 passed, 0 failed"


@pytest.mark.parametrize("zero", [True, False], ids=["zeroed", "inverted"])
def test_verify_fails_with_damaged_weights(tmp_path, zero):
    copy = tmp_path / "damaged.gguf"
    damage(bundled_model(), copy, zero=zero)
    result = run_real(copy, tmp_path, installed=True)
    assert result.returncode == 1, result.stdout + result.stderr
    assert not result.stdout.rstrip().endswith("3 passed, 0 failed")
    assert "Traceback" not in result.stderr
