#!/bin/sh
# Makes a virtual environment from the pins and puts the package in it: `cluster/setup.sh .venv`.
# Used by `make setup`, and on every node of a cluster that has no image of its own.
set -eu
venv=${1:-.venv}
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
uv() { if command -v uv >/dev/null 2>&1; then command uv "$@"; else "$python" -m uv "$@"; fi; }

uv venv --quiet --allow-existing --python "$python" "$venv"
# Bytecode now: where Python may not write it, each process of a run would compile its imports anew, for ten seconds.
uv pip sync --compile-bytecode --quiet --python "$venv/bin/python" "$root/requirements.txt"
uv pip install --quiet --python "$venv/bin/python" --no-deps --no-build-isolation --editable "$root"
"$venv/bin/python" -m compileall -q "$root/factory"

# torchvision's wheels want the CUDA build of torch, which runs on machines without a GPU too.
if ! "$venv/bin/python" -c "import torchvision, timm" 2>/dev/null; then
  echo "setup: torchvision or timm cannot be imported, most likely because a CPU-only torch is installed beside them." >&2
  echo "setup: remove $venv and run this again with uv, which takes the matching builds; plain pip may not." >&2
  exit 1
fi
