"""Progress of long work, shown through an injected meter: a live bar on a terminal, plain lines elsewhere.

Library code takes a `ProgressMeter` and calls it; it never prints by itself. A meter only reads the numbers it is
given (no random numbers, no tensors kept), so the results of a run do not depend on which meter watches it.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

__all__ = [
    "NoProgress",
    "PlainProgress",
    "ProgressMeter",
    "ProgressTask",
    "RichProgress",
    "format_duration",
    "make_progress",
]

_REFRESH_S = 0.1  # at most ten redraws per second, however fast the steps are
_LINE_S = 10.0  # at most one plain line per this many seconds inside a stage


class ProgressTask(Protocol):
    """One stage under way."""

    def update(self, step: int, **values: Any) -> None:
        """Say that `step` steps are complete; `values` (losses, rates; numbers or short strings) are shown beside."""


class ProgressMeter(Protocol):
    """Shows stages: `with meter.task("stage 1: field", total=n, start=k) as task: task.update(step, loss=...)`."""

    def task(self, name: str, total: int, start: int = 0) -> AbstractContextManager[ProgressTask]:
        """Open a stage of `total` steps, of which `start` were done by an earlier, interrupted run."""

    def note(self, text: str) -> None:
        """Show one line of text; on a terminal it appears above the live bar."""


class NoProgress:
    """A meter that shows nothing; for tests, notebooks and `--quiet`."""

    @contextlib.contextmanager
    def task(self, name: str, total: int, start: int = 0) -> Iterator[ProgressTask]:
        yield _SilentTask()

    def note(self, text: str) -> None:
        pass


class _SilentTask:
    def update(self, step: int, **values: Any) -> None:
        pass


class PlainProgress:
    """Plain lines for logs and pipes: one at the start and the end of a stage, at most one per `interval_s` between.

    Args:
        stream: text stream that takes the lines; None is the current `sys.stderr`.
        interval_s: least time between two lines of one stage, in seconds.
        clock: seconds since any fixed moment; replaced in tests.
    """

    def __init__(
        self, stream: TextIO | None = None, interval_s: float = _LINE_S, clock: Callable[[], float] = time.monotonic
    ):
        self._stream = stream
        self._interval_s = interval_s
        self._clock = clock

    @contextlib.contextmanager
    def task(self, name: str, total: int, start: int = 0) -> Iterator[ProgressTask]:
        self.note(f"{name}: resumed at step {start} of {total}" if start else f"{name}: {total} steps")
        task = _PlainTask(self, name, total, start)
        try:
            yield task
        except BaseException as error:
            self.note(f"{name}: stopped at step {task.step}/{total} ({type(error).__name__})")
            raise
        self.note(f"{name}: done in {format_duration(self._clock() - task.began)}{_listing(task.values)}")

    def note(self, text: str) -> None:
        print(text, file=self._stream if self._stream is not None else sys.stderr, flush=True)

    def now(self) -> float:
        return self._clock()

    def is_due(self, since: float) -> bool:
        return self._clock() - since >= self._interval_s


class _PlainTask:
    def __init__(self, meter: PlainProgress, name: str, total: int, start: int):
        self._meter, self._name, self._total, self._start = meter, name, total, start
        self.step = start
        self.values: dict[str, Any] = {}
        self.began = self._last_line = meter.now()

    def update(self, step: int, **values: Any) -> None:
        self.step = step
        self.values.update(values)
        if not self._meter.is_due(self._last_line):
            return
        self._last_line = self._meter.now()
        elapsed = self._last_line - self.began
        left = _time_left(elapsed, step - self._start, self._total - step)
        times = f", {format_duration(elapsed)} elapsed, {left} left"
        self._meter.note(f"{self._name}: {step}/{self._total}{_listing(self.values)}{times}")


class RichProgress:
    """A live bar: stage, step/total, losses and rates, elapsed time, time left. Finished stages stay on screen.

    Args:
        console: where to draw; None is a console on stderr.
    """

    def __init__(self, console: Console | None = None):
        self._console = console if console is not None else Console(stderr=True)

    @contextlib.contextmanager
    def task(self, name: str, total: int, start: int = 0) -> Iterator[ProgressTask]:
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[cyan]{task.fields[left]} left"),
            TextColumn("{task.fields[listing]}"),
        )
        with Progress(*columns, console=self._console, refresh_per_second=4) as bar:
            task = _RichTask(bar, bar.add_task(name, total=total, completed=start, left="?", listing=""), total, start)
            try:
                yield task
            finally:
                task.show()

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class _RichTask:
    def __init__(self, bar: Progress, task_id: TaskID, total: int, start: int):
        self._bar, self._id, self._total, self._start = bar, task_id, total, start
        self._step = start
        self._values: dict[str, Any] = {}
        self._began = time.monotonic()
        self._last_shown = float("-inf")

    def update(self, step: int, **values: Any) -> None:
        self._step = step
        self._values.update(values)
        if time.monotonic() - self._last_shown >= _REFRESH_S:
            self.show()

    def show(self) -> None:
        """Hand the newest numbers to the bar."""
        self._last_shown = time.monotonic()
        left = _time_left(self._last_shown - self._began, self._step - self._start, self._total - self._step)
        self._bar.update(self._id, completed=self._step, left=left, listing=_listing(self._values).removeprefix(", "))


def make_progress(quiet: bool = False) -> ProgressMeter:
    """The meter for a command: none if `quiet`, a live bar if stderr or stdout is a terminal, else plain lines."""
    if quiet:
        return NoProgress()
    if _is_terminal(sys.stderr):
        return RichProgress(Console(stderr=True))
    if _is_terminal(sys.stdout):
        return RichProgress(Console())
    return PlainProgress()


def format_duration(seconds: float) -> str:
    """Seconds as a short text: `4.2 s`, `3:07 min`, `1:02:05 h`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def _time_left(elapsed: float, n_done: int, n_left: int) -> str:
    """Remaining time at the mean pace of this run; `?` before the first step."""
    return format_duration(elapsed / n_done * max(n_left, 0)) if n_done > 0 else "?"


def _listing(values: dict[str, Any]) -> str:
    """`, loss 0.0123, rate 1.2e+06`; strings are shown as they are."""
    parts = (
        f", {name} {value if isinstance(value, str) else format(float(value), '.4g')}" for name, value in values.items()
    )
    return "".join(parts)
