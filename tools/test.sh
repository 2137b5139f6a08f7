#!/usr/bin/env bash
# The test command of the README: lint, types and the test suite. Arguments go to pytest.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$root/tools/setup.sh"
cd "$root"
python="${POSEMAP_PYTHON:-$root/.venv/bin/python}"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
if [[ $# -gt 0 ]]; then
  exec "$python" -m pytest "$@"
fi
# The emulated CUDA kernels and the parsers are single-threaded: two processes. All else uses two threads: one process.
OMP_NUM_THREADS=1 "$python" -m pytest -q -n 2 tests/cuda_emulation tests/data
exec "$python" -m pytest -q --ignore=tests/cuda_emulation --ignore=tests/data
