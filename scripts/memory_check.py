#!/usr/bin/env python3
"""Does a checkpoint run on the CPU in bounded memory?  Makes one of a given size and runs it under a hard limit.

    python scripts/memory_check.py                            5 GB of packed weights within 8 GB of memory
    python scripts/memory_check.py --gigabytes 20 --memory-gb 24 --json
    python scripts/memory_check.py --model some.gguf          a checkpoint at hand instead

The checkpoint has V4-Flash's widths, fewer layers and experts, and random weights in Q8_0, F16, IQ2_XXS, Q2_K and
MXFP4; it lies in a temporary directory and is deleted afterwards.  A process of its own prefills a prompt and decodes
some tokens.  What it may allocate is limited by the kernel (RLIMIT_DATA, which counts all private writable memory) to
what the file leaves of --memory-gb: even with every page of the mapped file resident, it stays within --memory-gb.
Linux only.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ds4.demo import bundled_model_path
from ds4.engine import LLM
from ds4.errors import Ds4Error
from ds4.weights import open_checkpoint
from ds4.weights.formats import FORMATS

GB, MB = 10**9, 10**6
PROMPT_TOKENS, DECODE_STEPS = 140, 16


@dataclass(frozen=True)
class Widths:
    """Sizes of the fabricated model; what is not here is as in the bundled one."""

    vocab: int = 129280
    hidden: int = 4096
    heads: int = 64
    q_lora: int = 1024
    groups: int = 8
    o_lora: int = 1024
    inter: int = 2048
    index_heads: int = 64
    ratios: tuple[int, ...] = (0, 4, 128, 4)
    max_experts: int = 256


HEAD_DIM, INDEX_DIM, STREAMS, MIX, USED = 512, 128, 4, 24, 6
Tensor = tuple[str, str, tuple[int, ...]]


def tensors(w: Widths, n_layers: int, n_experts: int) -> Iterator[Tensor]:
    """(GGUF name, format, row-major shape) in file order: antirez's types, the experts of odd layers in MXFP4."""
    d = w.hidden
    yield "token_embd.weight", "f16", (w.vocab, d)
    yield "output.weight", "q8_0", (w.vocab, d)
    yield "output_norm.weight", "f32", (d,)
    yield "output_hc_fn.weight", "f16", (STREAMS, STREAMS * d)
    yield "output_hc_base.weight", "f32", (STREAMS,)
    yield "output_hc_scale.weight", "f32", (1,)
    for i in range(n_layers):
        ratio = w.ratios[i % len(w.ratios)]
        for name, fmt, shape in _layer(w, ratio, n_experts, hashed=i == 0, two_bit=i % 2 == 0):
            yield f"blk.{i}.{name}", fmt, shape


