"""Everything that can only be known on a GPU, in one call: build, tests, parity, sanitizers, benchmarks, one run.

Each step has a time limit of its own (25 minutes together, 7 more with --libraries), so that one failure does not cost
the rest. OUT then holds a log per step, the figures as JSON and a table. `--steps` runs some of them; what OUT holds of
the others stays in the table, so that a check can be made in several calls.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_report import read_steps, report  # beside this file

from posemap_fast.files import write_text

__all__ = ["Step", "main", "run_step", "steps_of"]

ROOT = Path(__file__).resolve().parents[1]
PASSED, FAILED, NO_GPU = 0, 1, 3  # argparse ends with 2
OVER_LIMIT = 124  # what timeout(1) returns
_GRACE_S = 10  # between the polite and the final signal
_SHORT_RUN = {
    "network.weights": "random",
    "nerf.steps": 4000,
    "posemap.steps": 600,
    "apr.steps": 1200,
    "align.steps": 300,
}


@dataclass(frozen=True)
class Step:
    """A command with a time limit; its output goes to OUT/<name>.log."""

    name: str
    limit_s: int
    command: tuple[str, ...]
    needs_gpu: bool = True


def steps_of(out: Path, scene: str, libraries: Path | None) -> list[Step]:
    """All steps, in their order; those of --libraries only with a folder."""
    python = sys.executable
    module = functools.partial(_command, python, "-m")
    tests = functools.partial(module, "pytest", "-q", "-p", "no:cacheprovider")
    parity = tests("tests/cuda_emulation/test_public_ops.py", "-k", "gpu")
    bench = functools.partial(module, "posemap_fast.bench", "--device", "cuda", "--seconds", "0.5")
    sanitizer = functools.partial(_command, "compute-sanitizer", "--error-exitcode", "9", "--tool")
    short = [argument for key, value in _SHORT_RUN.items() for argument in ("--set", f"{key}={value}")]
    train = module("posemap_fast.cli", "train", "--scene", scene, "--preset", "gpu", "--out", str(out / "run"), *short)
    inference = ("--suite", "infer", "--only", "infer/vgg16/480x854/*", "--json", str(out / "inference.json"))
    backbones = _command(python, "benchmarks/gpu_backbones.py", "--json", str(out / "backbones.json"))
    return [
        Step("environment", 60, module("posemap_fast.cli", "inspect", "--environment", "--json"), needs_gpu=False),
        Step("build_cpu", 60, module("posemap_fast.ops._build_cli"), needs_gpu=False),
        Step("build_cuda", 120, module("posemap_fast.ops._build_cli", "--cuda"), needs_gpu=False),
        *(_library_steps(out, libraries) if libraries else ()),
        Step("parity", 120, parity),
        Step("tests", 330, tests("-m", "cuda or not cuda", *_in_parallel())),
        Step("backbones", 150, backbones),
        Step("bench", 150, bench("--suite", "ops,render,refine", "--json", str(out / "bench.json"))),
        Step("inference", 120, bench(*inference)),
        Step("pipeline", 210, train),
        Step("memcheck", 90, sanitizer("memcheck", *parity)),
        Step("racecheck", 90, sanitizer("racecheck", *parity)),
    ]


def _command(*words: str) -> tuple[str, ...]:
    return words


def _library_steps(out: Path, libraries: Path) -> list[Step]:
    """tiny-cuda-nn and nerfacc from source trees into OUT/site, for this torch and this GPU."""
    build = functools.partial(
        _command, sys.executable, "benchmarks/gpu_libraries.py", str(libraries), str(out / "site")
    )
    return [Step("tcnn", 240, build("tcnn")), Step("nerfacc", 180, build("nerfacc"))]


def _in_parallel() -> tuple[str, ...]:
    """The suite's tests in several processes, where pytest-xdist is installed; a file's tests share fixtures."""
    if importlib.util.find_spec("xdist") is None:
        return ()
    return ("-n", str(max(2, min(8, (os.cpu_count() or 2) // 2))), "--dist", "loadfile")


def run_step(step: Step, out: Path) -> dict[str, Any]:
    """Run it; the row for the table. All processes that it started are ended at its limit."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(out / "site"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PMF_CACHE_DIR": os.environ.get("PMF_CACHE_DIR", str(out / "cache")),
        "TORCH_EXTENSIONS_DIR": str(out / "torch_extensions"),  # nerfacc's kernels
    }
    if step.name == "tests":
        environment["OMP_NUM_THREADS"] = "1"  # its processes share the cores
    log = out / f"{step.name}.log"
    begin = time.monotonic()
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                step.command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
            )
        except OSError as error:
            file.write(f"{step.command[0]}: {error.strerror}\n".encode())
            status = 127
        else:
            status = _wait(process, step.limit_s)
    seconds = round(time.monotonic() - begin)
    return {"step": step.name, "status": status, "seconds": seconds, "limit": step.limit_s}


