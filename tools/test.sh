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
# Two processes of one thread each: most tests are too small for a second one. A file's tests share costly fixtures.
OMP_NUM_THREADS=1 exec "$python" -m pytest -q -n 2 --dist loadfile
