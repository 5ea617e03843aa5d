"""The experts' matrices among the inputs of ``moe_up`` and ``moe_down``: formats, planes, multipliers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ds4.kernels.cases import Inputs
from ds4.kernels.packing import PACKINGS, Packing, Planes
from ds4.weights.formats.iq2_xxs import patterns

# Format -> its struct in ds4/kernels/include; layouts of one format have the same planes.
TEMPLATES = {
    "f32": "F32Tile",
    "f16": "F16Tile",
    "bf16": "Bf16Tile",
    "q8_0": "Q8Tile",
    "fp8_block": "Fp8Tile",
    "nvfp4": "Nvfp4Tile",
    "nvfp4_modelopt": "Nvfp4Tile",
    "nvfp4_sleepy": "Nvfp4Tile",
    "mxfp4": "Mxfp4Tile",
    "mxfp4_official": "Mxfp4Tile",
    "q2_k": "Q2KTile",
    "q4_k": "Q4KTile",
    "q6_k": "Q6KTile",
    "iq2_xxs": "Iq2Tile",
}
FORMATS = tuple(TEMPLATES)
N_PLANES = 4  # of a matrix in the kernels' parameters; formats with fewer leave the last ones out


def matrix_inputs(name: str, planes: Planes) -> Inputs:
    """A matrix under the names that the operations have for its parts."""
    tensors = {f"{name}_{key}": tensor for key, tensor in planes.tensors.items()}
    return {f"{name}_format": planes.packing.format, **tensors}


def n_rows_of(inputs: Inputs, name: str) -> int:
    """Rows of matrix ``name``, of all experts: its first plane has one for each."""
    return inputs[f"{name}_{_packing(inputs, name).planes[0].name}"].shape[0]


def decoded(inputs: Inputs, name: str, expert: int, n_rows: int, n_cols: int) -> Tensor:
    """f32 [n_rows, n_cols]: the rows of one expert, times its multiplier."""
    packing, scale = _packing(inputs, name), inputs[f"{name}_scale"]
    tensors = {plane.name: inputs[f"{name}_{plane.name}"] for plane in packing.planes}
    matrix = Planes(packing, n_rows_of(inputs, name), n_cols, tensors)
    values = matrix.rows(expert * n_rows, (expert + 1) * n_rows).decode()
    if scale is None:
        return values
    return values * (scale[expert] if isinstance(scale, Tensor) else scale)


def plane_arguments(inputs: Inputs, name: str, n_rows: int, n_cols: int) -> dict[str, Tensor | None]:
    """The kernels' plane arguments for matrix ``name``: of experts with ``n_rows`` rows each, or of the shared one.

    Raises ValueError where the planes or multipliers are not those of such a matrix, or no kernel reads them.
    """
    packing, n_all, scale = _packing(inputs, name), n_rows_of(inputs, name), inputs[f"{name}_scale"]
    row_block = max(plane.row_block for plane in packing.planes)
    fits = n_all == n_rows if name.startswith("s") else n_all % n_rows == 0 == n_rows % row_block
    if not fits or n_rows % 16 or n_cols % 32:
        raise ValueError(f"moe: {name}, {packing.format} with {n_all} rows of {n_cols}: no experts of {n_rows} rows")
    if isinstance(scale, Tensor) and scale.shape != (n_all // n_rows,):
        raise ValueError(f"moe: {name}_scale is {list(scale.shape)}, not [{n_all // n_rows}]")
    found: dict[str, Tensor | None] = {f"{name}_{i}": None for i in range(N_PLANES)}
    for i, plane in enumerate(packing.planes):
        tensor = inputs[f"{name}_{plane.name}"]
        want = (plane.n_rows(n_all), plane.row_bytes(n_cols) // plane.dtype.itemsize)
        if tensor.shape != want or tensor.dtype != plane.dtype:
            raise ValueError(f"moe: {name}_{plane.name} is {tensor.dtype} {list(tensor.shape)}, not {list(want)}")
        found[f"{name}_{i}"] = tensor.view(torch.uint8)
    return found


def format_constants(names: tuple[str, ...], formats: tuple[str, ...]) -> dict[str, str]:
    """The kernels' constants that say which structs the matrices have."""
    return {constant_of(name): TEMPLATES[fmt] for name, fmt in zip(names, formats, strict=True)}


def constant_of(name: str) -> str:
    """The constant for the format of matrix ``name``."""
    return f"{name.upper()}_FORMAT"


def formats_of(inputs: Inputs, names: tuple[str, ...]) -> tuple[str, ...]:
    """The formats of the matrices. Raises ValueError for one without a kernel."""
    return tuple(_packing(inputs, name).format for name in names)


def pattern_argument(inputs: Inputs, names: tuple[str, ...], device: torch.device) -> Tensor | None:
    """The table that IQ2_XXS needs, if one of the matrices has this format."""
    return pattern_table(device) if "iq2_xxs" in formats_of(inputs, names) else None


@functools.cache
def pattern_table(device: torch.device) -> Tensor:
    """i64 [512]: the magnitudes of each pattern as bf16 [256, 8], which iq2_weights.cuh wants."""
    magnitudes = patterns(torch.device("cpu")).view(torch.int8).view(256, 8).to(torch.bfloat16)
    return magnitudes.view(torch.int64).flatten().to(device)


def _packing(inputs: Inputs, name: str) -> Packing:
    fmt = inputs[f"{name}_format"]
    if fmt not in TEMPLATES:
        raise ValueError(f"moe: {name}: no kernel for {fmt}; there are: {', '.join(FORMATS)}")
    return PACKINGS[fmt]
