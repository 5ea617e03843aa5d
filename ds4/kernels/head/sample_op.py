"""``sample``: a token from each row of logits on the device, with or without the distribution it was drawn from."""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.cases import Inputs, Outputs
from ds4.kernels.entry import ArgPack, Constants, Entry, KernelCall, constant_set
from ds4.kernels.head import sample_ref
from ds4.kernels.head.sample_cases import cases, cases_with_probs
from ds4.kernels.head.sample_ref import sample_params
from ds4.kernels.registry import Operation, register, run

__all__ = ["SAMPLE", "SAMPLE_WITH_PROBS", "sample", "sample_params"]

MAX_VOCAB = 1 << 17
_CHUNK, _BINS, _STATE = 1024, 2048, 16  # sample_state.cuh: kChunk, kBins; words of a row's state
_REFINEMENTS = 4  # two digits after the first, for top_k and for top_p
_TYPES = {
    "logits": "f32*",
    "first_seen": "i32*",
    "pos": "i32*",
    "drafted": "i32*",
    "params": "i64*",
    "keys": "u32*",
    "e": "u64*",
    "part": "u64*",
    "count": "u32*",
    "mass": "u64*",
    "state": "u64*",
    "counter": "u32*",
    "token": "i32*",
    "status": "i32*",
    "probs": "f32*",
    "stream": "i32",
}
_WORKSPACES = ("keys", "e", "part", "count", "mass", "state", "counter")


def _entry(name: str, params: str) -> Entry:
    types = tuple((param, _TYPES[param]) for param in params.split())
    return Entry(name, "head/sample.cu", types, ("VOCAB", "N_TOK"))


_BEST = _entry("sample_best", "logits first_seen pos drafted params keys part count mass state counter token status")
_MASS = _entry("sample_mass", "params keys e part count mass state counter")
_REFINE = _entry("sample_refine", "params keys e count mass state counter")
_DRAW = _entry("sample_draw", "pos drafted params keys e part state counter token stream")
_PROBS = _entry("sample_probs", "keys e part state token probs")


def sample(
    logits: Tensor,
    pos: Tensor,
    params: Tensor,
    first_seen: Tensor | None = None,
    *,
    drafted: Tensor | None = None,
    stream: int = 0,
    probs: bool = False,
) -> dict[str, Tensor]:
    """Choose a token from each row of logits; the token that ``ds4.sampling.Sampler`` chooses.

    logits      f32 [n_tok, vocab]
    pos         i32 [1]       position of the token that row 0 is behind. Row t draws for position pos + 1 + t: so many
                tokens are in front, prompt included. Like params and drafted it is read at each launch
    params      i64 [6]       ``sample_params(...)``, the same for all rows
    first_seen  i32 [vocab] or None   where each token first stands in the text, 2^31 - 1 where it does not: the
                repetition penalty applies in rows with a larger position, so that rows of drafts share it
    drafted     i32 [1] or None   added to the positions: tokens in between, in front of which pos still stands
    stream      which of a position's random numbers draws (``ds4.sampling.uniform``)
    probs       also return the distribution
    returns     token i32 [n_tok]; status i32 [n_tok], 1 where the largest logit is not finite (the token is then the
                one that holds it); probs f32 [n_tok, vocab], one-hot where nothing was drawn
    Order:      tokens by falling logit, lower id first; sums are of integers, so their order does not matter. Row t
                does not depend on n_tok, bit for bit.
    Error:      sums of E are off by 2^-47 a token and P by 2^-62, against FP64 in ds4.sampling: another token only
                where the random number, or top_p, lies that close to a boundary; top_p does where it keeps a whole
                number of equally likely tokens, as 0.9 of 300. A token less than 2^-47 times as likely as the likeliest
                is never drawn.
    Limits:     n_tok 1 to 8 and at most 2^17 tokens in the vocabulary.
    Source:     ds4/sampling.py, spec kernels.md b.9.
    """
    inputs: Inputs = {"logits": logits, "pos": pos, "params": params, "first_seen": first_seen}
    inputs |= {"drafted": drafted, "stream": stream}
    return run(SAMPLE_WITH_PROBS if probs else SAMPLE, inputs)


