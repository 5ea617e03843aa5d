"""``attn_decode``: the attention core of the decode step, from raw queries and packed rows; its kernels. The prefill
form is registered from here."""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.attn import ref
from ds4.kernels.attn.cases import cases
from ds4.kernels.attn.prefill_op import ATTN_PREFILL, attn_prefill
from ds4.kernels.cases import Inputs, Outputs
from ds4.kernels.common import apply_rope
from ds4.kernels.entry import ArgPack, Entry, KernelCall, constant_set
from ds4.kernels.numerics import Numerics
from ds4.kernels.registry import Operation, register, run
from ds4.kv.ring import ring_read
from ds4.kv.rows import PackedRow

__all__ = ["ATTN_DECODE", "ATTN_PREFILL", "attn_decode", "attn_prefill"]

HEAD_DIM, ROPE_DIM = 512, 64
_ROW = PackedRow(HEAD_DIM - ROPE_DIM, ROPE_DIM)
_HEADS, _TILE, _MAX_SPANS, _SLICE = 16, 32, 32, 256  # attn_decode.cu, attn_rows.cuh: kHeads, kTile, kMaxSpans, kSlice
_SHARED_BYTES = 60608  # attn_decode.cu: sizeof(Shared)
_PLAN = (("max_pool", "i32"), ("max_spans", "i32"), ("window", "i32"))
_CONSTANTS = ("N_HEADS", "RATIO", "RING_SLOTS")
_PARTIALS = Entry(
    "attn_partials",
    "attn/attn_decode.cu",
    (
        *(("q", "f32*"), ("cis", "f32*"), ("ring", "u8*"), ("pool", "u8*"), ("selected", "i32*"), ("pos", "i32*")),
        *(("partials", "f32*"), ("extremes", "f32*"), *_PLAN, ("eps", "f32")),
    ),
    _CONSTANTS,
)
_COMBINE = Entry(
    "attn_combine",
    "attn/attn_decode.cu",
    (
        *(("partials", "f32*"), ("extremes", "f32*"), ("sink", "f32*"), ("cis", "f32*"), ("pos", "i32*")),
        *(("o", "f32*"), *_PLAN),
    ),
    _CONSTANTS,
)


def attn_decode(
    q: Tensor,
    cis: Tensor,
    sink: Tensor,
    *,
    ring: Tensor,
    pool: Tensor | None = None,
    selected: Tensor | None = None,
    pos: Tensor,
    window: int,
    ratio: int = 0,
    eps: float,
) -> Tensor:
    """Attention of each head over the window and the pool, from raw queries to what ``wo_a`` takes.

    q_h = rope(q_h rsqrt(mean(q_h^2) + eps));  s_i = (q_h . row_i) 512^-0.5
    o_h = rope^-1(sum_i e^(s_i - m) row_i / (sum_i e^(s_i - m) + e^(sink_h - m))),  m = max_i s_i

    Token t is at position p = pos + t. Its rows are those of positions max(0, p - window + 1) to p, and of the pool the
    first n = (p + 1) / ratio entries, or those that ``selected[t]`` lists: its first min(n, top_k).

    q         f32 [n_tok, n_heads, 512]    neither normed nor rotated
    cis       f32 [n_tok, 32, 2]           cos and sin for the last 64 dimensions at the tokens' positions
    sink      f32 [n_heads]                -inf: none
    ring      u8 [ring_slots, 584]         position p in slot p % ring_slots; the tokens' own rows are in it
    pool      u8 [n_entries, 584] or None  entries, needed where there is a ratio; others are not read
    selected  i32 [n_tok, top_k] or None   entries of each token, each below n_entries; what follows them is not read
    pos       i32 [1]                      position of token 0, at least 0
    returns   f32 [n_tok, n_heads, 512]
    Order:    row t depends on its position and inputs alone, not on n_tok, n_entries, ring_slots or top_k, bit for bit.
    Error:    scores off by 2^-20 of the rows' size as a rule, o by as much times their size; see attn/cases.py.
    Limits:   on a GPU 1 to 8 tokens, at least window + n_tok - 1 slots. Values of rows are finite in FP32, parts of o
              below 2^-100 may be lost. Raises ValueError for shapes that do not go together.
    Source:   spec model.md 2.3 to 2.6, 6.1.
    """
    inputs: Inputs = {"q": q, "cis": cis, "sink": sink, "ring": ring, "pool": pool, "selected": selected, "pos": pos}
    return run(ATTN_DECODE, inputs | {"window": window, "ratio": ratio, "eps": eps})["o"]


