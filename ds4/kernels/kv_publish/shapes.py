"""Shapes of the cache writers' tensors, in both forms."""

from __future__ import annotations

from torch import Tensor

from ds4.kernels.cases import Inputs
from ds4.kernels.kv_publish import ref
from ds4.kernels.kv_publish.cases import Kind

HEAD_DIM, ROPE_PAIRS, KEY_DIM = 512, 32, 128
_PROJECTED = ("q_a", "kv", "cis")
_COMPRESSED = ("comp_kv", "comp_gate", "entry_cis")
TOKEN_INPUTS: dict[Kind, tuple[str, ...]] = {
    "swa": _PROJECTED,
    "hca": (*_PROJECTED, *_COMPRESSED),
    "csa": (*_PROJECTED, *_COMPRESSED, "idx_kv", "idx_gate"),
}
"""Inputs with a row a token."""


def ratio_of(kind: Kind, inputs: Inputs) -> int:
    """Tokens of a compressor's window; 0 without one."""
    return 0 if kind == "swa" else ref.CSA_RATIO if kind == "csa" else inputs["ape"].shape[0]


def _expected(kind: Kind, n_tok: int, q_lora: int, ratio: int) -> dict[str, tuple[int | None, ...]]:
    """Shape of every tensor; None: any size."""
    turn = (n_tok, ROPE_PAIRS, 2)
    shapes: dict[str, tuple[int | None, ...]] = {"q_a": (n_tok, q_lora), "kv": (n_tok, HEAD_DIM), "pos": (1,)}
    shapes |= {"cis": turn, "q_norm": (q_lora,), "kv_norm": (HEAD_DIM,), "ring": (None, ref.ROW.row_bytes)}
    if kind != "swa":
        width = HEAD_DIM * (2 if kind == "csa" else 1)
        shapes |= {"comp_kv": (n_tok, width), "comp_gate": (n_tok, width), "entry_cis": turn, "ape": (ratio, width)}
        shapes |= {"comp_norm": (HEAD_DIM,), "state": (None, 2, width), "pool": (None, ref.ROW.row_bytes)}
    if kind == "csa":
        width = 2 * KEY_DIM
        shapes |= {"idx_kv": (n_tok, width), "idx_gate": (n_tok, width), "idx_ape": (ratio, width)}
        shapes |= {"idx_norm": (KEY_DIM,), "key_state": (None, 2, width), "keys": (None, ref.KEY.row_bytes)}
    return shapes


def check_inputs(name: str, kind: Kind, inputs: Inputs, most: int, slots: dict[str, int]) -> None:
    """Raises ValueError, beginning with ``name``, for shapes that do not go together, more than ``most`` tokens, or a
    tensor with fewer rows than ``slots`` names for it."""
    (n_tok, q_lora), ratio = inputs["q_a"].shape, ratio_of(kind, inputs)
    for key, want in _expected(kind, n_tok, q_lora, ratio).items():
        shape = tuple(inputs[key].shape)
        if len(shape) != len(want) or any(n not in (None, m) for n, m in zip(want, shape, strict=True)):
            raise ValueError(f"{name}: {key} is {list(shape)}, not {list(want)}")
    if not 1 <= n_tok <= most or q_lora % 4 or ratio % 4:
        raise ValueError(f"{name}: {n_tok} tokens, q_lora {q_lora}, ratio {ratio}: 1 to {most}, multiples of 4")
    for key, least in slots.items():
        if key in inputs and inputs[key].shape[0] < least:
            raise ValueError(f"{name}: {key} has {inputs[key].shape[0]} slots; {least} are needed")
    if kind == "csa" and inputs["pool"].shape[0] != inputs["keys"].shape[0]:
        raise ValueError(f"{name}: pool and keys have different numbers of entries")


def sizes(inputs: Inputs) -> dict[str, Tensor | float | int]:
    """Scalars that kernels take beside the tensors they belong to, by their names there."""
    rows = {"ring_slots": "ring", "state_slots": "state", "key_slots": "key_state", "n_entries": "pool", "ratio": "ape"}
    return {name: inputs[tensor].shape[0] for name, tensor in rows.items() if tensor in inputs}
