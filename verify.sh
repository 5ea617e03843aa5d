#!/usr/bin/env bash
# The correctness gate: three greedy generations whose content is checked (scripts/verify_checks.py holds the rules).
#
#   ./verify.sh                                        the bundled model
#   MODEL=path/to/model.gguf ./verify.sh               another checkpoint
#   MODEL=... ./verify.sh --device cuda --ctx 4096     further options go to every `ds4 generate`
#
# Exits 0 only if all three checks pass. A command that fails or an empty answer counts as a failed check.
set -u
export PYTHONUTF8=1

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)" || exit 1
python="$(command -v python3 || command -v python)" || { echo "verify.sh: no python3 on PATH" >&2; exit 1; }
if command -v ds4 >/dev/null 2>&1; then
  ds4=(ds4)
else # a clone whose package is not installed
  ds4=(env "PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}" "$python" -m ds4)
fi
model=()
if [ -n "${MODEL:-}" ]; then model=(--model "$MODEL"); fi
answer="$(mktemp)" || exit 1
trap 'rm -f "$answer"' EXIT

passed=0
failed=0
check() { # NAME PROMPT TOKENS [OPTION...]
  local name="$1" prompt="$2" tokens="$3" status
  shift 3
  echo "== $name: $prompt"
  "${ds4[@]}" generate "$prompt" ${model[@]+"${model[@]}"} --temp 0 --max-tokens "$tokens" --json "$@" >"$answer"
  status=$?
  if [ "$status" -ne 0 ]; then
    echo "FAIL $name: ds4 generate ended with exit code $status"
    failed=$((failed + 1))
  elif "$python" "$here/scripts/verify_checks.py" "$name" <"$answer"; then
    passed=$((passed + 1))
  else
    failed=$((failed + 1))
  fi
}

check arithmetic "What is 2+2? Answer with one word." 256 "$@"
check story "Tell me a short story about a robot learning to paint." 1024 "$@"
check capital "What is the capital of France? One word." 256 "$@"

echo "$passed passed, $failed failed"
[ "$passed" -eq 3 ] && [ "$failed" -eq 0 ]
