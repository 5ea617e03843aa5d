"""``accept_drawn``: what is kept of a draft whose tokens were drawn.

accept_drawn rejection sampling (ds4/mtp/accept.py) of the n_tok - 1 tokens of a step's draft
    p        f32 [n_tok, vocab]  the distributions of the step's rows; token, status i32 [n_tok] drawn from them with a
             position's number 0: what ``sample_with_probs`` says
    q        f32 [7, pitch]      the distributions that the drafted tokens were drawn from; rows and columns beyond
             n_tok - 1 and vocab do not count
    params   i64 [6]             ``sample_params(...)``, of which the seed counts
    words    pos, tokens; UPDATED IN PLACE: pos, the first of tokens, accepted, status (ds4/kernels/draft/words)

Order:   sums are of integers, so their order does not matter.
Error:   a remainder max(0, p - q) is off by 2^-62, against FP64 in ds4/mtp/accept.py: another token only where the
         random number lies that close to a boundary. A token whose remainder is less than 2^-62 is never drawn.
Limits:  n_tok 1 to 8.
Source:  spec model.md 7.3; Leviathan et al. 2023.
"""

from __future__ import annotations

import torch

from ds4.kernels.cases import Inputs, Outputs
from ds4.kernels.draft.accept_cases import MOST_DRAFTED, accept_drawn_cases
from ds4.kernels.draft.accept_ref import accept_drawn
from ds4.kernels.draft.words import WORDS
from ds4.kernels.entry import ArgPack, Entry, KernelCall
from ds4.kernels.registry import Operation, register

_CHUNK = 1024  # accept.cu: kChunk
_ENTRY = Entry(
    "accept_drawn",
    "draft/accept.cu",
    (
        *(("p", "f32*"), ("q", "f32*"), ("token", "i32*"), ("status", "i32*"), ("params", "i64*"), ("words", "i32*")),
        *(("part", "u64*"), ("counter", "u32*"), ("n_tok", "i32"), ("vocab", "i32"), ("pitch", "i32")),
    ),
)


def _outputs(inputs: Inputs) -> Outputs:
    device, n_blocks = inputs["p"].device, -(-inputs["p"].shape[1] // _CHUNK)
    return {
        "part": torch.empty(n_blocks, dtype=torch.int64, device=device),
        "counter": torch.zeros(4, dtype=torch.int32, device=device),
    }


def _calls(inputs: Inputs, outputs: Outputs) -> list[KernelCall]:
    n_tok, vocab = inputs["p"].shape
    shapes = {"token": (n_tok,), "status": (n_tok,), "params": (6,), "words": (WORDS,)}
    for name, shape in shapes.items():
        if inputs[name].shape != shape:
            raise ValueError(f"accept_drawn: {name} is {list(inputs[name].shape)}, not {list(shape)}")
    n_rows, pitch = inputs["q"].shape
    if not 1 <= n_tok <= MOST_DRAFTED + 1 or n_rows < n_tok - 1 or pitch < vocab:
        raise ValueError(f"accept_drawn: p is {[n_tok, vocab]} and q {[n_rows, pitch]}: up to 8 rows, and one less")
    values = {**inputs, **outputs, "n_tok": n_tok, "vocab": vocab, "pitch": pitch}
    pack = ArgPack(_ENTRY, {name: values[name] for name, _ in _ENTRY.params})
    return [KernelCall(_ENTRY, (), (-(-vocab // _CHUNK), 1, 1), (256, 1, 1), 0, pack, pdl=True)]


ACCEPT_DRAWN = register(
    Operation(
        name="accept_drawn",
        reference=lambda inputs: {"words": accept_drawn(**inputs)},
        outputs=_outputs,
        calls=_calls,
        entries=(_ENTRY,),
        cases=accept_drawn_cases,
        variants=((_ENTRY, ()),),
        mutates=("words",),
        workspaces=("part", "counter"),
    )
)
