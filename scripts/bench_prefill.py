"""How fast prompts are processed on the CPU: the bundled model, and a random one of 910 million parameters.

    python scripts/bench_prefill.py                              # both models, and peers where they are installed
    python scripts/bench_prefill.py --only bundled --tokens 5000 --json
    OMP_NUM_THREADS=1 python scripts/bench_prefill.py --only large --profile

The large model has 1,024 hidden values, 8 layers and 64 experts of 512 in BF16; it is made from a seed in a temporary
directory (1.8 GB), with the bundled model's tokenizer, and deleted afterwards. The prompt is text of the demonstration
corpus. Wall time counts where the machine is idle; where it is not, tokens a CPU second are the fairer figure, and
peers are compared by them as well. One pass of each kind before those that count warms up.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from statistics import median
from typing import Any

import torch
from demo_corpus import Corpus

import ds4.model.attention
import ds4.model.block
import ds4.model.moe
from ds4.config import ModelConfig
from ds4.demo import bundled_model_path
from ds4.engine import LLM
from ds4.kernels.numerics import Numerics
from ds4.model.compressor import Compressor
from ds4.model.indexer import Indexer
from ds4.model.transformer import Transformer
from ds4.weights import open_checkpoint
from ds4.weights.gguf_write import write_gguf

SEED = 910
WARM_UP_TOKENS = 200
LARGE: dict[str, Any] = {
    **{"hidden_size": 1024, "num_hidden_layers": 8, "compress_ratios": (0, 4, 128, 4, 128, 4, 128, 4)},
    **{"num_attention_heads": 16, "q_lora_rank": 512, "o_groups": 4, "o_lora_rank": 256},
    **{"index_n_heads": 16, "index_topk": 512, "moe_intermediate_size": 512, "n_routed_experts": 64},
    **{"num_hash_layers": 1, "n_mtp_layers": 0},
}


class RandomParams:
    """Random weights for whatever a network asks for, kept under their names."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.made: dict[str, tuple[torch.Tensor, str]] = {}
        self._random = torch.Generator().manual_seed(SEED)
        largest = max(config.vocab_size, config.num_attention_heads * config.head_dim) * config.hidden_size
        # Matrices are windows of one pool at random places: drawing every weight anew would take minutes.
        self._pool = (torch.randn(2 * largest, generator=self._random) * 0.02).bfloat16()

    def n_experts(self, prefix: str) -> int:
        return self.config.n_routed_experts

    def __contains__(self, name: object) -> bool:
        return True

    def expect(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        n = torch.Size(shape).numel()
        if name.endswith(".tid2eid"):
            table = torch.rand(shape[0], self.config.n_routed_experts, generator=self._random)
            made = table.argsort(1)[:, : shape[1]].contiguous(), "i32"
        elif "norm" in name:
            made = torch.ones(shape), "f32"
        elif len(shape) == 1 or "hc_" in name or name.endswith(".ape"):
            made = torch.randn(shape, generator=self._random) * 0.02, "f32"
        else:
            start = int(torch.randint(len(self._pool) - n, (), generator=self._random))
            made = self._pool[start : start + n].view(shape), "bf16"
        self.made[name] = made
        return made[0]


def fabricate(path: Path, changes: dict[str, Any]) -> int:
    """Write a random BF16 checkpoint of the bundled model's shape but for ``changes``; its number of parameters."""
    base = open_checkpoint(bundled_model_path())
    params = RandomParams(replace(base.config, **changes))
    Transformer(params.config, params, Numerics())
    tokenizer = {key: value for key, value in base.metadata.items() if key.startswith("tokenizer.")}
    tensors = [(name, values, fmt) for name, (values, fmt) in params.made.items()]
    write_gguf(path, params.config, tensors, tokenizer_metadata=tokenizer, name="random weights")
    return sum(values.numel() for values, _ in params.made.values())


def prompt_of(llm: LLM, n: int) -> list[int]:
    """``n`` tokens of conversations that the bundled model was not trained on."""
    assert llm.tokenizer is not None
    ids: list[int] = []
    for text in Corpus(SEED).texts(SEED, "heldout"):
        ids += llm.tokenizer.encode(text)
        if len(ids) >= n:
            break
    return ids[:n]


@dataclass(frozen=True)
class Speed:
    """Tokens a second of wall time and of CPU time, medians."""

    wall: float
    cpu: float

    @staticmethod
    def of(run: Callable[[], object], n_tokens: int, repeats: int) -> Speed:
        walls, cpus = [], []
        for _ in range(repeats):
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            walls.append(n_tokens / (time.perf_counter() - wall))
            cpus.append(n_tokens / (time.process_time() - cpu))
        return Speed(median(walls), median(cpus))


# The profile


class Parts:
    """CPU seconds of one thread by part of the network; a part within another is not counted twice."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._inner = [0.0]

    def wrapped(self, name: str, f: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(f)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.thread_time()
            try:
                return f(*args, **kwargs)
            finally:
                took = time.thread_time() - start
                self.seconds[name] += took - self._inner.pop()
                self.calls[name] += 1
                self._inner[-1] += took

        return timed

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Every part is timed within it."""
        attention, block, moe = ds4.model.attention, ds4.model.block, ds4.model.moe
        places: list[tuple[str, Any, str]] = [
            ("mHC boundaries", block.Site, "__call__"),
            ("input projections", attention, "proj_in_tiles"),
            ("query and output projections", attention, "proj_tiles"),
            ("query and output projections", attention, "proj_grouped_tiles"),
            ("window rows", attention.Attention, "_window_rows"),
            ("compressors", Compressor, "prefill"),
            ("index selection", Indexer, "select_prefill"),
            ("attention", attention.Attention, "_attended"),
            ("router", moe.MoE, "_route"),
            ("experts", moe, "moe_tiles"),
        ]
        before = [(owner, attribute, getattr(owner, attribute)) for _, owner, attribute in places]
        try:
            for name, owner, attribute in places:
                setattr(owner, attribute, self.wrapped(name, getattr(owner, attribute)))
            yield
        finally:
            for owner, attribute, f in before:
                setattr(owner, attribute, f)


def profile(llm: LLM, ids: Sequence[int]) -> list[dict[str, Any]]:
    """The parts of one prompt on one thread, the longest first."""
    parts, threads, session = Parts(), torch.get_num_threads(), llm.session()
    torch.set_num_threads(1)
    try:
        with parts.watching():
            parts.wrapped("everything else", session.prefill)(ids)
    finally:
        torch.set_num_threads(threads)
    total = sum(parts.seconds.values())
    return [
        {"part": name, "seconds": seconds, "share": seconds / total, "calls": parts.calls[name]}
        for name, seconds in sorted(parts.seconds.items(), key=lambda item: -item[1])
    ]


# Peers


def llama_cpp(path: Path, ids: Sequence[int], repeats: int) -> Speed:
    """llama.cpp on the same file, by its Python binding."""
    import llama_cpp

    threads = torch.get_num_threads()
    peer = llama_cpp.Llama(
        str(path), n_ctx=len(ids) + 8, n_batch=2048, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def run() -> None:
        peer.reset()
        peer.eval(list(ids))

    peer.eval(list(ids[:WARM_UP_TOKENS]))
    return Speed.of(run, len(ids), repeats)


def transformers(path: Path, ids: Sequence[int], repeats: int) -> Speed:
    """transformers on the same weights, converted to BF16 safetensors."""
    from transformers import AutoModelForCausalLM

    from ds4.weights.convert import convert
    from ds4.weights.recipes import Recipe

    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "model"
        convert(open_checkpoint(path), out, Recipe("bf16", "bf16"), tokenizer={})
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
        tokens = torch.tensor([list(ids)])
        with torch.inference_mode():
            model(tokens[:, :WARM_UP_TOKENS], logits_to_keep=1)
            return Speed.of(lambda: model(tokens, logits_to_keep=1), len(ids), repeats)


PEERS: dict[str, tuple[str, Callable[[Path, Sequence[int], int], Speed]]] = {
    "llama.cpp": ("llama_cpp", llama_cpp),
    "transformers": ("transformers", transformers),
}


def peers(path: Path, ids: Sequence[int], repeats: int, ours: Speed) -> dict[str, dict[str, Any]]:
    """What each peer reaches and our ratio to it, or why there is none."""
    out: dict[str, dict[str, Any]] = {}
    for name, (module, measure) in PEERS.items():
        if importlib.util.find_spec(module) is None:
            out[name] = {"status": "not installed"}
            continue
        try:
            speed = measure(path, ids, repeats)
        except Exception as error:  # whatever a peer cannot do is its result
            out[name] = {"status": f"failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"}
            continue
        out[name] = {
            **{"status": "measured", "tokens_per_second": speed.wall, "tokens_per_cpu_second": speed.cpu},
            **{"ratio": ours.wall / speed.wall, "ratio_cpu": ours.cpu / speed.cpu},
        }
    return out


# Both models


def measure(path: Path, n_tokens: int, repeats: int, *, with_profile: bool, with_peers: bool) -> dict[str, Any]:
    """Everything about one checkpoint."""
    llm = LLM(path, device="cpu", draft="off", ctx=n_tokens + 8)
    ids = prompt_of(llm, n_tokens)
    llm.session().prefill(ids[:WARM_UP_TOKENS])
    speed = Speed.of(lambda: llm.session().prefill(ids), n_tokens, repeats)
    record: dict[str, Any] = {
        **{"prompt_tokens": n_tokens, "repeats": repeats, "threads": torch.get_num_threads()},
        **{"tokens_per_second": speed.wall, "tokens_per_cpu_second": speed.cpu},
    }
    if with_profile:
        record["profile"] = profile(llm, ids)
    if with_peers:
        record["peers"] = peers(path, ids, repeats, speed)
    return record


def report(record: dict[str, Any]) -> None:
    """Tables for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table("", "million", "prompt", "tokens/s", "a CPU s", "ratio", "of CPU s")
    for column in table.columns[1:]:
        column.justify = "right"
    missing = []
    for name, model in record["models"].items():
        speeds = (f"{model['tokens_per_second']:,.0f}", f"{model['tokens_per_cpu_second']:,.0f}")
        table.add_row(name, f"{model['parameters'] / 1e6:,.1f}", f"{model['prompt_tokens']:,}", *speeds, "", "")
        for peer, result in model.get("peers", {}).items():
            if result["status"] != "measured":
                missing.append(f"{name}, {peer}: {result['status']}")
                continue
            speeds = (f"{result['tokens_per_second']:,.0f}", f"{result['tokens_per_cpu_second']:,.0f}")
            table.add_row(f"  {peer}", "", "", *speeds, f"{result['ratio']:.2f}", f"{result['ratio_cpu']:.2f}")
    console.print(table)
    for line in missing:
        console.print(line, markup=False)
    for name, model in record["models"].items():
        if "profile" in model:
            table = Table("part", "CPU s", "share", "calls", title=f"{name}, on one thread")
            for column in table.columns[1:]:
                column.justify = "right"
            for row in model["profile"]:
                table.add_row(row["part"], f"{row['seconds']:.3f}", f"{row['share']:.0%}", f"{row['calls']:,}")
            console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="example: python scripts/bench_prefill.py --only bundled --tokens 5000 --profile",
    )
    parser.add_argument("--only", choices=("bundled", "large"), help="one of the two models (default: both)")
    parser.add_argument("--tokens", type=int, default=2048, help="of the prompt (2048)")
    parser.add_argument("--repeats", type=int, default=3, help="prompts that count; medians are printed (3)")
    parser.add_argument("--profile", action="store_true", help="also the CPU time by part of the network")
    parser.add_argument("--no-peers", action="store_true", help="leave llama.cpp and transformers out")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    args = parser.parse_args()
    if args.tokens <= WARM_UP_TOKENS or args.repeats < 1:
        parser.error(f"--tokens must be above {WARM_UP_TOKENS}, --repeats at least 1")
    wanted = {"with_profile": args.profile, "with_peers": not args.no_peers}
    models: dict[str, Any] = {}
    if args.only != "large":
        path = bundled_model_path()
        checkpoint = open_checkpoint(path)
        n = sum(torch.Size(checkpoint.tensor(name).shape).numel() for name in checkpoint.names())
        models["bundled"] = {"parameters": n} | measure(path, args.tokens, args.repeats, **wanted)
    if args.only != "bundled":
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "large.gguf"
            n = fabricate(path, LARGE)
            models["large"] = {"parameters": n} | measure(path, args.tokens, args.repeats, **wanted)
    record = {"torch": torch.__version__, "models": models}
    print(json.dumps(record, indent=2)) if args.json else report(record)


if __name__ == "__main__":
    main()
