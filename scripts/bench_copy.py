"""Memory bandwidth of the first GPU (ds4.kernels.bandwidth): what the kernels' figures are percentages of.

python scripts/bench_copy.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds4.errors import CudaError, Ds4Error
from ds4.kernels.bandwidth import measure, open_gpu


def table(found: dict[str, Any]) -> str:
    """The rows as text, the two figures that count last."""
    lines = [f"{'':8} {'MB':>6} {'GB/s':>8} {'min':>8} {'max':>8}"]
    for row in found["rows"]:
        figures = " ".join(f"{row[key]:8.1f}" for key in ("gb_s", "min", "max"))
        lines.append(f"{row['kind']:8} {row['bytes'] / 1e6:6.0f} {figures}")
    return "\n".join([*lines, f"copy {found['copy_gb_s']:.1f} GB/s, read {found['read_gb_s']:.1f} GB/s"])


def main() -> int:
    """The command; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description="Memory bandwidth of the first GPU.")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    try:
        found = measure(*open_gpu())
    except (Ds4Error, CudaError) as error:
        print(f"bench_copy: {error}", file=sys.stderr)
        return 2
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