def _wait(process: subprocess.Popen[bytes], limit_s: float) -> int:
    """Exit code, or OVER_LIMIT; no process of its group outlives it."""
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return OVER_LIMIT
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(_GRACE_S)


def _parser() -> argparse.ArgumentParser:
    names = [step.name for step in steps_of(Path(), "room", Path())]
    parser = argparse.ArgumentParser(
        prog="tools/gpu_check.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="POSEMAP_PYTHON: the interpreter (default .venv's, else python3).\n"
        "PMF_CUDA_LIBRARY: a libpmf_cuda.so built elsewhere.\n"
        "Exit code: 0 these steps passed, 1 one failed, 2 bad arguments, 3 no GPU (those that need one have not run).",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for logs, JSON and the table")
    parser.add_argument(
        "scene", metavar="SCENE", nargs="?", default="room", help="captured scene (transforms.json); default: the room"
    )
    parser.add_argument("--steps", metavar="NAME,...", help=f"these only: {', '.join(names)}")
    parser.add_argument(
        "--libraries",
        metavar="FOLDER",
        type=Path,
        help="build FOLDER/tiny-cuda-nn (with its submodules) and FOLDER/nerfacc-*.whl into OUT/site, and use them; "
        "other wheels in FOLDER serve the build (setuptools<81, ninja). Without it what is installed is used",
    )
    return parser


def _chosen(parser: argparse.ArgumentParser, arguments: argparse.Namespace, out: Path) -> list[Step]:
    """The steps to run; ends with exit code 2 and a sentence when the arguments are wrong."""
    scene = arguments.scene
    if scene != "room":
        if not Path(scene).is_dir():
            parser.error(f"SCENE {scene}: no such folder")
        scene = str(Path(scene).resolve())
    libraries = arguments.libraries
    if libraries is not None and not libraries.is_dir():
        parser.error(f"--libraries {libraries}: no such folder")
    steps = steps_of(out, scene, libraries.resolve() if libraries else None)
    if arguments.steps is None:
        return steps
    wanted = arguments.steps.split(",")
    names = [step.name for step in steps]
    for name in wanted:
        if name not in names:
            more = "; tcnn and nerfacc need --libraries FOLDER" if name in ("tcnn", "nerfacc") else ""
            parser.error(f"--steps: no step {name!r}, there are {', '.join(names)}{more}")
    return [step for step in steps if step.name in wanted]


def main(argv: list[str] | None = None) -> int:
    """Run the steps, write OUT/gpu_check.json, print the table."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    out = arguments.out.resolve()
    steps = _chosen(parser, arguments, out)
    out.mkdir(parents=True, exist_ok=True)
    rows = {} if arguments.steps is None else {row["step"]: row for row in read_steps(out)}
    has_gpu = torch.cuda.is_available()
    for step in steps:
        if step.needs_gpu and not has_gpu:
            continue
        print(f"== {step.name} (at most {step.limit_s} s)", flush=True)
        row = run_step(step, out)
        rows[step.name] = row
        write_text(out / "steps.jsonl", "".join(json.dumps(row) + "\n" for row in rows.values()))
        if row["status"] != 0:
            print(*(out / f"{step.name}.log").read_text(errors="replace").splitlines()[-5:], sep="\n", flush=True)
    report(out)
    if not has_gpu and any(step.needs_gpu for step in steps):
        print("gpu_check: torch sees no GPU here; the steps that need one were not run", file=sys.stderr)
        return NO_GPU
    return FAILED if any(rows[step.name]["status"] != 0 for step in steps) else PASSED


if __name__ == "__main__":
    sys.exit(main())
