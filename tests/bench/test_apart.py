"""Families have processes of their own: all alike, with everything imported, and the end of one is told."""

from __future__ import annotations

import os
import signal
import sys
import time
from multiprocessing.process import BaseProcess

import pytest

from posemap_fast.bench import apart
from posemap_fast.bench.apart import run_family_apart
from posemap_fast.bench.runner import Options, Outcome

THRESHOLDS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
SMOKE = Options("cpu", 1, seconds=0.01, is_smoke=True)


def complains(name: str, options: Options) -> Outcome:
    print("warned before", file=sys.stderr)
    raise RuntimeError("out of luck")


def is_killed(name: str, options: Options) -> Outcome:
    print("warned before", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def sleeps(name: str, options: Options) -> Outcome:
    time.sleep(600)
    return Outcome([], [], [])


def tells(name: str, options: Options) -> Outcome:
    """Where it runs, and with what."""
    found = {"pid": os.getpid(), "has_cli": "posemap_fast.bench.cli" in sys.modules}
    return Outcome([found | {key: os.environ.get(key) for key in THRESHOLDS}], [], [])


def test_a_family_runs_with_its_options() -> None:
    outcome = run_family_apart("ops/sh_encode", Options("cpu", 1, 0.01, is_smoke=True, only="sh_encode/forward/*"))
    assert [row["case"] for row in outcome.rows] == ["sh_encode/forward/smoke"] and not outcome.failed


def test_a_family_that_ends_its_process_has_failed_and_says_why() -> None:
    assert run_family_apart("a", SMOKE, complains).failed == [{"case": "a", "reason": "RuntimeError: out of luck"}]
    assert "ended by SIGKILL" in run_family_apart("a", SMOKE, is_killed).failed[0]["reason"]


def test_processes_are_new_and_have_everything_imported() -> None:
    (one,), (two,) = (run_family_apart("a", SMOKE, tells).rows for _ in range(2))
    assert len({one["pid"], two["pid"], os.getpid()}) == 3 and one["has_cli"]
    assert all(one[key] is not None and two[key] == one[key] for key in THRESHOLDS)


def test_an_interrupted_run_does_not_wait_for_its_family(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[BaseProcess] = []

    def interrupted(process: BaseProcess) -> None:
        started.append(process)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BaseProcess, "join", interrupted)
        run_family_apart("a", SMOKE, sleeps)
    started[0].join(timeout=30)
    assert started[0].exitcode == -signal.SIGKILL


@pytest.mark.parametrize("own", [None, "65536"])
def test_they_start_with_fixed_thresholds_of_malloc_unless_the_user_has(own, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = THRESHOLDS
    seen: dict[str, str] = {}
    monkeypatch.delenv(first, raising=False)
    monkeypatch.delenv(second, raising=False)
    if own:
        monkeypatch.setenv(first, own)
    monkeypatch.setattr(apart.forkserver, "ensure_running", lambda: seen.update(os.environ))
    apart._context.__wrapped__()
    assert seen[first] == (own or str(32 << 20)) and seen[second] == str(64 << 20)
    assert os.environ.get(first) == own and second not in os.environ  # the parent keeps what it had
