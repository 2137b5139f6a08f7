#!/usr/bin/env bash
# Everything that can only be known on a GPU: tools/gpu_check.sh OUT [SCENE] [--steps NAME,...] [--libraries FOLDER]
# What it does, its limits and exit codes: --help. POSEMAP_PYTHON: the interpreter (default .venv's, else python3).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${POSEMAP_PYTHON:-}"
[[ -n "$python" ]] || { [[ -x "$root/.venv/bin/python" ]] && python="$root/.venv/bin/python" || python=python3; }
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" "$root/benchmarks/gpu_check.py" "$@"
