"""The memory planner: what a model will allocate, whether there is room for it, and the longest context that fits.

``ds4 generate``, ``chat`` and ``bench`` ask it before they load anything, ``ds4 inspect --memory`` for a memory of any
size. On a GPU the weights are counted in the planes that kernels read, and the workspaces of the decode step from its
list of launches, both on torch's meta device; on the CPU weights stay in the memory-mapped file.
Source:  state by ds4.kv.spec (spec model.md 6).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ds4.errors import Ds4Error
from ds4.kernels.packing import PlaneMatrix
from ds4.kv.spec import RowFormats, cache_bytes, layer_spec
from ds4.model.prefill_pass import CAPACITIES, PrefillPass, capacity_for
from ds4.model.steps import DecodeStep
from ds4.model.transformer import Transformer
from ds4.profiling.shapes import shape_model
from ds4.weights.checkpoint import Checkpoint
from ds4.weights.dense_cache import BUDGET_BYTES, TILED_BYTES

RESERVE_BYTES = {"cuda": 2 << 30, "cpu": 512 << 20}
"""Set aside for what nobody counts: on a GPU the CUDA context and loaded kernels (not measured on one yet), on the CPU
torch itself and activations."""

SHORT_CTX = 4096
"""Workspaces of shorter contexts count as this one's."""

GRAPH_BYTES_PER_LAUNCH = 16 << 10
"""Set aside for a node of a CUDA graph and its arguments; not measured on a GPU yet."""


@dataclass(frozen=True)
class Fit:
    """Bytes that a model needs at a context of ``ctx`` tokens, and what a memory of ``memory_bytes`` has room for.

    weights  in memory; ``mapped``: they stay in the file and do not count
    cache    rows, keys and compressor state of all sessions
    steps    results and workspaces of the decode steps' launch lists
    prompts  the same of a prompt's passes, for all capacities that the context needs
    graphs   CUDA graphs of these lists
    copies   FP32 copies of matrices: on the CPU of those that steps multiply, on a GPU of a draft head's, whose rows of
             a prompt are made in torch
    reserve  RESERVE_BYTES
    max_ctx  longest context that fits, at most the model's own; 0 where none does
    """

    ctx: int
    memory_bytes: int
    weights_bytes: int
    cache_bytes: int
    steps_bytes: int
    prompts_bytes: int
    graphs_bytes: int
    copies_bytes: int
    reserve_bytes: int
    max_ctx: int
    mapped: bool = False

    @property
    def parts(self) -> dict[str, int]:
        """What counts, by name."""
        counted = {field.name.removesuffix("_bytes"): getattr(self, field.name) for field in fields(self)[2:9]}
        return {name: 0 if name == "weights" and self.mapped else n_bytes for name, n_bytes in counted.items()}

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.memory_bytes

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"total_bytes": self.total_bytes, "fits": self.fits}

    def line(self) -> str:
        """One line of what will be allocated."""
        shown = {"weights": "weights", "cache": f"cache of {self.ctx:,} tokens", "steps": "workspaces"}
        shown |= {"prompts": "prompt workspaces", "graphs": "graphs", "copies": "copies", "reserve": "reserve"}
        parts = [f"{shown[name]} {binary_size(n_bytes)}" for name, n_bytes in self.parts.items() if n_bytes]
        return f"memory: {', '.join(parts)}; {binary_size(self.total_bytes)} of {binary_size(self.memory_bytes)} free"

    def check(self) -> None:
        """Raise Ds4Error where it does not fit: what is missing, and the longest context that does."""
        if self.fits:
            return
        remedy = f"the longest context that fits is --ctx {self.max_ctx}" if self.max_ctx else "no context fits"
        missing = self.total_bytes - self.memory_bytes
        raise Ds4Error(
            f"memory: {binary_size(missing)} ({missing} bytes) are missing at a context of {self.ctx} tokens: "
            f"{binary_size(self.total_bytes)} are needed, {binary_size(self.memory_bytes)} are free; {remedy}"
        )


def binary_size(n_bytes: float) -> str:
    """Bytes in binary units: 80.8 GiB."""
    unit, scale = ("GiB", 1 << 30) if n_bytes >= 1 << 28 else ("MiB", 1 << 20)
    return f"{n_bytes / scale:,.1f} {unit}"


