"""Runs families, each in a process of its own, and makes the rows of the report.

What earlier cases left of the heap changes how long a case takes (large tensors land in holes instead of fresh pages),
so the order of the families must not matter. And whoever else uses the machine comes and goes in minutes: the families
of a suite are set up one after the other, and then timed in rounds, so that a case is timed at several moments.
"""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from posemap_fast.bench.case import FAMILIES, BenchContext, Comparison, Skipped
from posemap_fast.bench.timing import Race, Times, peak_memory_mib
from posemap_fast.errors import PosemapError

__all__ = ["Options", "Outcome", "run_families_apart", "run_family", "wait_for_parent"]

_STOP = "posemap_fast.bench: waiting"  # what a child says when it may go on


@dataclass(frozen=True)
class Options:
    """How families are run."""

    device: str
    threads: int
    seconds: float = 1.0  # per case, all sides together
    is_smoke: bool = False
    only: str = "*"  # pattern of case names
    profile: Path | None = None  # folder for traces of the torch profiler
    rounds: int = 1  # that the time of a case is divided into


@dataclass(frozen=True)
class Outcome:
    """What a family left."""

    rows: list[dict[str, Any]]
    skipped: list[dict[str, str]]  # case, reason: what is missing here
    failed: list[dict[str, str]]  # case, reason: what should have worked


@dataclass(frozen=True)
class _Verified:
    """A case that is ready to be timed, or not worth it."""

    case: Comparison
    common: dict[str, Any]  # of its rows
    memory: float | None = None  # of a run of ours, MiB
    race: Race | None = None  # None: it is wrong, or was measured before

    def rows(self) -> Iterator[dict[str, Any]]:
        """One per peer; one without a peer where there is none."""
        case = self.case
        if not self.common["verified"]:
            yield from (_blank(self.common, peer) for peer in case.peers or [""])
            return
        if self.race is None:
            assert case.measured_ms is not None
            times, peers = Times((case.measured_ms,)), dict[str, Times]()
        else:
            times, peers = self.race.times()
        seconds = times.median / 1e3
        common = self.common | {
            "value": times.median,
            "iqr": times.iqr,
            "p50": times.median,
            "p95": times.percentile(95),
            "p99": times.percentile(99),
            "repeats": len(times.ms),
            "peak_memory_mib": self.memory,
            "rate": case.work / seconds,
            "rate_unit": f"{case.work_unit}/s",
            "bytes_per_s": case.n_bytes / seconds or None,
            "flops_per_s": case.n_flops / seconds or None,
        }
        if not peers:
            yield _blank(common, "")
        for peer, theirs in peers.items():
            yield common | _of_peer(peer, theirs, times)


def run_family(name: str, options: Options, wait: Callable[[], object] = lambda: None) -> Outcome:
    """Verify and time the cases of one family in this process.

    Args:
        wait: called before every round.
    """
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    context = BenchContext(torch.device(options.device), options.is_smoke, options.only)
    ready: list[_Verified] = []
    outcome = Outcome([], [], [])
    try:
        for case in FAMILIES.get(name)(context):
            if isinstance(case, Skipped):
                outcome.skipped.append({"case": case.name, "reason": case.reason})
            elif context.wants(case.name):
                ready.append(_verify(case, context.device))
            gc.collect()
    except PosemapError as error:  # a missing library or compiler
        outcome.skipped.append({"case": name, "reason": str(error)})
    for _ in range(options.rounds):
        wait()
        for found in ready:
            if found.race is not None:
                repeats = 1 if options.is_smoke else found.case.min_repeats
                found.race.go(options.seconds, repeats, options.rounds)
    for found in ready:
        if options.profile is not None and found.race is not None:
            _profile(found.case, context.device, options.profile)
        outcome.rows.extend(row | {"family": name} for row in found.rows())
    return outcome


