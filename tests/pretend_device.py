"""A device that computes on the CPU but keeps apart from it: code that mixes the two fails here as it would on a GPU.

Inside ``PretendDevice()`` tensors made with ``device="meta"`` hold real values. An operation that takes such a tensor
and a CPU tensor together raises, but for those that a GPU allows (copies, 0-dimensional values, CPU indices); so does
``numpy()``. torch's own meta device lends its name, since no other device without a driver has one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
_MOVES = {torch.ops.aten._to_copy, torch.ops.aten.copy_}
_CPU_INDICES = {torch.ops.aten.index, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_}


class OnDevice(Tensor):
    """A tensor on the pretended device; ``inner`` is the CPU tensor that it stands for."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )
        made.inner = inner
        return made

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __repr__(self) -> str:
        return f"OnDevice({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation on the inner tensors; results are on the device where the arguments, or ``device``, are."""
    target = kwargs.get("device")
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    ours = [t for t in tensors if isinstance(t, OnDevice)]
    foreign = [t for t in tensors if not isinstance(t, OnDevice) and t.dim() > 0]
    packet = func.overloadpacket
    if ours and foreign and packet not in _MOVES and not (packet in _CPU_INDICES and isinstance(args[0], OnDevice)):
        raise RuntimeError(f"{func} takes tensors of the device and of the CPU")
    inner_args, inner_kwargs = tree_map(lambda t: t.inner if isinstance(t, OnDevice) else t, (args, kwargs))
    if target is not None:
        inner_kwargs["device"] = torch.device("cpu")
    result = func(*inner_args, **inner_kwargs)
    if packet is torch.ops.aten.copy_:
        return args[0]
    on_device = bool(ours) if target is None else torch.device(target) == DEVICE
    if not on_device:
        return result
    if packet is torch.ops.aten._conj:  # a flag on the tensor, which the stand-in would not have
        pairs = torch.view_as_real(inner_args[0])
        return OnDevice(torch.view_as_complex(torch.stack((pairs[..., 0], -pairs[..., 1]), dim=-1)))
    if packet is torch.ops.aten._to_copy or not ours:
        return tree_map(lambda t: OnDevice(t) if isinstance(t, Tensor) else t, result)
    wrapped = tree_map(lambda t: OnDevice(t) if isinstance(t, Tensor) else t, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def tensor(data: Any, *, device: torch.device | str | None = None, **options: Any) -> Tensor:
    """``torch.tensor``, which builds nothing on torch's own meta device."""
    target = torch.empty(0).device if device is None else torch.device(device)  # empty: where new tensors go by default
    made = _TENSOR(data, device="cpu", **options)
    return OnDevice(made) if target == DEVICE else made


_TENSOR = torch.tensor


class PretendDevice(TorchDispatchMode):
    """Within it ``device="meta"`` means the pretended device."""

    def __enter__(self) -> PretendDevice:
        torch.tensor = tensor
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        torch.tensor = _TENSOR
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})