def _layer(w: Widths, ratio: int, n_experts: int, *, hashed: bool, two_bit: bool) -> Iterator[Tensor]:
    d = w.hidden
    for site in ("attn", "ffn"):
        yield f"hc_{site}_fn.weight", "f16", (MIX, STREAMS * d)
        yield f"hc_{site}_base.weight", "f32", (MIX,)
        yield f"hc_{site}_scale.weight", "f32", (3,)
        yield f"{site}_norm.weight", "f32", (d,)
    yield "attn_q_a.weight", "q8_0", (w.q_lora, d)
    yield "attn_q_a_norm.weight", "f32", (w.q_lora,)
    yield "attn_q_b.weight", "q8_0", (w.heads * HEAD_DIM, w.q_lora)
    yield "attn_kv.weight", "q8_0", (HEAD_DIM, d)
    yield "attn_kv_a_norm.weight", "f32", (HEAD_DIM,)
    yield "attn_sinks.weight", "f32", (w.heads,)
    yield "attn_output_a.weight", "q8_0", (w.groups * w.o_lora, w.heads * HEAD_DIM // w.groups)
    yield "attn_output_b.weight", "q8_0", (d, w.groups * w.o_lora)
    for prefix, width in (("attn", HEAD_DIM), ("indexer", INDEX_DIM)):
        if ratio == 4 or (ratio and prefix == "attn"):
            wide = width * (2 if ratio == 4 else 1)
            yield f"{prefix}_compressor_kv.weight", "f16", (wide, d)
            yield f"{prefix}_compressor_gate.weight", "f16", (wide, d)
            yield f"{prefix}_compressor_ape.weight", "f16", (ratio, wide)
            yield f"{prefix}_compressor_norm.weight", "f32", (width,)
    if ratio == 4:
        yield "indexer.attn_q_b.weight", "f16", (w.index_heads * INDEX_DIM, w.q_lora)
        yield "indexer.proj.weight", "f16", (w.index_heads, d)
    yield "ffn_gate_inp.weight", "f16", (n_experts, d)
    if hashed:
        yield "ffn_gate_tid2eid.weight", "i32", (w.vocab, USED)
    else:
        yield "exp_probs_b.bias", "f32", (n_experts,)
    for matrix, fmt in (("gate", "iq2_xxs"), ("up", "iq2_xxs"), ("down", "q2_k")):
        shape = (d, w.inter) if matrix == "down" else (w.inter, d)
        yield f"ffn_{matrix}_exps.weight", fmt if two_bit else "mxfp4", (n_experts, *shape)
        yield f"ffn_{matrix}_shexp.weight", "q8_0", shape


def n_bytes(fmt: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1]) * FORMATS[fmt].row_bytes(shape[-1])


def choose_sizes(w: Widths, size: int) -> tuple[int, int]:
    """(layers, experts a layer) whose tensors take about ``size`` bytes; as few layers as hold it."""

    def total(n_layers: int, n_experts: int) -> int:
        return sum(n_bytes(fmt, shape) for _, fmt, shape in tensors(w, n_layers, n_experts))

    n_layers = len(w.ratios)
    while total(n_layers, w.max_experts) < size:
        n_layers += 1
    base = total(n_layers, 0)
    n_experts = round((size - base) / (total(n_layers, 1) - base))
    if n_experts < USED:
        raise Ds4Error(
            f"--gigabytes: {size / GB:g} is too little, at least {total(n_layers, USED) / GB:.2f} are needed"
        )
    return n_layers, min(n_experts, w.max_experts)


def random_blocks(fmt: str, generator: torch.Generator) -> bytes:
    """About 1 MB of whole blocks whose weights are finite and about 0.02 in size."""
    form = FORMATS[fmt]
    n = MB // form.block_bytes
    if form.quantize is not None:
        return form.quantize(torch.randn(n, form.block, generator=generator) * 0.02).numpy().tobytes()
    data = torch.randint(0, 256, (n, form.block_bytes), generator=generator, dtype=torch.uint8)
    if fmt == "mxfp4":
        data[:, 0] = 119  # 2^-8
        return data.numpy().tobytes()
    first, scales = {"iq2_xxs": (0, (2e-4,)), "q2_k": (80, (2e-3, 2e-2))}[fmt]
    data[:, first : first + 2 * len(scales)] = torch.tensor(scales, dtype=torch.float16).view(torch.uint8)
    return data.numpy().tobytes()


def metadata(w: Widths, n_layers: int, n_experts: int) -> dict[str, Any]:
    """The bundled model's keys, tokenizer included, with other sizes."""
    keys = dict(open_checkpoint(bundled_model_path()).metadata)
    keys.pop("deepseek4.nextn_predict_layers")
    sizes = {
        **{"block_count": n_layers, "vocab_size": w.vocab, "embedding_length": w.hidden, "hash_layer_count": 1},
        **{"embedding_length_out": STREAMS * w.hidden, "attention.head_count": w.heads},
        **{"attention.q_lora_rank": w.q_lora, "attention.output_group_count": w.groups},
        **{"attention.output_lora_rank": w.o_lora, "attention.indexer.head_count": w.index_heads},
        **{"attention.indexer.top_k": 512, "expert_feed_forward_length": w.inter, "expert_count": n_experts},
        **{"attention.compress_ratios": [w.ratios[i % len(w.ratios)] for i in range(n_layers)]},
        **{"swiglu_clamp_exp": [10.0] * n_layers, "swiglu_clamp_shexp": [10.0] * n_layers},
    }
    return keys | {"general.name": "random weights"} | {f"deepseek4.{key}": value for key, value in sizes.items()}


