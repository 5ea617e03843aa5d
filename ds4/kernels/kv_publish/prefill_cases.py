"""Cases of the three ``kv_prefill`` operations."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ds4.kernels.cases import Case, Compare, Exact, Group, Inputs
from ds4.kernels.common import rms_norm
from ds4.kernels.kv_publish import cases, ref
from ds4.kernels.kv_publish.cases import EPS, MUTATES, Kind

_Q_LORA = 644  # two rounds of a block's threads, the second one short
_MARGIN = 2e-6  # relative: a sum of squares in another order, a root and two products


def _latent(n: int, norm: Tensor, rng: torch.Generator) -> Tensor:
    """q_a f32 [n, q_lora] whose normed values no rounding of sums brings to another BF16 number."""
    q_a, bad = torch.empty(n, len(norm)), torch.ones(n, dtype=torch.bool)
    while bad.any():
        q_a[bad] = torch.randn(int(bad.sum()), len(norm), generator=rng)
        qr = rms_norm(q_a, norm, EPS)
        bad = ((qr * (1 + _MARGIN)).bfloat16() != (qr * (1 - _MARGIN)).bfloat16()).any(1)
    return q_a


def random_inputs(
    seed: int,
    device: torch.device,
    *,
    kind: Kind,
    n_rows: int,
    pos: int,
    count: int | None = None,
    window: int = 8,
    ring_slots: int = 16,
    q_lora: int = _Q_LORA,
    **options: Any,
) -> Inputs:
    """A chunk at positions ``pos ..``, and caches that hold other values; options as those of kv_publish's maker."""
    cpu = torch.device("cpu")
    inputs = cases.random_inputs(seed, cpu, kind=kind, n_tok=n_rows, pos=pos, q_lora=q_lora, **options)
    rng = torch.Generator().manual_seed(seed)
    inputs["q_a"] = _latent(n_rows, inputs["q_norm"], rng)
    inputs["ring"] = torch.randint(0, 256, (ring_slots, ref.ROW.row_bytes), generator=rng, dtype=torch.uint8)
    inputs |= {"window": window, "count": None if count is None else torch.tensor([count], dtype=torch.int32)}
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _bytes(kind: Kind, n_rows: int, q_lora: int) -> int:
    """Bytes that have to move: projections once, results once."""
    raw = {"swa": 0, "hca": 2 * 512, "csa": 2 * (1024 + 256)}[kind]
    stored = {"swa": 0, "hca": 584 // 128, "csa": (584 + 68) // 4}[kind]
    return n_rows * (4 * (q_lora + 512 + 64 + raw) + 2 * q_lora + 584 + stored)


def _case(name: str, group: Group, kind: Kind, n_rows: int, pos: int, **options: Any) -> Case:
    make = partial(random_inputs, kind=kind, n_rows=n_rows, pos=pos, **options)
    compare: dict[str, Compare] = dict.fromkeys(("qr", "rows", *MUTATES[kind]), Exact())
    return Case(name, group, make, compare, _bytes(kind, n_rows, int(options.get("q_lora", _Q_LORA))))


def prefill_cases(kind: Kind) -> list[Case]:
    """Chunks shorter and longer than ring and state, at the start of a text and within; and of V4-Flash's size."""
    flash = {"q_lora": 1024, "window": 128, "ring_slots": 136}
    large = [
        _case("4096 tokens", "decode", kind, 4096, 8192, **flash),
        _case("100 of 512 tokens", "decode", kind, 512, 4095, count=100, **flash),
    ]
    if kind == "swa":
        return [
            _case("longer than the ring, near the start", "smoke", kind, 21, 5, count=18),
            _case("one token", "edges", kind, 1, 0),
            _case("one of 9, a ring of the window", "edges", kind, 9, 1001, count=1, ring_slots=8),
            _case("no window", "edges", kind, 3, 7, window=0, kv_scale=1e-20),
            *large,
        ]
    if kind == "hca":
        return [
            _case("longer than the state", "smoke", kind, 29, 7, count=28, ratio=12),
            _case("one token closes a window", "edges", kind, 1, 127),
            _case("8 tokens around the state", "edges", kind, 8, 250),
            _case("two windows begin and end", "edges", kind, 9, 4, ratio=4),
            _case("nothing closed, no room", "edges", kind, 3, 3),
            _case("closed beyond the room", "edges", kind, 9, 126, count=3, n_entries=0),
            _case("closed behind the live tokens", "edges", kind, 9, 126, count=1),
            *large,
        ]
    return [
        _case("longer than the states", "smoke", kind, 22, 6, count=19),
        _case("from the start", "edges", kind, 9, 0),
        _case("one token closes a window", "edges", kind, 1, 3),
        _case("nothing closed, no room", "edges", kind, 3, 0),
        _case("closed beyond the room", "edges", kind, 9, 2, count=6, n_entries=1),
        _case("one of 9", "edges", kind, 9, 1002, count=1),
        *large,
    ]
