"""Meters: what they print, how often, and that a stage that fails still fails."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from posemap_fast.progress import NoProgress, PlainProgress, RichProgress, format_duration, make_progress


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_plain_lines_come_at_the_ends_and_every_ten_seconds_between() -> None:
    stream, clock = io.StringIO(), Clock()
    with PlainProgress(stream, clock=clock).task("stage 1: field", total=100) as task:
        for step in range(1, 101):
            clock.seconds += 0.25
            task.update(step, loss=1 / step, rate="2 M rays/s")
    assert stream.getvalue().splitlines() == [
        "stage 1: field: 100 steps",
        "stage 1: field: 40/100, loss 0.025, rate 2 M rays/s, 10.0 s elapsed, 15.0 s left",
        "stage 1: field: 80/100, loss 0.0125, rate 2 M rays/s, 20.0 s elapsed, 5.0 s left",
        "stage 1: field: done in 25.0 s, loss 0.01, rate 2 M rays/s",
    ]


def test_a_resumed_stage_counts_time_left_from_its_own_pace() -> None:
    stream, clock = io.StringIO(), Clock()
    with PlainProgress(stream, clock=clock).task("apr", total=100, start=90) as task:
        clock.seconds += 10
        task.update(95)
    first, second, _ = stream.getvalue().splitlines()
    assert first == "apr: resumed at step 90 of 100"
    assert second == "apr: 95/100, 10.0 s elapsed, 10.0 s left"


def test_a_failing_stage_says_where_it_stopped_and_raises_on() -> None:
    stream = io.StringIO()
    with pytest.raises(ValueError, match="boom"), PlainProgress(stream).task("apr", total=9) as task:
        task.update(4)
        raise ValueError("boom")
    assert stream.getvalue().splitlines()[-1] == "apr: stopped at step 4/9 (ValueError)"


def test_the_live_bar_shows_name_steps_and_numbers_also_when_markup_is_in_a_note() -> None:
    stream = io.StringIO()
    meter = RichProgress(Console(file=stream, force_terminal=True, width=160))
    with meter.task("stage 2", total=10, start=3) as task:
        task.update(10, loss=0.5)
        meter.note("kept [as is]")
    text = stream.getvalue()
    assert "stage 2" in text
    assert "10/10" in text
    assert "loss 0.5" in text
    assert "kept [as is]" in text


def test_the_silent_meter_takes_everything_and_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    meter = NoProgress()
    with meter.task("x", total=1) as task:
        task.update(1, loss=1.0)
    meter.note("x")
    assert capsys.readouterr() == ("", "")


def test_the_meter_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert isinstance(make_progress(quiet=True), NoProgress)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert isinstance(make_progress(), PlainProgress)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert isinstance(make_progress(), RichProgress)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert isinstance(make_progress(), RichProgress)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (4.21, "4.2 s"), (187.4, "3:07 min"), (3725, "1:02:05 h"), (3599.9, "1:00:00 h")],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