class Planner:
    """The bills of one checkpoint on a device, at any context.

    device    "cuda" or "cpu"
    formats   of the cache (default: packed rows)
    n_toks    numbers of tokens of the decode steps: one list of launches each; the CPU has none. More than 1: drafts
    sessions  that exist at a time
    in_file   the CPU reads the weights from the mapped file
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str = "cuda",
        *,
        formats: RowFormats | None = None,
        n_toks: Sequence[int] = (1,),
        sessions: int = 1,
        in_file: bool = True,
    ) -> None:
        self.checkpoint, self.config, self.device = checkpoint, checkpoint.config, device
        self.n_toks, self.sessions = tuple(n_toks) if device == "cuda" else (), sessions
        self._built: dict[int, tuple[int, int, int]] = {}
        self._mapped = in_file and device == "cpu"
        self.formats = formats or RowFormats.of(self.config, kv_fp8=True, kv_rope_bf16=True, index_fp4=True)

    def fit(self, ctx: int, memory_bytes: int) -> Fit:
        """The bill at ``ctx`` tokens against a memory."""
        low, high = 0, self.config.max_position_embeddings
        if not self._bill(high, memory_bytes, 0).fits:
            while low < high:
                middle = (low + high + 1) // 2
                fits = self._bill(middle, memory_bytes, 0).fits
                low, high = (middle, high) if fits else (low, middle - 1)
        return self._bill(ctx, memory_bytes, high)

    def _bill(self, ctx: int, memory_bytes: int, max_ctx: int) -> Fit:
        workspaces, prompts, launches = self._lists(ctx)
        return Fit(
            ctx,
            memory_bytes,
            self._weights,
            self.sessions * self.session_bytes(ctx),
            self.sessions * workspaces,
            self.sessions * prompts,
            self.sessions * launches * GRAPH_BYTES_PER_LAUNCH,
            min(BUDGET_BYTES, self._dense),
            RESERVE_BYTES[self.device],
            max_ctx,
            mapped=self._mapped,
        )

    def session_bytes(self, ctx: int) -> int:
        """The state of one session; on the CPU each ring is there in FP32 as well."""
        total = cache_bytes(self.config, self.formats, ctx)
        if self.device == "cpu":
            slots = sum(layer_spec(self.config, ratio).ring_slots for ratio in self.config.compress_ratios)
            total += slots * self.formats.row.width * 4
        return total

    @cached_property
    def _shapes(self) -> Transformer | None:
        """The network without its values; None on the CPU and where a format has no kernels."""
        if self.device == "cpu":
            return None
        try:
            return shape_model(self.checkpoint)
        except Ds4Error:
            return None

    @cached_property
    def _weights(self) -> int:
        """As the planes of the device have them, without those as stored; a draft head as stored, if it is used."""
        if self._shapes is None:
            return self.checkpoint.total_bytes
        head = sum(n_bytes for name, _, _, n_bytes in self.checkpoint.stored_groups() if name.startswith("mtp."))
        return sum(weight_storages(self._shapes).values()) + (head if max(self.n_toks) > 1 else 0)

    @cached_property
    def _dense(self) -> int:
        """FP32 bytes of the matrices that are small enough to be kept as copies; experts are stacks of them."""
        total, only = 0, "mtp." if self.device == "cuda" else ""
        if only and max(self.n_toks, default=1) == 1:
            return 0
        for name, _, shape, _ in self.checkpoint.stored_groups():
            if not name.startswith(only):
                continue
            count, matrix = (shape[0], shape[1:]) if "*" in name else (1, shape)
            if len(matrix) == 2 and 4 * matrix[0] * matrix[1] <= TILED_BYTES:
                total += count * 4 * matrix[0] * matrix[1]
        return total

    @cached_property
    def _sample(self) -> tuple[Transformer, list[int], list[int]] | None:
        """The network with one layer of each kind, as layers of a kind share their workspaces; these layers' numbers,
        and how many there are of each."""
        if self._shapes is None or not self.n_toks:
            return None
        config = self.config
        kinds = [(config.compress_ratios[i], i < config.num_hash_layers) for i in range(config.num_hidden_layers)]
        layers = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
        model = copy.copy(self._shapes)
        model.blocks = [self._shapes.blocks[i] for i in layers]
        return model, layers, [kinds.count(kinds[i]) for i in layers]

    def _lists(self, ctx: int) -> tuple[int, int, int]:
        """(bytes of steps, of prompts, launches of steps) of all lists at the power of two that holds ``ctx`` tokens:
        what they need is a little less than proportional to the context, and small."""
        ctx = min(max(SHORT_CTX, 1 << (ctx - 1).bit_length()), self.config.max_position_embeddings)
        if ctx not in self._built:
            self._built[ctx] = self._build(ctx)
        return self._built[ctx]

    def _build(self, ctx: int) -> tuple[int, int, int]:
        if self._sample is None:
            return 0, 0, 0
        model, layers, times = self._sample
        cache = model.new_cache(ctx)
        cache.layers = [cache.layers[i] for i in layers]
        n_bytes = launches = 0
        try:
            for n_tok in self.n_toks:
                step = DecodeStep(model, cache, n_tok)
                n_bytes += step.workspace_bytes
                in_layers = (len(part.calls) * (1 if part.layer is None else times[part.layer]) for part in step.parts)
                launches += sum(in_layers)
            prompts = sum(PrefillPass(model, cache, n).workspace_bytes for n in CAPACITIES if n <= capacity_for(ctx))
        except (Ds4Error, ValueError):  # sizes that no kernel has: it will be refused when it is to be processed
            return 0, 0, 0
        return n_bytes, prompts, launches


def weight_storages(model: Transformer) -> dict[int, int]:
    """Bytes of every piece of memory that the network's weights lie in, by its identity."""
    found: dict[int, int] = {}
    for tensor in _tensors(model, set()):
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage.nbytes()
    return found


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors that an object of ds4 holds, in its attributes and in theirs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, PlaneMatrix):
        yield from (value.arena or value.planes).tensors.values()
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one, seen)
    elif type(value).__module__.startswith("ds4.model") and id(value) not in seen:
        seen.add(id(value))
        for one in vars(value).values():
            yield from _tensors(one, seen)


def free_bytes(device: torch.device) -> int:
    """Memory that nobody uses: of a GPU, or what Linux can give (elsewhere: all there is)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            facts = dict(line.split(":", 1) for line in file)
        return int(facts["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
