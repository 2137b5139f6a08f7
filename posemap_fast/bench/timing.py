"""Clocks: alternating timed runs of our side and of its peers, their percentiles, and peak memory."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

__all__ = ["Times", "peak_memory_mib", "time_by_turns"]

_MAX_ROUNDS = 100
_MAX_PER_ROUND = 10  # runs of a fast side for each run of a slow one
_SLOW_ROUND_MS, _MIN_SLOW_ROUNDS = 1500.0, 3
_MAX_PER_SLOW_ROUND, _SLOW_SHARE_MS = 3, 1000.0  # of a side
_VERY_SLOW_ROUND_MS, _MIN_VERY_SLOW_ROUNDS = 4000.0, 2
_WARM_MS = 1000.0  # a run as long as this needs no other to warm up


@dataclass(frozen=True)
class Times:
    """Milliseconds of the runs of one side."""

    ms: tuple[float, ...]

    def percentile(self, share: float) -> float:
        """Linear interpolation between the runs; share in percent."""
        return float(np.percentile(self.ms, share))

    @property
    def median(self) -> float:
        """In ms."""
        return self.percentile(50)

    @property
    def iqr(self) -> float:
        """Inter-quartile range, ms."""
        return self.percentile(75) - self.percentile(25)


def time_by_turns(
    run: Callable[[], object],
    peers: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float,
    min_repeats: int,
) -> tuple[Times, dict[str, Times]]:
    """Time our side and every peer in turn, so that a change of the machine's load meets all of them.

    Every side runs twice to warm up, once where that takes a second. A side that is much faster than the slowest runs
    up to ten times per turn, so that its median is as good as the other. Where a turn is slow it runs up to three times
    within a second, and on a CPU the last run of each side's warming up is the first turn.

    Args:
        seconds: to spend, all sides together; `min_repeats` turns are made in any case, three where one is slow, two
            where one takes four seconds.
    """
    sides = [run, *peers.values()]
    clock = _cuda_ms if device.type == "cuda" else _host_ms
    first = [clock(side) for side in sides]
    last = [ms if ms >= _WARM_MS else clock(side) for ms, side in zip(first, sides, strict=True)]
    first = [min(pair) for pair in zip(first, last, strict=True)]
    found: list[list[float]] = [[] for _ in sides]
    per_turn = [_fit(max(first), ms, _MAX_PER_ROUND) for ms in first]
    if sum(n * ms for n, ms in zip(per_turn, first, strict=True)) > _SLOW_ROUND_MS:
        per_turn = [
            min(n, _fit(_SLOW_SHARE_MS, ms, _MAX_PER_SLOW_ROUND)) for n, ms in zip(per_turn, first, strict=True)
        ]
        min_repeats = min(min_repeats, _MIN_VERY_SLOW_ROUNDS if sum(first) > _VERY_SLOW_ROUND_MS else _MIN_SLOW_ROUNDS)
        if device.type != "cuda":  # there a first run may be long because it loads kernels
            found = [[ms] for ms in last]
    end = time.perf_counter() + seconds
    gc.collect()
    for turn in range(int(any(found)), _MAX_ROUNDS):
        if turn >= min_repeats and time.perf_counter() >= end:
            break
        for side, values, n in zip(sides, found, per_turn, strict=True):
            values.extend(clock(side) for _ in range(n))
    ours, *theirs = (Times(tuple(times)) for times in found)
    return ours, dict(zip(peers, theirs, strict=True))


def _fit(limit_ms: float, ms: float, most: int) -> int:
    """Runs of `ms` in a time, one at least."""
    return int(min(most, max(1, limit_ms // max(ms, 1e-3))))


def _host_ms(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begin)


def _cuda_ms(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def peak_memory_mib(run: Callable[[], object], device: torch.device) -> float | None:
    """Memory that one run needs above what is held before it; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - held) / 2**20
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # else the run would live in what earlier ones left of the heap
        clear.write_text("5")  # resets VmHWM to VmRSS (man 5 proc)
        before = _status_kib(status, "VmRSS")
        run()
        return max(0.0, _status_kib(status, "VmHWM") - before) / 1024
    except (OSError, ValueError, AttributeError):  # not Linux, or another C library
        return None


def _status_kib(path: Path, key: str) -> float:
    lines: Sequence[str] = path.read_text(encoding="ascii").splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(key + ":")))
