"""A small operation with a kernel, and a backend in Python, for tests of what holds for every operation."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from ds4.kernels.cases import Case, Close, Exact
from ds4.kernels.entry import ArgPack, Entry, KernelCall, constant_set
from ds4.kernels.registry import Operation

SOURCE = """
extern "C" __global__ void toy(const float* x, float* y, float* total, int n_tok) {
    if (threadIdx.x < kWidth)
        for (int t = 0; t < n_tok; ++t) {
            y[t * kWidth + threadIdx.x] = 2.0f * x[t * kWidth + threadIdx.x];
            total[threadIdx.x] += x[t * kWidth + threadIdx.x];
        }
}
"""
WIDTH = 4


class PythonBackend:
    """Runs the toy kernel in Python, from the packs' addresses alone; ``fault`` names a mistake to make."""

    def __init__(self, fault: str = "") -> None:
        self.fault, self.n_runs = fault, 0

    def run(self, calls):
        for call in calls:
            self.n_runs += 1
            cells = (ctypes.c_void_p * 4).from_address(call.args.address)
            where = [ctypes.c_uint64.from_address(cell).value for cell in cells[:3]]
            by_address = {tensor.data_ptr(): tensor for tensor in call.args.tensors}
            x, y, total = (by_address[address] for address in where)
            n_tok = ctypes.c_int32.from_address(cells[3]).value
            y[:n_tok] = 2 * x[:n_tok]
            total += x[:n_tok].sum(0)
            if self.fault == "wrong":
                y[0, 0] += 1
            if self.fault == "depends on n_tok":
                y[0, 0] += n_tok
            if self.fault == "depends on the neighbour" and n_tok > 1:
                y[1] += x[0]
            if self.fault == "not repeatable":
                y[0, 0] += self.n_runs


def reference(inputs):
    return {"y": 2 * inputs["x"], "total": inputs["total"] + inputs["x"].sum(0)}


def outputs(inputs):
    x = inputs["x"]
    return {"y": torch.empty_like(x), "scratch": torch.empty(4, device=x.device)}


def make(seed, device, n_tok=8):
    x = torch.randn(n_tok, WIDTH, generator=torch.Generator().manual_seed(seed))
    return {"x": x.to(device), "total": torch.ones(WIDTH, device=device)}


def operation(folder: Path, stateless: bool = False, **fields) -> Operation:
    """The toy operation with its source in ``folder``. ``stateless``: the total is an output and not kept."""
    path = folder / "toy.cu"
    path.write_text(SOURCE)
    entry = Entry("toy", str(path), (("x", "f32*"), ("y", "f32*"), ("total", "f32*"), ("n_tok", "i32")), ("kWidth",))
    constants = constant_set(kWidth=WIDTH)

    def calls(inputs, given):
        total = given["scratch"] if stateless else inputs["total"]
        values = {"x": inputs["x"], "y": given["y"], "total": total, "n_tok": inputs["x"].shape[0]}
        return [KernelCall(entry, constants, (1, 1, 1), (32, 1, 1), 0, ArgPack(entry, values))]

    compare = {"y": Exact(), "total": Close(1e-6, 1e-6, "eight values of about 1, summed in another order")}
    if stateless:
        compare = {"y": Exact()}
    return Operation(
        **{
            "name": "toy",
            "reference": (lambda inputs: {"y": 2 * inputs["x"]}) if stateless else reference,
            "outputs": outputs,
            "calls": calls,
            "entries": (entry,),
            "cases": lambda: [Case("small", "smoke", make, compare, bytes_moved=8 * WIDTH * 8, flops=2 * 8 * WIDTH)],
            "variants": ((entry, constants),),
            "mutates": () if stateless else ("total",),
            "workspaces": ("scratch",),
            "token_inputs": {"x": 0},
            "token_outputs": {"y": 0},
            **fields,
        }
    )
