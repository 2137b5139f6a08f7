"""Times the native CPU kernels against plain PyTorch in the same process; see benchmarks/README.md.

    python benchmarks/cpu_kernels.py --threads 2 --repeats 7 [--only hash_encode] [--json out.json]

Every case is verified against the reference before it is timed. Exit code 1: a result was wrong. Times never fail.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout of this script is what it measures

from cpu_cases import CASES, Tensors, Timing

from posemap_fast.errors import BackendError
from posemap_fast.ops import _library


@dataclass(frozen=True)
class Row:
    """One line of the table; times in ms, a ratio is speed over the peer's speed."""

    case: str
    verified: bool
    error: float  # largest relative error of any result or gradient, ours against the reference
    peer: str
    value: float | None = None  # median
    iqr: float | None = None
    peer_value: float | None = None
    peer_iqr: float | None = None
    ratio_to_reference: float | None = None
    unit: str = "ms"


def relative_error(got: Tensors, want: Tensors) -> float:
    """Largest over the tensors of |got - want| / |want| in the 2-norm; NaN counts as infinite."""
    errors = []
    for ours, theirs in zip(got, want, strict=True):
        difference = (ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30)
        errors.append(float(difference.nan_to_num(nan=float("inf"))))
    return max(errors)


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call; everything here is synchronous."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def median_and_iqr(values: Sequence[float]) -> tuple[float, float]:
    """Median and inter-quartile range in ms."""
    low, middle, high = np.percentile(np.array(values) * 1e3, [25, 50, 75])
    return float(middle), float(high - low)


def measure(case: str, timing: Timing, repeats: int) -> Row:
    """Verify both sides, then time them by turns; a wrong result is not timed."""
    want = timing.reference()
    error, peer_error = relative_error(timing.ours(), want), relative_error(timing.peer(), want)
    del want
    if max(error, peer_error) > timing.tolerance:
        print(f"{case}: error {error:.1e}, of the peer {peer_error:.1e}, allowed {timing.tolerance:.0e}")
        return Row(case, False, error, timing.peer_name)
    run_ours, run_peer = timing.timed or (timing.ours, timing.peer)
    seconds(run_ours), seconds(run_peer)  # warm up
    pairs = [(seconds(run_ours), seconds(run_peer)) for _ in range(repeats)]
    (value, iqr), (peer_value, peer_iqr) = (median_and_iqr(side) for side in zip(*pairs, strict=True))
    return Row(case, True, error, timing.peer_name, value, iqr, peer_value, peer_iqr, peer_value / value)


HEADER = f"{'case':<30}{'ours ms (IQR)':>18}{'peer ms (IQR)':>20}{'ratio':>8}{'error':>9}  peer"


def line(row: Row) -> str:
    """One line of the table."""
    if row.value is None:
        return f"{row.case:<30}{'WRONG RESULT, not timed':>46}{row.error:>9.0e}  {row.peer}"
    ours, peer = f"{row.value:.2f} ({row.iqr:.2f})", f"{row.peer_value:.1f} ({row.peer_iqr:.1f})"
    return f"{row.case:<30}{ours:>18}{peer:>20}{row.ratio_to_reference:>7.1f}x{row.error:>9.0e}  {row.peer}"


def _first_match(path: str, key: str) -> str:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return "unknown"
    return next((text.split(":", 1)[1].strip() for text in lines if text.startswith(key)), "unknown")


def _git(*command: str) -> str:
    root = Path(__file__).resolve().parent
    try:
        result = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


def metadata(arguments: argparse.Namespace) -> dict[str, object]:
    """What a reader needs to judge the figures."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": _git("status", "--porcelain") != "",
        "command": " ".join(sys.argv),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _first_match("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "load_1min": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "dtype": "float32",
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="threads of torch and of the kernels (default 2)")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls per side (default 7)")
    parser.add_argument("--only", metavar="NAME", default="", help=f"one case of: {', '.join(CASES)}")
    parser.add_argument("--json", metavar="F", type=Path, help="also write the figures to this file")
    parser.add_argument("--no-header", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.only and arguments.only not in CASES:
        parser.error(f"unknown case '{arguments.only}' (known: {', '.join(CASES)})")
    if arguments.threads < 1 or arguments.repeats < 1:
        parser.error("--threads and --repeats must be at least 1")
    return arguments


def run_case(name: str, repeats: int) -> list[Row]:
    """Verify and time every part of one case in this process, and print each line as it is known."""
    rows = []
    with _library.use_backend("native"):
        for part, timing in CASES[name]():
            gc.collect()
            rows.append(measure(f"{name}/{part}", timing, repeats))
            print(line(rows[-1]), flush=True)
    return rows


def run_case_apart(name: str, arguments: argparse.Namespace) -> list[Row]:
    """`run_case` in a new process: what earlier cases left of the heap would change how long torch's peers take."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "case.json"
        command = [sys.executable, __file__, "--only", name, "--json", str(report), "--no-header"]
        options = ["--threads", str(arguments.threads), "--repeats", str(arguments.repeats)]
        status = subprocess.run([*command, *options], check=False).returncode
        if not report.exists():
            sys.exit(status or 1)
        return [Row(**row) for row in json.loads(report.read_text())["results"]]


def main(argv: list[str] | None = None) -> int:
    """Run the cases, print the table; 1 when a result was wrong, 2 without native kernels."""
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    about = metadata(arguments)
    if not arguments.no_header:
        print(", ".join(f"{key} {about[key]}" for key in ("cpu", "torch", "threads", "repeats", "load_1min")))
        print(HEADER, flush=True)
    try:
        if arguments.only:
            rows = run_case(arguments.only, arguments.repeats)
        else:
            rows = [row for name in CASES for row in run_case_apart(name, arguments)]
    except BackendError as error:
        print(f"cpu_kernels: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        report = {"schema": 1, "metadata": about, "results": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(row.verified for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
