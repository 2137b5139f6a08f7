#!/usr/bin/env bash
# Everything that can only be known on a GPU, in one call: tools/gpu_check.sh OUT [SCENE]
#
# Builds the kernels, runs the whole test suite and the parity tests on the GPU, the sanitizers, the benchmarks and one
# whole training run, each under its own time limit (25 minutes together), and leaves logs, JSON and a table in OUT.
# SCENE: a captured scene (folder with transforms.json); default: the embedded room.
# POSEMAP_PYTHON: the interpreter (default python3); PMF_CUDA_LIBRARY: a libpmf_cuda.so built elsewhere.
# Exit code: 0 all passed, 1 a step failed, 3 no GPU (the steps that need none have run).
set -uo pipefail
if [[ $# -lt 1 || "$1" == -h || "$1" == --help ]]; then
  sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  [[ $# -ge 1 ]] && exit 0 || exit 2
fi
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
scene="${2:-room}"
[[ "$scene" == room ]] || scene="$(realpath "$scene")" || exit 2
mkdir -p "$1" || exit 2
out="$(cd "$1" && pwd)"
python="${POSEMAP_PYTHON:-python3}"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PMF_CACHE_DIR="${PMF_CACHE_DIR:-$out/cache}"
cd "$root" || exit 2
: >"$out/steps.jsonl"

step() {  # name, seconds, command...: its output goes to OUT/name.log, its fate to steps.jsonl
  local name="$1" limit="$2" begin=$SECONDS status=0
  shift 2
  echo "== $name (at most $limit s)"
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  [[ $status -eq 0 ]] || tail -n 5 "$out/$name.log"
  printf '{"step": "%s", "status": %d, "seconds": %d, "limit": %d}\n' \
    "$name" "$status" $((SECONDS - begin)) "$limit" >>"$out/steps.jsonl"
}
finish() {
  "$python" benchmarks/gpu_report.py "$out"
  exit "$1"
}

step environment 60 "$python" -m posemap_fast.cli inspect --environment --json
step build_cpu 60 "$python" -m posemap_fast.ops._build_cli
step build_cuda 120 "$python" -m posemap_fast.ops._build_cli --cuda
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_check: torch sees no GPU here; the steps that need one were not run" >&2
  finish 3
fi
parity=(-m pytest -q -p no:cacheprovider tests/cuda_emulation/test_public_ops.py -k gpu)
step parity 120 "$python" "${parity[@]}"
step tests 330 "$python" -m pytest -q -p no:cacheprovider -m "cuda or not cuda"
step backbones 150 "$python" benchmarks/gpu_backbones.py --json "$out/backbones.json"
bench=("$python" -m posemap_fast.bench --device cuda --seconds 0.5)
step bench 150 "${bench[@]}" --suite ops,render,refine --json "$out/bench.json"
step inference 120 "${bench[@]}" --suite infer --only 'infer/vgg16/480x854/*' --json "$out/inference.json"
short=(--set network.weights=random --set nerf.steps=4000 --set posemap.steps=600 --set apr.steps=1200 --set align.steps=300)
step pipeline 210 "$python" -m posemap_fast.cli train --scene "$scene" --preset gpu --out "$out/run" "${short[@]}"
step memcheck 90 compute-sanitizer --tool memcheck --error-exitcode 9 "$python" "${parity[@]}"
step racecheck 90 compute-sanitizer --tool racecheck --error-exitcode 9 "$python" "${parity[@]}"
grep -q '"status": [^0]' "$out/steps.jsonl" && finish 1
finish 0
