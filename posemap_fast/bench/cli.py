"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from posemap_fast.bench.apart import run_family_apart
from posemap_fast.bench.case import REPEATED, suite_names
from posemap_fast.bench.compare import changes, slower, with_baseline
from posemap_fast.bench.history import write_history
from posemap_fast.bench.machine import describe_machine
from posemap_fast.bench.passes import best_of
from posemap_fast.bench.report import print_changes, print_report
from posemap_fast.bench.runner import Options, Outcome
from posemap_fast.bench.schema import SCHEMA, problems, read_report
from posemap_fast.bench.suites import FAMILIES
from posemap_fast.errors import ConfigError, PosemapError
from posemap_fast.files import write_text

__all__ = ["main"]

_DESCRIPTION = """\
What it costs, against whom, and since when. Every case is verified against a reference before it is timed, and its
peers are timed in turn with it: read the ratio (speed over the peer's, more is better), not the milliseconds, across
machines. benchmarks/README.md says how to read and how to add a case.
"""
_EXAMPLE = """\
examples:
  python -m posemap_fast.bench --suite ops,render --json here.json
  python -m posemap_fast.bench --only 'hash_encode/*' --profile traces
  python -m posemap_fast.bench --suite all --baseline benchmarks/results/mine.json     # 1 when something is slower
  python -m posemap_fast.bench --compare old.json new.json
  python -m posemap_fast.bench --history benchmarks/results --plot history.svg

exit code: 0 all is well; 1 a wrong result, a case that failed, or one slower than the baseline allows; 2 bad input"""
_SMOKE = "smoke"
_CPU_PASSES = 3
_MINUTES = 14.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m posemap_fast.bench",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ", ".join(suite_names())
    parser.add_argument("--suite", default="all", metavar="A,B", help=f"all, smoke (all at tiny sizes), or of: {known}")
    parser.add_argument(
        "--only", default="*", metavar="PATTERN", help="cases whose name matches, such as 'composite/*'"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=0, help="of torch and of the kernels (default: all cores)")
    parser.add_argument("--seconds", type=float, default=1.0, help="per case, all sides together (default: 1)")
    parser.add_argument("--json", type=Path, metavar="F", help="write the report here")
    parser.add_argument(
        "--baseline", type=Path, metavar="F", help="an earlier report; exit code 1 when a case is slower"
    )
    parser.add_argument("--tolerance", type=float, default=0.15, help="share of speed that may be lost (default: 0.15)")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="also write a torch profiler trace of each case")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="compare two reports, run nothing"
    )
    parser.add_argument("--history", type=Path, metavar="DIR", help="plot the reports of a folder, run nothing")
    parser.add_argument("--plot", type=Path, default=Path("history.svg"), metavar="F", help="of --history (svg, png)")
    parser.add_argument("--list", action="store_true", help="print the families and what each measures, run nothing")
    repeated = ", ".join(sorted(REPEATED))
    parser.add_argument(
        "--passes",
        type=int,
        default=0,
        metavar="N",
        help=f"over {repeated}, in new processes; the best counts (default: {_CPU_PASSES}, 1 on GPUs)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=_MINUTES,
        metavar="M",
        help="further passes that would end later are left out (default: %(default)g)",
    )
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)  # tiny sizes of a suite
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks; the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options, Console() if sys.stdout.isatty() else Console(width=160))
    except PosemapError as error:
        print(f"posemap_fast.bench: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, console: Console) -> int:
    if options.list:
        for name in FAMILIES:
            family = FAMILIES.get(name)
            doc = getattr(family, "func", family).__doc__  # of a partial, that of the function
            console.print(f"{name}: {(doc or '').strip().splitlines()[0]}", markup=False, soft_wrap=True)
        return 0
    if options.compare:
        old, new = (read_report(path)["results"] for path in options.compare)
        print_changes(changes(new, old), options.tolerance, console)
        return 0
    if options.history:
        return _history(options, console)
    return _measure(options, _options(options), console)


def _history(options: argparse.Namespace, console: Console) -> int:
    paths = sorted(options.history.glob("*.json"))
    if not paths:
        raise ConfigError(f"--history {options.history}: no reports (*.json) there")
    write_history([read_report(path) for path in paths], options.plot)
    console.print(f"{len(paths)} reports: {options.plot}", markup=False)
    return 0


def _options(options: argparse.Namespace) -> Options:
    if min(options.threads, options.passes, options.minutes) < 0 or options.seconds <= 0:
        raise ConfigError("--threads, --passes and --minutes must be >= 0, --seconds > 0")
    if not 0 < options.tolerance < 1:
        raise ConfigError(f"--tolerance must be between 0 and 1; got {options.tolerance}")
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    is_smoke = options.smoke or options.suite == _SMOKE
    return Options(
        device=device,
        threads=options.threads or cores,
        seconds=options.seconds,
        is_smoke=is_smoke,
        only=options.only,
        profile=options.profile,
    )


def _n_passes(wanted: int, how: Options) -> int:
    """Over the suites and families that are repeated."""
    if how.is_smoke:
        return 1
    return wanted or (_CPU_PASSES if how.device == "cpu" else 1)


def _families(wanted: str) -> list[str]:
    """Names of the families of `--suite`."""
    if wanted in ("all", _SMOKE):
        return list(FAMILIES)
    chosen = wanted.split(",")
    for name in chosen:
        if name not in suite_names():
            raise ConfigError(f"--suite {name}: no such suite (known: all, smoke, {', '.join(suite_names())})")
    return [name for name in FAMILIES if name.split("/")[0] in chosen]


def _measure(options: argparse.Namespace, how: Options, console: Console) -> int:
    families = _families(options.suite)
    before = read_report(options.baseline)["results"] if options.baseline else []
    torch.set_num_threads(how.threads)
    about = describe_machine(how.device, how.threads, how.is_smoke)
    with tempfile.TemporaryDirectory(prefix="posemap_bench_") as work:
        n_passes, seconds = _n_passes(options.passes, how), 60 * options.minutes
        outcomes = _run_families(families, replace(how, work=Path(work)), n_passes, seconds)
    rows = [row for outcome in outcomes for row in outcome.rows]
    if not rows and how.only != "*":
        raise ConfigError(f"--only {how.only}: no such case in {', '.join(families)}")
    found = changes(rows, before)
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "metadata": about,
        "results": with_baseline(rows, found),
        "skipped": [entry for outcome in outcomes for entry in outcome.skipped],
        "failed": [entry for outcome in outcomes for entry in outcome.failed],
    }
    departures = problems(report)
    assert not departures, departures
    if options.json:
        write_text(options.json, json.dumps(report, indent=1) + "\n")
    print_report(report, console)
    lost = slower(found, options.tolerance)
    for change in lost:
        console.print(f"SLOWER: {change.case} ({change.peer or 'no peer'}): {change.ratio:.2f}x the baseline's speed")
    is_right = not report["failed"] and all(row["verified"] for row in rows)
    return 0 if is_right and not lost else 1


