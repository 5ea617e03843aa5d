"""Checkpoints by hub name: what a name stands for, the local cache, and downloads from a small hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ds4 import hub
from ds4.demo import bundled_model_path
from ds4.errors import Ds4Error

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """As much of the hub's HTTP interface as a download needs; it can break off in the middle of a file."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.break_after: int | None = None
        self.breaks = 0
        self.ranges: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if re.fullmatch(r"/api/models/org/model(/revision/\w+)?", path):
            siblings = [{"rfilename": name} for name in self.server.files]
            return self.answer(json.dumps({"id": "org/model", "sha": COMMIT, "siblings": siblings}).encode())
        if re.fullmatch(r"/api/models/org/model/tree/\w+", path):
            tree = [{"type": "file", "path": n, "size": len(d), "oid": "0"} for n, d in self.server.files.items()]
            return self.answer(json.dumps(tree).encode())
        match = re.fullmatch(r"/org/model/resolve/\w+/(.+)", path)
        if match and match[1] in self.server.files:
            return self.answer(self.server.files[match[1]], file=True)
        self.send_response(404)
        if not path.startswith(("/api/models/org/model", "/org/model")):
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def answer(self, body: bytes, *, file: bool = False) -> None:
        start = 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if file and wanted:
            start = int(wanted[1])
            self.server.ranges.append(self.headers["Range"])
        self.send_response(206 if start else 200)
        if file:
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Type", "application/octet-stream" if file else "application/json")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = self.server.break_after if file and self.server.breaks else None
        self.wfile.write(body[start:stop])
        if stop is not None:
            self.server.breaks -= 1
            self.wfile.flush()
            self.connection.close()


