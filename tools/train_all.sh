#!/usr/bin/env bash
# From posed images to a localizer: sets up the environment if there is none, then runs every stage of one scene.
#   tools/train_all.sh                                   the embedded scene, CPU preset, into runs/room
#   tools/train_all.sh --scene my_capture --preset cpu   a folder with transforms.json
# Safe to interrupt and run again. All options: tools/train_all.sh --help
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$root/tools/setup.sh"
export POSEMAP_RUNS="${POSEMAP_RUNS:-$root/runs}"
exec "${POSEMAP_PYTHON:-$root/.venv/bin/python}" -m posemap_fast.cli train "$@"
