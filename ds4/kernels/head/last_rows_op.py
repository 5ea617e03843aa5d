"""``last_rows``: the last tokens of a chunk, for the language-model head.

Inputs, of up to n_rows tokens, what ``hc_head`` takes of them:
    y          f32 [n_rows, d], prev_post f32 [n_rows, 4], prev_comb f32 [n_rows, 4, 4]: output of the last sublayer
    streams    f32 [n_rows, 4, d]
    count      i32 [1] or None      only the first ``count`` tokens are there; None: all
    n          int                  how many tokens are wanted
Results, of tokens count - n .. count - 1:
    y1 f32 [n, d], streams1 f32 [n, 4, d], post1 f32 [n, 4], comb1 f32 [n, 4, 4]
Rows of tokens before the first, where count < n, are not written.

Order, Error: copies.
Limits:  n 1 to 8 and at most n_rows; d a multiple of 4. ValueError where shapes do not go together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.cases import Case, Exact, Group, Inputs, Outputs
from ds4.kernels.entry import ArgPack, Entry, KernelCall
from ds4.kernels.mhc.op import N_STREAMS
from ds4.kernels.registry import Operation, register
from ds4.kernels.verify import poison

MOST = 8  # tokens of hc_head and lm_head
_THREADS = 256
_COPIED = {"y": "y1", "streams": "streams1", "prev_post": "post1", "prev_comb": "comb1"}
_LAST_ROWS = Entry(
    "last_rows",
    "head/last_rows.cu",
    (
        *((name, "f32*") for name in ("y", "streams", "post", "comb")),
        ("count", "i32*"),
        *((name, "f32*") for name in _COPIED.values()),
        ("d", "i32"),
        ("n_rows", "i32"),
    ),
)


def _outputs(inputs: Inputs) -> Outputs:
    return {
        new: torch.empty(inputs["n"], *inputs[name].shape[1:], device=inputs[name].device)
        for name, new in _COPIED.items()
    }


def _reference(inputs: Inputs) -> Outputs:
    """What is not specified is as ds4.kernels.verify leaves it."""
    n, n_rows = inputs["n"], inputs["y"].shape[0]
    n_live = n_rows if inputs["count"] is None else min(int(inputs["count"]), n_rows)
    results = _outputs(inputs)
    poison(results.values())
    for name, new in _COPIED.items():
        last = inputs[name][max(0, n_live - n) : n_live]
        results[new][n - len(last) :] = last
    return results


def _calls(inputs: Inputs, outputs: Outputs) -> list[KernelCall]:
    (n_rows, d), n = inputs["y"].shape, inputs["n"]
    shapes = {"streams": (n_rows, N_STREAMS, d), "prev_post": (n_rows, N_STREAMS), "count": (1,)}
    for name, shape in (shapes | {"prev_comb": (n_rows, N_STREAMS, N_STREAMS)}).items():
        if inputs[name] is not None and inputs[name].shape != shape:
            raise ValueError(f"last_rows: {name} is {list(inputs[name].shape)}, not {list(shape)}")
    if not 1 <= n <= min(MOST, n_rows) or d % 4:
        raise ValueError(f"last_rows: {n} of {n_rows} rows of {d}: 1 to {MOST} of rows of a multiple of 4 are needed")
    values = {name: inputs[name] for name in ("y", "streams", "count")} | outputs
    values |= {"post": inputs["prev_post"], "comb": inputs["prev_comb"], "d": d, "n_rows": n_rows}
    grid = (-(-(1 + N_STREAMS) * d // (4 * _THREADS)), n, 1)
    return [KernelCall(_LAST_ROWS, (), grid, (_THREADS, 1, 1), 0, ArgPack(_LAST_ROWS, values), pdl=True)]


def _case(name: str, group: Group, n_rows: int, n: int, d: int, count: int | None = None) -> Case:
    def make(seed: int, device: torch.device) -> Inputs:
        rng = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(n_rows, *shape, generator=rng).to(device)

        inputs: Inputs = {"y": normal(d), "streams": normal(N_STREAMS, d), "prev_post": normal(N_STREAMS), "n": n}
        inputs["prev_comb"] = normal(N_STREAMS, N_STREAMS)
        inputs["count"] = None if count is None else torch.tensor([count], dtype=torch.int32, device=device)
        return inputs

    moved = 2 * 4 * n * ((1 + N_STREAMS) * (d + N_STREAMS))
    return Case(name, group, make, dict.fromkeys(_COPIED.values(), Exact()), moved)


def _cases() -> list[Case]:
    return [
        _case("3 of 11, of 13 rows", "smoke", 13, 3, 324, 11),
        _case("all of 8", "edges", 8, 8, 32),
        _case("8 of 5", "edges", 9, 8, 36, 5),
        _case("one of one", "edges", 1, 1, 4, 1),
        _case("one of 4096", "decode", 4096, 1, 4096, 4096),
        _case("8 of 4096", "decode", 4096, 8, 4096, 4000),
    ]


LAST_ROWS = register(
    Operation(
        name="last_rows",
        reference=_reference,
        outputs=_outputs,
        calls=_calls,
        entries=(_LAST_ROWS,),
        cases=_cases,
        variants=((_LAST_ROWS, ()),),
        decode=False,
    )
)