def fabricate(path: Path, size: int, w: Widths) -> Path:
    """Write a checkpoint of about ``size`` bytes."""
    import gguf
    import numpy as np

    kinds = gguf.GGUFValueType
    types = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}
    n_layers, n_experts = choose_sizes(w, size)
    writer = gguf.GGUFWriter(path, "deepseek4")
    for key, value in metadata(w, n_layers, n_experts).items():
        if isinstance(value, list):
            writer.add_key_value(key, value, kinds.ARRAY, types[type(value[0])])
        elif key != "general.architecture":
            writer.add_key_value(key, value, types[type(value)])
    for name, fmt, shape in tensors(w, n_layers, n_experts):
        form = FORMATS[fmt]
        raw = gguf.GGMLQuantizationType(form.ggml_type or 0)
        stored = (*shape[:-1], form.row_bytes(shape[-1]))
        if form.block == 1:  # the writer counts bytes of quantised tensors only
            stored = shape
        dtype = {"f32": "float32", "f16": "float16", "i32": "int32"}.get(fmt, "uint8")
        writer.add_tensor_info(name, stored, np.dtype(dtype), n_bytes(fmt, shape), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    generator = torch.Generator().manual_seed(0)
    blocks = {fmt: random_blocks(fmt, generator) for fmt in {fmt for _, fmt, _ in tensors(w, 2, 1)} - {"i32"}}
    with open(path, "ab") as file:
        file.write(bytes(-file.tell() % 32))
        for _, fmt, shape in tensors(w, n_layers, n_experts):
            left = n_bytes(fmt, shape)
            if fmt == "i32":  # six different experts for every token
                table = torch.rand(shape[0], n_experts, generator=generator).topk(USED).indices
                file.write(table.to(torch.int32).numpy().tobytes())
            else:
                # Each megabyte starts at another block, so that rows and experts differ.
                form, data = FORMATS[fmt], blocks[fmt]
                while left:
                    start = int(torch.randint(len(data) // form.block_bytes, (), generator=generator))
                    part = (data[start * form.block_bytes :] + data[: start * form.block_bytes])[:left]
                    file.write(part)
                    left -= len(part)
            file.write(bytes(-file.tell() % 32))
    return path


def status() -> dict[str, int]:
    """Bytes of this process: RssAnon, RssFile, VmData, VmHWM of /proc/self/status."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    wanted = ("RssAnon:", "RssFile:", "VmData:", "VmHWM:")
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words and words[0] in wanted}


class PeakAnon(threading.Thread):
    """Samples the anonymous resident memory every 10 ms: the kernel keeps no maximum of it."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self._stop_asked = 0, threading.Event()

    def run(self) -> None:
        while not self._stop_asked.wait(0.01):
            self.peak = max(self.peak, status()["RssAnon"])

    def stop(self) -> int:
        self._stop_asked.set()
        self.join()
        return max(self.peak, status()["RssAnon"])


def run_here(path: Path, memory: int, n_prompt: int, n_steps: int) -> dict[str, Any]:
    """Limit this process, then prefill and decode; what came out, sizes in bytes and times in seconds."""
    size, before = path.stat().st_size, status()
    allowance = memory - size - before["RssAnon"]
    if allowance <= 0:
        raise Ds4Error(f"--memory-gb: {memory / GB:g} is not more than the file and an idle process take")
    limit = before["VmData"] + allowance
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    watch = PeakAnon()
    watch.start()
    started = time.perf_counter()
    llm = LLM(path, ctx=n_prompt + n_steps)
    ids = torch.randint(
        llm.config.vocab_size, (n_prompt + n_steps,), generator=torch.Generator().manual_seed(1)
    ).tolist()
    session = llm.session()
    opened = time.perf_counter()
    finite = bool(session.prefill(ids[:n_prompt]).isfinite().all())
    prefilled = time.perf_counter()
    for token in ids[n_prompt:]:
        finite = finite and bool(session.decode([token]).isfinite().all())
    done = time.perf_counter()
    peak_anon, after = watch.stop(), status()
    return {
        **{"file_bytes": size, "memory_bytes": memory, "limit_data_bytes": limit, "idle_anon_bytes": before["RssAnon"]},
        **{"peak_anon_bytes": peak_anon, "peak_rss_bytes": after["VmHWM"], "file_rss_bytes": after["RssFile"]},
        **{"prompt_tokens": n_prompt, "decode_steps": n_steps, "finite": finite, "open_seconds": opened - started},
        **{"prefill_seconds": prefilled - opened, "decode_seconds": done - prefilled},
    }


def run_limited(path: Path, memory: int, n_prompt: int = PROMPT_TOKENS, n_steps: int = DECODE_STEPS) -> dict[str, Any]:
    """``run_here`` in a process of its own; Ds4Error with its last line if it failed (too little memory, say)."""
    command = [sys.executable, __file__, "--model", str(path), "--here", "--memory-bytes", str(memory)]
    command += ["--prompt-tokens", str(n_prompt), "--decode-steps", str(n_steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise Ds4Error(f"{path}: the run within {memory / GB:g} GB failed: {last}")
    return json.loads(done.stdout)


def report(result: dict[str, Any]) -> None:
    """The figures as a table."""
    rows = [
        ("checkpoint", f"{result['file_bytes'] / GB:.2f} GB"),
        ("memory allowed, file and all", f"{result['memory_bytes'] / GB:.2f} GB"),
        ("anonymous memory: idle process", f"{result['idle_anon_bytes'] / MB:.0f} MB"),
        ("anonymous memory: peak", f"{result['peak_anon_bytes'] / MB:.0f} MB"),
        ("resident memory: peak, mapped file included", f"{result['peak_rss_bytes'] / MB:.0f} MB"),
        (f"prefill of {result['prompt_tokens']} tokens", f"{result['prefill_seconds']:.2f} s"),
        (f"{result['decode_steps']} decode steps", f"{result['decode_seconds']:.2f} s"),
        ("logits finite", "yes" if result["finite"] else "NO"),
    ]
    for name, value in rows:
        print(f"{name:45}{value:>12}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=5.0, help="size of the checkpoint to make")
    parser.add_argument("--memory-gb", type=float, default=8.0, help="what the run may take, the file included")
    parser.add_argument("--model", type=Path, help="run this checkpoint instead of making one")
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS)
    parser.add_argument("--decode-steps", type=int, default=DECODE_STEPS)
    parser.add_argument("--json", action="store_true", help="print one object instead of a table")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # the limited process itself
    parser.add_argument("--memory-bytes", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    memory = args.memory_bytes or int(args.memory_gb * GB)
    try:
        if args.here:
            print(json.dumps(run_here(args.model, memory, args.prompt_tokens, args.decode_steps)))
            return 0
        with tempfile.TemporaryDirectory() as directory:
            path = args.model or fabricate(Path(directory) / "random.gguf", int(args.gigabytes * GB), Widths())
            result = run_limited(path, memory, args.prompt_tokens, args.decode_steps)
    except Ds4Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2)) if args.json else report(result)
    return 0 if result["finite"] else 1


if __name__ == "__main__":
    sys.exit(main())