def _reference(inputs: Inputs) -> Outputs:
    q, cis = inputs["q"], torch.view_as_complex(inputs["cis"])
    n_tok, window, ratio = q.shape[0], inputs["window"], inputs["ratio"]
    rows = []
    for i in range(n_tok):
        end = int(inputs["pos"]) + i + 1
        packed = ring_read(inputs["ring"], max(0, end - window), end)
        if ratio:
            n = end // ratio
            entries = slice(n) if inputs["selected"] is None else inputs["selected"][i, :n]
            packed = torch.cat((packed, inputs["pool"][entries]))
        rows.append(_ROW.unpack(packed))
    numerics = Numerics()
    o = ref.attn_decode(ref.query(q, cis, inputs["eps"], numerics), rows, inputs["sink"], range(n_tok), numerics)
    return {"o": apply_rope(o, cis.unsqueeze(-2), inverse=True)}


def _max_pool(inputs: Inputs) -> int:
    """The most rows of the pool that a token can attend to."""
    if not inputs["ratio"]:
        return 0
    return int(inputs["pool"].shape[0] if inputs["selected"] is None else inputs["selected"].shape[1])


def _max_spans(inputs: Inputs) -> int:
    return min(_MAX_SPANS, -(-(inputs["window"] + _max_pool(inputs)) // _TILE))


def _check_shapes(inputs: Inputs) -> None:
    """Raises ValueError naming what does not fit."""
    n_tok, n_heads, _ = inputs["q"].shape
    ring, pool, selected = inputs["ring"], inputs["pool"], inputs["selected"]
    want = {
        "q": (n_tok, n_heads, HEAD_DIM),
        "cis": (n_tok, ROPE_DIM // 2, 2),
        "sink": (n_heads,),
        "ring": (ring.shape[0], _ROW.row_bytes),
        "pos": (1,),
    }
    want |= {"pool": (pool.shape[0], _ROW.row_bytes)} if pool is not None else {}
    want |= {"selected": (n_tok, selected.shape[1])} if selected is not None else {}
    for name, shape in want.items():
        if inputs[name].shape != shape:
            raise ValueError(f"attn_decode: {name} has shape {list(inputs[name].shape)} instead of {list(shape)}")
    if not 1 <= n_tok <= 8 or inputs["window"] < 1 or ring.shape[0] < inputs["window"] + n_tok - 1:
        raise ValueError(f"attn_decode: {n_tok} tokens and window {inputs['window']} do not fit {ring.shape[0]} slots")
    if (pool is None) != (inputs["ratio"] == 0) or (pool is None and selected is not None):
        raise ValueError("attn_decode: a pool goes with a ratio, and a selection with a pool")


def _outputs(inputs: Inputs) -> Outputs:
    _check_shapes(inputs)
    q, spans = inputs["q"], _max_spans(inputs)
    n_tok, n_heads, _ = q.shape
    return {
        "o": torch.empty_like(q),
        "partials": torch.empty(n_tok, n_heads, spans, HEAD_DIM, device=q.device),
        "extremes": torch.empty(n_tok, n_heads, spans, 2, device=q.device),
    }


def _calls(inputs: Inputs, outputs: Outputs) -> list[KernelCall]:
    n_tok, n_heads, _ = inputs["q"].shape
    constants = constant_set(N_HEADS=n_heads, RATIO=inputs["ratio"], RING_SLOTS=inputs["ring"].shape[0])
    spans = _max_spans(inputs)
    values = {**inputs, **outputs, "max_pool": _max_pool(inputs), "max_spans": spans}

    def call(entry: Entry, grid: tuple[int, int, int], shared_bytes: int) -> KernelCall:
        pack = ArgPack(entry, {name: values[name] for name, _ in entry.params})
        return KernelCall(entry, constants, grid, (256, 1, 1), shared_bytes, pack, pdl=True)

    return [
        call(_PARTIALS, (spans, -(-n_heads // _HEADS), n_tok), _SHARED_BYTES),
        call(_COMBINE, (HEAD_DIM // _SLICE, n_heads, n_tok), 0),
    ]


ATTN_DECODE = register(
    Operation(
        name="attn_decode",
        reference=_reference,
        outputs=_outputs,
        calls=_calls,
        entries=(_PARTIALS, _COMBINE),
        cases=cases,
        variants=tuple(
            (entry, constant_set(N_HEADS=64, RATIO=ratio, RING_SLOTS=136))
            for entry in (_PARTIALS, _COMBINE)
            for ratio in (0, 4, 128)
        ),
        workspaces=("partials", "extremes"),
        token_inputs={"q": 0, "cis": 0, "selected": 0},
        token_outputs={"o": 0},
    )
)
