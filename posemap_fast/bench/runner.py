"""Runs a family in this process, and makes the rows of the report."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posemap_fast.bench.case import FAMILIES, BenchContext, Comparison, Skipped
from posemap_fast.bench.timing import Times, peak_memory_mib, time_by_turns
from posemap_fast.errors import PosemapError

__all__ = ["Options", "Outcome", "run_family"]

_FURTHER_REPEATS = 3  # timed runs per side, at least, in a pass that is not the first


@dataclass(frozen=True)
class Options:
    """How families are run."""

    device: str
    threads: int
    seconds: float = 1.0  # per case, all sides together
    is_smoke: bool = False
    only: str = "*"  # pattern of case names
    is_verified: bool = False  # an earlier pass has done it
    profile: Path | None = None  # folder for traces of the torch profiler
    work: Path | None = None  # as of BenchContext


@dataclass(frozen=True)
class Outcome:
    """What a family left."""

    rows: list[dict[str, Any]]
    skipped: list[dict[str, str]]  # case, reason: what is missing here
    failed: list[dict[str, str]]  # case, reason: what should have worked


def run_family(name: str, options: Options) -> Outcome:
    """Verify and time the cases of one family in this process."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    context = BenchContext(torch.device(options.device), options.is_smoke, options.only, options.work)
    outcome = Outcome([], [], [])
    try:
        for case in FAMILIES.get(name)(context):
            if isinstance(case, Skipped):
                outcome.skipped.append({"case": case.name, "reason": case.reason})
            elif context.wants(case.name):
                outcome.rows.extend(row | {"family": name} for row in _rows(case, context, options))
            del case
            gc.collect()
    except PosemapError as error:  # a missing library or compiler
        outcome.skipped.append({"case": name, "reason": str(error)})
    return outcome


def _rows(case: Comparison, context: BenchContext, options: Options) -> Iterator[dict[str, Any]]:
    """One row per peer; one without a peer where there is none."""
    error = 0.0 if options.is_verified else float(case.verify())
    is_right = error <= case.tolerance  # False for NaN
    common: dict[str, Any] = {
        "case": case.name,
        "unit": "ms",
        "verified": is_right,
        "error": error if math.isfinite(error) else None,
        "tolerance": case.tolerance,
        "notes": dict(case.notes),
    }
    if not is_right:
        yield from (_blank(common, peer) for peer in [*case.peers, *case.measured_peers_ms] or [""])
        return
    times, peers, memory = _measure(case, context.device, options)
    seconds = times.median / 1e3
    common |= {
        "value": times.median,
        "iqr": times.iqr,
        "p50": times.median,
        "p95": times.percentile(95),
        "p99": times.percentile(99),
        "repeats": len(times.ms),
        "peak_memory_mib": memory,
        "rate": case.work / seconds,
        "rate_unit": f"{case.work_unit}/s",
        "bytes_per_s": case.n_bytes / seconds or None,
        "flops_per_s": case.n_flops / seconds or None,
    }
    if not peers:
        yield _blank(common, "")
    for peer, theirs in peers.items():
        yield common | _of_peer(peer, theirs, times)


def _measure(case: Comparison, device: torch.device, options: Options) -> tuple[Times, dict[str, Times], float | None]:
    """Times of our side and of the peers, and the memory of our side."""
    if case.measured_ms is not None:
        return Times((case.measured_ms,)), {name: Times((ms,)) for name, ms in case.measured_peers_ms.items()}, None
    memory = None if options.is_verified else peak_memory_mib(case.run, device)
    repeats = 1 if options.is_smoke else case.min_repeats
    if options.is_verified:  # a further pass
        repeats = min(repeats, _FURTHER_REPEATS)
    times, peers = time_by_turns(case.run, case.peers, device, seconds=options.seconds, min_repeats=repeats)
    if options.profile is not None:
        _profile(case, device, options.profile)
    return times, peers, memory


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
