"""``route_select``: the router's choice for a chunk of a prompt, from logits that a matrix product made.

Inputs:
    logits   f32 [n_rows, n_experts]
    bias     f32 [n_experts] or None     selection only, never in weights
    tid2eid  i32 [vocab, top_k] or None  hash-routed layers, with tokens i32 [n_rows]
    count    i32 [1] or None             only the first ``count`` tokens are there; None: all
    top_k int, route_scale float
Results:
    ids      i32 [n_rows, top_k]         by falling selection score, or the table's
    weights  f32 [n_rows, top_k]         as ``route`` (ds4/kernels/route/op.py) has them
Rows from ``count`` on are not written.

Order:   ties go to the lower expert id; row t depends neither on n_rows nor on count, bit for bit, and is what
         ``route`` gives where it sums up the same logits.
Error:   ids exact but for scores closer than the rounding of exponential, logarithm and root; weights within 2e-6. A
         NaN is chosen last and never becomes an id that there is not.
Limits:  at most 1024 experts, top_k at most 32 and at most the experts. ValueError where shapes do not go together.
Source:  spec model.md 2.7.
"""

from __future__ import annotations

import torch

from ds4.kernels.cases import Inputs, Outputs
from ds4.kernels.entry import ArgPack, Entry, KernelCall, constant_set
from ds4.kernels.registry import Operation, register
from ds4.kernels.route import ref
from ds4.kernels.route.select_cases import cases
from ds4.kernels.verify import poison

_TOKENS_PER_BLOCK = 8  # route_select.cu: kWarps
_CONSTANTS = ("N_EXPERTS", "TOP_K")
_RESULTS = (
    ("count", "i32*"),
    ("ids", "i32*"),
    ("weights", "f32*"),
    ("route_scale", "f32"),
    ("n_rows", "i32"),
)
_FILE = "route/route_select.cu"
_LEARNED = Entry("route_select", _FILE, (("logits", "f32*"), ("bias", "f32*"), *_RESULTS), _CONSTANTS)
_HASHED = Entry(
    "route_select_hash", _FILE, (("logits", "f32*"), ("tid2eid", "i32*"), ("tokens", "i32*"), *_RESULTS), _CONSTANTS
)


def _reference(inputs: Inputs) -> Outputs:
    logits, table = inputs["logits"], inputs["tid2eid"]
    n_live = len(logits) if inputs["count"] is None else min(int(inputs["count"]), len(logits))
    hash_ids = None if table is None else table[inputs["tokens"][:n_live]].to(torch.int64)
    live = ref.select(
        logits[:n_live],
        bias=inputs["bias"],
        hash_ids=hash_ids,
        top_k=inputs["top_k"],
        route_scale=inputs["route_scale"],
    )
    results = _outputs(inputs)
    poison(results.values())  # what is not specified is as ds4.kernels.verify leaves it
    for result, rows in zip(results.values(), live, strict=True):
        result[:n_live] = rows
    return results


def _outputs(inputs: Inputs) -> Outputs:
    shape, device = (inputs["logits"].shape[0], inputs["top_k"]), inputs["logits"].device
    return {"ids": torch.empty(shape, dtype=torch.int32, device=device), "weights": torch.empty(shape, device=device)}


def _calls(inputs: Inputs, outputs: Outputs) -> list[KernelCall]:
    (n_rows, n_experts), top_k, table = inputs["logits"].shape, inputs["top_k"], inputs["tid2eid"]
    wanted = {"bias": (n_experts,), "tokens": (n_rows,), "count": (1,)} | (
        {"tid2eid": (len(table), top_k)} if table is not None else {}
    )
    for name, shape in wanted.items():
        if inputs[name] is not None and inputs[name].shape != shape:
            raise ValueError(f"route_select: {name} is {list(inputs[name].shape)}, not {list(shape)}")
    if not 1 <= top_k <= min(32, n_experts) or n_experts > 1024 or (table is None) != (inputs["tokens"] is None):
        raise ValueError(f"route_select: {top_k} of {n_experts} experts, or a table without tokens")
    entry = _LEARNED if table is None else _HASHED
    values = {**inputs, **outputs, "n_rows": n_rows}
    pack = ArgPack(entry, {name: values[name] for name, _ in entry.params})
    constants = constant_set(N_EXPERTS=n_experts, TOP_K=top_k)
    grid = (-(-n_rows // _TOKENS_PER_BLOCK), 1, 1)
    return [KernelCall(entry, constants, grid, (32 * _TOKENS_PER_BLOCK, 1, 1), 0, pack, pdl=True)]


ROUTE_SELECT = register(
    Operation(
        name="route_select",
        reference=_reference,
        outputs=_outputs,
        calls=_calls,
        entries=(_LEARNED, _HASHED),
        cases=cases,
        variants=tuple((entry, constant_set(N_EXPERTS=256, TOP_K=6)) for entry in (_LEARNED, _HASHED)),
        token_inputs={"logits": 0, "tokens": 0},
        token_outputs={"ids": 0, "weights": 0},
        decode=False,
    )
)
