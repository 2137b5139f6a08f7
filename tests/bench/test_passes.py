"""Passes over the short cases: each side's best counts, what is verified once is not verified again."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from posemap_fast.bench import cli, timing
from posemap_fast.bench.case import FAMILIES, REPEATED, BenchContext, Comparison, suite_names
from posemap_fast.bench.passes import best_of
from posemap_fast.bench.runner import Options, Outcome, run_family
from posemap_fast.bench.schema import read_report
from posemap_fast.bench.timing import time_by_turns
from posemap_fast.registry import Registry


def row(value: float | None, peer_value: float | None, case: str = "a", **fields: Any) -> dict[str, Any]:
    """A row of a report; rates follow from the value."""
    found = {"case": case, "peer": "them", "verified": True, "repeats": 5, "iqr": 0.1, "peer_iqr": 0.2}
    found |= {"value": value, "p50": value, "p95": value, "p99": value, "bytes_per_s": None, "flops_per_s": None}
    found |= {"peer_value": peer_value, "rate": value and 1 / value, "ratio_to_reference": None, "error": 1e-7}
    return found | fields


def test_each_side_has_its_best_pass() -> None:
    (found,) = best_of([row(2.0, 10.0)], [row(3.0, 8.0, iqr=0.5, peer_iqr=0.7, error=0.0)])
    assert (found["value"], found["iqr"], found["rate"]) == (2.0, 0.1, 0.5)
    assert (found["peer_value"], found["peer_iqr"]) == (8.0, 0.7)
    assert found["ratio_to_reference"] == 4.0 and found["repeats"] == 10 and found["error"] == 1e-7
    (found,) = best_of([row(2.0, 10.0)], [row(1.0, 12.0, iqr=0.5)])
    assert (found["value"], found["iqr"], found["rate"], found["ratio_to_reference"]) == (1.0, 0.5, 1.0, 10.0)


def test_what_was_wrong_or_is_not_there_stays_as_it_was() -> None:
    wrong = row(None, None, verified=False, repeats=None)
    alone = row(2.0, None, case="alone", peer="")
    other = row(7.0, 9.0, case="other")
    again = [row(1.0, 5.0), row(1.5, None, case="alone", peer=""), row(1.0, 1.0, case="unknown")]
    found = best_of([wrong, alone, other], again)
    assert found[0] == wrong and found[2] == other and len(found) == 3
    assert found[1]["value"] == 1.5 and found[1]["ratio_to_reference"] is None


@pytest.mark.parametrize(("words", "n_passes"), [(["--passes", "2"], 2), ([], 3), (["--smoke"], 1)])
@pytest.mark.parametrize("repeated", ["mine", "mine/a"])
def test_the_passes_are_timed_and_only_the_first_is_verified(
    words: list[str], n_passes: int, repeated: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = {"verify": 0, "run": 0}

    def count(name: str) -> float:
        calls[name] += 1
        return 0.0

    families: Registry = Registry("benchmark")
    for suite in ("mine", "yours"):
        case = Comparison(suite, lambda: count("run"), lambda: count("verify"), 0.0, min_repeats=1)
        families.register(f"{suite}/a")(lambda context, case=case: iter([case]))
    for module in ("cli", "runner", "case"):
        monkeypatch.setattr(f"posemap_fast.bench.{module}.FAMILIES", families)
    runs: list[tuple[str, bool, float]] = []

    def here(name: str, how: Options):
        runs.append((name, how.is_verified, how.seconds))
        return run_family(name, how)

    describe = cli.describe_machine
    monkeypatch.setattr(cli, "describe_machine", lambda device, threads, is_smoke: describe(device, threads, True))
    monkeypatch.setattr(cli, "run_family_apart", here)
    monkeypatch.setattr(cli, "REPEATED", {repeated})
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    file = tmp_path / "report.json"
    arguments = ["--device", "cpu", "--threads", "1", "--seconds", "0.003", "--json", str(file), *words]
    assert cli.main(arguments) == 0
    assert [name for name, *_ in runs] == ["mine/a", "yours/a"] + ["mine/a"] * (n_passes - 1)
    assert [verified for _, verified, _ in runs] == [False, False] + [True] * (n_passes - 1)
    assert runs[0][2] == pytest.approx(0.003 / n_passes) and runs[1][2] == 0.003
    assert calls["verify"] == 2
    mine = next(r for r in read_report(file)["results"] if r["family"] == "mine/a")
    assert mine["verified"] and mine["repeats"] >= n_passes


def test_what_has_further_passes_is_a_suite_or_a_family() -> None:
    assert {*suite_names(), *FAMILIES} >= REPEATED != set()


def test_a_pass_that_fails_is_told_and_what_cannot_run_is_not_tried_again(monkeypatch) -> None:
    tried: list[str] = []

    def run(name: str, how: Options) -> Outcome:
        tried.append(name)
        if name == "ops/missing":
            return Outcome([], [{"case": name, "reason": "no compiler"}], [])
        again = [{"case": name, "reason": "killed"}] if how.is_verified else []
        return Outcome([] if again else [row(2.0, 10.0)], [], again)

    monkeypatch.setattr(cli, "run_family_apart", run)
    mended, missing = cli._run_families(["ops/a", "ops/missing"], Options("cpu", 1), 2)
    assert tried == ["ops/a", "ops/missing", "ops/a"]
    assert mended.rows == [row(2.0, 10.0)] and mended.failed == [{"case": "ops/a", "reason": "killed"}]
    assert missing.skipped[0]["reason"] == "no compiler"


def test_further_passes_that_would_end_too_late_are_left_out_and_told(monkeypatch, capsys) -> None:
    tried: list[str] = []
    clock = itertools.count(step=10.0)  # ten seconds from one look to the next

    def run(name: str, how: Options) -> Outcome:
        tried.append(name)
        return Outcome([row(2.0, 10.0)], [], [])

    monkeypatch.setattr(cli, "run_family_apart", run)
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(clock))
    cli._run_families(["ops/a", "ops/b", "train/a"], Options("cpu", 1), 3, seconds=85.0)
    assert tried == ["ops/a", "ops/b", "train/a", "ops/a"]  # begun 70 s after the start; the next would end at 100
    told = capsys.readouterr().err
    assert "3 further passes" in told and told.count("10.0 s  ops/a") == 2
    tried.clear()
    cli._run_families(["ops/a", "train/a"], Options("cpu", 1), 2, seconds=0.0)
    assert tried == ["ops/a", "train/a"]  # the first pass is always made


def test_what_a_family_keeps_is_there_for_the_others_of_a_run(tmp_path: Path) -> None:
    with BenchContext(torch.device("cpu"), work=tmp_path).kept("train/room") as folder:
        (folder / "map").write_text("trained")
    with BenchContext(torch.device("cpu"), work=tmp_path).kept("train/room") as folder:
        assert (folder / "map").read_text() == "trained"
    with BenchContext(torch.device("cpu")).kept("train/room") as alone:
        assert not list(alone.iterdir())
    assert not alone.exists()


def test_a_run_of_more_than_a_second_needs_no_warming_up(monkeypatch) -> None:
    taken = iter([2000.0, 5.0, 4.0] + [1900.0, 6.0, 6.0, 6.0] * 2)
    monkeypatch.setattr(timing, "_host_ms", lambda run: next(taken))
    slow, others = time_by_turns(lambda: None, {"fast": lambda: None}, torch.device("cpu"), seconds=0.01, min_repeats=5)
    assert slow.ms == (2000.0, 1900.0, 1900.0)
    assert others["fast"].ms == (4.0,) + (6.0,) * 6  # three runs in a long turn, the first of all to warm up


def test_a_turn_of_seconds_comes_twice_and_sides_of_nearly_a_second_run_once_in_it(monkeypatch) -> None:
    times = {"ours": 50.0, "slow": 3600.0, "tuned": 900.0}
    monkeypatch.setattr(timing, "_host_ms", lambda run: times[run()])
    peers = {name: lambda name=name: name for name in ("slow", "tuned")}
    ours, others = time_by_turns(lambda: "ours", peers, torch.device("cpu"), seconds=0.0, min_repeats=5)
    assert (len(ours.ms), len(others["slow"].ms), len(others["tuned"].ms)) == (4, 2, 2)


def test_every_side_has_a_time_when_the_first_run_has_used_up_the_time(monkeypatch) -> None:
    taken = iter([2000.0, 5.0, 4.0] + [1900.0, 6.0, 6.0, 6.0] * 2)
    monkeypatch.setattr(timing, "_host_ms", lambda run: next(taken))
    slow, others = time_by_turns(lambda: None, {"fast": lambda: None}, torch.device("cpu"), seconds=0, min_repeats=1)
    assert slow.ms == (2000.0,) and others["fast"].ms == (4.0,)
