#!/usr/bin/env bash
# Serves a named shape with dummy weights on port 8000 while a command runs, from the repository's root on a machine
# with a GPU:
#
#   bash tools/bench_peers/gpu/serve.sh SHAPE COMMAND ...
#
# SHAPE is also the name of the served model (`octavo bench make-checkpoint list`). The server's log goes to
# $OUT/serve.txt. The exit code is the command's.
set -uo pipefail
export OUT=${OUT:-build/gpu}
shape=$1
shift
mkdir -p "$OUT"
source tools/bench_peers/gpu/setup.sh
folder=$(mktemp -d)/$shape
octavo bench make-checkpoint "$shape" "$folder" --no-weights > "$OUT/serve.txt"
setsid python3 -c 'from octavo_engine.cli import main; main()' serve "$folder" --load-format dummy \
  --max-model-len 9216 --served-model-name "$shape" >> "$OUT/serve.txt" 2>&1 &
server=$!
"$@"
code=$?
kill -TERM -- "-$server"
wait "$server"
exit "$code"
