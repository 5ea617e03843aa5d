"""Train a DSpark head for the bundled model and write it as a GGUF of its own.

    python scripts/train_dspark.py --out ds4/demo/dspark.gguf     # about an hour on one CPU core
    python scripts/train_dspark.py --resume                       # continue from the last checkpoint

The trunk stays as it is: it runs over texts of ``demo_corpus.py`` and gives taps and targets (``dspark_blocks.py``);
the head (``dspark_net.py``) drafts blocks behind random tokens of the answers.

    loss  cross entropy, half against the trunk's choice, half against its distribution, plus the confidence head's:
          binary cross entropy against "this draft is right", where all drafts before it in the block are right

From ``--qat-from`` on the weights are seen through the formats they are shipped in, gradients passing straight through.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import deque
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from dspark_blocks import Blocks, Trunk, cut, dense, texts
from dspark_net import BlockNet
from torch import Tensor
from train_demo import SEED, export_format, make_tokenizer, rounding

from ds4.config import ModelConfig
from ds4.demo import bundled_model_path
from ds4.weights import Checkpoint, open_checkpoint
from ds4.weights.gguf_write import write_draft_gguf

NOISE = 2  # the padding token: in no text, so that the trunk's embedding of it means nothing else
NAME = "ds4 demo DSpark for the preview"  # the release whose form the bundled trunk has; a head's file has to name it
CONFIDENCE_WEIGHT = 0.1


def head_config(trunk: ModelConfig, stages: int, block: int, rank: int) -> ModelConfig:
    """The trunk's configuration with a DSpark head that taps every layer."""
    return replace(
        trunk,
        n_mtp_layers=stages,
        dspark_block_size=block,
        dspark_noise_token_id=NOISE,
        dspark_target_layer_ids=tuple(range(trunk.num_hidden_layers)),
        dspark_markov_rank=rank,
    )


def initial(c: ModelConfig, checkpoint: Checkpoint, n_experts: int) -> dict[str, Tensor]:
    """Start values: every stage is the trunk's MTP block with its first experts; the rest is new and seeded."""
    g = torch.Generator().manual_seed(SEED)
    d, rank, taps = c.hidden_size, c.dspark_markov_rank or 0, len(c.dspark_target_layer_ids)
    last = f"mtp.{c.n_mtp_layers - 1}"
    out: dict[str, Tensor] = {}
    for name, t in dense(checkpoint, "mtp.0.").items():
        suffix = name.removeprefix("mtp.0.")
        stacked = suffix.split(".")[2] if suffix.startswith("ffn.experts.") else "0"
        if suffix.split(".")[0] in ("e_proj", "h_proj", "enorm", "hnorm") or int(stacked) >= n_experts:
            continue
        if suffix.startswith("ffn.gate"):
            t = t[:n_experts]
        final = suffix.startswith("hc_head") or suffix == "norm.weight"
        for stage in range(c.n_mtp_layers):
            if not final or stage == c.n_mtp_layers - 1:
                out[f"mtp.{stage}.{suffix}"] = t.clone()
    out["mtp.0.main_proj.weight"] = torch.randn(d, taps * d, generator=g) * 0.1 * (taps * d) ** -0.5
    out["mtp.0.main_proj.weight"][:, -d:] += torch.eye(d)  # the last layer's output is most of what there is to know
    out["mtp.0.main_norm.weight"] = torch.ones(d)
    for w in ("w1", "w2"):
        out[f"{last}.markov_head.markov_{w}.weight"] = torch.randn(c.vocab_size, rank, generator=g) * rank**-0.5 * 0.3
    out[f"{last}.confidence_head.proj.weight"] = torch.zeros(1, d + rank)
    return out


@dataclass
class Score:
    """Loss, the confidence head's loss, and by place in the block: how often it counted and was right."""

    loss: Tensor
    confidence: Tensor
    tried: Tensor
    right: Tensor


