"""Cases of ``embed``."""

from __future__ import annotations

from functools import partial

import torch

from ds4.kernels.cases import Case, Close, Compare, Exact, Group, Inputs
from ds4.kernels.common import rope_frequencies
from ds4.kernels.packing import PACKINGS, Planes
from ds4.weights.formats import FORMATS

_CIS = Close(1.2e-7, 0, "both sides within a last place, 2^-24 near 1, of cos and sin of the same FP32 angle")
COMPARE: dict[str, Compare] = {"streams": Exact(), "cis": _CIS}


def frequencies() -> tuple[torch.Tensor, torch.Tensor]:
    """Plain and compressed, f32 [32], of V4-Flash."""
    return (
        rope_frequencies(64, 10000.0, 1.0, 0, 32.0, 1.0),
        rope_frequencies(64, 160000.0, 16.0, 65536, 32.0, 1.0),
    )


def random_inputs(
    seed: int, device: torch.device, *, n_tok: int, hidden: int, vocab: int, name: str, pos: int
) -> Inputs:
    """Tokens at positions ``pos ..``, the first and last rows among them; a table in the format ``name``."""
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(min(vocab, 64), hidden, generator=rng)
    planes = Planes.allocate(PACKINGS[name], vocab, hidden)
    quantize = FORMATS[name].quantize
    assert quantize is not None, name
    data = quantize(rows)
    for first in {0, vocab - len(rows)}:  # random rows of a whole vocabulary would take seconds
        planes.write(*(data if isinstance(data, tuple) else (data,)), first=first)
    tokens = torch.randint(0, len(rows), (n_tok,), generator=rng, dtype=torch.int32)
    tokens[1::2] += vocab - len(rows)
    tokens[-1] = vocab - 1
    plain, compressed = frequencies()
    inputs: Inputs = {"tokens": tokens, "pos": torch.tensor([pos], dtype=torch.int32), **planes.tensors}
    inputs |= {"plain": plain, "compressed": compressed}
    return {k: v.to(device) for k, v in inputs.items()} | {"format": name}


def _case(label: str, group: Group, n_tok: int, hidden: int, vocab: int, name: str, pos: int) -> Case:
    make = partial(random_inputs, n_tok=n_tok, hidden=hidden, vocab=vocab, name=name, pos=pos)
    row = PACKINGS[name].nbytes(1, hidden)
    return Case(label, group, make, COMPARE, bytes_moved=n_tok * (row + 16 * hidden + 4 * 32 * 8 + 4) + 256)


def cases() -> list[Case]:
    """Smoke and edges for the emulation, decode at the dimensions of V4-Flash."""
    return [
        *(_case(f"{name} 8 tokens", "smoke", 8, 576, 96, name, 1001) for name in ("f32", "f16", "bf16", "q8_0")),
        _case("from the start", "edges", 8, 32, 5, "q8_0", 0),
        _case("a prompt's tokens", "edges", 37, 32, 5, "f32", 100),
        _case("around the first window", "edges", 8, 32, 5, "f32", 124),
        _case("the last positions of 1M", "edges", 8, 288, 7, "q8_0", 2**20 - 8),
        _case("the last positions that FP32 counts", "edges", 2, 32, 5, "f32", 2**24 - 2),
        *(_case(f"{name} n={n}", "decode", n, 4096, 129280, name, 4095) for name in ("bf16", "q8_0") for n in (1, 8)),
    ]
