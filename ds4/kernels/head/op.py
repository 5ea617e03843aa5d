"""``lm_head``: logits and greedy tokens; its kernels. The family's other operations are registered from here."""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.cases import Inputs, Outputs
from ds4.kernels.entry import ArgPack, Constants, Entry, KernelCall, constant_set
from ds4.kernels.head import ref
from ds4.kernels.head.cases import cases
from ds4.kernels.head.hc_head_op import HC_HEAD, hc_head
from ds4.kernels.head.last_rows_op import LAST_ROWS
from ds4.kernels.head.sample_op import SAMPLE, sample, sample_params
from ds4.kernels.packing import PACKINGS, Planes
from ds4.kernels.packing.arguments import plane_params, planes_among
from ds4.kernels.proj.plan import THREADS, n_blocks, rows_plan
from ds4.kernels.registry import Operation, register, run

__all__ = ["HC_HEAD", "LAST_ROWS", "LM_HEAD", "SAMPLE", "hc_head", "lm_head", "sample", "sample_params"]

_RESULTS = (
    ("logits", "f32*"),
    ("best", "u64*"),
    ("counter", "u32*"),
    ("token", "i32*"),
    ("top", "f32*"),
    ("status", "i32*"),
)
FORMATS = ("f32", "f16", "bf16", "q8_0")
_ENTRIES = {
    name: Entry(
        f"lm_head_{name}",
        "head/lm_head.cu",
        (("x", "f32*"), *plane_params(name), *_RESULTS),
        ("HIDDEN", "VOCAB", "N_TOK"),
    )
    for name in FORMATS
}


def lm_head(x: Tensor, weight: Planes) -> dict[str, Tensor]:
    """Logits of each token, and the greedy choice.

    x        f32 [n_tok, d]        after the final norm
    weight   planes of f32 | f16 | bf16 | q8_0, ``vocab`` rows of d
    returns  logits f32 [n_tok, vocab]; token i32 [n_tok], the largest logit's row; top f32 [n_tok], that logit; status
             i32 [n_tok], 1 where it is not finite
    Order:   ties go to the lowest row; a NaN is larger than any number. Row t does not depend on n_tok, bit for bit.
    Error:   logits within d roundings of FP32; the token is exact but for logits closer than that.
    Limits:  n_tok 1 to 8 on a GPU, d a multiple of 32, planes without gaps between rows.
    Source:  spec model.md 2.0.
    """
    return run(LM_HEAD, {"x": x, "format": weight.packing.format, **weight.tensors})


def _reference(inputs: Inputs) -> Outputs:
    planes, x = planes_among(inputs, FORMATS, "lm_head"), inputs["x"]
    n_rows = next(iter(planes.values())).shape[0]
    return ref.lm_head(x, Planes(PACKINGS[inputs["format"]], n_rows, x.shape[1], planes).decode())


def _outputs(inputs: Inputs) -> Outputs:
    x, planes = inputs["x"], planes_among(inputs, FORMATS, "lm_head")
    n_tok, vocab = x.shape[0], next(iter(planes.values())).shape[0]
    return {
        "logits": torch.empty(n_tok, vocab, device=x.device),
        "token": torch.empty(n_tok, dtype=torch.int32, device=x.device),
        "top": torch.empty(n_tok, device=x.device),
        "status": torch.empty(n_tok, dtype=torch.int32, device=x.device),
        "best": torch.zeros(8, dtype=torch.int64, device=x.device),
        "counter": torch.zeros(4, dtype=torch.int32, device=x.device),
    }


def _calls(inputs: Inputs, outputs: Outputs) -> list[KernelCall]:
    x, planes = inputs["x"], planes_among(inputs, FORMATS, "lm_head")
    n_tok, hidden = x.shape
    vocab = next(iter(planes.values())).shape[0]
    if not 1 <= n_tok <= 8 or hidden % 32:
        raise ValueError(f"lm_head: x {list(x.shape)}: 1 to 8 rows of a multiple of 32 are needed")
    for plane in PACKINGS[inputs["format"]].planes:
        want = (vocab, plane.row_bytes(hidden) // plane.dtype.itemsize)
        if planes[plane.name].shape != want:
            raise ValueError(f"lm_head: plane {plane.name} is {list(planes[plane.name].shape)}, not {list(want)}")
    entry = _ENTRIES[inputs["format"]]
    constants = constant_set(HIDDEN=hidden, VOCAB=vocab, N_TOK=n_tok)
    plan = rows_plan(hidden, n_tok)
    grid, block = (n_blocks(plan, -(-vocab // plan.unit_rows), x.device), 1, 1), (THREADS, 1, 1)
    arguments = ArgPack(entry, {"x": x, **planes, **outputs})
    return [KernelCall(entry, constants, grid, block, plan.shared_bytes, arguments, pdl=True)]


def _flash(n_tok: int) -> Constants:
    return constant_set(HIDDEN=4096, VOCAB=129280, N_TOK=n_tok)


LM_HEAD = register(
    Operation(
        name="lm_head",
        reference=_reference,
        outputs=_outputs,
        calls=_calls,
        entries=tuple(_ENTRIES.values()),
        cases=cases,
        variants=tuple((entry, _flash(n_tok)) for entry in _ENTRIES.values() for n_tok in (1, 2, 8)),
        workspaces=("best", "counter"),
        token_inputs={"x": 0},
        token_outputs={"logits": 0, "token": 0, "top": 0, "status": 0},
    )
)