def score(net: BlockNet, blocks: Blocks) -> Score:
    """The head on blocks; a place is tried where all drafts before it are right."""
    logits, confidence = net.outputs(net.hidden(blocks.taps, blocks.tokens, blocks.starts), blocks.before)
    counts = blocks.counts
    seen, wanted, p = logits[counts], blocks.wanted[counts], blocks.logits[counts].softmax(-1)
    log_q = seen.log_softmax(-1)
    loss = 0.5 * F.nll_loss(log_q, wanted) - 0.5 * (p * log_q).sum(1).mean()
    with torch.no_grad():
        right = (logits.argmax(-1) == blocks.wanted) & counts
        before = F.pad(right.cumprod(-1)[..., :-1], (1, 0), value=1).bool()
        tried = counts & before
    bce = F.binary_cross_entropy_with_logits(confidence[tried], right[tried].float())
    return Score(loss, bce, tried.sum((0, 1)), (right & tried).sum((0, 1)))


class Trainer:
    """Parameters of the head and their updates."""

    def __init__(self, args: argparse.Namespace, checkpoint: Checkpoint) -> None:
        self.args = args
        self.config = head_config(checkpoint.config, args.stages, args.block, args.rank)
        self.shared = {n: checkpoint.tensor(n).dequantize() for n in ("embed.weight", "head.weight")}
        tensors = initial(self.config, checkpoint, args.experts)
        self.fixed = {n: t for n, t in tensors.items() if n.endswith("gate.bias")}
        self.params = {n: t.requires_grad_() for n, t in tensors.items() if n not in self.fixed}
        matrices = [t for n, t in self.params.items() if t.dim() == 2 and "hc_" not in n]
        ids = {id(t) for t in matrices}
        others = [t for t in self.params.values() if id(t) not in ids]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), eps=1e-9, foreach=True)
        self.roundings: dict[str, Tensor | None] = {}

    def net(self, quantised: bool, refresh: bool = True) -> BlockNet:
        """The head on the current weights, ``quantised``: as they will be read back from the file."""
        tensors = self.shared | self.fixed
        for name, w in self.params.items():
            if quantised and refresh:
                self.roundings[name] = rounding(w, name)
            delta = self.roundings.get(name) if quantised else None
            tensors[name] = w if delta is None else w + delta
        # Few Sinkhorn rounds are close to twenty and much cheaper under autograd; the last part trains the real number.
        rounds = self.config.hc_sinkhorn_iters if quantised else 6
        return BlockNet(replace(self.config, hc_sinkhorn_iters=rounds), tensors)

    def step(self, done: float, refresh: bool, blocks: Blocks) -> Score:
        """One update, ``done`` of the training being over."""
        a = self.args
        net = self.net(done >= a.qat_from, refresh or not self.roundings)
        found = score(net, blocks)
        (found.loss + CONFIDENCE_WEIGHT * found.confidence).backward()
        torch.nn.utils.clip_grad_norm_(self.params.values(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for i, stage in enumerate(net.stages):
            self.fixed[f"mtp.{i}.ffn.gate.bias"] += a.bias_speed * torch.sign(stage.counts.mean() - stage.counts)
        return found

    def rate(self, step: int, done: float) -> None:
        """Set the learning rate: a short warm-up, then half a cosine."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * min(1.0, (step + 1) / 40) * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))

    @torch.no_grad()
    def heldout(self, blocks: Blocks) -> str:
        """Loss, the confidence head's, and acceptance by place on held-out blocks, weights as they are shipped."""
        s = score(self.net(quantised=True), blocks)
        rates = "  ".join(f"{n / max(1, of):.3f}" for n, of in zip(s.right.tolist(), s.tried.tolist(), strict=True))
        return f"held-out loss {s.loss:.4f}  confidence {s.confidence:.4f}  accepted by place {rates}"

    def save(self, path: Path, step: int, spent: float) -> None:
        params = {n: p.detach() for n, p in self.params.items()}
        state = {
            "step": step,
            "spent": spent,
            "params": params,
            "fixed": self.fixed,
            "opt": self.optimizer.state_dict(),
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def restore(self, path: Path) -> tuple[int, float]:
        state = torch.load(path, weights_only=True)
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(state["params"][name])
        self.fixed.update(state["fixed"])
        self.optimizer.load_state_dict(state["opt"])
        return int(state["step"]), float(state["spent"])

    def export(self, path: Path) -> None:
        tensors = {**self.fixed, **{n: p.detach() for n, p in self.params.items()}}
        rows = ((n, t, export_format(n, tuple(t.shape))) for n, t in tensors.items())
        write_draft_gguf(path, self.config, rows, name=NAME)


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(bundled_model_path())
    tok = make_tokenizer()
    trunk, trainer = Trunk(checkpoint, tok), Trainer(args, checkpoint)
    saved, window = args.work / "dspark.pt", checkpoint.config.sliding_window
    first, spent = trainer.restore(saved) if args.resume and saved.exists() else (0, 0.0)
    rng, g = random.Random(SEED + first), torch.Generator().manual_seed(SEED + first)
    source = texts(trunk, tok, args.seq, 9000 + first, "train")
    held = list(islice(texts(trunk, tok, args.seq, 9, "heldout"), 24))
    held_blocks = cut(held, args.blocks, args.block, window, torch.Generator().manual_seed(SEED))
    pool = deque(islice(source, args.rows), maxlen=8 * args.rows)
    start, step, loss, confidence = time.monotonic() - spent, first, 0.0, 0.0
    while True:
        done = max(step / args.steps, (time.monotonic() - start) / (60 * args.minutes))
        if done >= 1:
            break
        # A text serves for a few steps, with other blocks: the trunk costs as much as the head does.
        pool.extend(islice(source, args.rows // 4))
        trainer.rate(step, done)
        chosen = rng.sample(list(pool), args.rows)
        found = trainer.step(done, step % 8 == 0, cut(chosen, args.blocks, args.block, window, g))
        step += 1
        loss, confidence = loss + found.loss.item() / 20, confidence + found.confidence.item() / 20
        if step % 20 == 0:
            spent = time.monotonic() - start
            print(f"step {step}  loss {loss:.3f}  confidence {confidence:.3f}  {spent / 60:.1f} minutes", flush=True)
            loss = confidence = 0.0
        if step % 100 == 0:
            trainer.save(saved, step, time.monotonic() - start)
            print(f"step {step}  {trainer.heldout(held_blocks)}", flush=True)
    spent = time.monotonic() - start
    trainer.save(saved, step, spent)
    print(f"step {step}  {trainer.heldout(held_blocks)}", flush=True)
    trainer.export(args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB, {spent / 60:.1f} minutes")


def main() -> None:
    p = argparse.ArgumentParser(description="Train a DSpark head for the bundled model and write it as a GGUF.")
    p.add_argument("--out", type=Path, default=Path("ds4/demo/dspark.gguf"))
    p.add_argument("--work", type=Path, default=Path("train"), help="folder of the checkpoint (default: train)")
    p.add_argument("--resume", action="store_true", help="continue from the checkpoint in --work")
    p.add_argument("--export-only", action="store_true", help="write --out from the checkpoint without training")
    p.add_argument("--steps", type=int, default=1500)
    p.add_argument("--minutes", type=float, default=math.inf, help="end after this time if --steps are not done")
    p.add_argument("--rows", type=int, default=8, help="texts in one step")
    p.add_argument("--seq", type=int, default=512, help="tokens of a text: long enough for a story")
    p.add_argument("--blocks", type=int, default=48, help="blocks of a text in one step")
    p.add_argument("--stages", type=int, default=2)
    p.add_argument("--block", type=int, default=5, help="tokens drafted at a time")
    p.add_argument("--rank", type=int, default=64, help="columns of the Markov matrices")
    p.add_argument("--experts", type=int, default=8, help="routed experts of a stage")
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument(
        "--qat-from", type=float, default=0.85, help="share of the training after which weights are quantised"
    )
    p.add_argument("--bias-speed", type=float, default=1e-3, help="step of the router's selection bias")
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.export_only:
        trainer = Trainer(args, open_checkpoint(bundled_model_path()))
        trainer.restore(args.work / "dspark.pt")
        trainer.export(args.out)
        return
    train(args)


if __name__ == "__main__":
    main()