def _verify(case: Comparison, device: torch.device) -> _Verified:
    error = float(case.verify())
    is_right = error <= case.tolerance  # False for NaN
    common: dict[str, Any] = {
        "case": case.name,
        "unit": "ms",
        "verified": is_right,
        "error": error if math.isfinite(error) else None,
        "tolerance": case.tolerance,
        "notes": dict(case.notes),
    }
    if not is_right or case.measured_ms is not None:
        return _Verified(case, common)
    return _Verified(case, common, peak_memory_mib(case.run, device), Race(case.run, case.peers, device))


def _of_peer(peer: str, theirs: Times, ours: Times) -> dict[str, Any]:
    ratio = theirs.median / ours.median
    return {"peer": peer, "peer_value": theirs.median, "peer_iqr": theirs.iqr, "ratio_to_reference": ratio}


def _blank(common: dict[str, Any], peer: str) -> dict[str, Any]:
    missing = dict.fromkeys(
        "value iqr p50 p95 p99 repeats peak_memory_mib rate rate_unit bytes_per_s flops_per_s".split()
    )
    return missing | common | {"peer": peer, "peer_value": None, "peer_iqr": None, "ratio_to_reference": None}


def _profile(case: Comparison, device: torch.device, folder: Path) -> None:
    """A trace of one run, to be opened in chrome://tracing or Perfetto."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile(activities=kinds, record_shapes=True) as trace:
        case.run()
    trace.export_chrome_trace(str(folder / f"{case.name.replace('/', '_')}.json"))


def run_families_apart(
    names: Sequence[str], options: Options, report: Callable[[str], object] = lambda name: None
) -> list[Outcome]:
    """`run_family` for each, in new processes; those of a suite are timed in turn when there are several rounds.

    A family that ends its process has failed; its rows so far are lost.

    Args:
        report: called with the name of a family when it is set up, and after each of its rounds.
    """
    outcomes: list[Outcome] = []
    groups = [list(group) for _, group in groupby(names, lambda name: name.split("/")[0])]
    for group in groups if options.rounds > 1 else [[name] for name in names]:
        with ExitStack() as stack:
            children = []
            for name in group:
                children.append(stack.enter_context(_Child(name, options)))
                children[-1].until_it_waits()
                report(name)
            for _ in range(options.rounds):
                for child in children:
                    child.go_on()
                    report(child.name)
            outcomes += [child.outcome() for child in children]
    return outcomes


class _Child:
    """A family in a process of its own, which waits before every round."""

    def __init__(self, name: str, options: Options):
        self.name, self._stack = name, ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._errors = self._stack.enter_context((self._folder / "errors").open("w"))
        command = [sys.executable, "-m", "posemap_fast.bench", "--family", name, "--rows", str(self._report)]
        command += ["--device", options.device, "--threads", str(options.threads), "--only", options.only]
        command += ["--seconds", str(options.seconds), "--rounds", str(options.rounds)]
        command += ["--smoke"] if options.is_smoke else []
        command += ["--profile", str(options.profile)] if options.profile else []
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=self._errors)
        self._process = self._stack.enter_context(process)

    @property
    def _report(self) -> Path:
        return self._folder / "rows.json"

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # when we are interrupted; else it has ended
        self._stack.close()

    def until_it_waits(self) -> None:
        """Return when it waits or has ended; whatever else it prints is dropped."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() == _STOP:
                return

    def go_on(self) -> None:
        """Let it do a round."""
        assert self._process.stdin is not None
        try:
            os.write(self._process.stdin.fileno(), b"\n")
        except BrokenPipeError:
            return  # it has ended: `outcome` says why
        self.until_it_waits()

    def outcome(self) -> Outcome:
        """Of a process that has done all its rounds, or has failed."""
        code = self._process.wait()
        if self._report.exists():
            return Outcome(**json.loads(self._report.read_text(encoding="utf-8")))
        lines = (self._folder / "errors").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return Outcome([], [], [{"case": self.name, "reason": (lines or [f"exit code {code}"])[-1]}])


def wait_for_parent() -> None:
    """What a child does before a round."""
    print(_STOP, flush=True)
    if not sys.stdin.readline():
        raise KeyboardInterrupt  # the parent is gone
