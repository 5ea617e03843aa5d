"""The operations that have CUDA kernels: reference, kernels and cases of each under one name.

A family registers its operations in ``ds4/kernels/<family>/op.py``, which FAMILIES lists. A public function of the
family calls :func:`run`: CPU tensors go through the torch reference, CUDA tensors through the kernels. There is no
fallback from one to the other.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ds4.kernels.cases import Case, Inputs, Outputs
from ds4.kernels.entry import Backend, Constants, Entry, KernelCall

# Folders of ds4/kernels with an op.py.
FAMILIES: tuple[str, ...] = (
    "attn",
    "draft",
    "embed",
    "gemm",
    "head",
    "indexer",
    "kv_publish",
    "mhc",
    "moe",
    "proj",
    "route",
)


@dataclass(frozen=True)
class Operation:
    """One operation: the torch reference that defines it, and the kernels that compute the same on a GPU.

    ``reference(inputs)``  the results by name; it leaves its inputs as they are.
    ``outputs(inputs)``    new tensors for results and workspaces, on the inputs' device.
    ``calls(inputs, outputs)``  the launches, in order. They read and write these tensors and no others.
    ``entries``            every entry that ``calls`` may launch.
    ``variants``           (entry, constants) as launched at the dimensions of DeepSeek-V4-Flash; resources.json has
                           one row for each of them and architecture.
    ``cases()``            what it is tested and measured with.
    ``mutates``            inputs that the kernels update in place. They are results: ``reference`` returns their new
                           values under their names.
    ``workspaces``         outputs that are not results.
    ``token_inputs``, ``token_outputs``  the inputs and results with one row a token -> the dimension that counts
                           tokens. Taking the first n tokens of every token input gives a valid call whose token
                           outputs are the first n rows, bit for bit. A token input may be None where a case has
                           none, a token output may be absent. Both empty: the operation has no tokens.
    ``decode``             part of the decode step, whose kernels may not spill registers.
    """

    name: str
    reference: Callable[[Inputs], Outputs]
    outputs: Callable[[Inputs], Outputs]
    calls: Callable[[Inputs, Outputs], list[KernelCall]]
    entries: tuple[Entry, ...]
    cases: Callable[[], list[Case]]
    variants: tuple[tuple[Entry, Constants], ...] = ()
    mutates: tuple[str, ...] = ()
    workspaces: tuple[str, ...] = ()
    token_inputs: Mapping[str, int] = field(default_factory=dict)
    token_outputs: Mapping[str, int] = field(default_factory=dict)
    decode: bool = True


_operations: dict[str, Operation] = {}


def register(operation: Operation) -> Operation:
    """Add an operation; returns it. Raises ValueError if the name is taken."""
    if operation.name in _operations:
        raise ValueError(f"operation {operation.name} is registered twice")
    _operations[operation.name] = operation
    return operation


def all_operations() -> list[Operation]:
    """Every registered operation, by name."""
    for family in FAMILIES:
        importlib.import_module(f"ds4.kernels.{family}.op")
    return [_operations[name] for name in sorted(_operations)]


def get(name: str) -> Operation:
    """The operation called ``name``. Raises ValueError if there is none."""
    found = [operation for operation in all_operations() if operation.name == name]
    if not found:
        raise ValueError(f"no operation {name}; there are: {', '.join(op.name for op in all_operations()) or 'none'}")
    return found[0]


def device_of(inputs: Inputs) -> torch.device:
    """The device of all tensors among ``inputs``. Raises ValueError where there are several, or no tensor."""
    devices = {str(value.device): value.device for value in inputs.values() if isinstance(value, Tensor)}
    if len(devices) != 1:
        raise ValueError(f"the tensors are on {', '.join(sorted(devices)) or 'no device'}: one is needed")
    return next(iter(devices.values()))


def results_of(operation: Operation, inputs: Inputs, outputs: Outputs) -> Outputs:
    """The results among ``outputs`` and the inputs that the operation updates; not copied."""
    results = {name: value for name, value in outputs.items() if name not in operation.workspaces}
    return results | {name: inputs[name] for name in operation.mutates}


def run_kernels(operation: Operation, inputs: Inputs, backend: Backend) -> Outputs:
    """The results of the operation's kernels on ``backend``; inputs that it mutates are updated and among them."""
    outputs = operation.outputs(inputs)
    backend.run(operation.calls(inputs, outputs))
    return results_of(operation, inputs, outputs)


def run(operation: Operation, inputs: Inputs) -> Outputs:
    """The operation's results by name: on CPU tensors by its reference, on CUDA tensors by its kernels.

    Inputs in ``mutates`` are updated in place on both. Raises ValueError where the tensors are on several devices or on
    one of another kind, Ds4Error where a kernel does not exist for the GPU's architecture or no GPU can be used, and
    CudaError where the GPU fails.
    """
    device = device_of(inputs)
    if device.type == "cuda":
        from ds4.kernels.cuda_backend import backend_for

        return run_kernels(operation, inputs, backend_for(device))
    if device.type != "cpu":
        raise ValueError(f"{operation.name}: tensors on {device}; cpu or cuda is needed")
    results = operation.reference(inputs)
    for name in operation.mutates:
        inputs[name].copy_(results[name])
        results[name] = inputs[name]
    return results
