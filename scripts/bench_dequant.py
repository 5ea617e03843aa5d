"""How fast weights are decoded, encoded and packed into planes on this machine's CPU.

    python scripts/bench_dequant.py                    # all formats, 2 threads, 4096 x 4096 weights
    python scripts/bench_dequant.py q8_0 mxfp4 --json

All figures are GB/s of FP32 values (4 bytes a weight, 10^9 bytes a GB), the median of several runs after a first one:

    decode   PackedTensor.dequantize() to a new tensor; writing fresh memory is a part of it
    tiles    the same a few rows at a time, which stay in the cache: what streaming readers see
    encode   Format.quantize, where ds4 can write the format; nothing is done for f32
    pack     from checkpoint bytes to the planes that kernels read

The target for decode is 1 GB/s each on two cores. Times wander with whatever else the machine does; compare medians of
runs that follow each other.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch

from ds4.kernels.packing import PACKINGS, Planes, pack_rows
from ds4.weights.formats import FORMATS, Format
from ds4.weights.tensor import PackedTensor


def stored(fmt: Format, n_rows: int, n_cols: int) -> PackedTensor:
    """A weight in this format: encoded where ds4 can, else of random bytes below 0x7C, which no not-a-number has."""
    g = torch.Generator().manual_seed(0)
    if fmt.quantize is not None:
        data, *parts = fmt.encode(torch.randn(n_rows, n_cols, generator=g))
    else:
        data, parts = torch.randint(0, 0x7C, (n_rows, fmt.row_bytes(n_cols)), generator=g, dtype=torch.uint8), []
    return PackedTensor(fmt.name, fmt.name, (n_rows, n_cols), data, parts=dict(zip(fmt.parts, parts, strict=True)))


def rate(run: Callable[[], object], n_weights: int, repeat: int) -> float:
    """GB/s of FP32 values: the median of ``repeat`` runs after one that does not count."""
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 4e-9 * n_weights / statistics.median(times[1:])


def measure(fmt: Format, n_rows: int, n_cols: int, repeat: int) -> dict[str, float | str | None]:
    """One row of the table."""
    tensor = stored(fmt, n_rows, n_cols)
    planes = Planes.allocate(PACKINGS[fmt.name], n_rows, n_cols)
    x = torch.randn(n_rows, n_cols, generator=torch.Generator().manual_seed(1))
    n = n_rows * n_cols
    return {
        "format": fmt.name,
        "bits": round(8 * tensor.nbytes / n, 3),
        "decode": rate(tensor.dequantize, n, repeat),
        "tiles": rate(lambda: [None for _ in tensor.tiles()], n, repeat),
        "encode": rate(lambda: fmt.encode(x), n, repeat) if fmt.quantize and fmt.name != "f32" else None,
        "pack": rate(lambda: pack_rows(tensor, planes), n, repeat),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=f"of {' '.join(PACKINGS)}; all without")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    unknown = set(args.formats) - set(PACKINGS)
    if unknown:
        parser.error(f"unknown format {' '.join(sorted(unknown))}; choose from {' '.join(PACKINGS)}")
    torch.set_num_threads(args.threads)
    if not args.json:
        print(f"{args.rows} x {args.cols} weights, {args.threads} threads, GB/s of FP32 values")
        print(f"{'format':<16}{'bits':>8}{'decode':>8}{'tiles':>8}{'encode':>8}{'pack':>8}")
    # Not counted: a virtual machine may be slow to hand out memory during the first second or two.
    measure(FORMATS["f16"], args.rows, args.cols, 2 * args.repeat)
    results = []
    for name in args.formats or PACKINGS:
        result = measure(FORMATS[name], args.rows, args.cols, args.repeat)
        results.append(result)
        if not args.json:
            figures = (result[key] for key in ("decode", "tiles", "encode", "pack"))
            print(f"{name:<16}{result['bits']:>8}" + "".join("       -" if v is None else f"{v:8.2f}" for v in figures))
    if args.json:
        machine = {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        }
        shape = {"rows": args.rows, "cols": args.cols, "threads": args.threads, "repeat": args.repeat}
        json.dump({**machine, **shape, "unit": "GB/s of FP32 values", "results": results}, sys.stdout, indent=1)
        print()


if __name__ == "__main__":
    main()
