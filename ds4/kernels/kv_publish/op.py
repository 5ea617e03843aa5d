"""``kv_publish``: what attention will read of a launch's tokens goes to the caches. One operation a kind of layer. The
prefill form, ``kv_prefill``, is registered from here.

Inputs of all three:
    q_a     f32 [n_tok, q_lora], kv f32 [n_tok, 512]: projections of the tokens at positions pos[0], pos[0] + 1, ...
    pos     i32 [1]
    cis     f32 [n_tok, 32, 2]          (cos, sin) of the layer's table at the tokens' positions
    q_norm  f32 [q_lora], kv_norm f32 [512], eps float
    ring    u8 [ring_slots, 584]        UPDATED IN PLACE: position p in row p % ring_slots
Compressed layers, C = 1024 (CSA) or 512 (HCA) and ratio = 4 or that of ape:
    comp_kv, comp_gate f32 [n_tok, C]; ape f32 [ratio, C], comp_norm f32 [512]
    entry_cis  f32 [n_tok, 32, 2]       at the first position of a window that the token closes
    state   f32 [state_slots, 2, C]     UPDATED IN PLACE: (kv, gate + ape[p % ratio]) in p % state_slots
    pool    u8 [n_entries, 584]         UPDATED IN PLACE: entry (p + 1) / ratio - 1 where p closes a window
CSA layers, for the indexer:
    idx_kv, idx_gate f32 [n_tok, 256]; idx_ape f32 [4, 256], idx_norm f32 [128]
    key_state  f32 [key_slots, 2, 256], keys u8 [n_entries, 68]   UPDATED IN PLACE, as state and pool
Result:
    qr      f32 [n_tok, q_lora]         rms_norm(q_a) q_norm
Rows and keys are packed as ds4.kv.rows packs them.  Several windows may close in one launch.

Order:   a token's bytes do not depend on n_tok, nor on how earlier tokens were split into launches, bit for bit.
Error:   qr and what is packed differ from FP32 by the order of sums and a few roundings; raw rows are exact.
Limits:  n_tok 1 to 8; q_lora and an HCA layer's ratio multiples of 4; 512 columns, of which 64 turn, keys of 128.
         A state has 8 + n_tok - 1 slots or more (CSA) or ratio + n_tok - 1 (HCA); a ring has n_tok or more, and needs
         window + n_tok - 1 for every token of the launch to attend a full window. An entry that pool has no row for is
         not written. ValueError where shapes do not go together.
Source:  spec model.md 2.1, 2.3, 3, 5.1 to 5.3, 6; kernels.md b.4.
"""

from __future__ import annotations

from functools import partial

import torch

from ds4.kernels.cases import Inputs, Outputs
from ds4.kernels.entry import ArgPack, Entry, KernelCall, constant_set
from ds4.kernels.kv_publish import ref
from ds4.kernels.kv_publish.cases import MUTATES, Kind, lookback, publish_cases
from ds4.kernels.kv_publish.prefill_op import KV_PREFILL
from ds4.kernels.kv_publish.shapes import TOKEN_INPUTS, check_inputs, ratio_of, sizes
from ds4.kernels.registry import Operation, register

__all__ = ["KV_PREFILL", "KV_PUBLISH_CSA", "KV_PUBLISH_HCA", "KV_PUBLISH_SWA"]

MAX_TOKENS = 8
_BLOCK = {"swa": 128, "csa": 128, "hca": 512}  # kv_publish.cu: threads, and roles of a token
_ROLES = {"swa": 2, "csa": 6, "hca": 4}

_HEAD = (("q_a", "f32*"), ("kv", "f32*"))
_COMPRESSOR = (("comp_kv", "f32*"), ("comp_gate", "f32*"))
_INDEXER = (("idx_kv", "f32*"), ("idx_gate", "f32*"))
_NORMS = (("q_norm", "f32*"), ("kv_norm", "f32*"))
_ENTRY_WEIGHTS = (("ape", "f32*"), ("comp_norm", "f32*"))
_KEY_WEIGHTS = (("idx_ape", "f32*"), ("idx_norm", "f32*"))
_WHERE = (("pos", "i32*"), ("cis", "f32*"))
_ENTRY_CIS = (("entry_cis", "f32*"),)
_RING = (("ring", "u8*"),)
_POOL = (("state", "f32*"), ("pool", "u8*"))
_KEYS = (("key_state", "f32*"), ("keys", "u8*"))
_RESULT = (("qr", "f32*"), ("eps", "f32"), ("ring_slots", "i32"))
_PARAMS = {
    "swa": (*_HEAD, *_WHERE, *_NORMS, *_RING, *_RESULT),
    "hca": (
        *(*_HEAD, *_COMPRESSOR, *_WHERE, *_ENTRY_CIS, *_NORMS, *_ENTRY_WEIGHTS, *_RING, *_POOL, *_RESULT),
        *(("state_slots", "i32"), ("n_entries", "i32"), ("ratio", "i32")),
    ),
    "csa": (
        *(*_HEAD, *_COMPRESSOR, *_INDEXER, *_WHERE, *_ENTRY_CIS, *_NORMS, *_ENTRY_WEIGHTS, *_KEY_WEIGHTS),
        *(*_RING, *_POOL, *_KEYS, *_RESULT),
        *(("state_slots", "i32"), ("key_slots", "i32"), ("n_entries", "i32")),
    ),
}
_ENTRIES = {
    kind: Entry(f"kv_publish_{kind}", "kv_publish/kv_publish.cu", params, ("Q_LORA",))
    for kind, params in _PARAMS.items()
}


def _outputs(inputs: Inputs) -> Outputs:
    return {"qr": torch.empty_like(inputs["q_a"])}


def _calls(inputs: Inputs, outputs: Outputs, kind: Kind) -> list[KernelCall]:
    entry, (n_tok, q_lora) = _ENTRIES[kind], inputs["q_a"].shape
    state_slots = lookback(kind, ratio_of(kind, inputs)) + n_tok - 1
    slots = {"ring": n_tok, "state": state_slots, "key_state": state_slots}
    check_inputs(f"kv_publish_{kind}", kind, inputs, MAX_TOKENS, slots)
    values = sizes(inputs) | inputs | outputs
    grid, block = (_ROLES[kind], n_tok, 1), (_BLOCK[kind], 1, 1)
    pack = ArgPack(entry, {name: values[name] for name, _ in entry.params})
    return [KernelCall(entry, constant_set(Q_LORA=q_lora), grid, block, 0, pack, pdl=True)]


def _operation(kind: Kind) -> Operation:
    return register(
        Operation(
            name=f"kv_publish_{kind}",
            reference=ref.kv_publish,
            outputs=_outputs,
            calls=partial(_calls, kind=kind),
            entries=(_ENTRIES[kind],),
            cases=partial(publish_cases, kind),
            variants=((_ENTRIES[kind], constant_set(Q_LORA=1024)),),
            mutates=MUTATES[kind],
            token_inputs=dict.fromkeys(TOKEN_INPUTS[kind], 0),
            token_outputs={"qr": 0},
        )
    )


KV_PUBLISH_SWA = _operation("swa")
KV_PUBLISH_HCA = _operation("hca")
KV_PUBLISH_CSA = _operation("csa")