def _reference(inputs: Inputs) -> Outputs:
    results = _reference_with_probs(inputs)
    return {name: results[name] for name in ("token", "status")}


def _reference_with_probs(inputs: Inputs) -> Outputs:
    return sample_ref.sample(**inputs)


def _outputs(inputs: Inputs) -> Outputs:
    n_tok, vocab = inputs["logits"].shape
    device, n_blocks = inputs["logits"].device, -(-vocab // _CHUNK)
    return {
        "token": torch.empty(n_tok, dtype=torch.int32, device=device),
        "status": torch.empty(n_tok, dtype=torch.int32, device=device),
        "keys": torch.empty(n_tok, vocab, dtype=torch.int32, device=device),
        "e": torch.empty(n_tok, vocab, dtype=torch.int64, device=device),
        "part": torch.empty(n_tok, 2, n_blocks, dtype=torch.int64, device=device),
        "count": torch.empty(n_tok, 2, _BINS, dtype=torch.int32, device=device),
        "mass": torch.empty(n_tok, 2, _BINS, dtype=torch.int64, device=device),
        "state": torch.empty(n_tok, _STATE, dtype=torch.int64, device=device),
        "counter": torch.zeros(8, dtype=torch.int32, device=device),
    }


def _outputs_with_probs(inputs: Inputs) -> Outputs:
    return {**_outputs(inputs), "probs": torch.empty_like(inputs["logits"])}


def _calls(inputs: Inputs, outputs: Outputs) -> list[KernelCall]:
    n_tok, vocab = inputs["logits"].shape
    if not 1 <= n_tok <= 8 or not 1 <= vocab <= MAX_VOCAB:
        raise ValueError(f"sample: logits {[n_tok, vocab]}: 1 to 8 rows of 1 to {MAX_VOCAB} are needed")
    for name, shape in (("pos", (1,)), ("drafted", (1,)), ("params", (6,)), ("first_seen", (vocab,))):
        if inputs[name] is not None and inputs[name].shape != shape:
            raise ValueError(f"sample: {name} is {list(inputs[name].shape)}, not {list(shape)}")
    values = {**inputs, **outputs}
    entries = [_BEST, _MASS, *[_REFINE] * _REFINEMENTS, _DRAW, *([_PROBS] if "probs" in outputs else [])]
    return [
        KernelCall(
            entry,
            constant_set(VOCAB=vocab, N_TOK=n_tok),
            (-(-vocab // _CHUNK), n_tok, 1),
            (256, 1, 1),
            0,
            ArgPack(entry, {name: values[name] for name, _ in entry.params}),
        )
        for entry in entries
    ]


def _flash(n_tok: int) -> Constants:
    return constant_set(VOCAB=129280, N_TOK=n_tok)


_TOKEN_INPUTS = {"logits": 0}
_ENTRIES = (_BEST, _MASS, _REFINE, _DRAW)
SAMPLE = register(
    Operation(
        name="sample",
        reference=_reference,
        outputs=_outputs,
        calls=_calls,
        entries=_ENTRIES,
        cases=cases,
        variants=tuple((entry, _flash(n_tok)) for entry in _ENTRIES for n_tok in (1, 2, 8)),
        workspaces=_WORKSPACES,
        token_inputs=_TOKEN_INPUTS,
        token_outputs={"token": 0, "status": 0},
    )
)
SAMPLE_WITH_PROBS = register(
    Operation(
        name="sample_with_probs",
        reference=_reference_with_probs,
        outputs=_outputs_with_probs,
        calls=_calls,
        entries=(*_ENTRIES, _PROBS),
        cases=cases_with_probs,
        variants=tuple((entry, _flash(n_tok)) for entry in (*_ENTRIES, _PROBS) for n_tok in (1, 2, 8)),
        workspaces=_WORKSPACES,
        token_inputs=_TOKEN_INPUTS,
        token_outputs={"token": 0, "status": 0, "probs": 0},
    )
)
