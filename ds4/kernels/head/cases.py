"""Cases of ``lm_head``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ds4.kernels.cases import Case, Close, Compare, Exact, Group, Inputs
from ds4.kernels.packing import PACKINGS, Planes
from ds4.weights.formats import FORMATS

# A sum of d FP32 products in another order: errors grow as sqrt(d) roundings of partial sums of magnitude 1 to 4 (the
# makers give logits a spread of 1), so 4096 terms stay below 64 * 4 * 2^-24 = 1.5e-5.
_LOGITS = Close(1.5e-5, 2e-6, "FP32 dot products summed in another order")
COMPARE: dict[str, Compare] = {"logits": _LOGITS, "token": Exact(), "top": _LOGITS, "status": Exact()}
FORMAT_NAMES = ("f32", "f16", "bf16", "q8_0")
_GAP = 1e-3  # between a row's two largest logits: above any order of summation
_ROWS = 4096  # rows made and packed at a time


def packed(rows: Tensor, name: str) -> Planes:
    """Planes of f32 [n, d], rounded to the format, on its device."""
    planes = Planes.allocate(PACKINGS[name], rows.shape[0], rows.shape[1], rows.device)
    quantize = FORMATS[name].quantize
    assert quantize is not None, name
    for row in range(0, rows.shape[0], _ROWS):
        data = quantize(rows[row : row + _ROWS])
        planes.write(*(data if isinstance(data, tuple) else (data,)), first=row)
    return planes


def inputs_of(x: Tensor, planes: Planes, device: torch.device) -> Inputs:
    """Inputs of the operation, moved to the device."""
    tensors = {name: plane.to(device) for name, plane in planes.tensors.items()}
    return {"x": x.to(device), "format": planes.packing.format, **tensors}


def _random(seed: int, device: torch.device, *, n_tok: int, hidden: int, vocab: int, name: str) -> Inputs:
    """Logits of spread 1, and for each token a row of its own that wins by more than rounding can undo."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tok, hidden, generator=rng)
    weight = torch.randn(vocab, hidden, generator=rng) / hidden**0.5
    winners = torch.randperm(vocab, generator=rng)[:n_tok]
    weight[winners] += x[: len(winners)] * (6 / hidden)
    planes = packed(weight, name)
    if vocab > 1 and n_tok <= vocab:
        # Rows at a time: the decoded matrix of a real head is 2 GB.
        tiles = [planes.rows(row, min(row + _ROWS, vocab)).decode() for row in range(0, vocab, _ROWS)]
        top = torch.cat([x @ tile.T for tile in tiles], dim=1).topk(2, dim=1).values
        if float((top[:, 0] - top[:, 1]).min()) < _GAP:
            return _random(seed + 1000, device, n_tok=n_tok, hidden=hidden, vocab=vocab, name=name)
    return inputs_of(x, planes, device)


def _ties(seed: int, device: torch.device, name: str) -> Inputs:
    """Small integers, whose sums are exact in any order: the largest logit several times, in rows of several blocks."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (5, 1024), generator=rng).float()
    weight = torch.randint(-1, 2, (101, 1024), generator=rng).float()
    weight[70] = weight[66] = weight[33] = x[0].sign()
    weight[100] = weight[99] = x[1].sign()
    x[2] = 0  # all logits are 0
    weight[:, 31::32] = 127 / 64  # the largest magnitude of each Q8_0 block, so that d = 1 / 64 and integers are exact
    x[:, 31::32] = 0
    return inputs_of(x, packed(weight, name), device)


def _negative(seed: int, device: torch.device) -> Inputs:
    """Every logit below zero, so that a maximum that begins with zero shows; the last row, alone in its block, wins."""
    x = torch.ones(2, 1024)
    weight = -torch.arange(33, 0, -1.0).unsqueeze(1).expand(33, 1024).contiguous()
    return inputs_of(x, packed(weight, "f32"), device)


def _not_finite(seed: int, device: torch.device) -> Inputs:
    """Tokens whose largest logit is NaN, +inf, finite beside -inf, and -inf only."""
    x, weight = torch.zeros(4, 32), torch.zeros(33, 32)
    x[:, :4] = torch.eye(4)
    weight[:, :4] = torch.linspace(-1, 1, 33).unsqueeze(1)
    weight[:, 3] = -3e38
    x[3, 3] = 3e38
    x[1, 1] = 3e38
    weight[20, 1] = 3e38
    x[2, 2] = 3e38
    weight[:, 2] = -3e38
    weight[25, 2] = 0.5
    x[0, 0] = torch.nan
    return inputs_of(x, packed(weight, "f32"), device)


def _one_nan(seed: int, device: torch.device) -> Inputs:
    """Damaged rows: the first NaN is the token, before a larger row and before an infinity."""
    weight = torch.linspace(1, 2, 33).unsqueeze(1).repeat(1, 32)
    weight[10] = torch.inf
    weight[20] = weight[32] = torch.nan
    return inputs_of(torch.ones(2, 32), packed(weight, "bf16"), device)


def _case(
    name: str, group: Group, make: Callable[[int, torch.device], Inputs], shape: tuple[int, int, int, str]
) -> Case:
    n_tok, hidden, vocab, fmt = shape
    moved = PACKINGS[fmt].nbytes(vocab, hidden) + 4 * n_tok * (hidden + vocab)
    return Case(name, group, make, COMPARE, bytes_moved=moved, flops=2 * n_tok * vocab * hidden)


def _draw(title: str, group: Group, n_tok: int, hidden: int, vocab: int, name: str) -> Case:
    make = partial(_random, n_tok=n_tok, hidden=hidden, vocab=vocab, name=name)
    return _case(title, group, make, (n_tok, hidden, vocab, name))


def cases() -> list[Case]:
    """Smoke and edges for the emulation, decode at the dimensions of V4-Flash."""
    smoke = [_draw(f"{name} 8 tokens", "smoke", 8, 544, 150, name) for name in FORMAT_NAMES]
    smoke += [_draw(f"{name} several rounds", "smoke", 2, 2080, 33, name) for name in ("bf16", "q8_0")]
    edges = [
        *(_draw(f"n={n}", "edges", n, 64, 101, "bf16") for n in (3, 5, 7)),
        _draw("vocabulary of one", "edges", 1, 32, 1, "f16"),
        _draw("one block of Q8_0 a row", "edges", 2, 32, 33, "q8_0"),
        *(_case(f"ties {name}", "edges", partial(_ties, name=name), (5, 1024, 101, name)) for name in FORMAT_NAMES),
        _case("negative logits", "edges", _negative, (2, 1024, 33, "f32")),
        _case("not finite", "edges", _not_finite, (4, 32, 33, "f32")),
        _case("one NaN", "edges", _one_nan, (2, 32, 33, "bf16")),
    ]
    decode = [
        _draw(f"{name} n={n}", "decode", n, 4096, 129280, name) for name in ("bf16", "f16", "q8_0") for n in (1, 2, 8)
    ]
    return [*smoke, *edges, *decode]
