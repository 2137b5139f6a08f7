"""Families have processes of their own: all alike, with everything imported, and the end of one is told."""

from __future__ import annotations

import os
import sys

import pytest

from posemap_fast.bench import apart
from posemap_fast.bench.apart import run_family_apart
from posemap_fast.bench.runner import Options, Outcome

SMOKE = Options("cpu", 1, seconds=0.01, is_smoke=True)


def complains(name: str, options: Options) -> Outcome:
    print("warned before", file=sys.stderr)
    raise RuntimeError("out of luck")


def is_killed(name: str, options: Options) -> Outcome:
    os.kill(os.getpid(), 9)
    raise AssertionError


def tells(name: str, options: Options) -> Outcome:
    """Where it runs, and with what."""
    return Outcome([{"pid": os.getpid(), "has_cli": "posemap_fast.bench.cli" in sys.modules}], [], [])


def test_a_family_runs_with_its_options() -> None:
    outcome = run_family_apart("ops/sh_encode", Options("cpu", 1, 0.01, is_smoke=True, only="sh_encode/forward/*"))
    assert [row["case"] for row in outcome.rows] == ["sh_encode/forward/smoke"] and not outcome.failed


def test_a_family_that_ends_its_process_has_failed_and_says_why() -> None:
    assert run_family_apart("a", SMOKE, complains).failed == [{"case": "a", "reason": "RuntimeError: out of luck"}]
    assert run_family_apart("a", SMOKE, is_killed).failed == [{"case": "a", "reason": "exit code -9"}]


def test_processes_are_new_and_have_everything_imported() -> None:
    (one,), (two,) = (run_family_apart("a", SMOKE, tells).rows for _ in range(2))
    assert len({one["pid"], two["pid"], os.getpid()}) == 3 and one["has_cli"]


@pytest.mark.parametrize("own", [None, "65536"])
def test_they_start_with_fixed_thresholds_of_malloc_unless_the_user_has(own, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"
    seen: dict[str, str] = {}
    monkeypatch.delenv(first, raising=False)
    monkeypatch.delenv(second, raising=False)
    if own:
        monkeypatch.setenv(first, own)
    monkeypatch.setattr(apart.forkserver, "ensure_running", lambda: seen.update(os.environ))
    apart._context.__wrapped__()
    assert seen[first] == (own or str(32 << 20)) and seen[second] == str(64 << 20)
    assert os.environ.get(first) == own and second not in os.environ  # the parent keeps what it had
