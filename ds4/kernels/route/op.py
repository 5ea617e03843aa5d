"""``route``: the router's public function and its kernels. The prefill form is registered from here."""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.cases import Inputs, Outputs
from ds4.kernels.entry import ArgPack, Entry, KernelCall, constant_set
from ds4.kernels.proj.ref import Rows
from ds4.kernels.registry import Operation, register, run
from ds4.kernels.route import ref
from ds4.kernels.route.cases import cases
from ds4.kernels.route.select_op import ROUTE_SELECT

__all__ = ["ROUTE", "ROUTE_SELECT", "route"]

_GATES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_CONSTANTS = ("HIDDEN", "N_EXPERTS", "TOP_K", "N_TOK")
_RESULTS = (("scores", "f32*"), ("counter", "u32*"), ("ids", "i32*"), ("weights", "f32*"), ("route_scale", "f32"))
_LEARNED = {
    gate: Entry(
        f"route_{gate}",
        "route/route.cu",
        (("x", "f32*"), ("gate", f"{gate}*"), ("bias", "f32*"), *_RESULTS),
        _CONSTANTS,
    )
    for gate in _GATES.values()
}
_HASHED = {
    gate: Entry(
        f"route_hash_{gate}",
        "route/route.cu",
        (("x", "f32*"), ("gate", f"{gate}*"), ("tid2eid", "i32*"), ("tokens", "i32*"), *_RESULTS),
        _CONSTANTS,
    )
    for gate in _GATES.values()
}


def route(
    x: Tensor,
    gate: Tensor,
    *,
    bias: Tensor | None = None,
    tid2eid: Tensor | None = None,
    tokens: Tensor | None = None,
    top_k: int,
    route_scale: float,
    rows: Rows = None,
) -> tuple[Tensor, Tensor]:
    """Pick the routed experts of each token and their mixing weights.

    score = sqrt(softplus(x gate^T)); pick the top_k largest score + bias, or tid2eid[token] where there is a table;
    weights = route_scale * score / sum(score of the picked)

    x        f32 [n_tok, d]
    gate     f32 | f16 | bf16 [n_experts, d]   the reference wants f32
    bias     f32 [n_experts] or None           selection only, never in weights
    tid2eid  i32 [vocab, top_k] or None        hash-routed layers, with tokens i32 [n_tok]
    rows     CPU only: the rows of a decode launch that carry tokens (ds4.kernels.launch)
    returns  ids (i32 on a GPU, i64 on the CPU) [n_tok, top_k] by falling selection score; weights f32 [n_tok, top_k]
    Order:   ties go to the lower expert id; row t does not depend on n_tok, bit for bit.
    Error:   ids exact but for scores closer than the rounding of FP32 sums; weights within 1e-5 of the reference.
    Limits:  n_tok 1 to 8 on a GPU; d a multiple of 8, at most 1024 experts, top_k at most 32.
    Source:  spec model.md 2.7.
    """
    if x.device.type == "cpu":
        hash_ids = None if tid2eid is None or tokens is None else tid2eid[tokens].to(torch.int64)
        return ref.route(x, gate, bias=bias, hash_ids=hash_ids, top_k=top_k, route_scale=route_scale, rows=rows)
    inputs = {"x": x, "gate": gate, "bias": bias, "tid2eid": tid2eid, "tokens": tokens}
    results = run(ROUTE, inputs | {"top_k": top_k, "route_scale": route_scale})
    return results["ids"], results["weights"]


def _reference(inputs: Inputs) -> Outputs:
    table, tokens = inputs["tid2eid"], inputs["tokens"]
    ids, weights = ref.route(
        inputs["x"],
        inputs["gate"].float(),
        bias=inputs["bias"],
        hash_ids=None if table is None else table[tokens].to(torch.int64),
        top_k=inputs["top_k"],
        route_scale=inputs["route_scale"],
    )
    return {"ids": ids.to(torch.int32), "weights": weights}


def _outputs(inputs: Inputs) -> Outputs:
    x, n_experts, top_k = inputs["x"], inputs["gate"].shape[0], inputs["top_k"]
    n_tok = x.shape[0]
    return {
        "ids": torch.empty(n_tok, top_k, dtype=torch.int32, device=x.device),
        "weights": torch.empty(n_tok, top_k, device=x.device),
        "scores": torch.empty(n_tok, n_experts, device=x.device),
        "counter": torch.zeros(8, dtype=torch.int32, device=x.device),
    }


def _calls(inputs: Inputs, outputs: Outputs) -> list[KernelCall]:
    x, gate, top_k = inputs["x"], inputs["gate"], inputs["top_k"]
    n_experts, n_tok = gate.shape[0], x.shape[0]
    if x.shape[1] != gate.shape[1] or gate.dtype not in _GATES:
        raise ValueError(f"route: x {list(x.shape)} and gate {gate.dtype} {list(gate.shape)} do not go together")
    hashed = inputs["tid2eid"] is not None
    entry = (_HASHED if hashed else _LEARNED)[_GATES[gate.dtype]]
    values = {"x": x, "gate": gate, "route_scale": inputs["route_scale"], **outputs}
    values |= {name: inputs[name] for name in (("tid2eid", "tokens") if hashed else ("bias",))}
    constants = constant_set(HIDDEN=x.shape[1], N_EXPERTS=n_experts, TOP_K=top_k, N_TOK=n_tok)
    grid = (top_k, n_tok, 1) if hashed else (-(-n_experts // 2), 1, 1)
    return [KernelCall(entry, constants, grid, (64 if hashed else 128, 1, 1), 0, ArgPack(entry, values))]


def _flash(n_experts: int, n_tok: int) -> tuple[tuple[str, int | float | str], ...]:
    return constant_set(HIDDEN=4096, N_EXPERTS=n_experts, TOP_K=6, N_TOK=n_tok)


ROUTE = register(
    Operation(
        name="route",
        reference=_reference,
        outputs=_outputs,
        calls=_calls,
        entries=(*_LEARNED.values(), *_HASHED.values()),
        cases=cases,
        variants=(
            *((entry, _flash(256, n_tok)) for entry in _LEARNED.values() for n_tok in (1, 2, 8)),
            *((_LEARNED["bf16"], _flash(n_experts, 1)) for n_experts in (150, 160)),
            *((entry, _flash(256, 1)) for entry in _HASHED.values()),
        ),
        workspaces=("scores", "counter"),
        token_inputs={"x": 0, "tokens": 0},
        token_outputs={"ids": 0, "weights": 0},
    )
)
