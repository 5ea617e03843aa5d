"""Operations of drafting beside the network's own. ``words`` i32 [64] is the step's block, see ds4/kernels/draft/words.

draft_tap    keep what a draft head starts from: the streams and tokens of a step that was processed
    streams  f32 [n_tok, ...]; words: pos, tokens
    tail     f32 [slots, ...], ids i64 [slots]   UPDATED IN PLACE: position p in row p % slots
draft_mean   the same of the means over streams of one tapped layer; tail has one row of all of them
    streams  f32 [n_tok, 4, d]; words: pos, tokens; first int: the layer's first column
    tail     f32 [slots, taps * d], ids i64 [slots]   UPDATED IN PLACE: columns first .. first + d - 1
draft_pairs  the pairs (streams at p, token at p + 1) of the last ``n_pairs`` positions
    tail, ids  as above; words: pos, the first of tokens; UPDATED IN PLACE: pair, last, drafted
    h          f32 [n_pairs, ...], tokens i32 [n_pairs]
draft_join   norms in front of the projections of a pair
    embedded   f32 [n_tok, 4, d], of which stream 0 counts; h f32 [n_tok, 4, d]; enorm, hnorm f32 [d]; eps float
    e          f32 [n_tok, d], hn f32 [n_tok, 4, d]
draft_norm   rms norm. x f32 [n_tok, d], norm f32 [d], eps float; y f32 [n_tok, d]
draft_block  tokens of a block: the step's first one, then ``noise`` int, ``n_tok`` of them
    words    pos, the first of tokens; UPDATED IN PLACE: last, the block's last position; chain, drafted
    tokens   i32 [n_tok]
draft_choose greedy choice. logits, bias f32 [1, vocab]; biased f32 [1, vocab], their sum; token i32 [1], its largest
             one's place, of equal ones the lowest; a NaN is larger than any number
draft_push   a drafted token i32 [1] joins the step's; words UPDATED IN PLACE: tokens, chain, drafted, last
accept       greedy acceptance; accept_op.py has that of a draft that was drawn
    token, status  i32 [n_tok]: what lm_head says of a step of n_tok - 1 drafted tokens
    words    tokens; UPDATED IN PLACE: pos, the first of tokens, accepted, status

Order:   integers, copies and sums are exact; norms and means of row t do not depend on n_tok, bit for bit.
Error:   norms differ from FP32 by the order of a sum and a few roundings.
Limits:  on a GPU n_tok and n_pairs 1 to 8, at most ``slots``; rows of a multiple of 4. pos is at least n_pairs.
Source:  spec model.md 7.1 to 7.3; kernels.md d.2, d.6.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ds4.kernels.cases import Case, Inputs, Outputs
from ds4.kernels.common import rms_norm
from ds4.kernels.draft import cases, ref
from ds4.kernels.draft.accept_op import ACCEPT_DRAWN
from ds4.kernels.draft.words import WORDS
from ds4.kernels.entry import ArgPack, Constants, Dim3, Entry, KernelCall, constant_set
from ds4.kernels.registry import Operation, register

__all__ = ["ACCEPT", "ACCEPT_DRAWN", "DRAFT_BLOCK", "DRAFT_CHOOSE", "DRAFT_JOIN", "DRAFT_MEAN", "DRAFT_NORM"]
__all__ += ["DRAFT_PAIRS", "DRAFT_PUSH", "DRAFT_TAP"]

MOST = 8  # rows of a launch
_ROW = (("width", "i32"), ("slots", "i32"))
_TAP = Entry(
    "draft_tap", "draft/tail.cu", (("streams", "f32*"), ("words", "i32*"), ("tail", "f32*"), ("ids", "i64*"), *_ROW)
)
_PAIRS = Entry(
    "draft_pairs",
    "draft/tail.cu",
    (("tail", "f32*"), ("ids", "i64*"), ("words", "i32*"), ("h", "f32*"), ("tokens", "i32*"), *_ROW),
)
_JOIN = Entry(
    "draft_join",
    "draft/join.cu",
    (*((name, "f32*") for name in ("embedded", "h", "enorm", "hnorm", "e", "hn")), ("eps", "f32")),
    ("HIDDEN",),
)
_MEAN = Entry("draft_mean", "draft/tail.cu", (*_TAP.params, ("pitch", "i32"), ("first", "i32")))
_NORM = Entry(
    "draft_norm", "draft/join.cu", (("x", "f32*"), ("norm", "f32*"), ("y", "f32*"), ("eps", "f32")), ("HIDDEN",)
)
_BLOCK = Entry(
    "draft_block", "draft/words.cu", (("words", "i32*"), ("tokens", "i32*"), ("noise", "i32"), ("n_tok", "i32"))
)
_CHOOSE = Entry(
    "draft_choose",
    "draft/choose.cu",
    (
        *((name, "f32*") for name in ("logits", "bias", "biased")),
        *(("token", "i32*"), ("best", "u64*"), ("counter", "u32*"), ("vocab", "i32")),
    ),
)
_PUSH = Entry("draft_push", "draft/words.cu", (("token", "i32*"), ("words", "i32*")))
_ACCEPT = Entry(
    "accept", "draft/words.cu", (("token", "i32*"), ("status", "i32*"), ("words", "i32*"), ("n_tok", "i32"))
)


def _call(entry: Entry, values: Inputs, grid: Dim3, threads: int, constants: Constants = ()) -> list[KernelCall]:
    pack = ArgPack(entry, {name: values[name] for name, _ in entry.params})
    return [KernelCall(entry, constants, grid, (threads, 1, 1), 0, pack, pdl=True)]


def _expect(name: str, inputs: Inputs, shapes: dict[str, tuple[int, ...]], n_rows: int) -> None:
    """Raises ValueError for a tensor of another shape, or a number of rows that is not 1 to 8."""
    for key, shape in shapes.items():
        if inputs[key].shape != shape:
            raise ValueError(f"{name}: {key} is {list(inputs[key].shape)}, not {list(shape)}")
    if not 1 <= n_rows <= MOST:
        raise ValueError(f"{name}: {n_rows} rows; 1 to {MOST} are needed")


def _tail_calls(inputs: Inputs, outputs: Outputs, name: str, entry: Entry) -> list[KernelCall]:
    """Of the two that copy rows between the tail and a tensor of rows of the same shape."""
    tail, rows = inputs["tail"], inputs["streams"] if entry is _TAP else outputs["h"]
    n_rows, slots, width = rows.shape[0], tail.shape[0], tail[0].numel()
    _expect(name, inputs, {"ids": (slots,), "words": (WORDS,)}, n_rows)
    if rows.shape[1:] != tail.shape[1:] or width % 4 or n_rows > slots:
        raise ValueError(f"{name}: {list(rows.shape)} does not go with a tail of {list(tail.shape)}")
    values = {**inputs, **outputs, "width": width, "slots": slots}
    return _call(entry, values, (-(-width // 1024), n_rows, 1), 256)


def _mean_calls(inputs: Inputs, outputs: Outputs) -> list[KernelCall]:
    (n_tok, _, d), (slots, pitch), first = inputs["streams"].shape, inputs["tail"].shape, inputs["first"]
    _expect("draft_mean", inputs, {"streams": (n_tok, 4, d), "ids": (slots,), "words": (WORDS,)}, n_tok)
    if d % 4 or pitch % 4 or first % 4 or not 0 <= first <= pitch - d or n_tok > slots:
        raise ValueError(f"draft_mean: columns {first} .. {first + d - 1} do not go with a tail of {[slots, pitch]}")
    values = {**inputs, "width": d, "slots": slots, "pitch": pitch}
    return _call(_MEAN, values, (-(-d // 1024), n_tok, 1), 256)


def _pairs_outputs(inputs: Inputs) -> Outputs:
    n, tail = inputs["n_pairs"], inputs["tail"]
    tokens = torch.empty(n, dtype=torch.int32, device=tail.device)
    return {"h": torch.empty(n, *tail.shape[1:], device=tail.device), "tokens": tokens}


def _join_calls(inputs: Inputs, outputs: Outputs) -> list[KernelCall]:
    n_tok, m, d = inputs["h"].shape
    _expect("draft_join", inputs, {"embedded": (n_tok, 4, d), "h": (n_tok, 4, d), "enorm": (d,), "hnorm": (d,)}, n_tok)
    if d % 4:
        raise ValueError(f"draft_join: rows of {d} are no multiple of 4")
    return _call(_JOIN, {**inputs, **outputs}, (m + 1, n_tok, 1), 256, constant_set(HIDDEN=d))


def _norm_calls(inputs: Inputs, outputs: Outputs) -> list[KernelCall]:
    n_tok, d = inputs["x"].shape
    _expect("draft_norm", inputs, {"norm": (d,)}, n_tok)
    if d % 4:
        raise ValueError(f"draft_norm: rows of {d} are no multiple of 4")
    return _call(_NORM, {**inputs, **outputs}, (1, n_tok, 1), 256, constant_set(HIDDEN=d))


def _block_outputs(inputs: Inputs) -> Outputs:
    return {"tokens": torch.empty(inputs["n_tok"], dtype=torch.int32, device=inputs["words"].device)}


def _block_calls(inputs: Inputs, outputs: Outputs) -> list[KernelCall]:
    _expect("draft_block", inputs, {"words": (WORDS,)}, inputs["n_tok"])
    return _call(_BLOCK, {**inputs, **outputs}, (1, 1, 1), inputs["n_tok"])


def _choose_outputs(inputs: Inputs) -> Outputs:
    device = inputs["logits"].device
    return {
        "biased": torch.empty_like(inputs["logits"]),
        "token": torch.empty(1, dtype=torch.int32, device=device),
        "best": torch.zeros(2, dtype=torch.int64, device=device),
        "counter": torch.zeros(4, dtype=torch.int32, device=device),
    }


def _choose_calls(inputs: Inputs, outputs: Outputs) -> list[KernelCall]:
    vocab = inputs["logits"].shape[-1]
    _expect("draft_choose", inputs, {"logits": (1, vocab), "bias": (1, vocab)}, 1)
    return _call(_CHOOSE, {**inputs, **outputs, "vocab": vocab}, (-(-vocab // 1024), 1, 1), 256)


def _push_calls(inputs: Inputs, outputs: Outputs) -> list[KernelCall]:
    _expect("draft_push", inputs, {"token": (1,), "words": (WORDS,)}, 1)
    return _call(_PUSH, inputs, (1, 1, 1), 4)


def _accept_calls(inputs: Inputs, outputs: Outputs) -> list[KernelCall]:
    n_tok = len(inputs["token"])
    _expect("accept", inputs, {"status": (n_tok,), "words": (WORDS,)}, n_tok)
    return _call(_ACCEPT, {**inputs, "n_tok": n_tok}, (1, 1, 1), 32)


def _operation(
    entry: Entry,
    reference: Callable[[Inputs], Outputs],
    outputs: Callable[[Inputs], Outputs],
    calls: Callable[[Inputs, Outputs], list[KernelCall]],
    made: Callable[[], list[Case]],
    mutates: tuple[str, ...] = (),
    tokens: tuple[dict[str, int], dict[str, int]] = ({}, {}),
    workspaces: tuple[str, ...] = (),
) -> Operation:
    constants = constant_set(HIDDEN=4096) if entry.constants else ()
    given, results = tokens
    return register(
        Operation(
            name=entry.name,
            reference=reference,
            outputs=outputs,
            calls=calls,
            entries=(entry,),
            cases=made,
            variants=((entry, constants),),
            mutates=mutates,
            workspaces=workspaces,
            token_inputs=given,
            token_outputs=results,
        )
    )


def _named(names: tuple[str, ...], compute: Callable[[Inputs], tuple]) -> Callable[[Inputs], Outputs]:
    return lambda inputs: dict(zip(names, compute(inputs), strict=True))


DRAFT_TAP = _operation(
    _TAP,
    _named(("tail", "ids"), lambda i: ref.tap(i["streams"], i["words"], i["tail"], i["ids"])),
    lambda inputs: {},
    partial(_tail_calls, name="draft_tap", entry=_TAP),
    cases.tap_cases,
    mutates=("tail", "ids"),
)
DRAFT_MEAN = _operation(
    _MEAN,
    _named(("tail", "ids"), lambda i: ref.mean(i["streams"], i["words"], i["tail"], i["ids"], i["first"])),
    lambda inputs: {},
    _mean_calls,
    cases.mean_cases,
    mutates=("tail", "ids"),
)
DRAFT_PAIRS = _operation(
    _PAIRS,
    _named(("words", "h", "tokens"), lambda i: ref.pairs(i["words"], i["tail"], i["ids"], i["n_pairs"])),
    _pairs_outputs,
    partial(_tail_calls, name="draft_pairs", entry=_PAIRS),
    cases.pairs_cases,
    mutates=("words",),
)
DRAFT_JOIN = _operation(
    _JOIN,
    _named(("e", "hn"), lambda i: ref.join(i["embedded"], i["h"], i["enorm"], i["hnorm"], i["eps"])),
    lambda inputs: {"e": torch.empty_like(inputs["h"][:, 0].contiguous()), "hn": torch.empty_like(inputs["h"])},
    _join_calls,
    cases.join_cases,
    tokens=({"embedded": 0, "h": 0}, {"e": 0, "hn": 0}),
)
DRAFT_NORM = _operation(
    _NORM,
    _named(("y",), lambda i: (rms_norm(i["x"], i["norm"], i["eps"]),)),
    lambda inputs: {"y": torch.empty_like(inputs["x"])},
    _norm_calls,
    cases.norm_cases,
    tokens=({"x": 0}, {"y": 0}),
)
DRAFT_BLOCK = _operation(
    _BLOCK,
    _named(("words", "tokens"), lambda i: ref.block(i["words"], i["noise"], i["n_tok"])),
    _block_outputs,
    _block_calls,
    cases.block_cases,
    mutates=("words",),
)
DRAFT_CHOOSE = _operation(
    _CHOOSE,
    _named(("biased", "token"), lambda i: ref.choose(i["logits"], i["bias"])),
    _choose_outputs,
    _choose_calls,
    cases.choose_cases,
    workspaces=("best", "counter"),
)
DRAFT_PUSH = _operation(
    _PUSH,
    _named(("words",), lambda i: (ref.push(i["token"], i["words"]),)),
    lambda inputs: {},
    _push_calls,
    cases.push_cases,
    mutates=("words",),
)
ACCEPT = _operation(
    _ACCEPT,
    _named(("words",), lambda i: (ref.accept(i["token"], i["status"], i["words"]),)),
    lambda inputs: {},
    _accept_calls,
    cases.accept_cases,
    mutates=("words",),
)
