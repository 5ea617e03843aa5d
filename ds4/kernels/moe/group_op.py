"""``moe_group`` and ``moe_combine``: what stands around the experts' products of the prefill form."""

from __future__ import annotations

import torch
from torch import Tensor

from ds4.kernels.cases import Inputs, Outputs
from ds4.kernels.entry import ArgPack, Entry, KernelCall, constant_set
from ds4.kernels.moe import prefill_ref as ref
from ds4.kernels.moe.prefill_cases import combine_cases, group_cases
from ds4.kernels.registry import Operation, register, run

_THREADS = 256  # of a block
_PARTS = 8  # moe_group.cu: kWarps
_SIZES = (("n_rows", "i32"), ("top_k", "i32"))
_IDS = (("ids", "i32*"), ("count", "i32*"), ("counts", "i32*"))
_COUNT = Entry("moe_group_count", "moe/moe_group.cu", (*_IDS, *_SIZES))
_PLACE = Entry(
    "moe_group_place",
    "moe/moe_group.cu",
    (*_IDS, ("order", "i32*"), ("tiles", "i32*"), ("n_tiles", "i32*"), *_SIZES, ("tile", "i32"), ("max_tiles", "i32")),
)
_COMBINE = Entry(
    "moe_combine", "moe/moe_combine.cu", (("parts", "bf16*"), ("count", "i32*"), ("y", "f32*")), ("HIDDEN", "TOP_K")
)


def moe_group(ids: Tensor, *, n_experts: int, tile: int, count: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The (token, slot) pairs of a chunk sorted by expert and cut into tiles of one expert each.

    ids      i32 [n_rows, top_k] within the experts; those of rows from count on may be anything
    tile     pairs of a tile at most: that of :func:`moe_up_gemm` and :func:`moe_down_gemm`
    count    i32 [1] or None: rows with tokens, all by default
    returns  order i32 [n_rows * top_k]: pairs t * top_k + slot by expert, those of one by rising pair, then zeros;
             tiles i32 [max_tiles, 4]: (expert, first place in order, number of pairs, 0) by rising place, then zeros;
             n_tiles i32 [1]
    Order:   no atomics: the same ids give the same tensors.
    Source:  spec kernels.md c.
    """
    results = run(MOE_GROUP, {"ids": ids, "count": count, "n_experts": n_experts, "tile": tile})
    return results["order"], results["tiles"], results["n_tiles"]


def moe_combine(parts: Tensor, *, count: Tensor | None = None) -> Tensor:
    """y[t] = the sum of parts[t]: bf16 [n_rows, top_k + 1, d] -> f32 [n_rows, d], rows from ``count`` on unspecified.

    Order:   slots by rank, the shared expert last, in FP32: exact but for the roundings of these additions.
    Limits:  d a multiple of 8.
    Source:  spec model.md 2.7.
    """
    return run(MOE_COMBINE, {"parts": parts, "count": count})["y"]


def _outputs_group(inputs: Inputs) -> Outputs:
    ids, n_experts = inputs["ids"], inputs["n_experts"]
    most = ref.max_tiles(ids.numel(), n_experts, inputs["tile"])

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=ids.device)

    return {
        "order": empty(ids.numel()),
        "tiles": empty(most, 4),
        "n_tiles": empty(1),
        "counts": empty(n_experts, _PARTS),
    }


def _outputs_combine(inputs: Inputs) -> Outputs:
    n_rows, _, d = inputs["parts"].shape
    return {"y": torch.empty(n_rows, d, device=inputs["parts"].device)}


def _calls_group(inputs: Inputs, outputs: Outputs) -> list[KernelCall]:
    ids, n_experts, tile = inputs["ids"], inputs["n_experts"], inputs["tile"]
    if ids.dim() != 2 or n_experts < 1 or tile < 1:
        raise ValueError(f"moe_group: ids {list(ids.shape)}, {n_experts} experts, tiles of {tile}")
    values: Inputs = {"ids": ids, "count": inputs["count"], "counts": outputs["counts"]}
    values |= {"n_rows": ids.shape[0], "top_k": ids.shape[1]}
    place = values | outputs | {"tile": tile, "max_tiles": outputs["tiles"].shape[0]}
    grid, block = (n_experts, 1, 1), (_THREADS, 1, 1)
    return [
        KernelCall(entry, (), grid, block, 0, ArgPack(entry, args), pdl=True)
        for entry, args in ((_COUNT, values), (_PLACE, place))
    ]


def _calls_combine(inputs: Inputs, outputs: Outputs) -> list[KernelCall]:
    parts = inputs["parts"]
    n_rows, n_slots, d = parts.shape
    if d % 8 or parts.dtype != torch.bfloat16:
        raise ValueError(
            f"moe_combine: parts {parts.dtype} {list(parts.shape)}: bf16 rows of a multiple of 8 are needed"
        )
    args = ArgPack(_COMBINE, {"parts": parts, "count": inputs["count"], **outputs})
    constants, grid = constant_set(HIDDEN=d, TOP_K=n_slots - 1), (-(-d // (8 * _THREADS)), n_rows, 1)
    return [KernelCall(_COMBINE, constants, grid, (_THREADS, 1, 1), 0, args, pdl=True)]


MOE_GROUP = register(
    Operation(
        name="moe_group",
        reference=ref.group,
        outputs=_outputs_group,
        calls=_calls_group,
        entries=(_COUNT, _PLACE),
        cases=group_cases,
        variants=((_COUNT, ()), (_PLACE, ())),
        workspaces=("counts",),
        decode=False,
    )
)
MOE_COMBINE = register(
    Operation(
        name="moe_combine",
        reference=ref.combine,
        outputs=_outputs_combine,
        calls=_calls_combine,
        entries=(_COMBINE,),
        cases=combine_cases,
        variants=((_COMBINE, constant_set(HIDDEN=4096, TOP_K=6)),),
        token_inputs={"parts": 0},
        token_outputs={"y": 0},
        decode=False,
    )
)
