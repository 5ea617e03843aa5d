"""Cases of the three ``kv_publish`` operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ds4.kernels.cases import Case, Close, Compare, Exact, Group, Inputs
from ds4.kernels.common import rope_angles, rope_frequencies
from ds4.kernels.kv_publish import ref

Kind = Literal["swa", "csa", "hca"]
EPS = 1e-6
RING_SLOTS, MAX_DRAFT = 136, 8
MUTATES: dict[Kind, tuple[str, ...]] = {
    "swa": ("ring",),
    "hca": ("ring", "state", "pool"),
    "csa": ("ring", "state", "pool", "key_state", "keys"),
}
_QR = Close(0, 1e-6, "a sum of squares in another order, a root and two products: a few 2^-24 of the value")
# What sums, exponentials and roots may be off by, of a value and of its row's root mean square: makers draw again until
# that changes no stored code. Measured as 3e-7; a GPU's expf and rsqrtf add 2^-23 each, which the norm can enlarge.
_MARGIN = 2e-6


def lookback(kind: Kind, ratio: int) -> int:
    """Tokens that an entry is pooled from."""
    return ratio if kind == "hca" else 2 * ratio


def _clear(x: Tensor, pack: Callable[[Tensor], Tensor]) -> Tensor:
    """bool [n]: rows f32 [n, d] that pack to the same bytes a margin nearer to zero and farther from it."""
    margin = x.sign() * (x.abs() + x.square().mean(1, keepdim=True).sqrt()) * _MARGIN
    return (pack(x + margin) == pack(x - margin)).all(1)


def clear_of_boundaries(inputs: Inputs) -> dict[str, Tensor]:
    """bool [n_tok] each: tokens of which no rounding of sums can change the row ("kv"), the entry ("comp") or the key
    ("idx") that they close."""
    start, eps, n_tok = int(inputs["pos"]), inputs["eps"], inputs["kv"].shape[0]
    row = ref.ring_row(inputs["kv"], inputs["kv_norm"], torch.view_as_complex(inputs["cis"]), eps)
    clear = {"kv": _clear(row, ref.ROW.pack)}
    for prefix, names in ref.COMPRESSORS.items():
        if names[0] not in inputs:
            continue
        clear[prefix] = torch.ones(n_tok, dtype=torch.bool)
        kv, gate, ape, norm, state, _ = (inputs[name] for name in names)
        state = ref.publish_raw(kv, gate, ape, ref.lengthened(state, start, n_tok), start)
        cis, ratio = torch.view_as_complex(inputs["entry_cis"]), ape.shape[0]
        pack = ref.KEY.pack if prefix == "idx" else ref.ROW.pack
        first, entries = ref.closed_entries(state, start, n_tok, norm, cis, eps, ratio, indexer=prefix == "idx")
        if len(entries):
            clear[prefix][(first + 1) * ratio - 1 - start :: ratio] = _clear(entries, pack)
    return clear


def angles(pos: Tensor) -> Tensor:
    """f32 [n, 32, 2] of positions i64 [n], with the frequencies of the compressed layers of V4-Flash."""
    frequencies = rope_frequencies(64, 160000.0, 16.0, 65536, 32.0, 1.0)
    return torch.view_as_real(rope_angles(pos, frequencies)).contiguous()


def random_inputs(
    seed: int,
    device: torch.device,
    *,
    kind: Kind,
    n_tok: int,
    pos: int,
    q_lora: int = 128,
    ratio: int | None = None,
    n_entries: int | None = None,
    kv_scale: float = 1.0,
    gate_scale: float = 2.0,
) -> Inputs:
    """Tokens at positions ``pos ..``, and caches that hold other values; ``ratio`` of HCA, ``n_entries`` of room."""
    rng = torch.Generator().manual_seed(seed * 1000 + pos + n_tok)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=rng) * scale

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8)

    def gain(n: int) -> Tensor:  # not near zero, where no draw would be far from a boundary of bf16
        return normal(n).sign() * (0.5 + torch.rand(n, generator=rng))

    def raw_rows(slots: int, width: int) -> Tensor:
        return torch.stack([normal(slots, width, scale=scale) for scale in (kv_scale, gate_scale)], dim=1)

    positions = torch.arange(pos, pos + n_tok)
    inputs: Inputs = {"q_a": normal(n_tok, q_lora), "pos": torch.tensor([pos], dtype=torch.int32), "eps": EPS}
    inputs |= {"cis": angles(positions), "q_norm": gain(q_lora), "kv_norm": gain(512)}
    inputs["ring"] = codes(RING_SLOTS, ref.ROW.row_bytes)
    raw = {"kv": (512, kv_scale)}
    if kind != "swa":
        ratio = ref.CSA_RATIO if kind == "csa" else ratio or 128
        slots, width = lookback(kind, ratio) + MAX_DRAFT, 1024 if kind == "csa" else 512
        room = (pos + n_tok) // ratio if n_entries is None else n_entries
        inputs["entry_cis"] = angles((positions + 1 - ratio).clamp_min(0))
        inputs |= {"ape": normal(ratio, width), "comp_norm": gain(512), "pool": codes(room, ref.ROW.row_bytes)}
        raw |= {"comp_kv": (width, kv_scale), "comp_gate": (width, gate_scale)}
        inputs["state"] = raw_rows(slots, width)
    if kind == "csa":
        inputs |= {"idx_ape": normal(4, 256), "idx_norm": gain(128), "keys": codes(room, ref.KEY.row_bytes)}
        raw |= {"idx_kv": (256, kv_scale), "idx_gate": (256, gate_scale)}
        inputs["key_state"] = raw_rows(slots, 256)
    inputs |= {name: torch.empty(n_tok, width) for name, (width, _) in raw.items()}
    clear = dict.fromkeys(("kv", "comp", "idx"), torch.zeros(n_tok, dtype=torch.bool))
    while not all(tokens.all() for tokens in clear.values()):
        for name, (width, scale) in raw.items():
            bad = ~clear[name.split("_")[0]]
            inputs[name][bad] = normal(int(bad.sum()), width, scale=scale)
        if kind == "hca" and not clear["comp"].all():  # an entry is little but its state
            inputs["state"] = raw_rows(slots, 512)
        clear = clear_of_boundaries(inputs)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _bytes(kind: Kind, n_tok: int, pos: int, q_lora: int, ratio: int) -> int:
    """Bytes that have to move: projections and raw rows once, and for each closed window what it is pooled from."""
    total = n_tok * (4 * (2 * q_lora + 512 + 64) + 584) + 4 * (q_lora + 512)
    for width, entry_bytes in {"swa": (), "hca": ((512, 584),), "csa": ((1024, 584), (256, 68))}[kind]:
        closed = (pos + n_tok) // ratio - pos // ratio
        raw = 8 * (512 if width == 1024 else 128 if width == 256 else width)
        total += n_tok * 4 * 5 * width + closed * (lookback(kind, ratio) * raw + entry_bytes + 256)
    return total


def _case(name: str, group: Group, kind: Kind, n_tok: int, pos: int, **options: Any) -> Case:
    make = partial(random_inputs, kind=kind, n_tok=n_tok, pos=pos, **options)
    compare: dict[str, Compare] = {"qr": _QR} | dict.fromkeys(MUTATES[kind], Exact())
    q_lora, ratio = int(options.get("q_lora", 128)), int(options.get("ratio", 4 if kind == "csa" else 128))
    return Case(name, group, make, compare, _bytes(kind, n_tok, pos, q_lora, ratio))


def publish_cases(kind: Kind) -> list[Case]:
    """Launches that close windows and that do not, at both ends of the rings; decode at the dimensions of V4-Flash."""
    flash = {"q_lora": 1024}
    if kind == "swa":
        return [
            _case("8 tokens around the ring", "smoke", kind, 8, 130),
            _case("long latent", "edges", kind, 1, 0, q_lora=1536),
            _case("short latent, tiny values", "edges", kind, 3, 7, q_lora=132, kv_scale=1e-20),
            *(_case(f"n={n}", "decode", kind, n, 4095, **flash) for n in (1, 8)),
        ]
    if kind == "hca":
        return [
            _case("8 tokens close the first window", "smoke", kind, 8, 124),
            _case("8 tokens around the state", "edges", kind, 8, 250, q_lora=1536),
            _case("nothing closed, no room", "edges", kind, 3, 3),
            _case("closed beyond the room", "edges", kind, 1, 255, n_entries=1),
            _case("windows of 12", "edges", kind, 2, 34, ratio=12),
            _case("steep gates", "edges", kind, 1, 127, gate_scale=3e4, kv_scale=1e17),
            *(_case(f"n={n} closes a window", "decode", kind, n, 4095, n_entries=1024, **flash) for n in (1, 8)),
            _case("n=1 closes none", "decode", kind, 1, 4096, n_entries=1024, **flash),
        ]
    return [
        _case("8 tokens close two windows", "smoke", kind, 8, 1002),
        _case("8 tokens from the start", "edges", kind, 8, 0, q_lora=1536),
        _case("nothing closed, no room", "edges", kind, 3, 0),
        _case("closed beyond the room", "edges", kind, 2, 7, n_entries=1),
        _case("steep gates", "edges", kind, 4, 16, gate_scale=3e4, kv_scale=1e17),
        *(_case(f"n={n} closes a window", "decode", kind, n, 4095, n_entries=2048, **flash) for n in (1, 8)),
        _case("n=1 closes none", "decode", kind, 1, 4096, n_entries=2048, **flash),
    ]
