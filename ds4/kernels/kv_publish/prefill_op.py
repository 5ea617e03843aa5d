"""``kv_prefill``: what ``kv_publish`` stores, for a chunk of a prompt, and the rows that the chunk attends to. One
operation a kind of layer.

Inputs as those of ds4/kernels/kv_publish/op.py, with n_rows instead of n_tok tokens, and
    count   i32 [1] or None             only the first ``count`` tokens are there; None: all
    window  int                         positions before the chunk whose rows are wanted
Results:
    qr      bf16 [n_rows, q_lora]       rms_norm(q_a) q_norm, rounded to nearest even
    rows    u8 [window + n_rows, 584]   row of position pos[0] - window + i: the first ``window`` from the ring, then
                                        the tokens' own
Caches are updated in place as kv_publish updates them token by token: where a chunk is longer than a ring or a state,
its last tokens remain. Rows of positions below 0, and of tokens from ``count`` on, are not written.

Order:   cache bytes are those of kv_publish, bit for bit, however a text is cut into chunks and steps; so are rows. qr
         does not depend on the cut either.
Error:   as kv_publish; qr is rounded once.
Limits:  n_rows 1 to 8192; q_lora and an HCA layer's ratio multiples of 4. A ring has ``window`` slots or more, a state
         8 (CSA) or ratio (HCA). An entry that pool has no row for is not written. ValueError where shapes do not go
         together.
Source:  spec model.md 2.1, 2.3, 3, 5.1 to 5.3, 6; kernels.md b.4, c.
"""

from __future__ import annotations

from functools import partial

import torch

from ds4.kernels.cases import Inputs, Outputs
from ds4.kernels.entry import ArgPack, Dim3, Entry, KernelCall, constant_set
from ds4.kernels.kv_publish import ref
from ds4.kernels.kv_publish.cases import MUTATES, Kind, lookback
from ds4.kernels.kv_publish.prefill_cases import prefill_cases
from ds4.kernels.kv_publish.shapes import TOKEN_INPUTS, check_inputs, ratio_of, sizes
from ds4.kernels.registry import Operation, register

MAX_ROWS = 8192
_TYPES = {
    **dict.fromkeys(("pos", "count"), "i32*"),
    **dict.fromkeys(("ring", "rows", "pool", "keys"), "u8*"),
    **dict.fromkeys(("ring_slots", "state_slots", "key_slots", "n_entries", "ratio", "window", "n_rows"), "i32"),
    **{"qr": "bf16*", "eps": "f32"},
}


def _entry(name: str, params: str) -> Entry:
    types = tuple((param, _TYPES.get(param, "f32*")) for param in params.split())
    return Entry(f"kv_prefill_{name}", "kv_publish/kv_prefill.cu", types, ("Q_LORA",))


_ROWS = _entry("rows", "q_a kv pos count cis q_norm kv_norm ring rows qr eps ring_slots window n_rows")
_COMPRESS: dict[Kind, Entry] = {
    "hca": _entry(
        "entries_hca",
        "comp_kv comp_gate pos count entry_cis ape comp_norm state pool eps state_slots n_entries ratio n_rows",
    ),
    "csa": _entry(
        "entries_csa",
        "comp_kv comp_gate idx_kv idx_gate pos count entry_cis ape comp_norm idx_ape idx_norm state key_state "
        "pool keys eps state_slots key_slots n_entries n_rows",
    ),
}
_STORE: dict[Kind, Entry] = {
    "swa": _entry("store_swa", "rows pos count ring ring_slots window n_rows"),
    "hca": _entry(
        "store_hca",
        "rows comp_kv comp_gate pos count ape ring state ring_slots state_slots ratio window n_rows",
    ),
    "csa": _entry(
        "store_csa",
        "rows comp_kv comp_gate idx_kv idx_gate pos count ape idx_ape ring state key_state "
        "ring_slots state_slots key_slots window n_rows",
    ),
}


def _outputs(inputs: Inputs) -> Outputs:
    q_a = inputs["q_a"]
    shape = (inputs["window"] + len(q_a), ref.ROW.row_bytes)
    return {
        "qr": torch.empty_like(q_a, dtype=torch.bfloat16),
        "rows": torch.empty(shape, dtype=torch.uint8, device=q_a.device),
    }


def _calls(inputs: Inputs, outputs: Outputs, kind: Kind) -> list[KernelCall]:
    n_rows, ratio = inputs["q_a"].shape[0], ratio_of(kind, inputs)
    back = lookback(kind, ratio)
    slots = {"ring": max(1, inputs["window"]), "state": back, "key_state": back}
    check_inputs(f"kv_prefill_{kind}", kind, inputs, MAX_ROWS, slots)
    if inputs["window"] < 0 or (inputs["count"] is not None and inputs["count"].shape != (1,)):
        raise ValueError(f"kv_prefill_{kind}: window {inputs['window']} is below 0, or count is not one number")
    values = {**sizes(inputs), **inputs, **outputs, "n_rows": n_rows}
    constants = constant_set(Q_LORA=inputs["q_a"].shape[1])

    def call(entry: Entry, grid: Dim3, threads: int = 128) -> KernelCall:
        pack = ArgPack(entry, {name: values[name] for name, _ in entry.params})
        return KernelCall(entry, constants, grid, (threads, 1, 1), 0, pack, pdl=True)

    calls = [call(_ROWS, (2 * n_rows + inputs["window"], 1, 1))]
    if kind == "hca":
        calls.append(call(_COMPRESS[kind], (-(-n_rows // ratio), 1, 1), 512))
    elif kind == "csa":
        calls.append(call(_COMPRESS[kind], (-(-n_rows // ratio), 2, 1)))
    stored = [inputs[name].shape[0] for name in ("ring", "state", "key_state") if name in inputs]
    return [*calls, call(_STORE[kind], (min(n_rows, max(stored)), len(stored), 1))]


def _operation(kind: Kind) -> Operation:
    entries = tuple(by_kind[kind] for by_kind in (_COMPRESS, _STORE) if kind in by_kind)
    return register(
        Operation(
            name=f"kv_prefill_{kind}",
            reference=partial(ref.kv_prefill, token_inputs=TOKEN_INPUTS[kind]),
            outputs=_outputs,
            calls=partial(_calls, kind=kind),
            entries=(_ROWS, *entries),
            cases=partial(prefill_cases, kind),
            variants=tuple((entry, constant_set(Q_LORA=1024)) for entry in (_ROWS, *entries)),
            mutates=MUTATES[kind],
            token_inputs=dict.fromkeys(TOKEN_INPUTS[kind], 0),
            token_outputs={"qr": 0},
            decode=False,
        )
    )


KV_PREFILL: dict[Kind, Operation] = {kind: _operation(kind) for kind in MUTATES}
