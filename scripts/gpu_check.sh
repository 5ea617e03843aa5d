#!/usr/bin/env bash
# Everything a GPU machine can say about this version, in less than nine minutes: docs/gpu.md.
#
#   scripts/gpu_check.sh            exit code 0 if nothing failed, 1 if something did
#   scripts/gpu_check.sh --help     the options
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python="${PYTHON:-$(command -v python3 || command -v python)}"
[ -n "$python" ] || { echo "gpu_check: no python3 on PATH; set PYTHON" >&2; exit 1; }
exec "$python" scripts/gpu_check.py "$@"