@pytest.fixture
def served():
    """A running hub with the bundled model, a split GGUF's three parts and a picture."""
    demo = bundled_model_path().read_bytes()
    files = {"demo.gguf": demo, "plot.png": b"png"}
    files |= {f"q/big-{part:05d}-of-00003.gguf": f"part {part}".encode() for part in (1, 2, 3)}
    server = Hub(files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ds4(server_url: str, home: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: huggingface_hub reads its environment when it is imported."""
    environment = os.environ | {"HF_ENDPOINT": server_url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"} | extra
    command = [sys.executable, "-m", "ds4", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/model", hub.HubName("org/model")),
        ("org/model:a/b-*.gguf", hub.HubName("org/model", "a/b-*.gguf")),
        ("org/model@v1:x.gguf", hub.HubName("org/model", "x.gguf", "v1")),
    ],
)
def test_parse(name, expected):
    assert hub.parse(name) == expected
    assert str(expected) == name


@pytest.mark.parametrize(
    "name", ["model.gguf", "./org/model", "/org/model", "a/b/c", "org/model:", "org/m:../../x", ""]
)
def test_parse_refuses(name):
    assert hub.parse(name) is None


FILES = ["README.md", "x-Q2.gguf", "x-Q4-00001-of-00002.gguf", "x-Q4-00002-of-00002.gguf"]


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        ("x-Q2.gguf", ["x-Q2.gguf"]),
        ("*Q2*", ["x-Q2.gguf"]),
        ("x-Q4-00002-of-00002.gguf", FILES[2:]),
        ("*Q4*", FILES[2:]),
    ],
)
def test_what_a_name_stands_for(file, wanted):
    assert hub._wanted(hub.HubName("o/m", file), FILES) == wanted


@pytest.mark.parametrize(
    ("file", "files", "message"),
    [
        (None, FILES, "has several GGUF files; name one as o/m:FILE; choose from: x-Q2.gguf, x-Q4-00001"),
        (None, ["README.md"], "holds no checkpoint"),
        ("y.gguf", FILES, "has no file 'y.gguf'; choose from: x-Q2.gguf"),
        ("*.gguf", FILES, "stands for 3 files; choose from"),
    ],
)
def test_what_a_name_does_not_stand_for(file, files, message):
    with pytest.raises(Ds4Error) as caught:
        hub._wanted(hub.HubName("o/m", file), files)
    assert message in str(caught.value)


def test_safetensors_repository_brings_what_belongs_to_it():
    files = ["a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors", "config.json", "tokenizer.json", "x.png"]
    assert hub._wanted(hub.HubName("o/m"), files) == files[:4]


def test_pull_then_generate_by_name(served, tmp_path):
    before = ds4(served.url, tmp_path, "generate", "-m", "org/model:demo.gguf", "hello")
    assert before.returncode == 2
    assert before.stderr == (
        "ds4: error: org/model:demo.gguf: no such file, and not in the local hub cache; "
        "get it with 'ds4 pull org/model:demo.gguf'\n"
    )
    pulled = ds4(served.url, tmp_path, "pull", "org/model:demo.gguf", "--json")
    assert pulled.returncode == 0, pulled.stderr
    path = Path(json.loads(pulled.stdout)["path"])
    assert path.read_bytes() == served.files["demo.gguf"]
    assert path.is_relative_to(tmp_path)
    answer = ds4("http://127.0.0.1:9", tmp_path, "generate", "-m", "org/model:demo.gguf", "What is 2+2? One word.")
    assert answer.returncode == 0, answer.stderr
    assert "Four" in answer.stdout
    described = ds4("http://127.0.0.1:9", tmp_path, "inspect", "org/model:demo.gguf", "--json")
    assert json.loads(described.stdout)["container"] == "gguf"


def test_broken_connection_is_taken_up_again(served, tmp_path):
    served.break_after, served.breaks = 12_000_000, 1
    pulled = ds4(served.url, tmp_path, "pull", "org/model:demo.gguf")
    assert pulled.returncode == 0, pulled.stderr
    assert Path(pulled.stdout.strip()).read_bytes() == served.files["demo.gguf"]
    assert len(served.ranges) == 1
    assert int(served.ranges[0][6:-1]) >= 10_000_000


def test_download_that_never_ends_well_leaves_nothing(served, tmp_path):
    served.break_after, served.breaks = 12_000_000, 1000
    broken = ds4(served.url, tmp_path, "pull", "org/model:demo.gguf")
    assert broken.returncode == 2
    assert broken.stderr.count("ds4: error: org/model:demo.gguf:") == 1
    assert "Traceback" not in broken.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 1_000_000]


def test_one_part_brings_the_others(served, tmp_path):
    pulled = ds4(served.url, tmp_path, "pull", "org/model:q/big-00002-of-00003.gguf")
    assert pulled.returncode == 0, pulled.stderr
    first = Path(pulled.stdout.strip())
    assert first.name == "big-00001-of-00003.gguf"
    assert [p.read_text() for p in sorted(first.parent.iterdir())] == ["part 1", "part 2", "part 3"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/model:no.gguf", "org/model: has no file 'no.gguf'; choose from: demo.gguf, q/big-00001-of-00003.gguf"),
        ("org/nothing:x.gguf", "org/nothing: no such repository on the hub, or a private one (set HF_TOKEN)"),
        ("model.gguf", "'model.gguf' is not a name on the hub; give REPO or REPO:FILE"),
    ],
)
def test_wrong_names_are_one_line(served, tmp_path, name, message):
    result = ds4(served.url, tmp_path, "pull", name)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"ds4: error: {message}")
    assert len(result.stderr.splitlines()) == 1


def test_without_a_network(tmp_path):
    result = ds4("http://127.0.0.1:9", tmp_path, "pull", "org/model:demo.gguf")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "the hub cannot be reached" in result.stderr
    offline = ds4("http://127.0.0.1:9", tmp_path, "pull", "org/model:demo.gguf", HF_HUB_OFFLINE="1")
    assert offline.returncode == 2
    assert "HF_HUB_OFFLINE" in offline.stderr
