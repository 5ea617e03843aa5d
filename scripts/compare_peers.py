"""ds4 beside other runtimes on the same checkpoint, in one run: prompt and decode speed, and the ratios.

    python scripts/compare_peers.py [-m model.gguf] [--threads 1] [--python ~/venv/bin/python] [--json]

Peers are llama.cpp through its Python binding, llama.cpp's llama-bench if it is on the PATH, and transformers, which
gets a safetensors copy of a GGUF in BF16 (``ds4 convert``, in a temporary folder). Those that are not installed are
named and left out; --python is an interpreter that has them, where ds4's own does not. All are given the same token
ids, decode greedily, and take turns, round by round, so that a machine whose speed changes treats them alike; the first
round does not count. --one-by-one loads one at a time, for a model that memory holds only once.

The exit code is 0 where something was compared, 1 where there was no peer, 2 for bad input.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Answer = tuple[float, float, list[int]]
"""Seconds of the prompt and of the tokens behind its first one, and those tokens."""


# The peers' side: a process of its own, maybe of another interpreter. Only the peer itself is imported.


def ds4_peer(path: str, ctx: int, threads: int, device: str, draft: str) -> Callable[[list[int], int], Answer]:
    """ds4, plain or with drafts."""
    sys.path.insert(0, str(ROOT))
    import torch

    from ds4.engine import LLM, Statistics
    from ds4.sampling import SamplingParams

    torch.set_num_threads(threads)
    llm = LLM(path, device=device, ctx=ctx, draft=draft)
    if draft != "off" and not llm.draft:
        raise ImportError("the checkpoint has no draft head")

    def answer(prompt: list[int], n: int) -> Answer:
        *_, found = llm.generate(prompt, SamplingParams(max_tokens=n + 1))
        assert isinstance(found, Statistics)
        return found.prefill_seconds, found.decode_seconds, found.token_ids

    return answer


def llama_cpp_peer(path: str, ctx: int, threads: int, device: str, draft: str) -> Callable[[list[int], int], Answer]:
    """llama.cpp through llama-cpp-python."""
    import llama_cpp

    layers = -1 if device == "cuda" else 0
    llm = llama_cpp.Llama(
        path, n_ctx=ctx, n_threads=threads, n_threads_batch=threads, n_gpu_layers=layers, verbose=False
    )

    def answer(prompt: list[int], n: int) -> Answer:
        llm.reset()
        began = time.perf_counter()
        llm.eval(prompt)
        tokens = [llm.sample(temp=0.0)]
        first = time.perf_counter()
        while len(tokens) <= n:
            llm.eval(tokens[-1:])
            tokens.append(llm.sample(temp=0.0))
        return first - began, time.perf_counter() - first, tokens

    return answer


def transformers_peer(path: str, ctx: int, threads: int, device: str, draft: str) -> Callable[[list[int], int], Answer]:
    """transformers, in BF16 on a GPU and FP32 on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()

    @torch.inference_mode()
    def answer(prompt: list[int], n: int) -> Answer:
        began = time.perf_counter()
        out = model(torch.tensor([prompt], device=device), use_cache=True, logits_to_keep=1)
        tokens = [int(out.logits[0, -1].argmax())]
        first = time.perf_counter()
        while len(tokens) <= n:
            ids = torch.tensor([tokens[-1:]], device=device)
            out = model(ids, past_key_values=out.past_key_values, use_cache=True)
            tokens.append(int(out.logits[0, -1].argmax()))
        return first - began, time.perf_counter() - first, tokens

    return answer


PEERS = {"ds4": ds4_peer, "ds4 drafting": ds4_peer, "llama.cpp": llama_cpp_peer, "transformers": transformers_peer}


