"""``hc_head``: the collapse of the streams in front of the language-model head, with its kernels."""

from __future__ import annotations

from torch import Tensor, empty

from ds4.kernels.cases import Inputs, Outputs
from ds4.kernels.common import rms_norm
from ds4.kernels.entry import ArgPack, Entry, KernelCall, constant_set
from ds4.kernels.head import ref
from ds4.kernels.mhc.cases import head_cases
from ds4.kernels.mhc.op import (
    CONSTANTS,
    FN_TYPES,
    N_STREAMS,
    check_shapes,
    partials_grid,
    partials_workspace,
    pending_of,
)
from ds4.kernels.mhc.ref import hc_expand
from ds4.kernels.numerics import Numerics
from ds4.kernels.proj.ref import Rows
from ds4.kernels.registry import Operation, register, run

_FILE = "head/hc_head.cu"
_PARTIALS = {
    kind: Entry(
        f"hc_head_partials_{kind}",
        _FILE,
        (*((name, "f32*") for name in ("y", "post", "comb", "streams")), ("fn", f"{kind}*"), ("partials", "f32*")),
        CONSTANTS,
    )
    for kind in FN_TYPES.values()
}
_FINALISE = Entry(
    "hc_head_finalise",
    _FILE,
    (
        *((name, "f32*") for name in ("streams", "partials", "scale", "base", "norm", "x")),
        ("hc_eps", "f32"),
        ("norm_eps", "f32"),
    ),
    CONSTANTS,
)


def hc_head(
    y: Tensor | None,
    streams: Tensor,
    post: Tensor | None,
    comb: Tensor | None,
    *,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm: Tensor,
    hc_eps: float,
    norm_eps: float,
    numerics: Numerics | None = None,
    rows: Rows = None,
) -> tuple[Tensor, Tensor]:
    """Finish the last sublayer, then collapse and norm the streams for the language-model head.

    streams[k] = post[k] y + sum_j comb[j, k] streams[j];  mix = (streams fn^T) rsqrt(mean(streams^2) + norm_eps)
    x = rms_norm(sum_n (sigmoid(mix[n] scale + base[n]) + hc_eps) streams[n])

    y        f32 [n_tok, d] or None        output of the last sublayer; None where nothing is pending
    streams  f32 [n_tok, 4, d]             UPDATED IN PLACE: what a draft block takes
    post     f32 [n_tok, 4] or None, comb f32 [n_tok, 4, 4] or None   of the last sublayer, with y
    fn       f32 | f16 [4, 4 d], scale f32 [1], base f32 [4], norm f32 [d]
    numerics, rows  CPU only: rounding points of the official code, and the rows of a decode launch that carry tokens
    returns  (streams, x f32 [n_tok, d])
    Order:   row t does not depend on n_tok, bit for bit.
    Error:   FP32 sums in another order than the reference's; see mhc/cases.py.
    Limits:  on a GPU d is a multiple of 32. Raises ValueError for shapes that do not go together.
    Source:  spec model.md 2.2 (hc_head), 2.1.
    """
    inputs: Inputs = {"y": y, "prev_post": post, "prev_comb": comb, "streams": streams, "fn": fn, "scale": scale}
    inputs |= {"base": base, "norm": norm, "hc_eps": hc_eps, "norm_eps": norm_eps}
    if streams.device.type == "cpu":
        results = _reference(inputs, numerics or Numerics(), rows)
        streams.copy_(results["streams"])
    elif numerics is not None and numerics.bf16:
        raise ValueError("hc_head: the official code's bf16 rounding points exist on the CPU only")
    else:
        results = run(HC_HEAD, inputs)
    return streams, results["x"]


def _reference(inputs: Inputs, numerics: Numerics, rows: Rows = None) -> Outputs:
    streams, eps = inputs["streams"], {"hc_eps": inputs["hc_eps"], "norm_eps": inputs["norm_eps"]}
    if inputs["y"] is not None:
        streams = numerics.rd(hc_expand(inputs["y"], streams, inputs["prev_post"], inputs["prev_comb"]))
    fn, scale, base = inputs["fn"].float(), inputs["scale"], inputs["base"]
    x = ref.hc_head(streams, fn, scale, base, numerics=numerics, rows=rows, **eps)
    return {"streams": streams, "x": numerics.rd(rms_norm(x, inputs["norm"], inputs["norm_eps"]))}


def _outputs(inputs: Inputs) -> Outputs:
    streams = inputs["streams"]
    n_tok, _, d = streams.shape
    return {"x": empty(n_tok, d, device=streams.device), "partials": partials_workspace(streams, N_STREAMS)}


def _calls(inputs: Inputs, outputs: Outputs) -> list[KernelCall]:
    n_tok, d = check_shapes("hc_head", inputs, N_STREAMS, 1)
    constants = constant_set(HIDDEN=d, N_TOK=n_tok)
    first = _PARTIALS[FN_TYPES[inputs["fn"].dtype]]
    mix = ArgPack(first, pending_of(inputs) | {"fn": inputs["fn"], "partials": outputs["partials"]})
    values = {name: inputs[name] for name in ("streams", "scale", "base", "norm", "hc_eps", "norm_eps")}
    return [
        KernelCall(first, constants, partials_grid(n_tok, d), (256, 1, 1), 0, mix, pdl=True),
        KernelCall(
            _FINALISE,
            constants,
            (-(-d // 512), n_tok, 1),
            (128, 1, 1),
            0,
            ArgPack(_FINALISE, values | outputs),
            pdl=True,
        ),
    ]


_ENTRIES = (*_PARTIALS.values(), _FINALISE)
HC_HEAD = register(
    Operation(
        name="hc_head",
        reference=lambda inputs: _reference(inputs, Numerics()),
        outputs=_outputs,
        calls=_calls,
        entries=_ENTRIES,
        cases=head_cases,
        variants=tuple((entry, constant_set(HIDDEN=4096, N_TOK=n_tok)) for entry in _ENTRIES for n_tok in (1, 2, 8)),
        mutates=("streams",),
        workspaces=("partials",),
        token_inputs=dict.fromkeys(("y", "prev_post", "prev_comb", "streams"), 0),
        token_outputs={"streams": 0, "x": 0},
    )
)
