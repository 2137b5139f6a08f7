"""A family in a process of its own, forked from one that has imported everything and run nothing.

What earlier cases left of the heap changes how long a case takes (large tensors land in holes instead of fresh pages),
so the order of the families must not matter. For the same reason the C library's thresholds are set to what they grow
to by themselves in a program with large tensors: when they do depends on the order of its frees.

Importing torch and the families takes as long as many of them, so it is done once. The parent cannot be forked instead:
it has measured the machine, so it has threads, a grown heap and perhaps a GPU.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

from posemap_fast.bench.runner import Options, Outcome, run_family

__all__ = ["run_family_apart"]

_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}  # mallopt(3)
_IMPORTED = ["posemap_fast.bench.cli"]

_Run = Callable[[str, Options], Outcome]


def run_family_apart(name: str, options: Options, run: _Run = run_family) -> Outcome:
    """`run`, a function of a module, in a new process.

    A family that ends its process has failed; its rows so far are lost.
    """
    with tempfile.TemporaryDirectory() as folder:
        report, errors = Path(folder) / "rows.json", Path(folder) / "errors.txt"
        process = _context().Process(target=_report, args=(run, name, options, report, errors))
        process.start()
        try:
            process.join()
        except BaseException:  # interrupted: it would be waited for when this process ends
            process.kill()
            raise
        if report.exists():
            return Outcome(**json.loads(report.read_text(encoding="utf-8")))
        return Outcome([], [], [{"case": name, "reason": _reason(process.exitcode or 0, errors)}])


def _reason(exitcode: int, errors: Path) -> str:
    """Why a process ended: a signal, else the last line that it complained in."""
    if exitcode < 0:
        return f"ended by {signal.Signals(-exitcode).name}; the system's log may say why (memory?)"
    told = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines() if errors.exists() else []
    return (told or [f"exit code {exitcode}"])[-1]


@functools.cache
def _context() -> ForkServerContext:
    """With the server started, whose C library reads its thresholds when it starts."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(_IMPORTED)
    added = _MALLOC.keys() - os.environ.keys()  # the user's own settings win
    os.environ.update({key: _MALLOC[key] for key in added})
    try:
        forkserver.ensure_running()
    finally:
        for key in added:
            del os.environ[key]
    return found


def _report(run: _Run, name: str, options: Options, report: Path, errors: Path) -> None:
    """In the new process: rows into `report`, what libraries and Python complain of into `errors`."""
    with errors.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 2)
        outcome = run(name, options)
    temporary = report.with_suffix(".part")
    temporary.write_text(json.dumps(vars(outcome)), encoding="utf-8")
    temporary.replace(report)
