"""What a DSpark head is trained on: blocks at random places of answers, and what the frozen trunk says about them.

A drafted token is judged as a verifier at temperature 0 judges it: its target is the trunk's own choice, and it counts
only while the text in front of it, back to the block's first token, is what the trunk would have written. So the head
learns what the trunk writes, and no text has to be generated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from demo_corpus import Corpus
from demo_tokenizer import batches
from tokenizers import Tokenizer
from torch import Tensor
from train_demo import SEED

from ds4.kernels.launch import Launch
from ds4.kernels.numerics import resolve
from ds4.model.params import TensorParams
from ds4.model.transformer import Transformer
from ds4.weights import Checkpoint

STORY = 0.1  # share of stories among the turns of the training texts, as the trunk was trained


@dataclass(frozen=True)
class Text:
    """A text and what the trunk says about it.

    row      i64 [n]
    written  bool [n]       the tokens of answers, but for the one that ends an answer
    logits   f32 [n, v]
    taps     f32 [n, taps * d]
    """

    row: Tensor
    written: Tensor
    logits: Tensor
    taps: Tensor


@dataclass(frozen=True)
class Blocks:
    """Blocks in r texts, a in each, and what the trunk says about them.

    taps    f32 [r, n, taps * d]  of a part of each text
    tokens  i64 [r, a]         first token of each block
    starts  i64 [r, a]         its position in that part
    before  i64 [r, a, b]      the token in front of each place
    wanted  i64 [r, a, b]      the trunk's choice there
    logits  f32 [r, a, b, v]   the trunk's logits there
    counts  bool [r, a, b]     whether the text before the place is the trunk's own choice, back to the first token
    """

    taps: Tensor
    tokens: Tensor
    starts: Tensor
    before: Tensor
    wanted: Tensor
    logits: Tensor
    counts: Tensor


class Trunk:
    """The frozen model: taps and logits of texts."""

    def __init__(self, checkpoint: Checkpoint, tok: Tokenizer) -> None:
        config = replace(checkpoint.config, n_mtp_layers=0)
        self.model = Transformer(config, TensorParams(dense(checkpoint)), resolve("exact"))
        self.assistant = tok.token_to_id("<｜Assistant｜>")
        self.eos = config.eos_token_id
        self.layers = tuple(range(config.num_hidden_layers))
        self._taps: list[Tensor] = []

    def observe(self, launch: Launch, ids: Tensor, streams: Sequence[Tensor]) -> None:
        """Keep the taps of a tile (``ds4.model.transformer.Observer``)."""
        self._taps.append(launch.take(torch.cat([s.mean(1) for s in streams], dim=1)))

    def answers(self, row: Tensor) -> Tensor:
        """Bool ``[n]``: ``Text.written``."""
        out, inside = torch.zeros(len(row), dtype=torch.bool), -1
        for i, token in enumerate(row.tolist()):
            if token == self.assistant:
                inside = i + 1  # the next token, <think> or </think>, belongs to the prompt
            elif token == self.eos:
                inside = -1
            elif 0 <= inside < i:
                out[i] = True
        return out

    @torch.no_grad()
    def text(self, row: Tensor) -> Text:
        """What the model says about one text i64 ``[n]``."""
        self._taps.clear()
        cache = self.model.new_cache(len(row))
        logits = self.model.prefill(row.tolist(), 0, cache, all_logits=True, observer=self)
        return Text(row, self.answers(row), logits, torch.cat(self._taps))


def cut(texts: list[Text], a: int, b: int, window: int, g: torch.Generator) -> Blocks:
    """``a`` blocks of ``b`` tokens at random places of the answers in each text.

    All blocks of a text lie in a part of ``2 * window`` positions, drawn too, in which each sees its whole window.
    """
    parts = []
    for text in texts:
        n = len(text.row)
        possible = text.written[1:].nonzero()[:, 0] + 1
        drawn = int(possible[torch.randint(len(possible), (), generator=g)])
        first = max(0, min(drawn - window, n - 2 * window))
        possible = possible[(possible >= first + (window if first else 0)) & (possible < first + 2 * window)]
        starts = possible[torch.randperm(len(possible), generator=g).repeat(-(-a // len(possible)))[:a]]
        places = starts.unsqueeze(1) + torch.arange(b)
        row, written, choice = (F.pad(t, (0, b)) for t in (text.row, text.written, text.logits.argmax(1)))
        # A place counts while the text is an answer, and is the trunk's choice from the block's second token on.
        right = written[places]
        right[:, 1:] &= row[places[:, 1:]] == choice[places[:, :-1]]
        logits = text.logits[places.clamp(max=n - 1)]
        counts = right.cumprod(1).bool()
        taps = text.taps[first : first + 2 * window]
        parts.append((taps, row[starts], starts - first, row[places], choice[places], logits, counts))
    return Blocks(*(torch.stack(column) for column in zip(*parts, strict=True)))


def dense(checkpoint: Checkpoint, prefix: str = "") -> dict[str, Tensor]:
    """Tensors whose names begin with ``prefix``, f32 (tables i64), by official name."""
    return {n: checkpoint.tensor(n).dequantize() for n in checkpoint.names() if n.startswith(prefix)}


def texts(trunk: Trunk, tok: Tokenizer, seq: int, seed: int, split: str) -> Iterator[Text]:
    """Texts of ``seq`` tokens, packed conversations, with at least an answer's beginning in each; for ever."""
    weights = {"story": STORY} if split == "train" else None
    for rows in batches(Corpus(SEED, weights=weights), tok, seq, 1, seed, split=split):
        text = trunk.text(torch.from_numpy(rows[0, :seq]))
        if text.written.any():
            yield text