def serve(name: str, options: dict[str, Any]) -> None:
    """The child: one line when it is ready or why it is not, then a line for each request on standard input."""
    out, sys.stdout = sys.stdout, sys.stderr  # libraries print

    def say(what: dict[str, Any]) -> None:
        print(json.dumps(what), file=out, flush=True)

    try:
        answer = PEERS[name](**options)
    except ImportError as error:
        say({"missing": str(error)})
        return
    except Exception as error:  # whatever a peer makes of the checkpoint: one line of the report
        say({"failed": f"{type(error).__name__}: {error}"})
        return
    say({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            prompt, decode, ids = answer(request["prompt"], request["tokens"])
        except Exception as error:
            say({"failed": f"{type(error).__name__}: {error}"})
            return
        say({"prompt": prompt, "decode": decode, "ids": ids})


# This side


@dataclass
class Peer:
    """One runtime: its process, and tokens a second of its rounds. ``why`` it is not, or no longer, there."""

    name: str
    process: subprocess.Popen[str] | None = None
    prompt: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    why: str = ""

    def start(self, python: str, options: dict[str, Any]) -> None:
        """Load the model; ``why`` says where that fails."""
        command = [python, str(Path(__file__).resolve()), "--serve", self.name, json.dumps(options)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options["threads"])}
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
        except OSError as error:
            self.why = f"cannot be started: {error.strerror or error}"
            return
        self._reply()

    def round(self, prompt: list[int], tokens: int, *, counts: bool) -> None:
        """One prompt and its answer."""
        if self.process is None or self.process.stdin is None:
            return
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps({"prompt": prompt, "tokens": tokens}) + "\n")
            self.process.stdin.flush()
        found = self._reply()
        if found and counts:
            self.prompt.append(len(prompt) / found["prompt"])
            self.decode.append((len(found["ids"]) - 1) / found["decode"])
            self.ids = found["ids"]

    def _reply(self) -> dict[str, Any] | None:
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = json.loads(line) if line else {"failed": "it ended without a word"}
        if "missing" in found:
            self.why = f"not installed ({found['missing']})"
        elif "failed" in found:
            self.why = f"failed: {' '.join(found['failed'].split())[:200]}"
        if self.why:
            self.stop()
            return None
        return found

    def stop(self) -> None:
        """End the process and free its memory."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    @property
    def measured(self) -> bool:
        return bool(self.decode) and not self.why


def llama_bench(path: str, prompt: int, tokens: int, repeats: int, threads: int, device: str) -> Peer:
    """llama.cpp's own benchmark: random tokens, each part from an empty cache."""
    peer = Peer("llama-bench")
    program = shutil.which("llama-bench")
    if program is None:
        peer.why = "not installed (no llama-bench on the PATH)"
        return peer
    sizes = ["-p", str(prompt), "-n", str(tokens), "-r", str(repeats), "-t", str(threads)]
    layers = "99" if device == "cuda" else "0"
    done = subprocess.run(
        [program, "-m", path, *sizes, "-ngl", layers, "-o", "json"], capture_output=True, text=True, check=False
    )
    try:
        for row in json.loads(done.stdout):
            (peer.decode if row["n_gen"] else peer.prompt).extend(row["samples_ts"])
    except (ValueError, KeyError, TypeError):
        peer.why = f"failed: {' '.join(done.stderr.split())[-200:] or 'no output'}"
    return peer


