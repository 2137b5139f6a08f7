"""Runs families, each in a process of its own, and makes the rows of the report.

What earlier cases left of the heap changes how long a case takes (large tensors land in holes instead of fresh pages),
so the order of the cases must not matter.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posemap_fast.bench.case import FAMILIES, BenchContext, Comparison, Skipped
from posemap_fast.bench.timing import Times, peak_memory_mib, time_by_turns
from posemap_fast.errors import PosemapError

__all__ = ["Options", "Outcome", "run_family", "run_family_apart"]


@dataclass(frozen=True)
class Options:
    """How families are run."""

    device: str
    threads: int
    seconds: float = 1.0  # per case, all sides together
    is_smoke: bool = False
    only: str = "*"  # pattern of case names
    profile: Path | None = None  # folder for traces of the torch profiler


@dataclass(frozen=True)
class Outcome:
    """What a family left."""

    rows: list[dict[str, Any]]
    skipped: list[dict[str, str]]  # case, reason: what is missing here
    failed: list[dict[str, str]]  # case, reason: what should have worked


@dataclass
class _Record:
    """What is known of a case, which does not hold its inputs."""

    case: Comparison  # its figures; the callables do nothing
    error: float
    memory: float | None
    ours: Times
    peers: dict[str, Times]

    @property
    def is_right(self) -> bool:
        return self.error <= self.case.tolerance  # False for NaN


def run_family(name: str, options: Options) -> Outcome:
    """Verify and time the cases of one family in this process."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    context = BenchContext(torch.device(options.device), options.is_smoke, options.only)
    records: dict[str, _Record] = {}
    skipped: list[dict[str, str]] = []
    n_done, n_passes = 0, 1
    try:
        while n_done < n_passes:
            for case in FAMILIES.get(name)(context):
                if isinstance(case, Skipped):
                    if n_done == 0:
                        skipped.append({"case": case.name, "reason": case.reason})
                elif context.wants(case.name):
                    if n_done == 0:
                        records[case.name] = _verified(case, context.device, options)
                        n_passes = 1 if options.is_smoke else max(n_passes, case.passes)
                    _time(case, records[case.name], context.device, options)
                del case
                gc.collect()
            n_done += 1
    except PosemapError as error:  # a missing library or compiler
        skipped.append({"case": name, "reason": str(error)})
    complete = [record for record in records.values() if record.ours.ms or not record.is_right]
    return Outcome([row | {"family": name} for record in complete for row in _rows(record)], skipped, [])


def _verified(case: Comparison, device: torch.device, options: Options) -> _Record:
    """The error of a case; where it is small enough also the memory that it needs, and its trace if that is wanted."""
    figures = dataclasses.replace(case, run=_nothing, verify=_nothing, peers={})
    record = _Record(figures, float(case.verify()), None, Times(()), {peer: Times(()) for peer in case.peers})
    if record.is_right and case.measured_ms is None:
        record.memory = peak_memory_mib(case.run, device)
        if options.profile is not None:
            _profile(case, device, options.profile)
    return record


def _nothing() -> float:
    return 0.0


def _time(case: Comparison, record: _Record, device: torch.device, options: Options) -> None:
    """Add the times of one pass."""
    if not record.is_right:
        return
    if case.measured_ms is not None:
        record.ours = Times((case.measured_ms,))
        return
    repeats = 1 if options.is_smoke else math.ceil(case.min_repeats / case.passes)
    seconds = options.seconds / case.passes
    ours, peers = time_by_turns(case.run, case.peers, device, seconds=seconds, min_repeats=repeats)
    record.ours += ours
    record.peers = {peer: record.peers[peer] + times for peer, times in peers.items()}


def _rows(record: _Record) -> Iterator[dict[str, Any]]:
    """One row per peer; one without a peer where there is none."""
    case, times = record.case, record.ours
    common: dict[str, Any] = {
        "case": case.name,
        "unit": "ms",
        "verified": record.is_right,
        "error": record.error if math.isfinite(record.error) else None,
        "tolerance": case.tolerance,
        "notes": dict(case.notes),
    }
    if not record.is_right:
        yield from (_blank(common, peer) for peer in record.peers or [""])
        return
    seconds = times.median / 1e3
    common |= {
        "value": times.median,
        "iqr": times.iqr,
        "p50": times.median,
        "p95": times.percentile(95),
        "p99": times.percentile(99),
        "repeats": len(times.ms),
        "peak_memory_mib": record.memory,
        "rate": case.work / seconds,
        "rate_unit": f"{case.work_unit}/s",
        "bytes_per_s": case.n_bytes / seconds or None,
        "flops_per_s": case.n_flops / seconds or None,
    }
    if not record.peers:
        yield _blank(common, "")
    for peer, theirs in record.peers.items():
        yield common | _of_peer(peer, theirs, times)


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


def run_family_apart(name: str, options: Options) -> Outcome:
    """`run_family` in a new process.

    A family that ends its process has failed; its rows so far are lost.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "posemap_fast.bench", "--family", name, "--rows", str(report)]
        command += ["--device", options.device, "--threads", str(options.threads), "--only", options.only]
        command += ["--seconds", str(options.seconds), *(["--smoke"] if options.is_smoke else [])]
        command += ["--profile", str(options.profile)] if options.profile else []
        result = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
        if not report.exists():
            last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
            return Outcome([], [], [{"case": name, "reason": last}])
        return Outcome(**json.loads(report.read_text(encoding="utf-8")))
