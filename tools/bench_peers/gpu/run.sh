#!/usr/bin/env bash
# Measures Octavo on a machine with a GPU, from the repository's root:
#
#   bash tools/bench_peers/gpu/run.sh STEP ...
#
# A STEP is one of
#   ceilings                                 copy, read, bfloat16 multiplication at first and sustained
#   linears:MODEL                            cuBLAS for each linear layer of MODEL at 1 to 512 rows
#   tests[:PATH,PATH]                        pytest of these paths; default: tests/kernels
#   offline:MODEL:W3,W2[:NAME=VALUE,...]     workloads, with fields of the engine's configuration
#   profile:MODEL:W3,W2[:NAME=VALUE,...]     one repeat each, then PROFILE_STEPS (20) decode steps by kind of kernel
#   prefill:MODEL:W4[:NAME=VALUE,...]        the same, but the first steps after SKIP_STEPS (2), which are prompts
# MODEL is the name of a shape (`octavo bench make-checkpoint list`), with dummy weights, or a folder.
# Steps run in the order given, each in a process of its own, until LIMIT_S seconds (570) are over; a step that is cut
# off keeps the workloads it has finished. The steps' output goes to $OUT/run.log ($OUT: build/gpu) and, shortened, to the
# terminal; figures go to $OUT/results.jsonl. Percentages refer to the ceilings that a `ceilings` step before has
# measured; without one each step measures its own.
# Packages that the machine lacks: pip download them for its Python into .whl/ beforehand, and carry that folder along.
set -uo pipefail
export OUT=${OUT:-build/gpu}
LIMIT_S=${LIMIT_S:-570}
PROFILE_STEPS=${PROFILE_STEPS:-20}
SKIP_STEPS=${SKIP_STEPS:-2}
started=$(date +%s)
mkdir -p "$OUT"
results=$OUT/results.jsonl

say() { echo "[$(($(date +%s) - started)) s] $*"; }

# The options that fix the rates, if a `ceilings` step has measured them.
rates() {
  python3 - "$results" <<'PYTHON'
import json, pathlib, sys
file = pathlib.Path(sys.argv[1])
lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
for each in [line for line in lines if line["kind"] == "gpu-ceilings"][:1]:
    print(f"--bandwidth-gb-s {max(each['copy_gb_s'], each['read_gb_s'])} --tflops {each['matmul_tflops']}")
PYTHON
}

# offline MODEL WORKLOADS SETTINGS [OPTION ...]
offline() {
  local model=$1 options=()
  for workload in ${2//,/ }; do options+=(--workload "$workload"); done
  for setting in ${3//,/ }; do options+=(--set "$setting"); done
  # shellcheck disable=SC2046
  octavo bench offline --model "$model" "${options[@]}" $(rates) -o "$results" "${@:4}"
}

# The tests' common conftest.py asks for a Kubernetes client, which a GPU's machine need not have.
test_paths() {
  local failed=0
  for path in ${1//,/ }; do
    python3 -m pytest -q -p no:cacheprovider -W default --confcutdir "$(cut -d/ -f1-2 <<< "$path")" "$path" || failed=1
  done
  return "$failed"
}

run_step() {
  local kind model workloads settings
  IFS=: read -r kind model workloads settings <<< "$1"
  case $kind in
    ceilings) octavo bench ceilings -o "$results" ;;
    linears) octavo bench ceilings --sustained-s 0.5 --linears "$model" -o "$results" ;;
    tests) test_paths "${model:-tests/kernels}" ;;
    offline) offline "$model" "$workloads" "$settings" ;;
    profile) offline "$model" "$workloads" "$settings" --repeats 1 --profile "$PROFILE_STEPS" ;;
    prefill)
      offline "$model" "$workloads" "$settings" --repeats 1 --profile "$PROFILE_STEPS" --profile-skip "$SKIP_STEPS" ;;
    *) echo "no such step: $1"; return 2 ;;
  esac
}

source tools/bench_peers/gpu/setup.sh
if [ "${1:-}" = --step ]; then
  run_step "$2"
  exit
fi
command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version,power.limit,temperature.gpu --format=csv,noheader
say "ready"
failed=0
for step in "$@"; do
  left_s=$((LIMIT_S - ($(date +%s) - started)))
  if [ "$left_s" -lt 10 ]; then
    say "no time left for $step"
    continue
  fi
  log=$(mktemp)
  timeout -k 5 "$left_s" bash "$0" --step "$step" > "$log" 2>&1
  code=$?
  grep -v ' INFO \|^$' "$log" | tail -n "${SHOWN_LINES:-60}"
  { echo "== $step"; cat "$log"; } >> "$OUT/run.log"
  rm "$log"
  [ "$code" -ne 0 ] && failed=1
  say "$step ended with $code"
done
exit "$failed"