def _pass_over(name: str, how: Options, before: Outcome | None) -> Outcome:
    """The outcome of a family's first pass, or what another one makes of that of those before it."""
    if before is None:
        return run_family_apart(name, how)
    if not before.rows:
        return before
    found = run_family_apart(name, replace(how, is_verified=True, profile=None))
    return replace(before, rows=best_of(before.rows, found.rows), failed=before.failed + found.failed)


def _run_families(families: Sequence[str], how: Options, n_passes: int, seconds: float = math.inf) -> list[Outcome]:
    """One outcome per family: the best of the passes; further ones that would end after `seconds` are left out."""
    repeated = [name for name in families if {name, name.split("/")[0]} & REPEATED]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    outcomes: dict[str, Outcome] = {}
    took: dict[str, float] = {}
    n_left_out = 0
    begin = time.monotonic()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        jobs = [*families, *repeated * (n_passes - 1)]
        task = progress.add_task("", total=len(jobs))
        for name in jobs:
            progress.update(task, description=name)
            start = time.monotonic()
            if start - begin + took.get(name, 0.0) <= seconds or name not in outcomes:
                per_case = how.seconds / n_passes if name in repeated else how.seconds
                outcomes[name] = _pass_over(name, replace(how, seconds=per_case), outcomes.get(name))
                took[name] = time.monotonic() - start
                if outcomes[name].rows:  # else none of its cases is wanted, or can run here
                    progress.console.print(f"{took[name]:6.1f} s  {name}", highlight=False)
            else:
                n_left_out += 1
            progress.advance(task)
        if n_left_out:
            kept = f"{seconds / 60:g} minutes (--minutes)"
            progress.console.print(f"{n_left_out} further passes over a family left out: they would end after {kept}")
    return list(outcomes.values())
