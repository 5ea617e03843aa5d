"""Train the bundled demonstration model and write it as one GGUF.

    python scripts/train_demo.py --out ds4/demo/demo.gguf            # about an hour on 2 CPU cores
    python scripts/train_demo.py --resume --out ds4/demo/demo.gguf   # continue from the last checkpoint

The network is ds4's own (``Transformer.forward_text``) under autograd; the text comes from ``demo_corpus.py``. Workers
are plain processes, one core each, that share gradients through ``torch.distributed`` (gloo): the tensors are small,
and two single-threaded workers are faster than one with two threads. From ``--qat-from`` on, the weights are seen
through the formats they are shipped in (experts NVFP4, matrices Q8_0), gradients passing straight through.

The MTP block is trained with the trunk from ``--mtp-from`` on: the pair (streams at p, token p + 1) sits at position p
and predicts token p + 2 (spec model.md 7.1); its loss counts 0.3 and does reach the trunk. The block shares the trunk's
embedding, head and final stream collapse.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from demo_corpus import Corpus
from demo_tokenizer import batches, build_tokenizer, tokenizer_metadata
from tokenizers import Tokenizer
from torch import Tensor

from ds4.config import ModelConfig
from ds4.kernels.numerics import resolve
from ds4.kernels.route import route
from ds4.model.block import Block
from ds4.model.context import Context
from ds4.model.moe import MoE
from ds4.model.params import TensorParams
from ds4.model.transformer import Transformer
from ds4.mtp.mtp_block import MTPBlock
from ds4.weights.formats import FORMATS
from ds4.weights.gguf_write import write_gguf

SEED = 20261121
VOCAB = 1024
MTP_WEIGHT = 0.3


def demo_config(n_layers: int = 3) -> ModelConfig:
    """The bundled model: every part of the architecture, widths in multiples of 256."""
    return ModelConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        head_dim=512,
        qk_rope_head_dim=64,
        q_lora_rank=256,
        o_groups=2,
        o_lora_rank=128,
        sliding_window=128,
        compress_ratios=(0, 4, 128, 4)[:n_layers],
        compress_rope_theta=160000.0,
        rope_theta=10000.0,
        rope_factor=16.0,
        rope_original_max_position=65536,
        rope_beta_fast=32.0,
        rope_beta_slow=1.0,
        max_position_embeddings=1048576,
        index_n_heads=4,
        index_head_dim=128,
        index_topk=128,
        moe_intermediate_size=256,
        n_routed_experts=16,
        num_experts_per_tok=6,
        routed_scaling_factor=1.5,
        num_hash_layers=1,
        swiglu_limit=10.0,
        hc_mult=4,
        hc_sinkhorn_iters=20,
        hc_eps=1e-6,
        rms_norm_eps=1e-6,
        n_mtp_layers=1,
        bos_token_id=0,
        eos_token_id=1,
    )


def shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Official name -> shape of every trained or fixed tensor."""
    d, m, h = c.hidden_size, c.hc_mult, c.head_dim
    out: dict[str, tuple[int, ...]] = {
        "embed.weight": (c.vocab_size, d),
        "head.weight": (c.vocab_size, d),
        "norm.weight": (d,),
    }

    def hc_head(prefix: str) -> None:
        out.update({f"{prefix}hc_head_fn": (m, m * d), f"{prefix}hc_head_scale": (1,), f"{prefix}hc_head_base": (m,)})

    def compressor(prefix: str, ratio: int, width: int) -> None:
        n = width * (2 if ratio == 4 else 1)
        out.update({f"{prefix}.wkv.weight": (n, d), f"{prefix}.wgate.weight": (n, d)})
        out.update({f"{prefix}.ape": (ratio, n), f"{prefix}.norm.weight": (width,)})

    def block(prefix: str, ratio: int, hashed: bool) -> None:
        for site in ("attn", "ffn"):
            out[f"{prefix}.hc_{site}_fn"] = ((2 + m) * m, m * d)
            out[f"{prefix}.hc_{site}_scale"] = (3,)
            out[f"{prefix}.hc_{site}_base"] = ((2 + m) * m,)
            out[f"{prefix}.{site}_norm.weight"] = (d,)
        a, o = f"{prefix}.attn", c.o_groups * c.o_lora_rank
        out[f"{a}.wq_a.weight"], out[f"{a}.q_norm.weight"] = (c.q_lora_rank, d), (c.q_lora_rank,)
        out[f"{a}.wq_b.weight"] = (c.num_attention_heads * h, c.q_lora_rank)
        out[f"{a}.wkv.weight"], out[f"{a}.kv_norm.weight"] = (h, d), (h,)
        out[f"{a}.attn_sink"] = (c.num_attention_heads,)
        out[f"{a}.wo_a.weight"] = (o, c.num_attention_heads * h // c.o_groups)
        out[f"{a}.wo_b.weight"] = (d, o)
        if ratio:
            compressor(f"{a}.compressor", ratio, h)
        if ratio == 4:
            out[f"{a}.indexer.wq_b.weight"] = (c.index_n_heads * c.index_head_dim, c.q_lora_rank)
            out[f"{a}.indexer.weights_proj.weight"] = (c.index_n_heads, d)
            compressor(f"{a}.indexer.compressor", 4, c.index_head_dim)
        f = f"{prefix}.ffn"
        out[f"{f}.gate.weight"] = (c.n_routed_experts, d)
        if hashed:
            out[f"{f}.gate.tid2eid"] = (c.vocab_size, c.num_experts_per_tok)
        else:
            out[f"{f}.gate.bias"] = (c.n_routed_experts,)
        for e in (*(f"experts.{i}" for i in range(c.n_routed_experts)), "shared_experts"):
            out[f"{f}.{e}.w1.weight"] = out[f"{f}.{e}.w3.weight"] = (c.moe_intermediate_size, d)
            out[f"{f}.{e}.w2.weight"] = (d, c.moe_intermediate_size)

    for i, ratio in enumerate(c.compress_ratios):
        block(f"layers.{i}", ratio, i < c.num_hash_layers)
    hc_head("")
    block("mtp.0", 0, False)
    out.update({"mtp.0.e_proj.weight": (d, d), "mtp.0.h_proj.weight": (d, d)})
    out.update({f"mtp.0.{n}.weight": (d,) for n in ("enorm", "hnorm", "norm")})
    return out


def initial(c: ModelConfig) -> dict[str, Tensor]:
    """Seeded start values: fan-in scaled matrices, unit norms, streams that begin as plain residual connections."""
    g = torch.Generator().manual_seed(SEED)
    out: dict[str, Tensor] = {}
    for name, shape in shapes(c).items():
        if name.endswith("tid2eid"):
            table = [torch.randperm(c.n_routed_experts, generator=g)[: shape[1]] for _ in range(shape[0])]
            out[name] = torch.stack(table)
        elif name.endswith(("norm.weight", "hnorm.weight", "enorm.weight")) or name.endswith("_scale"):
            out[name] = torch.ones(shape) if "_scale" not in name else torch.full(shape, 0.5)
        elif name.endswith("_base"):
            base = torch.zeros(shape)
            if len(base) > c.hc_mult:  # comb starts near the identity: each stream mostly keeps itself
                base[2 * c.hc_mult :] = 3 * torch.eye(c.hc_mult).flatten()
            out[name] = base
        elif name.endswith((".bias", "attn_sink", ".ape")):
            out[name] = torch.zeros(shape)
        elif name == "embed.weight":
            out[name] = torch.randn(shape, generator=g) * 0.5
        else:
            std = shape[-1] ** -0.5
            if name.endswith(("wo_b.weight", "w2.weight")):
                std *= 0.5
            if name.endswith("fn"):
                std *= 0.2
            out[name] = torch.randn(shape, generator=g) * std
    return out


def export_format(name: str, shape: tuple[int, ...]) -> str:
    """Format a tensor is shipped in: experts NVFP4, other matrices Q8_0, small and sensitive ones F32."""
    if name.endswith("tid2eid"):
        return "i32"
    if ".ffn.experts." in name:
        return "nvfp4"
    f32 = len(shape) == 1 or "hc_" in name or name.endswith((".ape", "gate.weight"))
    return "f32" if f32 else "q8_0"


def rounding(w: Tensor, name: str) -> Tensor | None:
    """What rounding to the shipped format adds to ``w``; None where it is shipped as it is."""
    fmt = FORMATS[export_format(name, tuple(w.shape))]
    if fmt.quantize is None or fmt.name == "f32":
        return None
    with torch.no_grad():
        return fmt.dequantize(fmt.quantize(w), w.shape[-1]) - w


class CountingMoE:
    """Wraps a layer's experts and counts how often each is chosen, for the selection bias."""

    def __init__(self, inner: MoE, counts: Tensor) -> None:
        self.inner, self.counts = inner, counts

    def __call__(self, x: Tensor, ctx: Context) -> Tensor:
        m = self.inner
        if m.bias is not None:
            with torch.no_grad():
                ids, _ = route(x, m.gate, bias=m.bias, top_k=m.top_k, route_scale=m.route_scale)
            self.counts += torch.bincount(ids.flatten(), minlength=len(self.counts))
        return m(x, ctx)


class Trainer:
    """One worker: parameters, optimiser, and the update on its share of the batch."""

    def __init__(self, args: argparse.Namespace, rank: int) -> None:
        self.args, self.rank = args, rank
        self.config = demo_config(args.layers)
        tensors = initial(self.config)
        self.fixed = {n: t for n, t in tensors.items() if not t.is_floating_point() or n.endswith(("gate.bias",))}
        self.params = {n: t.requires_grad_() for n, t in tensors.items() if n not in self.fixed}
        matrices = [t for n, t in self.params.items() if t.dim() == 2 and "hc_" not in n and not n.endswith(".ape")]
        ids = {id(t) for t in matrices}
        others = [t for t in self.params.values() if id(t) not in ids]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), eps=1e-9, foreach=True)
        self.numerics = resolve("exact")
        self.roundings: dict[str, Tensor | None] = {}
        prefixes = [*(f"layers.{i}" for i in range(args.layers)), "mtp.0"]
        self.counts = {p: torch.zeros(self.config.n_routed_experts, dtype=torch.int64) for p in prefixes}

    def lr(self, step: int) -> float:
        a = self.args
        warm = min(1.0, (step + 1) / 40)
        cos = 0.5 * (1 + math.cos(math.pi * min(1.0, step / a.steps)))
        return a.lr * warm * (0.04 + 0.96 * cos)

    def models(self, quantised: bool, refresh: bool = True) -> tuple[Transformer, MTPBlock]:
        """Trunk and MTP block on the current weights, ``quantised``: as they will be read back from the shipped file.

        Rounding is found anew only on ``refresh``: weights move little in a few steps, and it costs as much as a step.
        """
        tensors = dict(self.fixed)
        for name, w in self.params.items():
            if quantised and refresh:
                self.roundings[name] = rounding(w, name)
            delta = self.roundings.get(name) if quantised else None
            tensors[name] = w if delta is None else w + delta
        # One file for trunk and MTP block has one stream collapse (llama.cpp reads it so): the block shares it.
        tensors |= {f"mtp.0.hc_head_{part}": tensors[f"hc_head_{part}"] for part in ("fn", "scale", "base")}
        params = TensorParams(tensors)
        # Few Sinkhorn rounds are close to twenty and much cheaper under autograd; the last part trains the real number.
        rounds = self.config.hc_sinkhorn_iters if quantised else 6
        config = replace(self.config, hc_sinkhorn_iters=rounds)
        trunk = Transformer(config, params, self.numerics)
        mtp = MTPBlock(config, params, trunk)
        for prefix, block in self.blocks(trunk, mtp):
            block.moe = CountingMoE(block.moe, self.counts[prefix])
        return trunk, mtp

    @staticmethod
    def blocks(trunk: Transformer, mtp: MTPBlock) -> list[tuple[str, Block]]:
        return [*((f"layers.{i}", b) for i, b in enumerate(trunk.blocks)), ("mtp.0", mtp.block)]

    def balance(self, world: int) -> None:
        """Move every selection bias one small step towards equal load (the model is trained without a balance loss)."""
        for prefix, counts in self.counts.items():
            if world > 1:
                dist.all_reduce(counts)
            bias = self.fixed.get(f"{prefix}.ffn.gate.bias")
            if bias is not None and counts.sum() > 0:
                bias += self.args.bias_speed * torch.sign(counts.float().mean() - counts)
            counts.zero_()

    def losses(self, row: Tensor, trunk: Transformer, mtp: MTPBlock | None) -> tuple[Tensor, Tensor | None]:
        """Mean next-token loss of one text i64 ``[n + 2]``, and the MTP block's."""
        n = row.shape[0] - 2
        logits, streams = trunk.forward_text(row[:n])
        loss = F.cross_entropy(logits, row[1 : n + 1])
        if mtp is None:
            return loss, None
        return loss, F.cross_entropy(mtp.forward_text(streams, row[1 : n + 1]), row[2 : n + 2])

    def step(self, step: int, rows: Tensor, world: int) -> tuple[float, float]:
        """One update on this worker's rows i64 ``[b, n + 2]``; returns this worker's (loss, MTP loss)."""
        a = self.args
        quantised = step >= a.qat_from * a.steps
        trunk, mtp = self.models(quantised, refresh=step % 4 == 0 or not self.roundings)
        use_mtp = step >= a.mtp_from * a.steps
        total, total_mtp = 0.0, 0.0
        for row in rows:
            loss, mtp_loss = self.losses(row, trunk, mtp if use_mtp else None)
            objective = loss if mtp_loss is None else loss + MTP_WEIGHT * mtp_loss
            (objective / (len(rows) * world)).backward(retain_graph=False)
            total += loss.item() / len(rows)
            total_mtp += mtp_loss.item() / len(rows) if mtp_loss is not None else 0.0
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.params.values()]
        if world > 1:
            flat = torch.cat([g.flatten() for g in grads])
            dist.all_reduce(flat)
            for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                g.copy_(part.view_as(g))
        for p, g in zip(self.params.values(), grads, strict=True):
            p.grad = g
        torch.nn.utils.clip_grad_norm_(self.params.values(), 1.0, foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.balance(world)
        return total, total_mtp

    def heldout(self, rows: Tensor) -> tuple[float, float]:
        """(loss, MTP loss) on held-out rows, weights as they are shipped."""
        with torch.no_grad():
            trunk, mtp = self.models(quantised=True)
            pairs = [self.losses(row, trunk, mtp) for row in rows]
        for counts in self.counts.values():
            counts.zero_()
        return sum(a.item() for a, _ in pairs) / len(pairs), sum(b.item() for _, b in pairs if b is not None) / len(
            pairs
        )

    def state(self, step: int, tok: Tokenizer) -> dict[str, object]:
        """Everything a checkpoint holds; the tokenizer only to notice that the corpus was changed under it."""
        params = {n: p.detach() for n, p in self.params.items()}
        optimizer = self.optimizer.state_dict()
        return {"step": step, "params": params, "fixed": self.fixed, "opt": optimizer, "tokenizer": tok.to_str()}

    def restore(self, path: Path, tok: Tokenizer) -> int:
        """Load a checkpoint; the number of steps it has behind it."""
        state = torch.load(path, weights_only=True)
        if state.get("tokenizer", tok.to_str()) != tok.to_str():
            raise SystemExit(f"{path}: the corpus has changed since, and its tokenizer with it; train from the start")
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(state["params"][name])
        self.fixed.update(state["fixed"])
        self.optimizer.load_state_dict(state["opt"])
        return int(state["step"])


def make_tokenizer() -> Tokenizer:
    """The tokenizer, learnt from the first texts of the corpus; the same in every worker and every run."""
    source = Corpus(SEED).texts(0)
    return build_tokenizer([next(source) for _ in range(4000)], VOCAB)


def worker(rank: int, args: argparse.Namespace) -> None:
    """Train; worker 0 reports, checkpoints and exports."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    if args.workers > 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(args.port))
        dist.init_process_group("gloo", rank=rank, world_size=args.workers)
    tok = make_tokenizer()
    trainer = Trainer(args, rank)
    checkpoint = args.work / "checkpoint.pt"
    first = trainer.restore(checkpoint, tok) if args.resume and checkpoint.exists() else 0
    corpus = Corpus(SEED, weights={"story": args.story})
    # The seed names the starting step, so that a resumed run sees fresh text instead of the first texts again.
    short = batches(corpus, tok, args.seq, args.batch // args.workers, 1000 * first + rank)
    long_rows = max(1, args.batch // (2 * args.workers))
    long = batches(corpus, tok, 2 * args.seq, long_rows, 1000 * first + 500 + rank)
    held = torch.from_numpy(next(batches(Corpus(SEED), tok, 2 * args.seq, 16, 7, split="heldout")))
    start, tokens = time.monotonic(), 0
    for step in range(first, args.steps):
        rows = torch.from_numpy(next(long if step >= args.long_from * args.steps else short))
        loss, mtp_loss = trainer.step(step, rows, args.workers)
        tokens += args.workers * rows.shape[0] * (rows.shape[1] - 2)
        if rank == 0 and (step % 10 == 9 or step == first):
            rate = tokens / (time.monotonic() - start)
            left = (args.steps - step - 1) * (time.monotonic() - start) / (step + 1 - first)
            print(
                f"step {step + 1}/{args.steps}  loss {loss:.3f}  mtp {mtp_loss:.3f}  {rate:.0f} tokens/s  "
                f"{left / 60:.0f} min left",
                flush=True,
            )
        if rank == 0 and (step % 100 == 99 or step == args.steps - 1):
            torch.save(trainer.state(step + 1, tok), checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            a, b = trainer.heldout(held)
            print(f"step {step + 1}  held-out loss {a:.4f}  MTP {b:.4f}", flush=True)
    if rank == 0:
        export(trainer, tok, args.out)
        print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB, {(time.monotonic() - start) / 60:.1f} minutes")
    if args.workers > 1:
        dist.barrier()
        dist.destroy_process_group()


def export(trainer: Trainer, tok: Tokenizer, path: Path) -> None:
    """Write the GGUF: trunk, MTP block, tokenizer."""
    tensors = {**trainer.fixed, **{n: p.detach() for n, p in trainer.params.items()}}
    rows = ((name, t, export_format(name, tuple(t.shape))) for name, t in tensors.items())
    write_gguf(
        path, trainer.config, rows, tokenizer_metadata=tokenizer_metadata(tok), name="ds4 demo", multipliers=False
    )


def main() -> None:
    p = argparse.ArgumentParser(description="Train the bundled demonstration model and write it as a GGUF.")
    p.add_argument("--out", type=Path, default=Path("ds4/demo/demo.gguf"))
    p.add_argument("--work", type=Path, default=Path("train"), help="folder of the checkpoint (default: train)")
    p.add_argument("--resume", action="store_true", help="continue from the checkpoint in --work")
    p.add_argument("--export-only", action="store_true", help="write --out from the checkpoint without training")
    p.add_argument("--steps", type=int, default=1300)
    p.add_argument("--batch", type=int, default=8, help="texts of --seq tokens a step, all workers together")
    p.add_argument("--seq", type=int, default=256)
    p.add_argument("--layers", type=int, default=3)
    p.add_argument("--lr", type=float, default=2.5e-3)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument(
        "--mtp-from", type=float, default=0.3, help="share of the steps after which the MTP block trains too"
    )
    p.add_argument("--qat-from", type=float, default=0.88, help="share of the steps after which weights are quantised")
    p.add_argument(
        "--long-from", type=float, default=0.0, help="share of the steps after which texts are twice as long"
    )
    p.add_argument("--story", type=float, default=0.1, help="share of stories among turns (they are long)")
    p.add_argument("--bias-speed", type=float, default=2e-3, help="step of the router's selection bias")
    p.add_argument("--port", type=int, default=29611, help="local port on which the workers meet")
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.export_only:
        trainer = Trainer(args, 0)
        tok = make_tokenizer()
        trainer.restore(args.work / "checkpoint.pt", tok)
        export(trainer, tok, args.out)
        return
    if args.workers > 1:
        mp.spawn(worker, (args,), nprocs=args.workers)
    else:
        worker(0, args)


if __name__ == "__main__":
    main()
