"""Tokens a second with drafts and without, in one run: the same answers decoded both ways, one after the other.

python scripts/bench_speculation.py                # 8 held-out stories of the bundled model, --draft auto
python scripts/bench_speculation.py --draft 2 --json
python scripts/bench_speculation.py --draft-model ds4/demo/dspark.gguf   # the bundled DSpark head instead

Each answer is decoded plainly and with drafts, in turns which of them comes first, so that a machine whose speed
changes treats both alike; the texts have to be the same. One answer of each kind before that warms up and is not
counted. Decoding only: the prompt and the first token, which comes from it, are left out.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from statistics import median

import torch
from acceptance import KINDS, SEED, prompts

from ds4.engine import LLM, Statistics
from ds4.sampling import SamplingParams


@dataclass
class Timed:
    """Decoded tokens and the seconds they took."""

    tokens: int = 0
    seconds: float = 0.0

    def add(self, statistics: Statistics) -> None:
        self.tokens += statistics.generated_tokens - 1
        self.seconds += statistics.decode_seconds

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def decode(llm: LLM, prompt: list[int], draft: int | str, limit: int) -> Statistics:
    """One answer, from an empty session."""
    *_, statistics = llm.generate(prompt, SamplingParams(max_tokens=limit), draft=draft)
    assert isinstance(statistics, Statistics)
    return statistics


def both(llm: LLM, prompt: list[int], draft: int | str, limit: int, *, plain_first: bool) -> tuple[Statistics, ...]:
    """(plain, with drafts)."""
    order = ("off", draft) if plain_first else (draft, "off")
    made = {d: decode(llm, prompt, d, limit) for d in order}
    if made["off"].token_ids != made[draft].token_ids:
        raise SystemExit("the texts with and without drafts differ; ds4 verify --one-answer says where")
    return made["off"], made[draft]


def measure(llm: LLM, kind: str, n: int, draft: int | str, limit: int, seed: int) -> dict[str, object]:
    """Both speeds over n answers, and what the drafts were like."""
    plain, drafted, ratios = Timed(), Timed(), []
    drafts = accepted = ended = 0
    for i, prompt in enumerate(prompts(llm, n + 1, seed, kind)):
        a, b = both(llm, prompt, draft, limit, plain_first=i % 2 == 0)
        if i == 0 or a.generated_tokens < 2:
            continue
        plain.add(a)
        drafted.add(b)
        ratios.append(b.tokens_per_second / a.tokens_per_second)
        if b.draft is not None:
            drafts, accepted = drafts + b.draft.drafts, accepted + b.draft.accepted
            ended += b.draft.stopped_after is not None
    return {
        "answers": len(ratios),
        "tokens": plain.tokens,
        "plain_tokens_per_second": plain.rate,
        "draft_tokens_per_second": drafted.rate,
        "speedup": drafted.rate / plain.rate if plain.rate else None,
        "median_speedup": median(ratios) if ratios else None,
        "mean_accepted": accepted / max(1, drafts),
        "ended": ended,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-m", "--model", default=None, help="checkpoint (default: the bundled model)")
    parser.add_argument("--draft", default="auto", help="auto (default), or tokens to draft")
    parser.add_argument("--draft-model", default=None, help="a draft head in a file of its own")
    parser.add_argument("--kind", choices=KINDS, default="story", help="of conversation (story)")
    parser.add_argument("--answers", type=int, default=8, help="to decode both ways")
    parser.add_argument("--limit", type=int, default=300, help="longest answer, in tokens")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    args = parser.parse_args()
    torch.set_num_threads(1)
    llm = LLM(args.model, device="cpu", draft=args.draft, draft_model=args.draft_model)
    record = measure(llm, args.kind, args.answers, args.draft, args.limit, args.seed)
    record |= {"model": str(llm.path), "draft_model": args.draft_model, "draft": args.draft}
    record |= {"kind": args.kind, "seed": args.seed}
    if args.json:
        print(json.dumps(record, indent=2))
        return
    print(f"{llm.path}: {record['answers']} answers ({args.kind}), {record['tokens']} tokens decoded each way")
    print(f"plain       {record['plain_tokens_per_second']:8.1f} tokens/s")
    print(f"draft {args.draft:5} {record['draft_tokens_per_second']:8.1f} tokens/s")
    print(
        f"speedup {record['speedup']:.2f} (median of the answers {record['median_speedup']:.2f}); "
        f"{record['mean_accepted']:.2f} tokens of a draft accepted; drafting ended early in {record['ended']} answers"
    )


if __name__ == "__main__":
    main()
