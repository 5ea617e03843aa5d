"""``attn_prefill``: the attention core for the tokens of a prompt; its kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ds4.kernels.attn.cases import ROW
from ds4.kernels.attn.prefill_cases import cases
from ds4.kernels.cases import Inputs, Outputs
from ds4.kernels.common import apply_rope
from ds4.kernels.entry import ArgPack, Entry, KernelCall
from ds4.kernels.registry import Operation, register, run

HEAD_DIM, ROPE_DIM = 512, 64
_SHARED_BYTES = 98560  # attn_prefill.cu: sizeof(Shared)
_MANY_HEADS, _FEW_HEADS = 64, 32  # of a block; the rows are decoded once a block
_FEW_ROWS = 32  # tokens up to which there are too few blocks without more of them
_ENTRY = Entry(
    "attn_prefill",
    "attn/attn_prefill.cu",
    (
        *(("q", "bf16*"), ("cis", "f32*"), ("sink", "f32*"), ("rows", "u8*"), ("pool", "u8*"), ("selected", "i32*")),
        *(("pos", "i32*"), ("count", "i32*"), ("o", "bf16*"), ("n_rows", "i32"), ("n_heads", "i32"), ("heads", "i32")),
        *(("max_pool", "i32"), ("window", "i32"), ("ratio", "i32"), ("eps", "f32")),
    ),
)


def attn_prefill(
    q: Tensor,
    cis: Tensor,
    sink: Tensor,
    *,
    rows: Tensor,
    pool: Tensor | None = None,
    selected: Tensor | None = None,
    pos: Tensor,
    count: Tensor | None = None,
    window: int,
    ratio: int = 0,
    eps: float,
) -> Tensor:
    """Attention of each head over the window and the pool, as ``attn_decode`` has it, for any number of tokens.

    q' = bf16(rope(q));  s_i = (q' . row_i) rsqrt(mean(q^2) + eps) 512^-0.5
    o  = bf16(rope^-1(sum_i bf16(e^(s_i - m)) row_i / (sum_i e^(s_i - m) + e^(sink - m)))),  m = M ln 2

    M is an integer, so that a power of two at most comes off a rounded weight. Token t is at position p = pos + t. Its
    rows are those of positions max(0, p - window + 1) to p, and of the pool the first n = (p + 1) / ratio entries, or
    those that ``selected[t]`` lists: its first min(n, top_k).

    q         bf16 [n_rows, n_heads, 512]   neither normed nor rotated
    cis       f32 [n_rows, 32, 2]           cos and sin for the last 64 dimensions at the tokens' positions
    sink      f32 [n_heads]                 -inf: none
    rows      u8 [window + n_rows, 584]     position pos - window + i in row i; of negative positions not read
    pool      u8 [n_entries, 584] or None   entries, needed where there is a ratio; others are not read
    selected  i32 [n_rows, top_k] or None   entries of each token, each below n_entries; what follows them is not read
    pos       i32 [1]                       position of token 0, at least 0
    count     i32 [1] or None               how many tokens there are; None: n_rows
    returns   bf16 [n_rows, n_heads, 512]   rows from ``count`` on are not specified
    Order:    row t depends on its position and inputs alone, not on where the chunk begins and ends, bit for bit.
    Error:    BF16 where the formulas say so, FP32 sums; see attn/prefill_cases.py.
    Limits:   values of rows up to 57344, scales up to 2^7. Raises ValueError for shapes that do not go together.
    Source:   spec model.md 2.3 to 2.6, 6.1.
    """
    inputs: Inputs = {"q": q, "cis": cis, "sink": sink, "rows": rows, "pool": pool, "selected": selected, "pos": pos}
    return run(ATTN_PREFILL, inputs | {"count": count, "window": window, "ratio": ratio, "eps": eps})["o"]


def _attended(inputs: Inputs, token: int) -> Tensor:
    """The rows that a token attends, f32 ``[n, 512]``: the window's by position, then the pool's by index."""
    window, ratio, end = inputs["window"], inputs["ratio"], int(inputs["pos"]) + token + 1
    packed = inputs["rows"][window + token + 1 - min(end, window) : window + token + 1]
    if ratio:
        entries = slice(end // ratio) if inputs["selected"] is None else inputs["selected"][token, : end // ratio]
        packed = torch.cat((packed, inputs["pool"][entries]))
    return ROW.unpack(packed)


def _bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(torch.float32)


def _reference(inputs: Inputs) -> Outputs:
    q, cis = inputs["q"].float(), torch.view_as_complex(inputs["cis"])
    o = torch.full_like(inputs["q"], torch.nan)
    for t in range(q.shape[0] if inputs["count"] is None else min(int(inputs["count"]), q.shape[0])):
        kv = _attended(inputs, t)
        factor = (q[t].square().mean(-1, keepdim=True) + inputs["eps"]).rsqrt() * (HEAD_DIM**-0.5 * math.log2(math.e))
        scores = (_bf16(apply_rope(q[t], cis[t])) @ kv.T) * factor
        m = scores.amax(-1, keepdim=True).ceil()
        weights = torch.exp2(scores - m)
        denominator = weights.sum(-1, keepdim=True) + torch.exp2(inputs["sink"].unsqueeze(-1) * math.log2(math.e) - m)
        o[t] = apply_rope((_bf16(weights) @ kv) / denominator, cis[t], inverse=True).to(torch.bfloat16)
    return {"o": o}


def _max_pool(inputs: Inputs) -> int:
    """The most rows of the pool that a token can attend to."""
    if not inputs["ratio"]:
        return 0
    return int(inputs["pool"].shape[0] if inputs["selected"] is None else inputs["selected"].shape[1])


def _check_shapes(inputs: Inputs) -> None:
    """Raises ValueError naming what does not fit."""
    n_rows, n_heads, _ = inputs["q"].shape
    want: dict[str, tuple[int, ...]] = {
        "q": (n_rows, n_heads, HEAD_DIM),
        "cis": (n_rows, ROPE_DIM // 2, 2),
        "sink": (n_heads,),
        "rows": (inputs["window"] + n_rows, ROW.row_bytes),
        "pos": (1,),
    }
    if (pool := inputs["pool"]) is not None:
        want["pool"] = (pool.shape[0], ROW.row_bytes)
    if (selected := inputs["selected"]) is not None:
        want["selected"] = (n_rows, selected.shape[1])
    if inputs["count"] is not None:
        want["count"] = (1,)
    for name, shape in want.items():
        if inputs[name].shape != shape:
            raise ValueError(f"attn_prefill: {name} has shape {list(inputs[name].shape)} instead of {list(shape)}")
    if n_rows < 1 or inputs["window"] < 1:
        raise ValueError(f"attn_prefill: {n_rows} tokens, window {inputs['window']}; both are at least 1")
    if (pool is None) != (inputs["ratio"] == 0) or (pool is None and selected is not None):
        raise ValueError("attn_prefill: a pool goes with a ratio, and a selection with a pool")


def _outputs(inputs: Inputs) -> Outputs:
    _check_shapes(inputs)
    return {"o": torch.empty_like(inputs["q"])}


def _calls(inputs: Inputs, outputs: Outputs) -> list[KernelCall]:
    n_rows, n_heads, _ = inputs["q"].shape
    heads = _FEW_HEADS if n_rows <= _FEW_ROWS else _MANY_HEADS
    sizes = {"n_rows": n_rows, "n_heads": n_heads, "heads": heads, "max_pool": _max_pool(inputs)}
    values = {**inputs, **outputs, **sizes}
    pack = ArgPack(_ENTRY, {name: values[name] for name, _ in _ENTRY.params})
    return [KernelCall(_ENTRY, (), (n_rows, -(-n_heads // heads), 1), (256, 1, 1), _SHARED_BYTES, pack, pdl=True)]


ATTN_PREFILL = register(
    Operation(
        name="attn_prefill",
        reference=_reference,
        outputs=_outputs,
        calls=_calls,
        entries=(_ENTRY,),
        cases=cases,
        variants=((_ENTRY, ()),),
        decode=False,
    )
)
