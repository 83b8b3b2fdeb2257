# Source this from the repository's root on a machine with a GPU: the packages that its Python lacks come from wheels in
# .whl/ (made beforehand, see run.sh), Octavo itself from the source tree.
export OCTAVO_SITE=${OCTAVO_SITE:-${TMPDIR:-/tmp}/site}
if [ ! -e "$OCTAVO_SITE/.ready" ]; then
  mkdir -p "$OCTAVO_SITE"
  if compgen -G '.whl/*.whl' > /dev/null && ! python3 -c 'import msgspec, pydantic, httptools, gguf' 2> /dev/null; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$OCTAVO_SITE" .whl/*.whl
  fi
  python3 tools/bench_peers/gpu/distribution.py "$OCTAVO_SITE" && touch "$OCTAVO_SITE/.ready"
fi
export PYTHONPATH=engine:kernels:operator:$OCTAVO_SITE${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 COLUMNS=${COLUMNS:-180}
octavo() { python3 -c 'from octavo_engine.cli import main; main()' "$@"; }
