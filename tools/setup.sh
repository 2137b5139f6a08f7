#!/usr/bin/env bash
# Makes .venv in the checkout and installs posemap_fast into it; quick when nothing has changed.
#   PYTHON=python3.11 tools/setup.sh        which interpreter to use (3.10 or newer)
#   POSEMAP_PYTHON=/path/to/python ...      use that environment as it is, install nothing
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"

[ -n "${POSEMAP_PYTHON:-}" ] && exit 0

python="${PYTHON:-python3}"
command -v "$python" >/dev/null || { echo "setup: $python not found; install Python 3.10 or newer, or set PYTHON" >&2; exit 2; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "setup: $python is older than 3.10; set PYTHON to a newer one" >&2
    exit 2
}

stamp=.venv/.posemap_setup
wanted="$(cat requirements.txt pyproject.toml setup.py | sha256sum | cut -d' ' -f1) $root"
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0

exec 9>.setup.lock
flock 9 # two commands started at once set up one after the other
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0

echo "setup: creating .venv (once; a few minutes, most of it PyTorch)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
export PIP_DISABLE_PIP_VERSION_CHECK=1
# torch first and by its exact version: a bare `torch` may bring several GB of CUDA packages.
.venv/bin/python -m pip install --quiet "$(grep '^torch==' requirements.txt)" 2>&1 | grep -v '^WARNING' || true
.venv/bin/python -c 'import torch' 2>/dev/null || { echo "setup: installing torch failed; see: .venv/bin/pip install -r requirements.txt" >&2; exit 2; }
.venv/bin/python -m pip install --quiet -r requirements.txt 2>&1 | grep -v '^WARNING' || true
.venv/bin/python -m pip install --quiet --no-build-isolation --no-deps -e . 2>&1 | grep -v '^WARNING' || true
.venv/bin/python -c 'import posemap_fast, cv2, yaml, rich, safetensors, matplotlib, pytest' || {
    echo "setup: the installation is incomplete; see: .venv/bin/pip install -r requirements.txt" >&2
    exit 2
}
echo "$wanted" > "$stamp"
echo "setup: done"
