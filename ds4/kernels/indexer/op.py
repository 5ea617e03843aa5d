"""``index_score`` and ``index_topk``: which compressed entries a token attends, from raw queries; their kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.cases import Inputs, Outputs
from ds4.kernels.entry import ArgPack, Constants, Entry, KernelCall, constant_set
from ds4.kernels.indexer import ref
from ds4.kernels.indexer.cases import KEY, RATIO, score_cases, topk_cases
from ds4.kernels.numerics import GROUPS
from ds4.kernels.registry import Operation, register, run

WIDTH, ROPE_DIM = 128, 64
SLICE = 16384  # select.cuh: entries that one block selects among
_GROUP, _WARPS, _TILE, _MAX_BLOCKS = 4, 8, 32, 264  # index_score.cu, key_tile.cuh: kGroup, kWarps, kTileKeys
_SCORE = Entry(
    "index_score",
    "indexer/index_score.cu",
    (
        *(("q", "f32*"), ("cis", "f32*"), ("weights", "f32*"), ("keys", "u8*"), ("pos", "i32*"), ("scores", "f32*")),
        *(("weight_scale", "f32"), ("n_tok", "i32"), ("n_entries", "i32"), ("top_k", "i32")),
    ),
    ("N_HEADS",),
)
_TOPK = Entry(
    "index_topk",
    "indexer/index_topk.cu",
    (
        *(("scores", "f32*"), ("pos", "i32*"), ("counter", "u32*"), ("candidates", "i32*"), ("selected", "i32*")),
        *(("n_entries", "i32"), ("top_k", "i32")),
    ),
)


def index_score(
    q: Tensor, cis: Tensor, weights: Tensor, keys: Tensor, pos: Tensor, *, weight_scale: float, top_k: int
) -> Tensor:
    """Scores of the compressed entries, from raw queries.

    I[t, e] = sum_h relu(q[t, h] . key[e]) weights[t, h] weight_scale, with q after RoPE, Hadamard rotation and rounding
    to FP4. Token t is at position p = pos + t and sees n = (p + 1) / 4 entries.

    q        f32 [n_tok, n_heads, 128]   neither rotated nor rounded
    cis      f32 [n_tok, 32, 2]          cos and sin for the last 64 columns at the tokens' positions
    weights  f32 [n_tok, n_heads]        raw; weight_scale is 128^-0.5 n_heads^-0.5
    keys     u8 [n_entries, 68]          ds4.kv.rows.PackedKey; those that no token sees are not read
    pos      i32 [1]                     position of token 0, at least 0
    returns  f32 [n_tok, n_entries]; row t is specified for e < n and only where n > top_k, as otherwise all entries
             are chosen: elsewhere it is NaN on the CPU, and on a GPU whatever was there
    Order:   row t depends on its position and inputs alone, not on n_tok or n_entries, bit for bit.
    Error:   products are exact, sums FP32; a query within rounding of the middle of two FP4 codes may take the other.
    Limits:  on a GPU at most 64 heads; any number of tokens. Raises ValueError for shapes that do not go together.
    Source:  spec model.md 4, 5.2, 5.3.
    """
    inputs: Inputs = {"q": q, "cis": cis, "weights": weights, "keys": keys, "pos": pos}
    return run(INDEX_SCORE, inputs | {"weight_scale": weight_scale, "top_k": top_k})["scores"]


def index_topk(scores: Tensor, pos: Tensor, *, top_k: int) -> Tensor:
    """The ``top_k`` best of the entries that each token sees.

    scores   f32 [n_tok, n_entries]   row t is read up to n = (pos + t + 1) / 4
    pos      i32 [1]                  position of token 0, at least 0
    returns  i32 [n_tok, top_k], rising, then -1 where n < top_k
    Order:   larger score first, of equal scores the lower index; -0 = +0, NaN is larger than any number. Exact.
    Limits:  on a GPU ceil(n_entries / 16384) top_k at most 16384; any number of tokens. Raises ValueError beyond.
    Source:  spec model.md 4.
    """
    return run(INDEX_TOPK, {"scores": scores, "pos": pos, "top_k": top_k})["selected"]


def n_visible(pos: Tensor, n_tok: int) -> Tensor:
    """Entries that each token sees, i64 [n_tok], on the CPU."""
    return (int(pos) + torch.arange(n_tok) + 1) // RATIO


def _score_reference(inputs: Inputs) -> Outputs:
    keys, top_k = inputs["keys"], inputs["top_k"]
    numerics = GROUPS["serve"]
    weights = inputs["weights"] * inputs["weight_scale"]
    scores = torch.full((inputs["q"].shape[0], keys.shape[0]), torch.nan)
    visible = n_visible(inputs["pos"], scores.shape[0]).tolist()
    rows = KEY.unpack(keys[: visible[-1]])
    for t, n in enumerate(visible):
        if n > top_k:
            query = ref.index_query(inputs["q"][t : t + 1], torch.view_as_complex(inputs["cis"][t : t + 1]), numerics)
            scores[t, :n] = ref.index_score(query, rows[:n], weights[t : t + 1], numerics)[0]
    return {"scores": scores}


def _score_outputs(inputs: Inputs) -> Outputs:
    q = inputs["q"]
    return {"scores": torch.zeros(q.shape[0], inputs["keys"].shape[0], device=q.device)}


def _score_calls(inputs: Inputs, outputs: Outputs) -> list[KernelCall]:
    n_tok, n_heads, _ = inputs["q"].shape
    n_entries = inputs["keys"].shape[0]
    want = {
        "q": (n_tok, n_heads, WIDTH),
        "cis": (n_tok, ROPE_DIM // 2, 2),
        "weights": (n_tok, n_heads),
        "keys": (n_entries, KEY.row_bytes),
        "pos": (1,),
        "scores": (n_tok, n_entries),
    }
    tensors = {name: inputs[name] for name in want if name in inputs} | outputs
    for name, shape in want.items():
        if tensors[name].shape != shape:
            raise ValueError(f"index_score: {name} has shape {list(tensors[name].shape)} instead of {list(shape)}")
    if n_tok < 1 or not 1 <= n_heads <= 64 or n_entries < 1:
        raise ValueError(f"index_score: {n_tok} tokens, {n_heads} heads, {n_entries} keys: not some, 1 to 64, some")
    padded = 8 if n_heads <= 8 else -(-n_heads // 16) * 16  # index_score.cu: kHeads
    shared = min(n_tok, _GROUP) * padded * (2 * WIDTH + 4) + _WARPS * _TILE * KEY.row_bytes
    numbers = {"n_tok": n_tok, "n_entries": n_entries, "weight_scale": inputs["weight_scale"], "top_k": inputs["top_k"]}
    groups = -(-n_tok // _GROUP)  # with many of them a block takes more keys, so that it prepares its queries for more
    grid = (min(-(-n_entries // _TILE), _MAX_BLOCKS, max(1, 2 * _MAX_BLOCKS // groups)), groups, 1)
    pack = ArgPack(_SCORE, tensors | numbers)
    return [KernelCall(_SCORE, _heads(n_heads), grid, (32 * _WARPS, 1, 1), shared, pack, pdl=True)]


def _heads(n_heads: int) -> Constants:
    return constant_set(N_HEADS=n_heads)


def _topk_reference(inputs: Inputs) -> Outputs:
    scores, top_k = inputs["scores"], inputs["top_k"]
    mask = ref.index_topk(scores, n_visible(inputs["pos"], scores.shape[0]), top_k)
    selected = torch.full((scores.shape[0], top_k), -1, dtype=torch.int32)
    for row, chosen in zip(selected, mask, strict=True):
        entries = chosen.nonzero().squeeze(1)
        row[: len(entries)] = entries.to(torch.int32)
    return {"selected": selected}


def _topk_outputs(inputs: Inputs) -> Outputs:
    (n_tok, n_entries), top_k, device = inputs["scores"].shape, inputs["top_k"], inputs["scores"].device
    made = {
        "selected": torch.empty(n_tok, top_k, dtype=torch.int32, device=device),
        "counter": torch.zeros(n_tok, dtype=torch.int32, device=device),
    }
    n_slices = -(-n_entries // SLICE)
    if n_slices > 1:
        made["candidates"] = torch.empty(n_tok, n_slices, top_k, dtype=torch.int32, device=device)
    return made


def _topk_calls(inputs: Inputs, outputs: Outputs) -> list[KernelCall]:
    (n_tok, n_entries), top_k = inputs["scores"].shape, inputs["top_k"]
    n_slices = -(-n_entries // SLICE)
    if n_tok < 1 or n_entries < 1 or top_k < 1 or n_slices * top_k > SLICE:
        raise ValueError(
            f"index_topk: top_k {top_k} of scores {[n_tok, n_entries]}: ceil(entries / {SLICE}) top_k of at most "
            f"{SLICE} is needed"
        )
    values = {"candidates": None} | outputs
    values |= {"scores": inputs["scores"], "pos": inputs["pos"], "n_entries": n_entries, "top_k": top_k}
    return [KernelCall(_TOPK, (), (n_slices, n_tok, 1), (512, 1, 1), 0, ArgPack(_TOPK, values), pdl=True)]


INDEX_SCORE = register(
    Operation(
        name="index_score",
        reference=_score_reference,
        outputs=_score_outputs,
        calls=_score_calls,
        entries=(_SCORE,),
        cases=score_cases,
        variants=((_SCORE, _heads(64)),),
        token_inputs={"q": 0, "cis": 0, "weights": 0},
        token_outputs={"scores": 0},
    )
)

INDEX_TOPK = register(
    Operation(
        name="index_topk",
        reference=_topk_reference,
        outputs=_topk_outputs,
        calls=_topk_calls,
        entries=(_TOPK,),
        cases=topk_cases,
        variants=((_TOPK, ()),),
        workspaces=("counter", "candidates"),
        token_inputs={"scores": 0},
        token_outputs={"selected": 0},
    )
)
