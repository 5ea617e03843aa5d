"""``embed``: the first operation of a decode step, its public function and its kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.cases import Inputs, Outputs
from ds4.kernels.embed import ref
from ds4.kernels.embed.cases import cases
from ds4.kernels.entry import ArgPack, Entry, KernelCall, constant_set
from ds4.kernels.packing import PACKINGS, Planes
from ds4.kernels.packing.arguments import plane_params, planes_among
from ds4.kernels.registry import Operation, register, run

_ROPE_PAIRS = 32
_THREADS = 128  # embed.cu: four columns each
FORMATS = ("f32", "f16", "bf16", "q8_0")
_REST = (("plain", "f32*"), ("compressed", "f32*"), ("streams", "f32*"), ("cis", "f32*"))
_ENTRIES = {
    name: Entry(
        f"embed_{name}",
        "embed/embed.cu",
        (("tokens", "i32*"), ("pos", "i32*"), *plane_params(name), *_REST),
        ("HIDDEN",),
    )
    for name in FORMATS
}


def embed(tokens: Tensor, pos: Tensor, weight: Planes, plain: Tensor, compressed: Tensor) -> tuple[Tensor, Tensor]:
    """Begin a step: the tokens' embedding rows in all residual streams, and the rotary tables of all layers.

    tokens   i32 [n_tok], each a row of the embedding
    pos      i32 [1], position of the first token; the others follow it
    weight   planes of f32 | f16 | bf16 | q8_0, ``vocab`` rows of d
    plain, compressed  f32 [32], angle per position of layers without and with a compressor
    returns  streams f32 [n_tok, 4, d]; cis f32 [4, n_tok, 32, 2], (cos, sin) of fp32(position) * frequency: tables 0
             (plain) and 1 (compressed) at the tokens' positions, 2 and 3 (compressed) where the window of 4 or 128
             tokens begins that ends with the token, or at 0 where that would be before the text
    Order:   rows are copied; row t does not depend on n_tok, bit for bit.
    Error:   streams exact; cos and sin off by 0.51 of a last place at most on a GPU, by torch's own error on the CPU.
    Limits:  d a multiple of 32 on a GPU, positions below 2^24, frequencies not above 1. Raises
             ValueError for a format without a kernel or shapes that do not go together.
    Source:  spec model.md 1.3, 2.0, 3.
    """
    inputs = {"tokens": tokens, "pos": pos, "format": weight.packing.format, **weight.tensors}
    results = run(EMBED, inputs | {"plain": plain, "compressed": compressed})
    return results["streams"], results["cis"]


def _hidden(planes: dict[str, Tensor]) -> int:
    return next(iter(planes.values())).shape[1]


def _reference(inputs: Inputs) -> Outputs:
    planes, tokens = planes_among(inputs, FORMATS, "embed"), inputs["tokens"]
    rows = {name: plane[tokens] for name, plane in planes.items()}
    decoded = Planes(PACKINGS[inputs["format"]], len(tokens), _hidden(planes), rows).decode()
    cis = ref.rotary_tables(int(inputs["pos"]), len(tokens), inputs["plain"], inputs["compressed"])
    return {"streams": ref.embed(decoded), "cis": cis}


def _outputs(inputs: Inputs) -> Outputs:
    tokens = inputs["tokens"]
    n_tok, d = tokens.shape[0], _hidden(planes_among(inputs, FORMATS, "embed"))
    return {
        "streams": torch.empty(n_tok, ref.N_STREAMS, d, device=tokens.device),
        "cis": torch.empty(4, n_tok, _ROPE_PAIRS, 2, device=tokens.device),
    }


def _calls(inputs: Inputs, outputs: Outputs) -> list[KernelCall]:
    planes, n_tok = planes_among(inputs, FORMATS, "embed"), inputs["tokens"].shape[0]
    d = _hidden(planes)
    if n_tok < 1 or d % 32:
        raise ValueError(f"embed: {n_tok} tokens of width {d}: some of a multiple of 32 are needed")
    for plane in PACKINGS[inputs["format"]].planes:
        width = plane.row_bytes(d) // plane.dtype.itemsize
        if planes[plane.name].shape[1] != width:
            raise ValueError(f"embed: plane {plane.name} has rows of {planes[plane.name].shape[1]}, not {width}")
    for name, shape in (("pos", (1,)), ("plain", (_ROPE_PAIRS,)), ("compressed", (_ROPE_PAIRS,))):
        if inputs[name].shape != shape:
            raise ValueError(f"embed: {name} is {list(inputs[name].shape)}, not {list(shape)}")
    entry = _ENTRIES[inputs["format"]]
    values = {name: inputs[name] for name in ("tokens", "pos", "plain", "compressed")} | planes | outputs
    grid = (-(-d // (4 * _THREADS)) + 1, n_tok, 1)
    return [
        KernelCall(entry, constant_set(HIDDEN=d), grid, (_THREADS, 1, 1), 0, ArgPack(entry, values), pdl=True),
    ]


EMBED = register(
    Operation(
        name="embed",
        reference=_reference,
        outputs=_outputs,
        calls=_calls,
        entries=tuple(_ENTRIES.values()),
        cases=cases,
        variants=tuple((entry, constant_set(HIDDEN=4096)) for entry in _ENTRIES.values()),
        token_inputs={"tokens": 0},
        token_outputs={"streams": 0, "cis": 1},
    )
)
