"""How many drafts of a model's draft head its trunk accepts, on held-out conversations of the demonstration corpus.

    python scripts/acceptance.py                              # the bundled model, drafts of 3
    python scripts/acceptance.py --draft-model ds4/demo/dspark.gguf --k 5
    python scripts/acceptance.py -m some.gguf --k 5 --json

The trunk answers each conversation greedily and without drafts; at every token of the answer the head drafts k tokens,
and the answer shows how many of them would have been accepted. So the text does not depend on the head, and every
position counts once. Conversations come from the corpus' held-out split, which the bundled model was not trained on,
under a seed of their own (docs/demo-model.md).

    draft i     of the drafts whose first i - 1 tokens were accepted, the share whose token i is accepted too
    accepted    mean number of accepted tokens of a draft of k; one more is what a verified step yields
    guessed     what the head itself says about the same tokens, where it does: its mean confidence as a probability

What a draft says about places behind the end of the answer is not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from demo_corpus import WEIGHTS, Corpus

from ds4.demo import bundled_model_path
from ds4.engine import LLM
from ds4.mtp.drafter import Draft, Drafter
from ds4.mtp.heads import draft_head
from ds4.sampling import Sampler, SamplingParams

SEED = 77_000_001  # of the conversations; the bundled model was trained under another
KINDS = ("arithmetic", "capitals", "facts", "story")


@dataclass
class Tally:
    """Of all drafts: how often their token i stood behind accepted ones only, how often it was accepted itself, and
    the sum of what the head thought of it (0 for a head that says nothing)."""

    tried: list[int]
    kept: list[int]
    guessed: list[float]

    @staticmethod
    def empty(k: int) -> Tally:
        return Tally([0] * k, [0] * k, [0.0] * k)

    def add(self, drafts: list[Draft], text: list[int]) -> None:
        """``drafts[i]`` was made in front of ``text[i]``; what reaches beyond the text is not counted."""
        for at, draft in enumerate(drafts):
            for i, (token, right) in enumerate(zip(draft.tokens, text[at:], strict=False)):
                self.tried[i] += 1
                if draft.confidence:
                    self.guessed[i] += 1 / (1 + math.exp(-draft.confidence[i]))
                if token != right:
                    break
                self.kept[i] += 1

    def __add__(self, other: Tally) -> Tally:
        def sums(a: list, b: list) -> list:
            return [x + y for x, y in zip(a, b, strict=True)]

        return Tally(sums(self.tried, other.tried), sums(self.kept, other.kept), sums(self.guessed, other.guessed))

    def shares(self, sums: Sequence[float]) -> list[float | None]:
        """Of each place, how much of ``tried`` a sum is; None where nothing was tried."""
        return [n / of if of else None for n, of in zip(sums, self.tried, strict=True)]

    def summary(self) -> dict[str, object]:
        accepted = sum(self.kept) / max(1, self.tried[0])
        found: dict[str, object] = {"drafts": self.tried[0], "draft": self.shares(self.kept), "accepted": accepted}
        return found | {"guessed": self.shares(self.guessed)} if any(self.guessed) else found


def answer(llm: LLM, drafter: Drafter, prompt: list[int], k: int, limit: int) -> tuple[list[int], list[Draft]]:
    """The greedy answer, and the draft made in front of each of its tokens but the first."""
    model, sampler = llm.model, Sampler(SamplingParams())
    drafts: list[Draft] = []
    stop = llm.tokenizer.stop_ids if llm.tokenizer else {llm.config.eos_token_id}
    cache = model.new_cache(len(prompt) + limit)
    ids = list(prompt)
    logits = model.prefill(ids, 0, cache, observer=drafter)
    while True:
        ids.append(sampler.sample(logits, ids))
        if ids[-1] in stop or len(ids) == len(prompt) + limit:
            return ids[len(prompt) + 1 :], drafts
        drafts.append(drafter.draft(ids, k, sampler))
        logits = model.decode(ids[-1:], len(ids) - 1, cache, drafter)[0]


def prompts(llm: LLM, n: int, seed: int, kind: str) -> list[list[int]]:
    """n conversations that begin with this kind, up to an answer drawn among theirs, a quarter in thinking mode."""
    corpus, rng, out = Corpus(seed), random.Random(f"{seed}/{kind}"), []
    for _ in range(n):
        messages = corpus.sample(rng, "heldout", kind)
        last = rng.choice([i for i, m in enumerate(messages) if m["role"] == "user"])
        out.append(llm.encode_prompt(messages[: last + 1], thinking=rng.random() < 0.25))
    return out


def measure(llm: LLM, kinds: dict[str, int], k: int, seed: int, limit: int) -> dict[str, Tally]:
    """Tallies by kind of conversation."""
    make = draft_head(llm.model, llm.checkpoint)
    if make is None:
        raise SystemExit(f"{llm.path}: has no draft head")
    if make().max_tokens < k:
        raise SystemExit(f"--k {k}: this draft head drafts at most {make().max_tokens} tokens")
    tallies: dict[str, Tally] = {}
    for kind, n in kinds.items():
        tallies[kind] = Tally.empty(k)
        for prompt in prompts(llm, n, seed, kind):
            text, drafts = answer(llm, make(), prompt, k, limit)
            tallies[kind].add(drafts, text)
    return tallies


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-m", "--model", default=None, help="checkpoint (default: the bundled model)")
    parser.add_argument("--draft-model", default=None, help="draft head in a file of its own (default: the model's)")
    parser.add_argument("--k", type=int, default=3, help="tokens of a draft")
    parser.add_argument("--conversations", type=int, default=60, help="in all; kinds in the shares of the corpus")
    parser.add_argument("--limit", type=int, default=400, help="longest answer, in tokens")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    llm = LLM(args.model or bundled_model_path(), draft_model=args.draft_model)
    weight = sum(WEIGHTS[kind] for kind in KINDS)
    kinds = {kind: max(1, round(args.conversations * WEIGHTS[kind] / weight)) for kind in KINDS}
    started = time.monotonic()
    with torch.inference_mode():
        tallies = measure(llm, kinds, args.k, args.seed, args.limit)
    tallies["all"] = sum(tallies.values(), Tally.empty(args.k))
    rows = {kind: tally.summary() for kind, tally in tallies.items()}
    head = {"draft_model": args.draft_model} if args.draft_model else {}
    report = {
        "model": str(llm.path),
        **head,
        "k": args.k,
        "seed": args.seed,
        "conversations": kinds,
        "acceptance": rows,
    }
    if args.json:
        print(json.dumps(report | {"seconds": round(time.monotonic() - started, 1)}, indent=2))
        return
    by = f" by {args.draft_model}" if args.draft_model else ""
    print(f"{llm.path}: drafts of {args.k}{by}, {sum(kinds.values())} held-out conversations, seed {args.seed}")
    print(f"{'':12}{'drafts':>8}" + "".join(f"{f'draft {i + 1}':>10}" for i in range(args.k)) + f"{'accepted':>10}")
    for kind, tally in tallies.items():
        print(f"{kind:12}{tally.tried[0]:8}{percent(tally.shares(tally.kept))}{tally.summary()['accepted']:10.2f}")
    if any(tallies["all"].guessed):
        print(f"{'guessed':20}{percent(tallies['all'].shares(tallies['all'].guessed))}")


def percent(shares: Sequence[float | None]) -> str:
    """Columns of a table."""
    return "".join(f"{'-':>10}" if share is None else f"{share:10.1%}" for share in shares)


if __name__ == "__main__":
    main()