@contextlib.contextmanager
def safetensors_of(path: Path, wanted: bool) -> Iterator[tuple[Path | None, str]]:
    """The checkpoint as a folder of safetensors: itself, or a copy in BF16; or None and why there is none."""
    if path.is_dir():
        yield path, ""
        return
    if not wanted:
        yield None, ""
        return
    with tempfile.TemporaryDirectory(prefix="ds4-peers-") as folder:
        out = Path(folder) / "model"
        command = [sys.executable, "-m", "ds4", "convert", str(path), str(out), "--experts", "bf16", "--dense", "bf16"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        yield (out, "") if done.returncode == 0 else (None, f"failed: {' '.join(done.stderr.split())}")


def installed(python: str, module: str) -> bool:
    """Whether an interpreter has a module."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    try:
        return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def prompt_ids(path: str, n: int) -> list[int]:
    """Token ids of source code, or random ones for a checkpoint without a tokenizer."""
    from ds4.bench.prompts import Prompt
    from ds4.engine import LLM

    llm = LLM(path, device="cpu", ctx=n, draft="off")
    return Prompt(llm, "code" if llm.tokenizer else "random", n).body


def compare(args: argparse.Namespace, path: Path) -> list[Peer]:
    """Every peer, measured or with a reason."""
    prompt = prompt_ids(str(path), args.prompt)
    options = {"ctx": args.prompt + args.tokens + 8, "threads": args.threads, "device": args.device, "draft": "off"}
    peers = [Peer(name) for name in PEERS]
    with safetensors_of(path, installed(args.python, "transformers")) as (folder, why):
        every: dict[str, tuple[str, dict[str, Any]]] = {
            "ds4": (sys.executable, {**options, "path": str(path)}),
            "ds4 drafting": (sys.executable, {**options, "path": str(path), "draft": "auto"}),
            "llama.cpp": (args.python, {**options, "path": str(path)}),
            "transformers": (args.python, {**options, "path": str(folder or path)}),
        }
        if why:
            peers[-1].why = why
        if path.is_dir():
            peers[2].why = "reads GGUF files only"
        try:
            groups = [[peer] for peer in peers] if args.one_by_one else [peers]
            for group in groups:
                for peer in group:
                    if not peer.why:
                        peer.start(*every[peer.name])
                for number in range(args.repeats + 1):
                    for peer in group:
                        peer.round(prompt, args.tokens, counts=number > 0)
                for peer in group:
                    peer.stop()
        finally:
            for peer in peers:
                peer.stop()
    if path.is_dir():
        return peers
    return [*peers, llama_bench(str(path), args.prompt, args.tokens, args.repeats, args.threads, args.device)]


def record(peers: list[Peer]) -> list[dict[str, Any]]:
    """Medians, spreads and how many times as fast as each peer plain ds4 is; ``why`` for those not measured."""
    ours, rows = peers[0], []
    for peer in peers:
        row: dict[str, Any] = {"peer": peer.name, "why": peer.why or None}
        if peer.measured:
            for name in ("prompt", "decode"):
                rates, base = getattr(peer, name), getattr(ours, name)
                middle = statistics.median(rates)
                row[name] = {"median": middle, "min": min(rates), "max": max(rates)}
                row[f"ds4_{name}_ratio"] = statistics.median(base) / middle if base else None
            same = next((i for i, (a, b) in enumerate(zip(peer.ids, ours.ids, strict=False)) if a != b), len(peer.ids))
            row["same_tokens"] = same if peer.ids else None
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'':14} {'prompt':>8} {'+-%':>4} {'ds4 is':>7} {'decode':>8} {'+-%':>4} {'ds4 is':>7} {'same':>5}"]
    for row in rows:
        if row["why"]:
            lines.append(f"{row['peer']:14} {row['why']}")
            continue
        cells = []
        for name in ("prompt", "decode"):
            rate, ratio = row[name], row[f"ds4_{name}_ratio"]
            spread = 50 * (rate["max"] - rate["min"]) / rate["median"]
            shown = f"{ratio:.2f}x" if ratio and row["peer"] != "ds4" else ""
            cells.append(f"{rate['median']:8.1f} {spread:4.0f} {shown:>7}")
        same = "" if row["same_tokens"] is None else row["same_tokens"]
        lines.append(f"{row['peer']:14} {' '.join(cells)} {same:>5}")
    return "\n".join(lines)


def main() -> int:
    """The command; its exit code."""
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], json.loads(sys.argv[3]))
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-m", "--model", help="a GGUF file or a folder of safetensors (the bundled model)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (512)")
    parser.add_argument("--tokens", type=int, default=64, help="to decode behind the first (64)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count (3)")
    parser.add_argument("--threads", type=int, default=1, help="of every runtime on the CPU (1)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has the peers (this one)")
    parser.add_argument("--one-by-one", action="store_true", help="load one model at a time")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if min(args.prompt, args.tokens, args.repeats, args.threads) < 1:
        parser.error("--prompt, --tokens, --repeats and --threads are at least 1")
    sys.path.insert(0, str(ROOT))
    from ds4.demo import bundled_model_path
    from ds4.errors import Ds4Error

    path = Path(args.model).absolute() if args.model else bundled_model_path()
    try:
        peers = compare(args, path)
    except Ds4Error as error:
        print(f"compare_peers: {error}", file=sys.stderr)
        return 2
    rows = record(peers)
    about = {name: getattr(args, name) for name in ("prompt", "tokens", "repeats", "threads", "device")}
    if args.json:
        print(json.dumps({"model": str(path), **about, "peers": rows}, indent=1))
    else:
        print(f"{path}: tokens/s, medians of {args.repeats} rounds")
        print(f"{args.prompt} prompt tokens, {args.tokens} decoded, {args.threads} threads, {args.device}")
        print(f"same: tokens before the first that differs from ds4's, of {args.tokens + 1}")
        print(table(rows))
    return 0 if sum(peer.measured for peer in peers if not peer.name.startswith("ds4")) else 1


if __name__ == "__main__":
    sys.exit(main())
