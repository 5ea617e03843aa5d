"""Hash tables of expert ids are checked when a model is built (spec model.md 2.7)."""

from __future__ import annotations

import pytest
import torch

from ds4.engine import LLM
from ds4.errors import Ds4Error
from ds4.model.moe import MoE
from ds4.model.params import TensorParams

PREFIX = "layers.0.ffn"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM()


@pytest.mark.parametrize(
    ("row", "fine"),
    [
        ([0, 1, 2, 3, 4, 15], True),
        ([0, 1, 2, 3, 4, 16], False),
        ([-1, 1, 2, 3, 4, 5], False),
        ([0, 1, 2, 3, 4, 4], False),
    ],
)
def test_hash_table_is_checked(llm: LLM, row: list[int], fine: bool) -> None:
    names = [n for n in llm.checkpoint.names() if n.startswith(PREFIX)]
    tensors = {n: llm.checkpoint.tensor(n).dequantize() for n in names}
    tensors[f"{PREFIX}.gate.tid2eid"][7] = torch.tensor(row)
    if fine:
        MoE(llm.config, TensorParams(tensors), PREFIX, hash_routed=True)
    else:
        with pytest.raises(Ds4Error, match=r"gate\.tid2eid: expert ids must be 0 to 15, all different"):
            MoE(llm.config, TensorParams(tensors), PREFIX, hash_routed=True)


def test_hash_table_of_a_pruned_layer(llm: LLM) -> None:
    """Ids count against the experts of that very layer, whatever the configuration says."""
    names = [n for n in llm.checkpoint.names() if n.startswith(PREFIX)]
    tensors = {n: llm.checkpoint.tensor(n).dequantize() for n in names}
    tensors[f"{PREFIX}.gate.weight"] = tensors[f"{PREFIX}.gate.weight"][:8]
    table = tensors[f"{PREFIX}.gate.tid2eid"]
    with pytest.raises(Ds4Error, match=r"gate\.tid2eid: expert ids must be 0 to 7, all different"):
        MoE(llm.config, TensorParams(tensors), PREFIX, hash_routed=True)
    tensors[f"{PREFIX}.gate.tid2eid"] = torch.arange(table.shape[1], dtype=table.dtype).expand(table.shape).clone()
    assert len(MoE(llm.config, TensorParams(tensors), PREFIX, hash_routed=True).experts) == 8
