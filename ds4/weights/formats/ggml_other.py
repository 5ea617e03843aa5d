"""The ggml types that ds4 has no code of its own for, decoded by the ``gguf`` package on the CPU.

They occur in mixed files on some tensors; such a file computes the right thing, slowly.  A few types are only known by
their sizes: what holds them can be listed, not loaded.
Source:  spec weights.md 4.9; sizes as in ``gguf.GGML_QUANT_SIZES``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ds4.errors import Ds4Error
from ds4.weights.formats.block_scale import finite

# Name -> (type number, weights in a block, bytes of a block).
TYPES = {
    "q4_0": (2, 32, 18),
    "q4_1": (3, 32, 20),
    "q5_0": (6, 32, 22),
    "q5_1": (7, 32, 24),
    "q8_1": (9, 32, 40),
    "q3_k": (11, 256, 110),
    "q5_k": (13, 256, 176),
    "q8_k": (15, 256, 292),
    "iq2_xs": (17, 256, 74),
    "iq3_xxs": (18, 256, 98),
    "iq1_s": (19, 256, 50),
    "iq4_nl": (20, 32, 18),
    "iq3_s": (21, 256, 110),
    "iq2_s": (22, 256, 82),
    "iq4_xs": (23, 256, 136),
    "i8": (24, 1, 1),
    "i16": (25, 1, 2),
    "f64": (28, 1, 8),
    "iq1_m": (29, 256, 56),
    "tq1_0": (34, 256, 54),
    "tq2_0": (35, 256, 66),
    "q1_0": (41, 128, 18),
}
UNDECODABLE = frozenset({"q8_1", "q8_k", "i8", "i16", "f64", "q1_0"})


def dequantizer(name: str) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """``dequantize(data uint8 [n_rows, row_bytes], n_cols) -> f32 [n_rows, n_cols]`` for one of ``TYPES``.

    Data on another device is decoded on the CPU and the result sent back.
    Error:   Ds4Error for block scales that are not finite, and always for an undecodable type.
    """

    def dequantize(data: torch.Tensor, n_cols: int) -> torch.Tensor:
        if name in UNDECODABLE:
            raise Ds4Error("is a type that ds4 cannot decode")
        import gguf  # takes as long to import as numpy, and few files need it
        import numpy as np

        with np.errstate(all="ignore"):  # not-a-numbers are reported below
            values = gguf.dequantize(data.cpu().numpy(), gguf.GGMLQuantizationType[name.upper()])
        return finite(torch.from_numpy(values)).to(data.device)

    return dequantize
